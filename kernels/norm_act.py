"""GroupNorm (Wu and He 2018) with time embedding, activation and residual, over a virtual concatenation.

NHWC. Statistics are float32, centred, and come from the producers of x and skip (one launch), from the tile
itself where one program holds whole groups (one launch), or from `group_stats` first (two-phase).
Groups may straddle the boundary between x and skip. Every reduction's order follows from C, H, W, groups and
dtype, never from N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import after_previous, cdiv, jit, norm_apply_launch, norm_tile_launch, require, start, tl
from .norm_stats import group_stats, merge_size, merge_stats, nhwc_strides, stats_size

__all__ = ["group_stats", "merge_stats", "norm_act", "workspace_size"]

FUSED_ACTIVATIONS = ("silu", "swish", "none")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@jit
def load_pair(x_ptr, skip_ptr, p, c, mask, C1: tl.constexpr, x_p: tl.constexpr, skip_p: tl.constexpr):
    """float32 [pixels, channels] of [x, skip], which are never joined in memory; zeros outside the mask."""
    p, c = p[:, None], c[None, :]
    if skip_ptr is None:
        h = tl.load(x_ptr + p * x_p + c, mask=mask, other=0.0).to(tl.float32)
    else:
        h = tl.load(x_ptr + p * x_p + c, mask=mask & (c < C1), other=0.0).to(tl.float32)
        s = tl.load(skip_ptr + p * skip_p + (c - C1), mask=mask & (c >= C1), other=0.0).to(tl.float32)
        h = tl.where(c < C1, h, s)
    return h


@jit
def channel_vector(ptr, c, mask, default: tl.constexpr):
    """float32 values of a per-channel parameter, or the default where the model has none."""
    if ptr is None:
        v = tl.zeros_like(c).to(tl.float32) + default
    else:
        v = tl.load(ptr + c, mask=mask, other=0.0).to(tl.float32)
    return v


@jit
def table_row(row_ptr, n):
    """Which row of a table image n reads: the one that the device counter names, or its own."""
    row = n
    if row_ptr is not None:
        row = tl.load(row_ptr).to(tl.int64)
    return row  # not a pointer that may be None: Triton 3.6 cannot return one


@jit
def store_activated(
    h, mean, rstd, n, p, c, mask, weight_ptr, bias_ptr, shift_ptr, scale_shift_ptr, residual_ptr, y_ptr,
    residual_p: tl.constexpr, y_p: tl.constexpr, C: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Normalise h [pixels, channels] by per-channel mean and rstd, and do all that follows. Pointers are at image n."""
    valid = c < C
    scale = rstd * channel_vector(weight_ptr, c, valid, 1.0)
    offset = channel_vector(bias_ptr, c, valid, 0.0)
    if scale_shift_ptr is not None:
        time_scale = 1.0 + channel_vector(scale_shift_ptr, c, valid, 0.0)
        scale *= time_scale
        offset = offset * time_scale + channel_vector(scale_shift_ptr + C, c, valid, 0.0)
    y = (h + (channel_vector(shift_ptr, c, valid, 0.0) - mean)[None, :]) * scale[None, :] + offset[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    if residual_ptr is not None:
        y += tl.load(residual_ptr + p[:, None] * residual_p + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + p[:, None] * y_p + c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _load_part(stats_ptr, first, p0, c, mask, PARTS: tl.constexpr, WIDTH: tl.constexpr, PB: tl.constexpr):
    """Counts, means, M2 [PB, NG * CGP] of parts p0.. for the pair's channels c, of the input that starts at first."""
    part = p0 + tl.arange(0, PB)[:, None]
    inside = mask & (c >= first) & (c < first + WIDTH)
    at = stats_ptr + part * 3 * WIDTH + (c - first)[None, :]
    inside = inside[None, :] & (part < PARTS)
    count = tl.load(at, mask=inside, other=0.0)
    return count, tl.load(at + WIDTH, mask=inside, other=0.0), tl.load(at + 2 * WIDTH, mask=inside, other=0.0)


@jit
def _group_sums(v, NG: tl.constexpr, CGP: tl.constexpr):
    """[NG] of v [NG * CGP]."""
    return tl.sum(tl.reshape(v, (NG, CGP)), axis=1)


@jit
def _spread(v, NG: tl.constexpr, CGP: tl.constexpr):
    """[NG * CGP] of v [NG]: each group's value at its channels."""
    return tl.reshape(tl.broadcast_to(v[:, None], (NG, CGP)), (NG * CGP,))


@jit
def merge_groups(
    stats_ptr, skip_stats_ptr, shift, c, mask, eps, C1: tl.constexpr, C2: tl.constexpr,
    PARTS: tl.constexpr, SKIP_PARTS: tl.constexpr, NG: tl.constexpr, CGP: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) [NG] of the groups whose channels are c [NG * CGP], CGP to a group.

    Chan's rule over all parts and channels at once: the weighted mean first, then every part's M2 about it;
    what the mean's rounding left behind is put right in the second pass. ``shift`` moves the channels' means.
    Parts by channels, not by groups by channels of a group: of three axes, Triton 3.6 lays a warp along the parts.
    """
    count = tl.zeros_like(shift)
    total = tl.zeros_like(shift)
    for p0 in range(0, PARTS, PB):
        k, m, _ = _load_part(stats_ptr, 0, p0, c, mask, PARTS, C1, PB)
        count += tl.sum(k, axis=0)
        total += tl.sum(k * (m + shift[None, :]), axis=0)
    if skip_stats_ptr is not None:
        for p0 in range(0, SKIP_PARTS, PB):
            k, m, _ = _load_part(skip_stats_ptr, C1, p0, c, mask, SKIP_PARTS, C2, PB)
            count += tl.sum(k, axis=0)
            total += tl.sum(k * (m + shift[None, :]), axis=0)
    pixels = tl.maximum(_group_sums(count, NG, CGP), 1.0)
    mean = _group_sums(total, NG, CGP) / pixels
    centred = shift - _spread(mean, NG, CGP)
    rest = tl.zeros_like(shift)
    m2 = tl.zeros_like(shift)
    for p0 in range(0, PARTS, PB):
        k, m, s = _load_part(stats_ptr, 0, p0, c, mask, PARTS, C1, PB)
        d = m + centred[None, :]
        rest += tl.sum(k * d, axis=0)
        m2 += tl.sum(s + k * d * d, axis=0)
    if skip_stats_ptr is not None:
        for p0 in range(0, SKIP_PARTS, PB):
            k, m, s = _load_part(skip_stats_ptr, C1, p0, c, mask, SKIP_PARTS, C2, PB)
            d = m + centred[None, :]
            rest += tl.sum(k * d, axis=0)
            m2 += tl.sum(s + k * d * d, axis=0)
    left = _group_sums(rest, NG, CGP) / pixels
    variance = tl.maximum(_group_sums(m2, NG, CGP) / pixels - left * left, 0.0)
    return mean + left, tl.rsqrt(variance + eps)


@jit
def _norm_apply_kernel(
    x_ptr, skip_ptr, stats_ptr, skip_stats_ptr, weight_ptr, bias_ptr, bias_row_ptr, scale_shift_ptr, row_ptr,
    residual_ptr, y_ptr, x_n, skip_n, residual_n, y_n, bias_row_n, scale_shift_n, eps,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, CG: tl.constexpr,
    x_p: tl.constexpr, skip_p: tl.constexpr, residual_p: tl.constexpr, y_p: tl.constexpr,
    PARTS: tl.constexpr, SKIP_PARTS: tl.constexpr, SILU: tl.constexpr,
    CGP: tl.constexpr, NG: tl.constexpr, PB: tl.constexpr,
    TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: TILES * BLOCK_P pixels of BLOCK_C channels of one image; it merges the NG groups they touch."""
    if PDL:
        after_previous()
    C: tl.constexpr = C1 + C2
    RUN: tl.constexpr = TILES * BLOCK_P
    RUNS: tl.constexpr = (HW + RUN - 1) // RUN
    pid = tl.program_id(0)
    n = (pid // RUNS).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if bias_row_ptr is not None:
        bias_row_ptr += table_row(row_ptr, n) * bias_row_n

    first = tl.program_id(1) * BLOCK_C // CG
    j = tl.arange(0, NG * CGP)
    if CG == CGP:
        member = first * CG + j
        inside = member < C
    else:  # a group's slots beyond its last channel stay empty
        member = (first + j // CGP) * CG + j % CGP
        inside = (j % CGP < CG) & (member < C)
    if skip_stats_ptr is not None:
        skip_stats_ptr += n * SKIP_PARTS * 3 * C2
    group_mean, group_rstd = merge_groups(
        stats_ptr + n * PARTS * 3 * C1, skip_stats_ptr, channel_vector(bias_row_ptr, member, inside, 0.0),
        member, inside, eps, C1, C2, PARTS, SKIP_PARTS, NG, CGP, PB,
    )  # fmt: skip
    if CG == CGP and NG * CGP == BLOCK_C:
        mean = _spread(group_mean, NG, CGP)
        rstd = _spread(group_rstd, NG, CGP)
    else:  # a gather as a sum over one nonzero term, which is exact
        own = (first + tl.arange(0, NG))[:, None] == (c // CG)[None, :]
        mean = tl.sum(tl.where(own, group_mean[:, None], 0.0), axis=0)
        rstd = tl.sum(tl.where(own, group_rstd[:, None], 0.0), axis=0)

    x_ptr += n * x_n
    y_ptr += n * y_n
    if skip_ptr is not None:
        skip_ptr += n * skip_n
    if residual_ptr is not None:
        residual_ptr += n * residual_n
    if scale_shift_ptr is not None:
        scale_shift_ptr += table_row(row_ptr, n) * scale_shift_n
    for t in range(TILES):
        p = pid % RUNS * RUN + t * BLOCK_P + tl.arange(0, BLOCK_P)
        mask = (p < HW)[:, None] & (c < C)[None, :]
        h = load_pair(x_ptr, skip_ptr, p, c, mask, C1, x_p, skip_p)
        store_activated(
            h, mean, rstd, n, p, c, mask, weight_ptr, bias_ptr, bias_row_ptr, scale_shift_ptr, residual_ptr, y_ptr,
            residual_p, y_p, C, SILU,
        )  # fmt: skip


@jit
def _norm_tile_kernel(
    x_ptr, skip_ptr, weight_ptr, bias_ptr, bias_row_ptr, scale_shift_ptr, row_ptr,
    residual_ptr, y_ptr, x_n, skip_n, residual_n, y_n, bias_row_n, scale_shift_n, eps,
    C1: tl.constexpr, C2: tl.constexpr, HW: tl.constexpr, CG: tl.constexpr,
    x_p: tl.constexpr, skip_p: tl.constexpr, residual_p: tl.constexpr, y_p: tl.constexpr, SILU: tl.constexpr,
    CGP: tl.constexpr, NG: tl.constexpr, BLOCK_P: tl.constexpr, PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: NG whole groups, all pixels of one image, in one tile [BLOCK_P, NG * CGP]."""
    if PDL:
        after_previous()
    C: tl.constexpr = C1 + C2
    n = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, NG * CGP)
    if CG == CGP:
        c = tl.program_id(1) * NG * CG + j
        valid = c < C
    else:  # a group's slots beyond its last channel stay empty
        c = (tl.program_id(1) * NG + j // CGP) * CG + j % CGP
        valid = (c < C) & (j % CGP < CG)
    p = tl.arange(0, BLOCK_P)
    mask = (p < HW)[:, None] & valid[None, :]

    if bias_row_ptr is not None:
        bias_row_ptr += table_row(row_ptr, n) * bias_row_n
    if skip_ptr is not None:
        skip_ptr += n * skip_n
    if residual_ptr is not None:
        residual_ptr += n * residual_n
    h = load_pair(x_ptr + n * x_n, skip_ptr, p, c, mask, C1, x_p, skip_p)
    shifted = tl.where(mask, h + channel_vector(bias_row_ptr, c, valid, 0.0)[None, :], 0.0)
    size: tl.constexpr = HW * CG
    mean = tl.sum(tl.reshape(tl.sum(shifted, axis=0), (NG, CGP)), axis=1) / size
    mean = tl.reshape(tl.broadcast_to(mean[:, None], (NG, CGP)), (NG * CGP,))
    d = tl.where(mask, shifted - mean[None, :], 0.0)
    left = tl.sum(tl.reshape(tl.sum(d, axis=0), (NG, CGP)), axis=1) / size  # what the mean's rounding left behind
    variance = tl.sum(tl.reshape(tl.sum(d * d, axis=0), (NG, CGP)), axis=1) / size - left * left
    rstd = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    mean += tl.reshape(tl.broadcast_to(left[:, None], (NG, CGP)), (NG * CGP,))
    rstd = tl.reshape(tl.broadcast_to(rstd[:, None], (NG, CGP)), (NG * CGP,))
    if scale_shift_ptr is not None:
        scale_shift_ptr += table_row(row_ptr, n) * scale_shift_n
    store_activated(
        h, mean, rstd, n, p, c, mask, weight_ptr, bias_ptr, bias_row_ptr, scale_shift_ptr, residual_ptr,
        y_ptr + n * y_n, residual_p, y_p, C, SILU,
    )  # fmt: skip


def workspace_size(
    x: Tensor, skip: Tensor | None = None, stats: Tensor | None = None, skip_stats: Tensor | None = None
) -> int:
    """float32 elements that `norm_act` may need: for statistics no producer left, or to thin many parts."""
    return sum(_space(t, s) for t, s in ((x, stats), (skip, skip_stats)) if t is not None)


def _space(x: Tensor, stats: Tensor | None) -> int:
    size = stats_size(x) if stats is None else merge_size(tuple(stats.shape))
    # Where the skip's begin must not change with the batch: by a pointer's alignment Triton picks the layout of a
    # load, and with it the order of a sum.
    return cdiv(size, 4) * 4


def norm_act(
    x: Tensor,  # [N, C1, H, W] channels_last; bf16, fp16 or fp32
    weight: Tensor | None,  # [C], C = C1 + C2
    bias: Tensor | None,  # [C]
    groups: int,
    eps: float,
    *,
    skip: Tensor | None = None,  # [N, C2, H, W]: the second part of a virtual concatenation
    act: str = "silu",  # silu | swish | none
    bias_row: Tensor | None = None,  # [R, C]: time embedding added before the norm
    scale_shift: Tensor | None = None,  # [R, 2C]: scale, then shift: norm(x) * (1 + scale) + shift
    row: Tensor | None = None,  # int [1+]: the row of bias_row and scale_shift; None: row n is image n's
    residual: Tensor | None = None,  # [N, C, H, W], added to the result
    stats: Tensor | None = None,  # [N, P, 3, C1]: statistics of x from its producer
    skip_stats: Tensor | None = None,  # [N, P', 3, C2]
    out: Tensor | None = None,
    workspace: Tensor | None = None,  # float32 [workspace_size(x, skip, stats, skip_stats)]; None: allocated
    pdl: bool = False,  # as programmatic dependent launches; see launch.start
) -> Tensor:  # [N, C, H, W] channels_last, in x's dtype
    """`reference.norm_act` in one launch, or two to three where no producer left statistics and a group is large.

    Raises ValueError for shapes, dtypes and memory that do not fit; ``row`` must be below R.
    """
    n, c1, h, w = x.shape
    c2 = 0 if skip is None else skip.shape[1]
    channels = c1 + c2
    _check(x, skip, channels, groups, act, residual, out)
    y = _like(x, channels) if out is None else out
    tables = [_table(t, width, row, n) for t, width in ((bias_row, channels), (scale_shift, 2 * channels))]
    images, pixels = zip(*(_strides(t) for t in (x, skip, residual, y)), strict=True)
    shape = (c1, c2, h * w, channels // groups, *pixels)
    parameters = (_dense(weight), _dense(bias), bias_row, scale_shift, row, residual, y, *images, *tables, eps, *shape)
    silu = act != "none"
    given = stats is not None or skip_stats is not None
    launch = None if given else norm_tile_launch(channels, groups, h * w, x.element_size())
    tensors = (x, skip, weight, bias, bias_row, scale_shift, row, residual, stats, skip_stats, y)
    if launch is not None:
        require(_norm_tile_kernel, *tensors)
        grid = (n, cdiv(groups, launch.meta["NG"]))
        start(_norm_tile_kernel, grid, x.device, x, skip, *parameters, SILU=silu, pdl=pdl, **launch.options())
        return y
    require(_norm_apply_kernel, *tensors)
    stats, skip_stats = _statistics(x, skip, stats, skip_stats, workspace, pdl)
    parts, skip_parts = stats.shape[1], 0 if skip_stats is None else skip_stats.shape[1]
    launch = norm_apply_launch(channels, groups, h * w, x.element_size(), max(parts, skip_parts))
    runs = cdiv(h * w, launch.meta["TILES"] * launch.meta["BLOCK_P"])
    grid = (n * runs, cdiv(channels, launch.meta["BLOCK_C"]))
    inputs = (x, skip, stats, skip_stats, *parameters, parts, skip_parts)
    start(_norm_apply_kernel, grid, x.device, *inputs, SILU=silu, pdl=pdl, **launch.options())
    return y


def _statistics(
    x: Tensor,
    skip: Tensor | None,
    stats: Tensor | None,
    skip_stats: Tensor | None,
    workspace: Tensor | None,
    pdl: bool,
) -> tuple[Tensor, Tensor | None]:
    """The producers' statistics, thinned where they are many, and our own where there are none."""
    rest = None if workspace is None else workspace.view(-1)[_space(x, stats) :]
    own = stats is None, skip is not None and skip_stats is None
    if stats is None:
        stats = group_stats(x, out=workspace, pdl=pdl)
    if skip is not None and skip_stats is None:
        skip_stats = group_stats(skip, out=rest, pdl=pdl)
    for name, s, t in (("stats", stats, x), ("skip_stats", skip_stats, skip)):
        want = None if t is None else (t.shape[0], 3, t.shape[1])
        if s is not None and ((s.shape[0], *s.shape[2:]) != want or s.dtype != torch.float32 or not s.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous float32 [N, P, 3, C] with (N, 3, C) = {want}; got {s.dtype} "
                f"{list(s.shape)}; take it from the producer of that input, or leave it out"
            )
    space, skip_space = (None if taken else s for taken, s in zip(own, (workspace, rest), strict=True))
    merged = merge_stats(stats, out=space, pdl=pdl)
    return merged, None if skip_stats is None else merge_stats(skip_stats, out=skip_space, pdl=pdl)


def _like(x: Tensor, channels: int) -> Tensor:
    n, _, h, w = x.shape
    return torch.empty((n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else nhwc_strides(t, "an input or out")


def _dense(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _table(table: Tensor | None, width: int, row: Tensor | None, n: int) -> int:
    """The stride from one row to the next: 0 where one row serves every image."""
    if table is None:
        return 0
    if table.dim() != 2 or table.shape[1] != width or (table.stride(1) != 1 and width > 1):
        raise ValueError(
            f"a time table must be [R, {width}] with dense rows; got {list(table.shape)} with strides "
            f"{tuple(table.stride())}; slice its columns, or call contiguous()"
        )
    if row is None and table.shape[0] not in (1, n):
        raise ValueError(
            f"without row a time table needs one row, or one an image ({n}); got {table.shape[0]}; pass row="
        )
    return 0 if row is None and table.shape[0] == 1 else table.stride(0)


def _check(
    x: Tensor, skip: Tensor | None, channels: int, groups: int, act: str, residual: Tensor | None, out: Tensor | None
) -> None:
    n, _, h, w = x.shape
    if x.dtype not in _DTYPES:
        raise ValueError(f"norm_act is fused for bf16, fp16 and fp32; got {x.dtype}; use reference.norm_act")
    if act not in FUSED_ACTIVATIONS:
        raise ValueError(
            f"norm_act fuses the activations {FUSED_ACTIVATIONS}; got {act!r}; use reference.norm_act for this block"
        )
    if channels % groups:
        raise ValueError(
            f"norm_act needs C % groups == 0; got C={channels}, groups={groups}; change the channels or the groups"
        )
    if skip is not None and (skip.shape[0], *skip.shape[2:]) != (n, h, w):
        raise ValueError(f"skip must be [{n}, C2, {h}, {w}] to follow x; got {list(skip.shape)}; match its pixels")
    for name, t in (("residual", residual), ("out", out)):
        if t is not None and t.shape != (n, channels, h, w):
            raise ValueError(f"{name} must be {[n, channels, h, w]}; got {list(t.shape)}; allocate it so")
