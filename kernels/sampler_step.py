"""x_t -> x_{t-1} in one launch: Algorithm 2 (Ho et al. 2020) or DDIM (Song et al. 2021) as a table row.

Nothing that changes between steps, seeds or batches is known to the host: the kernel reads its row, the
seed and the ids from the device, draws its own noise, and the last program to finish advances the row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .launch import after_previous, cdiv, constexpr, jit, require, start, step_launch, strides, tl
from .philox import normal4, normal_at, split64

VARIANCES = {"fixed": 0, "learned": 1, "learned_range": 2}
_KX, _KO, _CLIP = constexpr(reference.KX), constexpr(reference.KO), constexpr(reference.CLIP)
_C0, _CX, _CO = constexpr(reference.C0), constexpr(reference.CX), constexpr(reference.CO)
_SIGMA, _LOGVAR_A = constexpr(reference.SIGMA), constexpr(reference.LOGVAR_A)
_INITIAL_STEP = constexpr(reference.INITIAL_STEP)
_LOGVAR_B, _TABLE_WIDTH = constexpr(reference.LOGVAR_B), constexpr(reference.TABLE_WIDTH)


@jit
def step_update(x, eps, v, z, table_ptr, row, VARIANCE: tl.constexpr):
    """x_{t-1} from x_t, the network's output and noise: float32 tensors of one shape.

    ``row`` is the row of the step table at ``table_ptr``; ``v`` is the variance half of the output, unread when
    VARIANCE (a value of VARIANCES) is 0. NaN passes through the clip, as in torch.
    """
    c = table_ptr + row * _TABLE_WIDTH
    clip = tl.load(c + _CLIP)
    x0 = tl.load(c + _KX) * x + tl.load(c + _KO) * eps
    x0 = tl.minimum(x0, clip, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.maximum(x0, -clip, propagate_nan=tl.PropagateNan.ALL)
    sigma = tl.load(c + _SIGMA)
    if VARIANCE == 2:
        sigma = sigma * tl.exp(0.5 * (tl.load(c + _LOGVAR_A) + tl.load(c + _LOGVAR_B) * v))
    elif VARIANCE == 1:
        sigma = sigma * tl.sqrt_rn(v)
    return tl.load(c + _C0) * x0 + tl.load(c + _CX) * x + tl.load(c + _CO) * eps + sigma * z


@jit
def advance(counter_ptr, row, programs):
    """The last of ``programs`` to arrive writes row + 1 and clears the ticket word counter[1].

    The barrier keeps a program's slower warps from reading a row that its own ticket let another advance.
    """
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr + 1, 1)
    if ticket == programs - 1:
        tl.store(counter_ptr + 1, 0)
        tl.store(counter_ptr, row + 1)


@jit
def tile_noise(
    seed_ptr, id_ptr, step, c0, p0, HW: tl.constexpr, CP: tl.constexpr, BLOCK_P: tl.constexpr, ALIGNED: tl.constexpr
):
    """Noise [CP, BLOCK_P] of channels c0.. and pixels p0.. of the sample whose id is at ``id_ptr``.

    ALIGNED (H * W and p0 are multiples of 4): a Philox block never leaves its channel, so each is drawn once.
    """
    k0, k1 = split64(tl.load(seed_ptr))
    id0, id1 = split64(tl.load(id_ptr))
    c = (c0 + tl.arange(0, CP)) * HW
    if ALIGNED:
        block = (c[:, None] + p0) // 4 + tl.arange(0, BLOCK_P // 4)[None, :]
        z0, z1, z2, z3 = normal4(k0, k1, block.to(tl.uint32), step.to(tl.uint32), id0, id1)
        z = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [CP, BLOCK_P / 4, 2, 2]: the last axis is bit 0
        z = tl.reshape(z, (CP, BLOCK_P))
    else:
        element = c[:, None] + p0 + tl.arange(0, BLOCK_P)[None, :]
        z = normal_at(k0, k1, element.to(tl.uint32), step.to(tl.uint32), id0, id1)
    return z


@jit
def store_low(ptr, y, c0, p0, C, HW, LOW_C, s_c, s_p, CP: tl.constexpr, LOW_CP: tl.constexpr, BLOCK_P: tl.constexpr):
    """Write y [CP, BLOCK_P] and zeros up to LOW_CP channels in one tile, so that NHWC stores are whole vectors."""
    y = tl.where(c0 + tl.arange(0, CP)[:, None] < C, y, 0.0).to(ptr.dtype.element_ty)
    for i in tl.static_range(10):
        if (CP << i) < LOW_CP:
            y = tl.permute(tl.join(y, tl.zeros_like(y)), (2, 0, 1))
            y = tl.reshape(y, (CP << (i + 1), BLOCK_P))
    c, p = c0 + tl.arange(0, LOW_CP)[:, None], p0 + tl.arange(0, BLOCK_P)[None, :]
    tl.store(ptr + c * s_c + p * s_p, y, mask=(c < LOW_C) & (p < HW))


@jit
def _sampler_step_kernel(
    x_ptr,
    out_ptr,
    y_ptr,
    low_ptr,
    noise_ptr,
    table_ptr,
    counter_ptr,
    seed_ptr,
    ids_ptr,
    C: tl.constexpr,
    HW: tl.constexpr,
    LOW_C: tl.constexpr,
    x_n,
    x_c: tl.constexpr,
    x_p: tl.constexpr,
    out_n,
    out_c: tl.constexpr,
    out_p: tl.constexpr,
    y_n,
    y_c: tl.constexpr,
    y_p: tl.constexpr,
    low_n,
    low_c: tl.constexpr,
    low_p: tl.constexpr,
    noise_n,
    noise_c: tl.constexpr,
    noise_p: tl.constexpr,
    tiles,
    programs,
    VARIANCE: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CP: tl.constexpr,
    LOW_CP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One program: CP channels and BLOCK_P pixels of one sample. Strides are of image, channel and pixel.

    What the model fixes is constexpr, so that the compiler sees how wide a load can be; the batch is not.
    """
    if PDL:
        after_previous()
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    c0 = tl.program_id(1) * LOW_CP  # the two differ only where one program holds every channel
    p0 = pid % tiles * BLOCK_P
    c, p = c0 + tl.arange(0, CP)[:, None], p0 + tl.arange(0, BLOCK_P)[None, :]
    mask = (c < C) & (p < HW)
    row = tl.load(counter_ptr)

    x = tl.load(x_ptr + n * x_n + c * x_c + p * x_p, mask=mask, other=0.0).to(tl.float32)
    eps = tl.load(out_ptr + n * out_n + c * out_c + p * out_p, mask=mask, other=0.0).to(tl.float32)
    v = eps
    if VARIANCE:
        v = tl.load(out_ptr + n * out_n + (C + c) * out_c + p * out_p, mask=mask, other=0.0).to(tl.float32)
    if HAS_NOISE:
        z = tl.load(noise_ptr + n * noise_n + c * noise_c + p * noise_p, mask=mask, other=0.0).to(tl.float32)
    else:
        z = tile_noise(seed_ptr, ids_ptr + n, row, c0, p0, HW, CP, BLOCK_P, ALIGNED)
    y = step_update(x, eps, v, z, table_ptr, row, VARIANCE)
    tl.debug_barrier()  # y may be x, and a small tile's elements may be loaded by several threads
    tl.store(y_ptr + n * y_n + c * y_c + p * y_p, y, mask=mask)
    if HAS_LOW:
        store_low(low_ptr + n * low_n, y, c0, p0, C, HW, LOW_C, low_c, low_p, CP, LOW_CP, BLOCK_P)
    advance(counter_ptr, row, programs)


@jit
def _initial_noise_kernel(
    x_ptr,
    low_ptr,
    seed_ptr,
    ids_ptr,
    C: tl.constexpr,
    HW: tl.constexpr,
    LOW_C: tl.constexpr,
    x_n,
    x_c: tl.constexpr,
    x_p: tl.constexpr,
    low_n,
    low_c: tl.constexpr,
    low_p: tl.constexpr,
    tiles,
    HAS_LOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    CP: tl.constexpr,
    LOW_CP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr = False,
):
    if PDL:
        after_previous()
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    c0 = tl.program_id(1) * LOW_CP  # the two differ only where one program holds every channel
    p0 = pid % tiles * BLOCK_P
    c, p = c0 + tl.arange(0, CP)[:, None], p0 + tl.arange(0, BLOCK_P)[None, :]
    step = tl.full((), _INITIAL_STEP, tl.uint32)
    z = tile_noise(seed_ptr, ids_ptr + n, step, c0, p0, HW, CP, BLOCK_P, ALIGNED)
    tl.store(x_ptr + n * x_n + c * x_c + p * x_p, z, mask=(c < C) & (p < HW))
    if HAS_LOW:
        store_low(low_ptr + n * low_n, z, c0, p0, C, HW, LOW_C, low_c, low_p, CP, LOW_CP, BLOCK_P)


def sampler_step(
    x: Tensor,  # [N, C, H, W] float32: x_t
    out: Tensor,  # [N, C, H, W], or [N, 2C, H, W] with a learned variance
    table: Tensor,  # [T, TABLE_WIDTH] float32
    counter: Tensor,  # int32 [2]: the row to read, and the ticket word (0 between launches); row += 1 on return
    seed: Tensor,  # int64 [1]
    ids: Tensor,  # int64 [N]: the sample ids
    *,
    variance: str = "fixed",  # fixed | learned | learned_range
    x_prev: Tensor | None = None,  # float32: where to write; may be x itself
    low: Tensor | None = None,  # [N, C' >= C, H, W]: x_prev in low precision, zeros above C, for the next conv_in
    noise: Tensor | None = None,  # [N, C, H, W]: z from elsewhere; None: drawn here, as philox_normal
    pdl: bool = False,  # as a programmatic dependent launch; see launch.start
) -> Tensor:  # [N, C, H, W] float32: x_{t-1}
    """`reference.sampler_step` in one launch. Each tensor is NCHW or channels_last, as it likes.

    The row must be below T. Raises ValueError for shapes and dtypes that do not fit.
    """
    n, channels, h, w = x.shape
    _check_step(x, out, table, counter, seed, ids, variance, x_prev, low, noise)
    y = torch.empty_like(x) if x_prev is None else x_prev
    low_channels = 0 if low is None else low.shape[1]
    launch = step_launch(channels, low_channels, h * w)
    tiles = cdiv(h * w, launch.meta["BLOCK_P"])
    grid = (n * tiles, cdiv(max(channels, low_channels), launch.meta["LOW_CP"]))
    require(_sampler_step_kernel, x, out, table, counter, seed, ids, y, low, noise)
    start(
        _sampler_step_kernel,
        grid,
        x.device,
        x,
        out,
        y,
        y if low is None else low,
        x if noise is None else noise,
        table,
        counter,
        seed,
        ids,
        channels,
        h * w,
        low_channels,
        *strides(x, "x"),
        *strides(out, "out"),
        *strides(y, "x_prev"),
        *((0, 0, 0) if low is None else strides(low, "low")),
        *((0, 0, 0) if noise is None else strides(noise, "noise")),
        tiles,
        grid[0] * grid[1],
        VARIANCE=VARIANCES[variance],
        HAS_LOW=low is not None,
        HAS_NOISE=noise is not None,
        pdl=pdl,
        **launch.options(),
    )
    return y


def initial_noise(
    x: Tensor,  # [N, C, H, W] float32: x_T goes here
    seed: Tensor,  # int64 [1]
    ids: Tensor,  # int64 [N]
    low: Tensor | None = None,  # [N, C' >= C, H, W]: its low-precision copy, zeros above C
    pdl: bool = False,  # as a programmatic dependent launch; see launch.start
) -> Tensor:  # x
    """x_T = philox_normal at step INITIAL_STEP, in one launch. Setting the counter to 0 is the caller's."""
    n, channels, h, w = x.shape
    _check_source(x, seed, ids, low)
    low_channels = 0 if low is None else low.shape[1]
    launch = step_launch(channels, low_channels, h * w)
    tiles = cdiv(h * w, launch.meta["BLOCK_P"])
    grid = (n * tiles, cdiv(max(channels, low_channels), launch.meta["LOW_CP"]))
    require(_initial_noise_kernel, x, seed, ids, low)
    start(
        _initial_noise_kernel,
        grid,
        x.device,
        x,
        x if low is None else low,
        seed,
        ids,
        channels,
        h * w,
        low_channels,
        *strides(x, "x"),
        *((0, 0, 0) if low is None else strides(low, "low")),
        tiles,
        HAS_LOW=low is not None,
        pdl=pdl,
        **launch.options(),
    )
    return x


def _check_source(x: Tensor, seed: Tensor, ids: Tensor, low: Tensor | None) -> None:
    n, channels, h, w = x.shape
    if x.dtype != torch.float32:
        raise ValueError(f"x_t stays float32 in the fused step; got {x.dtype}; keep it float32, or use reference")
    if seed.dtype != torch.int64 or ids.dtype != torch.int64 or seed.numel() != 1 or ids.shape != (n,):
        raise ValueError(
            f"noise needs seed int64 [1] and ids int64 [{n}]; got {seed.dtype} {list(seed.shape)} and {ids.dtype} "
            f"{list(ids.shape)}; pass one id an image"
        )
    if not ids.is_contiguous():
        raise ValueError("noise needs contiguous ids; got a strided view; call ids.contiguous()")
    if low is not None and (low.shape[0] != n or low.shape[1] < channels or low.shape[2:] != (h, w)):
        raise ValueError(f"low must be [{n}, C' >= {channels}, {h}, {w}]; got {list(low.shape)}; allocate it so")


def _check_step(
    x: Tensor,
    out: Tensor,
    table: Tensor,
    counter: Tensor,
    seed: Tensor,
    ids: Tensor,
    variance: str,
    x_prev: Tensor | None,
    low: Tensor | None,
    noise: Tensor | None,
) -> None:
    _check_source(x, seed, ids, low)
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {list(VARIANCES)}; got {variance!r}; choose one of them")
    n, channels, h, w = x.shape
    want = (n, channels if variance == "fixed" else 2 * channels, h, w)
    if out.shape != want and not (variance == "fixed" and out.shape == (n, 2 * channels, h, w)):
        raise ValueError(
            f"variance={variance!r} needs the network's output as {list(want)}; got {list(out.shape)}; "
            "check the model's out_channels"
        )
    if table.dtype != torch.float32 or table.shape[1:] != (reference.TABLE_WIDTH,) or not table.is_contiguous():
        raise ValueError(
            f"the step table must be contiguous float32 [T, {reference.TABLE_WIDTH}]; got {table.dtype} "
            f"{list(table.shape)}; build it with Schedule"
        )
    if counter.dtype != torch.int32 or counter.numel() < 2:
        raise ValueError(f"counter must be int32 [2]; got {counter.dtype} {list(counter.shape)}; allocate it so")
    for name, t, dtype in (("x_prev", x_prev, torch.float32), ("noise", noise, None)):
        if t is not None and (t.shape != x.shape or dtype not in (None, t.dtype)):
            raise ValueError(f"{name} must be like x, {list(x.shape)}; got {t.dtype} {list(t.shape)}; allocate it so")
