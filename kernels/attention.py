"""Self-attention over the pixels of a feature map, one pass over the keys (Dao et al. 2022, "FlashAttention").

torch's fused attention cuts the keys into pieces where a batch is small, so there an image's bits depend on the
images beside it. Here tiles and the order of every sum follow from H * W, the heads' size and dtype alone. The
projection's output is read where it lies, and the result is written as the next projection reads it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .launch import Launch, after_previous, cdiv, interpreted, jit, next_power_of_2, require, start, tl
from .norm_stats import nhwc_strides

__all__ = ["attention", "attention_launch"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@jit
def _slice(ptr, pixel, c, T: tl.constexpr, D: tl.constexpr, stride: tl.constexpr):
    """[pixels, channels] of one head's q, k or v; zeros beyond the T pixels and D channels."""
    mask = (pixel < T)[:, None] & (c < D)[None, :]
    return tl.load(ptr + pixel[:, None] * stride + c[None, :], mask=mask, other=0.0)


@jit
def _scores(
    scores, q, k_ptr, key, c, T: tl.constexpr, D: tl.constexpr, stride: tl.constexpr, WIDEN: tl.constexpr
):  # [BM, BN]
    """scores + q k^T over the channels c."""
    k = _slice(k_ptr, key, c, T, D, stride)
    if WIDEN:
        q, k = q.to(tl.float32), k.to(tl.float32)
    return tl.dot(q, tl.trans(k), scores, input_precision="ieee")


@jit
def _attention_kernel(
    qkv_ptr, y_ptr, qkv_n, y_n,
    scale,  # of the scores, times log2(e)
    T: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,  # pixels, heads, channels a head
    qkv_p: tl.constexpr, y_p: tl.constexpr,  # strides of a pixel
    BM: tl.constexpr, BN: tl.constexpr,  # queries, keys
    BD: tl.constexpr,  # channels of a slice
    WIDEN: tl.constexpr,
    PDL: tl.constexpr = False,
):  # fmt: skip
    """One program: BM queries of one head of one image, and BD channels of their result."""
    if PDL:
        after_previous()
    TILES: tl.constexpr = (T + BM - 1) // BM
    SLICES: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    head = pid // TILES % HEADS
    n = (pid // TILES // HEADS).to(tl.int64)
    query = pid % TILES * BM + tl.arange(0, BM)
    c = tl.arange(0, BD)
    own = tl.program_id(1) * BD + c
    q_ptr = qkv_ptr + n * qkv_n + head * D
    k_ptr = q_ptr + HEADS * D
    v_ptr = k_ptr + HEADS * D

    if SLICES == 1:
        q = _slice(q_ptr, query, c, T, D, qkv_p)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for first in tl.range(0, T, BN):
        key = first + tl.arange(0, BN)
        scores = tl.zeros([BM, BN], tl.float32)
        if SLICES == 1:
            scores = _scores(scores, q, k_ptr, key, c, T, D, qkv_p, WIDEN)
        else:
            for i in tl.range(0, SLICES):
                q = _slice(q_ptr, query, i * BD + c, T, D, qkv_p)
                scores = _scores(scores, q, k_ptr, key, i * BD + c, T, D, qkv_p, WIDEN)
        scores = scores * scale
        if T % BN != 0:
            scores = tl.where((key < T)[None, :], scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, axis=1))
        weight = tl.exp2(scores - above[:, None])
        shrink = tl.exp2(largest - above)
        total = total * shrink + tl.sum(weight, axis=1)
        v = _slice(v_ptr, key, own, T, D, qkv_p)
        weight = weight.to(v.dtype)
        if WIDEN:
            weight, v = weight.to(tl.float32), v.to(tl.float32)
        acc = tl.dot(weight, v, acc * shrink[:, None], input_precision="ieee")
        largest = above

    y = acc / total[:, None]
    at = y_ptr + n * y_n + head * D + query[:, None] * y_p + own[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(query < T)[:, None] & (own < D)[None, :])


def attention_launch(
    pixels: int,  # H * W
    channels: int,  # of a head
    dtype: torch.dtype,
) -> Launch:
    """BM queries against BN keys at a time, in slices of BD channels; it does not depend on the number of images."""
    full = dtype == torch.float32
    width = max(16, next_power_of_2(channels))  # 16 is the least that a matrix instruction takes
    rows = max(16, next_power_of_2(pixels))
    bd = width if width <= (128 if full else 256) else 128
    return Launch(
        num_warps=4,
        num_stages=1 if full else 2,
        meta={"BM": min(rows, 32 if full else 64), "BN": min(rows, 32 if full or bd > 128 else 64), "BD": bd},
        reason="the rows of one warpgroup, and fewer keys where heads are wide: 96 KB at 256 channels, two programs a "
        "multiprocessor; wider heads in slices, and each program makes the scores anew for its own",
    )


def attention(
    qkv: Tensor,  # [N, 3 * D, H, W] channels_last; bf16, fp16 or fp32
    heads: int,
    *,
    out: Tensor | None = None,
    pdl: bool = False,  # as a programmatic dependent launch; see launch.start
) -> Tensor:  # [N, D, H, W] channels_last, in qkv's dtype
    """`reference.attention` in one launch. Raises ValueError for shapes, dtypes and memory that do not fit."""
    n, width, h, w = qkv.shape
    _check(qkv, heads, out)
    d = width // 3 // heads
    y = _empty(qkv) if out is None else out
    require(_attention_kernel, qkv, y)
    (qkv_n, qkv_p), (y_n, y_p) = nhwc_strides(qkv, "qkv"), nhwc_strides(y, "out")
    launch = attention_launch(h * w, d, qkv.dtype)
    grid = (n * heads * cdiv(h * w, launch.meta["BM"]), cdiv(d, launch.meta["BD"]))
    start(
        _attention_kernel, grid, qkv.device,
        qkv, y, qkv_n, y_n, math.log2(math.e) / math.sqrt(d), h * w, heads, d, qkv_p, y_p,
        WIDEN=interpreted(), pdl=pdl, **launch.options(),
    )  # fmt: skip
    return y


def _empty(qkv: Tensor) -> Tensor:
    n, width, h, w = qkv.shape
    shape = (n, width // 3, h, w)
    return torch.empty(shape, dtype=qkv.dtype, device=qkv.device, memory_format=torch.channels_last)


def _check(qkv: Tensor, heads: int, out: Tensor | None) -> None:
    n, width, h, w = qkv.shape
    if qkv.dtype not in DTYPES:
        raise ValueError(f"attention is fused for bf16, fp16 and fp32; got {qkv.dtype}; use reference.attention")
    if heads < 1 or width % (3 * heads):
        raise ValueError(
            f"attention needs q, k and v of {heads} equal heads; got {width} channels; change the heads or the channels"
        )
    if out is not None and (tuple(out.shape) != (n, width // 3, h, w) or out.dtype != qkv.dtype):
        raise ValueError(
            f"out must be {[n, width // 3, h, w]} in {qkv.dtype}; got {list(out.shape)} in {out.dtype}; allocate it so"
        )
