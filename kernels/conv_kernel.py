"""Device code of the fused convolution: one implicit GEMM, and its epilogue.

Rows of the product are output channels k, columns are output pixels m, and the sum runs over slices of
BC channels under one tap: all taps of x, then those of the virtual concatenation's second part, then the
two parts of the 1x1 shortcut. Pixels are the columns because the second operand of a matrix instruction may
be a transposed view of shared memory, whatever its shape was before: so a box that a descriptor fetched is
multiplied where it lies. As first operand it would go through registers.

Slice order and BC follow from shape and dtype alone. Tiles of any height and width take an output
element through the same slices by instructions of the same depth (16 for half precision), in the same order;
so do the statistics (`_part_sums`). That keeps a sample's bits the same in any batch.
"""

from __future__ import annotations

from .launch import after_previous, constexpr, jit, tl

# How a slice of an input is fetched.
BOX = constexpr(0)  # descriptor [images, H, W, C]; the tap shifts the box, and what lies outside is zero
FLAT = constexpr(1)  # descriptor [pixels, C], for 1x1 products
HALVES = constexpr(2)  # descriptor [images, H / 2, 2, W / 2, 2 * C], for stride 2
GATHER = constexpr(3)  # masked pointers: any stride, size and channel count


@jit
def _fetch(
    source,  # descriptor of, or pointer to, [images, H, W, C]
    n, h, w,  # of each output pixel [BM] (GATHER), or of the tile's first (BOX, HALVES), in the input's grid
    m0,  # the tile's first pixel (FLAT)
    dy, dx, c0, images,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
    MODE: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # [BM, BC]  # fmt: skip
    """Channels c0 to c0 + BC of the input pixels under one tap."""
    if MODE == BOX:
        tile = tl.reshape(source.load([n, h + dy, w + dx, c0]), [BM, BC])
    elif MODE == FLAT:
        tile = source.load([m0, c0])
    elif MODE == HALVES:
        # h and w are even: >> and & split a coordinate, -1 included, into its pair and its half.
        tile = source.load([n, (h + dy) >> 1, (h + dy) & 1, (w + dx) >> 1, ((w + dx) & 1) * C + c0])
        tile = tl.reshape(tile, [BM, BC])
    else:
        row, column = h + dy, w + dx
        channel = c0 + tl.arange(0, BC)
        inside = (n < images) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        mask = inside[:, None]
        if C % BC != 0:
            mask = mask & (channel < C)[None, :]
        at = n.to(tl.int64) * (H * W * C) + (row * W + column) * C
        tile = tl.load(source + at[:, None] + channel[None, :], mask=mask, other=0.0)
    return tile


@jit
def accumulate(
    acc,  # float32 [BN, BM]
    source, weight,  # weight: descriptor of, or pointer to, [K, COLUMNS]
    column,  # of weight: tap 0, channel 0 of this source
    k0, n, h, w, m0, dy, dx, images,
    H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    COLUMNS: tl.constexpr,
    PER_TAP: tl.constexpr,  # columns a tap: the channels of all sources, each padded to a multiple of BC
    SIZE: tl.constexpr,  # taps an axis
    MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """acc + the sum over one source's taps and channels."""
    SLICES: tl.constexpr = (C + BC - 1) // BC
    for i in tl.range(0, SIZE * SIZE * SLICES):
        tap = i // SLICES
        c0 = (i % SLICES) * BC
        b = _fetch(source, n, h, w, m0, dy + tap // SIZE, dx + tap % SIZE, c0, images, H, W, C, MODE, BM, BC)
        at = column + tap * PER_TAP + c0
        if MODE == GATHER:
            k = k0 + tl.arange(0, BN)
            c = at + tl.arange(0, BC)
            if K % BN == 0:
                a = tl.load(weight + k[:, None] * COLUMNS + c[None, :])
            else:
                a = tl.load(weight + k[:, None] * COLUMNS + c[None, :], mask=(k < K)[:, None], other=0.0)
        else:
            a = weight.load([k0, at])
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee")
    return acc


@jit
def pixels(m0, images, ROWS: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr, BM: tl.constexpr):
    """Image, row, column and validity of a tile's pixels, each [BM]; an image takes ROWS >= MH * MW of M."""
    m = m0 + tl.arange(0, BM)
    p = m % ROWS
    n = m // ROWS
    valid = n < images
    if ROWS != MH * MW:
        valid = valid & (p < MH * MW)
    return n, p // MW, p % MW, valid


@jit
def corner(
    n, h, w, valid, m0, images,
    ROWS: tl.constexpr, MW: tl.constexpr, STRIDE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Where `_fetch` starts, in the input's grid: scalars for a box, one for each pixel for pointers."""
    if MODE == GATHER:
        a, b, c = tl.where(valid, n, images), h * STRIDE, w * STRIDE
    else:
        p = m0 % ROWS
        a, b, c = m0 // ROWS, p // MW * STRIDE, p % MW * STRIDE
    return a, b, c


@jit
def _pair_sums(v, BN: tl.constexpr, BM: tl.constexpr):  # [BN, BM] -> [BN, BM // 2]
    a, b = tl.split(tl.reshape(v, [BN, BM // 2, 2]))
    return a + b


@jit
def _part_sums(v, BN: tl.constexpr, BM: tl.constexpr, PART: tl.constexpr, RUN: tl.constexpr):
    """Sums over runs of PART columns, [BN, BM] -> [BN, BM // PART], in an order that no tile choice changes.

    RUN columns lie inside one matrix instruction, where every layout spreads them over the lanes alike; beyond
    that the order of `tl.sum` would follow the number of warps along M, so pairs are added by hand.
    """
    if RUN > 1:
        v = tl.sum(tl.reshape(v, [BN, BM // RUN, RUN]), axis=2)
    if RUN < 2 and PART >= 2:
        v = _pair_sums(v, BN, BM)
    if RUN < 4 and PART >= 4:
        v = _pair_sums(v, BN, BM // 2)
    if RUN < 8 and PART >= 8:
        v = _pair_sums(v, BN, BM // 4)
    if RUN < 16 and PART >= 16:
        v = _pair_sums(v, BN, BM // 8)
    if RUN < 32 and PART >= 32:
        v = _pair_sums(v, BN, BM // 16)
    if RUN < 64 and PART >= 64:
        v = _pair_sums(v, BN, BM // 32)
    if RUN < 128 and PART >= 128:
        v = _pair_sums(v, BN, BM // 64)
    return v


@jit
def _store_stats(
    stats,  # float32 [images, P, 3, K]
    y,  # float32 [BN, BM]: the values as stored
    valid,  # bool [BM]
    m0, k0, phase, images,
    PIXELS: tl.constexpr, ROWS: tl.constexpr, PHASES: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Count, mean and centred sum of squares of each run of PART pixels of an image."""
    PARTS: tl.constexpr = ROWS // PART
    run = m0 // PART + tl.arange(0, BM // PART)
    image = run // PARTS
    part = run % PARTS
    count = tl.minimum(PIXELS - part * PART, PART).to(tl.float32)
    if ROWS != PIXELS:
        y = tl.where(valid[None, :], y, 0.0)
    mean = _part_sums(y, BN, BM, PART, RUN) / count[None, :]
    centred = tl.reshape(tl.reshape(y, [BN, BM // PART, PART]) - mean[:, :, None], [BN, BM])
    if ROWS != PIXELS:
        centred = tl.where(valid[None, :], centred, 0.0)
    m2 = _part_sums(centred * centred, BN, BM, PART, RUN)
    k = k0 + tl.arange(0, BN)
    at = (image.to(tl.int64) * (PHASES * PARTS) + phase * PARTS + part)[None, :] * (3 * K) + k[:, None]
    mask = (image < images)[None, :] & (k < K)[:, None]
    tl.store(stats + at, tl.broadcast_to(count[None, :], [BN, BM // PART]), mask=mask)
    tl.store(stats + at + K, mean, mask=mask)
    tl.store(stats + at + 2 * K, m2, mask=mask)


@jit
def conv_kernel(
    x, skip, weight,  # [images, H, W, C1 | C2] and [K, columns]: descriptors, or pointers under GATHER
    short_x, short_skip, short_weight,  # the same for the 1x1 shortcut: [images, OH, OW, S1 | S2]; or None
    bias, short_bias,  # [K], or None
    time, row,  # [R, K] and int [1+], or None
    residual, y,  # [images, OH, OW, K]
    stats,  # float32 [images, P, 3, K], or None
    images, scale,
    H: tl.constexpr, W: tl.constexpr,  # of the input
    MH: tl.constexpr, MW: tl.constexpr,  # the pixel grid of M: the output's, or one phase of it
    ROWS: tl.constexpr,  # of M an image: MH * MW, or more where statistics need whole parts
    C1: tl.constexpr, C2: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, K: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr,
    TOP: tl.constexpr, LEFT: tl.constexpr,  # zeros above and before the image
    PHASES: tl.constexpr,  # 4 for nearest upsampling by 2 (SIZE is then 2), else 1
    TIME: tl.constexpr,  # 0: none; 1: one row for all; 2: row n is image n's
    SCALED: tl.constexpr,
    MODE: tl.constexpr, SHORT_MODE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, SHORT_BC: tl.constexpr,
    PART: tl.constexpr, RUN: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies bfloat16 as bit patterns: widen there
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile [BN channels, BM pixels] of `reference.conv` or of one phase of `reference.upsample_conv`."""
    if PDL:
        after_previous()
    # Neighbouring programs share input pixels: output channels first, then phases, then pixels.
    K_TILES: tl.constexpr = (K + BN - 1) // BN
    pid = tl.program_id(0)
    k0 = (pid % K_TILES) * BN
    phase = (pid // K_TILES) % PHASES
    m0 = (pid // (K_TILES * PHASES)) * BM
    n, h, w, valid = pixels(m0, images, ROWS, MH, MW, BM)

    R1: tl.constexpr = (C1 + BC - 1) // BC * BC
    R2: tl.constexpr = (C2 + BC - 1) // BC * BC
    COLUMNS: tl.constexpr = PHASES * SIZE * SIZE * (R1 + R2)
    column = phase * (SIZE * SIZE * (R1 + R2))
    dy, dx = phase // 2 - TOP, phase % 2 - LEFT
    an, ah, aw = corner(n, h, w, valid, m0, images, ROWS, MW, STRIDE, MODE)
    UP: tl.constexpr = 2 if PHASES == 4 else 1
    k = k0 + tl.arange(0, BN)
    known = k < K
    mask = known[:, None] & valid[None, :]
    place = n.to(tl.int64) * (UP * UP * MH * MW)
    place += (UP * h + phase // 2) * (UP * MW) + UP * w + phase % 2
    at = place[None, :] * K + k[:, None]
    # The sum starts from what is added for each pixel: added behind it, that would pull the statistics into
    # the layout of its load, where they cost more and their order follows the tile.
    acc = tl.zeros([BN, BM], dtype=tl.float32)
    if residual is not None:
        acc = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if TIME == 2:
        acc += tl.load(time + n[None, :] * K + k[:, None], mask=mask, other=0.0).to(tl.float32)
    acc = accumulate(
        acc, x, weight, column, k0, an, ah, aw, m0, dy, dx, images,
        H, W, C1, K, COLUMNS, R1 + R2, SIZE, MODE, BM, BN, BC, WIDEN,
    )  # fmt: skip
    if C2 > 0:
        acc = accumulate(
            acc, skip, weight, column + R1, k0, an, ah, aw, m0, dy, dx, images,
            H, W, C2, K, COLUMNS, R1 + R2, SIZE, MODE, BM, BN, BC, WIDEN,
        )  # fmt: skip
    if S1 > 0:
        Q1: tl.constexpr = (S1 + SHORT_BC - 1) // SHORT_BC * SHORT_BC
        Q2: tl.constexpr = (S2 + SHORT_BC - 1) // SHORT_BC * SHORT_BC
        sn, sh, sw = corner(n, h, w, valid, m0, images, ROWS, MW, UP, SHORT_MODE)
        acc = accumulate(
            acc, short_x, short_weight, 0, k0, sn, sh, sw, m0, phase // 2, phase % 2, images,
            MH * UP, MW * UP, S1, K, Q1 + Q2, Q1 + Q2, 1, SHORT_MODE, BM, BN, SHORT_BC, WIDEN,
        )  # fmt: skip
        if S2 > 0:
            acc = accumulate(
                acc, short_skip, short_weight, Q1, k0, sn, sh, sw, m0, phase // 2, phase % 2, images,
                MH * UP, MW * UP, S2, K, Q1 + Q2, Q1 + Q2, 1, SHORT_MODE, BM, BN, SHORT_BC, WIDEN,
            )  # fmt: skip

    if bias is not None:
        acc += tl.load(bias + k, mask=known, other=0.0).to(tl.float32)[:, None]
    if short_bias is not None:
        acc += tl.load(short_bias + k, mask=known, other=0.0).to(tl.float32)[:, None]
    if TIME == 1:
        r = 0
        if row is not None:
            r = tl.load(row).to(tl.int32)
        acc += tl.load(time + r * K + k, mask=known, other=0.0).to(tl.float32)[:, None]
    if SCALED:
        acc *= scale
    stored = acc.to(y.dtype.element_ty)
    tl.store(y + at, stored, mask=mask)
    if stats is not None:
        _store_stats(
            stats, stored.to(tl.float32), valid, m0, k0, phase, images,
            MH * MW, ROWS, PHASES, K, BM, BN, PART, RUN,
        )  # fmt: skip
