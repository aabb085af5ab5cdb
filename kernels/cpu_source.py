"""C++ that a CPU's compiled operations share: vectors, maps that are read normalised, threads, moments, normalisation.

Feature maps are [N, H, W, C] in memory; T is their element type, L floats make a vector.
"""

from __future__ import annotations

VECTORS = r"""
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int L = 16;
#elif defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif
typedef float vec __attribute__((vector_size(4 * L)));
typedef int32_t ivec __attribute__((vector_size(4 * L)));
typedef uint32_t uvec __attribute__((vector_size(4 * L)));
typedef uint16_t hvec __attribute__((vector_size(2 * L)));

struct bf16 { uint16_t bits; };
typedef ELEMENT T;

static inline vec load(const float* p) { vec v; memcpy(&v, p, sizeof v); return v; }
static inline vec load(const bf16* p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}
static inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }
static inline void store(bf16* p, vec v) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
    const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
    uvec u = (uvec)v;
    u += 0x7fff + ((u >> 16) & 1);
    const hvec h = __builtin_convertvector(u >> 16, hvec);
#endif
    memcpy(p, &h, sizeof h);
}
// The same for the n <= L elements at the end of a row of channels.
template <class E> static inline vec load(const E* p, int n) {
    if (n == L) return load(p);
    E part[L];
    memset(part, 0, sizeof part);
    memcpy(part, p, n * sizeof(E));
    return load(part);
}
template <class E> static inline void store(E* p, vec v, int n) {
    if (n == L) return store(p, v);
    E part[L];
    store(part, v);
    memcpy(p, part, n * sizeof(E));
}

static inline vec exp_vec(vec x) {  // 2^k e^r with |r| <= ln 2 / 2, and a polynomial for e^r; within 2 ulp
    const vec zero = {};
    x = x < -87.3f ? zero - 87.3f : x;
    x = x > 88.3f ? zero + 88.3f : x;
    vec k = (x * 1.44269504f + 12582912.f) - 12582912.f;
    vec r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    vec e = zero + 1.9875691500e-4f;
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * (r * r) + r + 1.f;
    return e * (vec)((__builtin_convertvector(k, ivec) + 127) << 23);
}

enum { RAW, AFFINE, AFFINE_SILU };  // what is done to an element that is read

template <int ACT> static inline vec activated(vec v, const float* scale, const float* shift, int n) {
    if (ACT == RAW) return v;
    v = v * load(scale, n) + load(shift, n);
    return ACT == AFFINE ? v : v / (1.f + exp_vec(-v));
}

// The virtual concatenation [x, skip] with its normalisation not yet applied.
struct Map {
    const T *x, *skip;            // [N, H, W, C1], [N, H, W, C2]
    const float *scale, *shift;   // [N, C1 + C2]
    int64_t n, h, w, c1, c2;
    int64_t channels() const { return c1 + c2; }
};

template <int ACT, class E>
static inline void read(E* out, const T* x, int64_t c, const float* scale, const float* shift) {
    int64_t i = 0;
    for (; i + L <= c; i += L) store(out + i, activated<ACT>(load(x + i), scale + i, shift + i, L));
    if (i < c) store(out + i, activated<ACT>(load(x + i, c - i), scale + i, shift + i, c - i), c - i);
}

// Pixel p (of N H W) of the map, normalised and activated: out [C].
template <int ACT, class E> static inline void pixel(E* out, const Map& m, int64_t image, int64_t p) {
    const float *scale = nullptr, *shift = nullptr;
    if (ACT != RAW) scale = m.scale + image * m.channels(), shift = m.shift + image * m.channels();
    read<ACT>(out, m.x + p * m.c1, m.c1, scale, shift);
    if (!m.c2) return;
    if (ACT != RAW) scale += m.c1, shift += m.c1;
    read<ACT>(out + m.c1, m.skip + p * m.c2, m.c2, scale, shift);
}

// GOMP_parallel of the OpenMP that torch has loaded, so that both share one pool of threads; null: one thread.
typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
static Parallel parallel = nullptr;
extern "C" void use_threads(Parallel p) { parallel = p; }

template <class Run> struct Work {
    const Run& run;
    int64_t count;
    int threads;
    std::atomic<int> next;
    static void share(void* p) {
        Work& w = *(Work*)p;
        for (int i; (i = w.next++) < w.threads;) w.run(w.count * i / w.threads, w.count * (i + 1) / w.threads);
    }
};

// Calls run(first, last) for each thread's share of count items.
template <class Run> static void shared(int64_t count, int threads, const Run& run) {
    threads = (int)std::max<int64_t>(1, std::min<int64_t>(threads, count));
    if (!parallel || threads == 1) return run(0, count);
    Work<Run> work{run, count, threads, {0}};
    parallel(Work<Run>::share, &work, threads, 0);
}

// Sums about the first value seen, so that a large mean costs no digits.
struct Moments {
    std::vector<float> pivot, sum, squares;
    explicit Moments(int64_t c) : pivot(c), sum(c), squares(c) {}
    void start() {
        std::fill(sum.begin(), sum.end(), 0.f);
        std::fill(squares.begin(), squares.end(), 0.f);
    }
    void put(int64_t c, vec p, vec s, vec q) {
        store(&pivot[c], p);
        store(&sum[c], s);
        store(&squares[c], q);
    }
    void add(int64_t c, vec p, vec s, vec q) {
        store(&pivot[c], p);
        store(&sum[c], load(&sum[c]) + s);
        store(&squares[c], load(&squares[c]) + q);
    }
    void finish(float* out, int64_t c, double count) const {  // [2, C]: mean, centred sum of squares
        for (int64_t i = 0; i < c; i++) {
            out[i] = (float)(pivot[i] + sum[i] / count);
            out[c + i] = (float)std::max(0.0, squares[i] - (double)sum[i] * sum[i] / count);
        }
    }
};
"""

NORMALISATION = r"""
// Moments of V vectors of channels from i on, over `count` pixels.
template <int V> static inline void measure(Moments& m, const T* x, int64_t i, int64_t c, int64_t count, int lanes) {
    vec pivot[V], sum[V] = {}, squares[V] = {};
    for (int v = 0; v < V; v++) pivot[v] = load(x + i + v * L, lanes);
    for (int64_t p = 0; p < count; p++)
        for (int v = 0; v < V; v++) {
            const vec d = load(x + p * c + i + v * L, lanes) - pivot[v];
            sum[v] += d;
            squares[v] += d * d;
        }
    for (int v = 0; v < V; v++) m.put(i + v * L, pivot[v], sum[v], squares[v]);
}

// stats [N, ceil(H / rows), 2, C] of x: mean and centred sum of squares over each run of `rows` rows.
static void statistics(float* stats, const T* x, int64_t n, int64_t h, int64_t w, int64_t c, int64_t rows,
                       int threads) {
    const int64_t parts = (h + rows - 1) / rows, padded = (c + L - 1) / L * L;
    shared(n * parts, threads, [&](int64_t first, int64_t last) {
        Moments moments(padded);
        for (int64_t item = first; item < last; item++) {
            const int64_t image = item / parts, top = item % parts * rows, count = std::min(rows, h - top) * w;
            const T* start = x + (image * h + top) * w * c;
            int64_t i = 0;
            for (; i + 4 * L <= c; i += 4 * L) measure<4>(moments, start, i, c, count, L);
            for (; i < c; i += L) measure<1>(moments, start, i, c, count, (int)std::min<int64_t>(L, c - i));
            moments.finish(stats + item * 2 * c, c, (double)count);
        }
    });
}

// Statistics of one part of the concatenation: see `statistics`.
struct Stats {
    const float* values;
    int64_t c, rows;
};

// mean and variance of each channel of an image, from its parts (Chan et al. 1979).
static void merge(double* mean, double* variance, const Stats& s, int64_t image, int64_t h, int64_t w) {
    const int64_t parts = (h + s.rows - 1) / s.rows;
    const float* values = s.values + image * parts * 2 * s.c;
    auto share = [&](int64_t p) { return (double)std::min(s.rows, h - p * s.rows) / h; };
    std::fill(mean, mean + s.c, 0.0);
    std::fill(variance, variance + s.c, 0.0);
    for (int64_t p = 0; p < parts; p++)
        for (int64_t i = 0; i < s.c; i++) mean[i] += share(p) * values[p * 2 * s.c + i];
    for (int64_t p = 0; p < parts; p++)
        for (int64_t i = 0; i < s.c; i++) {
            const double d = values[p * 2 * s.c + i] - mean[i];
            variance[i] += values[(p * 2 + 1) * s.c + i] / (double)(h * w) + share(p) * d * d;
        }
}

// scale, shift [N, C]: group normalisation of [x, skip] + bias_row, then (1 + s) and + t of scale_shift [2 C], as one
// multiply-add a channel. Groups may straddle x and skip.
static void affine(float* scale, float* shift, Stats x, Stats skip, int64_t n, int64_t h, int64_t w, int64_t groups,
                   double eps, const float* weight, const float* bias, const float* bias_row, int64_t bias_stride,
                   const float* scale_shift, int64_t shift_stride, int threads) {
    const int64_t c = x.c + skip.c, size = c / groups;
    shared(n, threads, [&](int64_t first, int64_t last) {
        std::vector<double> moments(2 * c);
        double *mean = moments.data(), *m2 = mean + c;
        for (int64_t image = first; image < last; image++) {
            merge(mean, m2, x, image, h, w);
            if (skip.c) merge(mean + x.c, m2 + x.c, skip, image, h, w);
            const float* row = bias_row ? bias_row + image * bias_stride : nullptr;
            const float* film = scale_shift ? scale_shift + image * shift_stride : nullptr;
            for (int64_t i = 0; row && i < c; i++) mean[i] += row[i];
            for (int64_t start = 0; start < c; start += size) {
                double mu = 0, sum = 0;
                for (int64_t i = start; i < start + size; i++) mu += mean[i];
                mu /= size;
                for (int64_t i = start; i < start + size; i++) sum += m2[i] + (mean[i] - mu) * (mean[i] - mu);
                const double deviation = 1 / std::sqrt(sum / size + eps);
                for (int64_t i = start; i < start + size; i++) {
                    double a = deviation * (weight ? weight[i] : 1.f);
                    double b = (bias ? bias[i] : 0.f) - mu * a + (row ? a * row[i] : 0.0);
                    if (film) a *= 1.0 + film[i], b = b * (1.0 + film[i]) + film[c + i];
                    scale[image * c + i] = (float)a;
                    shift[image * c + i] = (float)b;
                }
            }
        }
    });
}

// y [N, H, W, C] = act(map) + residual.
template <int ACT> static void materialise(T* y, const Map& m, const T* residual, int threads) {
    const int64_t c = m.channels(), pixels = m.h * m.w;
    shared(m.n * pixels, threads, [&](int64_t first, int64_t last) {
        std::vector<float> wide(residual ? c : 0);
        for (int64_t p = first; p < last; p++) {
            if (!residual) {
                pixel<ACT>(y + p * c, m, p / pixels, p);
                continue;
            }
            pixel<ACT>(wide.data(), m, p / pixels, p);
            for (int64_t i = 0; i < c; i += L) {
                const int lanes = (int)std::min<int64_t>(L, c - i);
                store(y + p * c + i, load(wide.data() + i, lanes) + load(residual + p * c + i, lanes), lanes);
            }
        }
    });
}

static void norm_apply_act(T* y, const Map& m, int act, const T* residual, int threads) {
    if (act == RAW) materialise<RAW>(y, m, residual, threads);
    else if (act == AFFINE) materialise<AFFINE>(y, m, residual, threads);
    else materialise<AFFINE_SILU>(y, m, residual, threads);
}
"""
