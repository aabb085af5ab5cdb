"""The C++ around the products of Winograd convolutions: transforms, normalisation and statistics, in one pass each.

Compiled on the user's machine (ddpm_fast/compiled.py) for its instruction set, once for float and once for bf16;
no shape is built in. Written with the vector extensions that g++ and clang++ share, so the same source is AVX-512,
AVX2, SSE or NEON. Why not torch.compile: its pieces are specialised to shapes, and their first compilation took
60 to 110 s for one network and batch size; this takes seconds for all.
"""

from __future__ import annotations

from .cpu_source import NORMALISATION, VECTORS

TRANSFORMS = r"""
// One axis of a transform (Lavin and Gray 2016): PATCH inputs, STEP apart, to POSITIONS products, to OUT results.
struct F2 {  // F(2, 3)
    static constexpr int PATCH = 4, STEP = 2, POSITIONS = 4, OUT = 2;
    static inline void in(const vec* d, vec* v) {
        v[0] = d[0] - d[2];
        v[1] = d[1] + d[2];
        v[2] = d[2] - d[1];
        v[3] = d[1] - d[3];
    }
    static inline void out(const vec* m, vec* y) {
        y[0] = m[0] + m[1] + m[2];
        y[1] = m[1] - m[2] - m[3];
    }
};
struct F4 {  // F(4, 3)
    static constexpr int PATCH = 6, STEP = 4, POSITIONS = 6, OUT = 4;
    static inline void in(const vec* d, vec* v) {
        vec a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1], c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
        v[0] = 4.f * (d[0] - d[2]) + c;
        v[1] = a + b;
        v[2] = a - b;
        v[3] = c + e;
        v[4] = c - e;
        v[5] = 4.f * (d[1] - d[3]) + (d[5] - d[3]);
    }
    static inline void out(const vec* m, vec* y) {
        vec a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], e = m[3] - m[4];
        y[0] = m[0] + a + c;
        y[1] = b + 2.f * e;
        y[2] = a + 4.f * c;
        y[3] = b + 8.f * e + m[5];
    }
};
struct Up {  // nearest-neighbour upsampling and 3 taps, by differences
    static constexpr int PATCH = 3, STEP = 1, POSITIONS = 3, OUT = 2;
    static inline void in(const vec* d, vec* v) {
        v[0] = d[1];
        v[1] = d[1] - d[0];
        v[2] = d[2] - d[1];
    }
    static inline void out(const vec* m, vec* y) {
        y[0] = m[0] - m[1];
        y[1] = m[0] + m[2];
    }
};

template <class S> static void tiles_of(int64_t h, int64_t w, int64_t& th, int64_t& tw) {
    th = (h + S::STEP - 1) / S::STEP, tw = (w + S::STEP - 1) / S::STEP;
}

// v [rows tw, POSITIONS^2, cp]: the transformed patches of the map from row of tiles `begin` of the N th on, channels
// padded with zeros to cp.
template <class S, int ACT>
static void input(T* v, const Map& m, int64_t cp, int64_t begin, int64_t rows_of_tiles, int threads) {
    constexpr int A = S::PATCH, P = S::POSITIONS;
    int64_t th, tw;
    tiles_of<S>(m.h, m.w, th, tw);
    const int64_t width = (tw - 1) * S::STEP + A, length = width * cp;
    shared(rows_of_tiles, threads, [&](int64_t first, int64_t last) {
        std::vector<float> ring(A * length);  // the last A rows, with their zero padding: each is activated once
        int64_t done = 0;                     // rows of the image in the ring end here
        for (int64_t item = first; item < last; item++) {
            const int64_t image = (begin + item) / th, ty = (begin + item) % th, top = ty * S::STEP - 1;
            if (item == first || ty == 0) done = top;
            for (; done < top + A; done++) {
                float* row = ring.data() + (done + 1) % A * length;
                memset(row, 0, length * sizeof(float));
                if (done < 0 || done >= m.h) continue;
                for (int64_t x = 0; x < m.w; x++)
                    pixel<ACT>(row + (x + 1) * cp, m, image, (image * m.h + done) * m.w + x);
            }
            const float* rows[A];
            for (int i = 0; i < A; i++) rows[i] = ring.data() + (top + 1 + i) % A * length;
            for (int64_t tx = 0; tx < tw; tx++) {
                T* tile = v + (item * tw + tx) * P * P * cp;
                for (int64_t c = 0; c < cp; c += L) {
                    vec t[P][A], column[P], patch[A];
                    for (int j = 0; j < A; j++) {
                        for (int i = 0; i < A; i++) patch[i] = load(rows[i] + (tx * S::STEP + j) * cp + c);
                        S::in(patch, column);
                        for (int i = 0; i < P; i++) t[i][j] = column[i];
                    }
                    for (int i = 0; i < P; i++) {
                        S::in(t[i], column);
                        for (int j = 0; j < P; j++) store(tile + (i * P + j) * cp + c, column[j]);
                    }
                }
            }
        }
    });
}

struct Epilogue {
    const float* bias;     // [K] or null
    const float* time;     // [K] or [N, K] or null
    int64_t time_stride;   // 0 or K
    const T* residual;     // [N, H', W', K] or null
    float scale;
    float* stats;          // [N, th, 2, K] or null: mean and centred sum of squares over each row of tiles
};

// y [N, H', W', K] = scale * (A^T m A + bias + time + residual) of the products m [rows tw, POSITIONS^2, kp], which
// are those from row of tiles `begin` of the N th on.
template <class S>
static void output(T* y, const T* m, const Epilogue& e, int64_t h, int64_t w, int64_t k, int64_t kp, int64_t begin,
                   int64_t rows_of_tiles, int threads) {
    constexpr int P = S::POSITIONS, O = S::OUT;
    int64_t th, tw;
    tiles_of<S>(h, w, th, tw);
    const int64_t oh = h * O / S::STEP, ow = w * O / S::STEP;
    shared(rows_of_tiles, threads, [&](int64_t first, int64_t last) {
        std::vector<float> added(kp);
        Moments moments(e.stats ? kp : 0);
        for (int64_t item = first; item < last; item++) {
            const int64_t image = (begin + item) / th, ty = (begin + item) % th;
            for (int64_t c = 0; c < k; c++)
                added[c] = (e.bias ? e.bias[c] : 0.f) + (e.time ? e.time[image * e.time_stride + c] : 0.f);
            const int high = (int)std::min<int64_t>(O, oh - ty * O);
            if (e.stats) moments.start();
            for (int64_t tx = 0; tx < tw; tx++) {
                const int wide = (int)std::min<int64_t>(O, ow - tx * O);
                const T* tile = m + (item * tw + tx) * P * P * kp;
                const int64_t corner = ((image * oh + ty * O) * ow + tx * O) * k;
                auto channels = [&](int64_t c, int lanes, int high, int wide) {
                    vec t[O][P], column[P], result[O];
                    for (int j = 0; j < P; j++) {
                        for (int i = 0; i < P; i++) column[i] = load(tile + (i * P + j) * kp + c);
                        S::out(column, result);
                        for (int i = 0; i < O; i++) t[i][j] = result[i];
                    }
                    const vec add = load(added.data() + c);
                    vec pivot = {}, sum = {}, squares = {};
                    for (int i = 0; i < high; i++) {
                        S::out(t[i], result);
                        for (int j = 0; j < wide; j++) {
                            const int64_t at = corner + (i * ow + j) * k + c;
                            vec r = result[j] + add;
                            if (e.residual) r += load(e.residual + at, lanes);
                            r *= e.scale;
                            store(y + at, r, lanes);
                            if (!e.stats) continue;
                            if (i == 0 && j == 0) pivot = tx == 0 ? r : load(&moments.pivot[c]);
                            const vec d = r - pivot;
                            sum += d;
                            squares += d * d;
                        }
                    }
                    if (e.stats) moments.add(c, pivot, sum, squares);
                };
                int64_t c = 0;
                if (high == O && wide == O)
                    for (; c + L <= k; c += L) channels(c, L, O, O);  // what nearly all are: all loops unrolled
                for (; c < k; c += L) channels(c, (int)std::min<int64_t>(L, k - c), high, wide);
            }
            if (e.stats) moments.finish(e.stats + (begin + item) * 2 * k, k, (double)high * ow);
        }
    });
}
"""

ENTRIES = r"""
template <class S>
static void input_of(T* v, const Map& m, int act, int64_t cp, int64_t begin, int64_t rows, int threads) {
    if (act == RAW) input<S, RAW>(v, m, cp, begin, rows, threads);
    else if (act == AFFINE) input<S, AFFINE>(v, m, cp, begin, rows, threads);
    else input<S, AFFINE_SILU>(v, m, cp, begin, rows, threads);
}

enum { SCHEME_F2, SCHEME_F4, SCHEME_UP };

extern "C" {
void input_transform(int scheme, T* v, const T* x, const T* skip, const float* scale, const float* shift, int act,
                     int64_t n, int64_t h, int64_t w, int64_t c1, int64_t c2, int64_t cp, int64_t begin,
                     int64_t rows, int threads) {
    const Map m = {x, skip, scale, shift, n, h, w, c1, c2};
    if (scheme == SCHEME_F2) input_of<F2>(v, m, act, cp, begin, rows, threads);
    else if (scheme == SCHEME_F4) input_of<F4>(v, m, act, cp, begin, rows, threads);
    else input_of<Up>(v, m, act, cp, begin, rows, threads);
}

void output_transform(int scheme, T* y, const T* m, const float* bias, const float* time, int64_t time_stride,
                      const T* residual, float scale, float* stats,
                      int64_t h, int64_t w, int64_t k, int64_t kp, int64_t begin, int64_t rows, int threads) {
    const Epilogue e = {bias, time, time_stride, residual, scale, stats};
    if (scheme == SCHEME_F2) output<F2>(y, m, e, h, w, k, kp, begin, rows, threads);
    else if (scheme == SCHEME_F4) output<F4>(y, m, e, h, w, k, kp, begin, rows, threads);
    else output<Up>(y, m, e, h, w, k, kp, begin, rows, threads);
}

void channel_statistics(float* stats, const T* x, int64_t n, int64_t h, int64_t w, int64_t c, int64_t rows,
                        int threads) {
    statistics(stats, x, n, h, w, c, rows, threads);
}

void norm_affine(float* scale, float* shift, const float* x, int64_t c1, int64_t rows1, const float* skip, int64_t c2,
                 int64_t rows2, int64_t n, int64_t h, int64_t w, int64_t groups, double eps, const float* weight,
                 const float* bias, const float* bias_row, int64_t bias_stride, const float* scale_shift,
                 int64_t shift_stride, int threads) {
    affine(scale, shift, {x, c1, rows1}, {skip, c2, rows2}, n, h, w, groups, eps, weight, bias, bias_row, bias_stride,
           scale_shift, shift_stride, threads);
}

void norm_apply(T* y, const T* x, const T* skip, const float* scale, const float* shift, int act, const T* residual,
                int64_t n, int64_t h, int64_t w, int64_t c1, int64_t c2, int threads) {
    norm_apply_act(y, {x, skip, scale, shift, n, h, w, c1, c2}, act, residual, threads);
}
}
"""

SOURCE = "\n".join((VECTORS, TRANSFORMS, NORMALISATION, ENTRIES))
