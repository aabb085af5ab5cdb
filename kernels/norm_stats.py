"""Per-channel statistics of a feature map, [N, P, 3, C] float32: pixel count, mean, centred sum of squares.

Parts are merged by Chan's rule (Chan, Golub, LeVeque 1979), since E[x^2] - E[x]^2 loses bits. How the pixels
are cut into P parts depends on H * W alone, so no sample's statistics depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import MAX_PARTS, after_previous, cdiv, jit, require, start, stats_launch, strides, tl


@jit
def _group_stats_kernel(
    x_ptr,
    stats_ptr,
    x_n,
    C: tl.constexpr,
    HW: tl.constexpr,
    x_p: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One program: TILES * BLOCK_P pixels of BLOCK_C channels of one image, read once."""
    if PDL:
        after_previous()
    pid = tl.program_id(0)
    n = (pid // PARTS).to(tl.int64)
    part = pid % PARTS
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    for t in range(TILES):
        p0 = (part * TILES + t) * BLOCK_P
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p < HW)[:, None] & (c < C)[None, :]
        h = tl.load(x_ptr + n * x_n + p[:, None] * x_p + c[None, :], mask=mask, other=0.0).to(tl.float32)
        k = tl.minimum(tl.maximum(HW - p0, 0), BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(h, axis=0) / tl.maximum(k, 1.0)
        d = tl.where(mask, h - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = k / tl.maximum(count + k, 1.0)
        mean += delta * share
        m2 += tl.sum(d * d, axis=0) + delta * delta * (count * share)
        count += k
    to = stats_ptr + (n * PARTS + part) * 3 * C + c
    tl.store(to, tl.zeros((BLOCK_C,), tl.float32) + count, mask=c < C)
    tl.store(to + C, mean, mask=c < C)
    tl.store(to + 2 * C, m2, mask=c < C)


@jit
def _merge_stats_kernel(
    stats_ptr, out_ptr, C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, RUN: tl.constexpr, BLOCK_C: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: RUN neighbouring parts of one image and BLOCK_C channels become one part."""
    if PDL:
        after_previous()
    pid = tl.program_id(0)
    n = (pid // Q).to(tl.int64)
    p = pid % Q * RUN + tl.arange(0, RUN)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (p < P) & (c < C)[None, :]
    at = stats_ptr + (n * P + p) * 3 * C + c[None, :]
    k = tl.load(at, mask=mask, other=0.0)
    m = tl.load(at + C, mask=mask, other=0.0)
    count = tl.sum(k, axis=0)
    mean = tl.sum(k * m, axis=0) / tl.maximum(count, 1.0)
    d = m - mean[None, :]
    m2 = tl.sum(tl.load(at + 2 * C, mask=mask, other=0.0) + k * d * d, axis=0)
    to = out_ptr + (n * Q + pid % Q) * 3 * C + c
    tl.store(to, count, mask=c < C)
    tl.store(to + C, mean, mask=c < C)
    tl.store(to + 2 * C, m2, mask=c < C)


def group_stats(
    x: Tensor,  # [N, C, H, W] channels_last; bf16, fp16 or fp32
    *,
    out: Tensor | None = None,  # float32, at least stats_size(x) elements: where to write
    pdl: bool = False,
) -> Tensor:  # [N, P, 3, C] float32
    """Statistics of x as a producer would hand them to `norm_act`; `reference.channel_stats` in P parts."""
    n, channels, h, w = x.shape
    image, pixel = nhwc_strides(x, "x")
    launch = stats_launch(channels, h * w)
    parts = launch.meta["PARTS"]
    stats = _buffer(out, (n, parts, 3, channels), x.device)
    require(_group_stats_kernel, x, stats)
    grid = (n * parts, cdiv(channels, launch.meta["BLOCK_C"]))
    start(_group_stats_kernel, grid, x.device, x, stats, image, channels, h * w, pixel, pdl=pdl, **launch.options())
    return stats


def merge_stats(
    stats: Tensor,  # [N, P, 3, C] float32
    *,
    out: Tensor | None = None,  # float32, at least merge_size(stats) elements, for every round's result
    pdl: bool = False,
) -> Tensor:  # [N, Q, 3, C], Q <= MAX_PARTS
    """Merge neighbouring parts, 32 at a time, until at most MAX_PARTS are left."""
    while stats.shape[1] > MAX_PARTS:
        n, parts, _, channels = stats.shape
        fewer = cdiv(parts, 32)
        merged = _buffer(out, (n, fewer, 3, channels), stats.device)
        out = None if out is None else out.view(-1)[merged.numel() :]
        require(_merge_stats_kernel, stats, merged)
        start(
            _merge_stats_kernel, (n * fewer, cdiv(channels, 64)), stats.device, stats, merged,
            C=channels, P=parts, Q=fewer, RUN=32, BLOCK_C=64, num_warps=4, pdl=pdl,
        )  # fmt: skip
        stats = merged
    return stats


def merge_size(
    shape: tuple[int, ...],  # of the statistics, [N, P, 3, C]
) -> int:
    """Elements of all rounds' results of `merge_stats`; 0 where there is nothing to merge."""
    n, parts, _, channels = shape
    size = 0
    while parts > MAX_PARTS:
        parts = cdiv(parts, 32)
        size += n * parts * 3 * channels
    return size


def stats_size(x: Tensor) -> int:
    """Elements of `group_stats(x)`."""
    n, channels, h, w = x.shape
    return n * stats_launch(channels, h * w).meta["PARTS"] * 3 * channels


def _buffer(out: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=torch.float32, device=device)
    size = 1
    for s in shape:
        size *= s
    if out.dtype != torch.float32 or out.numel() < size or not out.is_contiguous():
        raise ValueError(
            f"the statistics need a contiguous float32 buffer of {size} elements; got {out.dtype} with {out.numel()}; "
            "size it with stats_size or workspace_size"
        )
    return out.view(-1)[:size].view(shape)


def nhwc_strides(t: Tensor, name: str) -> tuple[int, int]:
    """(image, pixel) strides of t [N, C, H, W] whose channels are neighbours in memory."""
    image, channel, pixel = strides(t, name)
    if channel != 1 and t.shape[1] > 1:
        raise ValueError(
            f"the fused kernels need channels_last memory; got {name} {tuple(t.shape)} with strides "
            f"{tuple(t.stride())}; call contiguous(memory_format=torch.channels_last)"
        )
    return image, pixel
