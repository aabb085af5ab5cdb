"""The last convolution with the sampler step as its epilogue: the network's output never reaches memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import sampler_step
from .conv import architecture, enqueue
from .conv_check import check_operands, check_packed, check_size
from .conv_kernel import accumulate, corner, pixels
from .conv_pack import PackedConv, pack_step_conv, step_rows
from .conv_plan import DTYPES, GATHER, ConvShape, Specialization, fetch_modes, source_boxes
from .launch import Launch, after_previous, cdiv, interpreted, jit, next_power_of_2, require, strides, tl
from .launch_conv import step_launch
from .sampler_step import advance, step_update, store_low, tile_noise

__all__ = ["conv_step", "pack_step_conv", "step_specialization"]


@jit
def _half(acc, which: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, CP: tl.constexpr):  # [BN, BM] -> [CP, BM]
    """Rows which * CP to (which + 1) * CP of the product. All other terms of the sum are zero: it is exact."""
    group = tl.arange(0, BN // CP)[:, None, None]
    return tl.sum(tl.where(group == which, tl.reshape(acc, [BN // CP, CP, BM]), 0.0), axis=0)


@jit
def conv_step_kernel(
    x, weight,  # [images, H, W, C1] and [K, columns]: descriptors, or pointers under GATHER
    bias,  # [C or 2C], or None
    x_t, x_prev, low,  # float32 [images, C, H, W] twice, and [images, LOW_C, H, W] or None
    table, counter, seed, ids,
    images, programs, x_n, y_n, low_n,
    H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, C1: tl.constexpr,
    C: tl.constexpr,  # of the image
    K: tl.constexpr,  # rows of the packed weights: CP for each half of the output
    LOW_C: tl.constexpr, SIZE: tl.constexpr,
    x_c: tl.constexpr, x_p: tl.constexpr,  # strides of channel and pixel
    y_c: tl.constexpr, y_p: tl.constexpr, low_c: tl.constexpr, low_p: tl.constexpr,
    VARIANCE: tl.constexpr, ALIGNED: tl.constexpr,
    MODE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, CP: tl.constexpr, LOW_CP: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BM pixels of one image: its rows of M are padded to whole tiles. Reads x_t only where it writes x_prev."""
    if PDL:
        after_previous()
    m0 = tl.program_id(0) * BM
    n, h, w, valid = pixels(m0, images, ROWS, H, W, BM)
    an, ah, aw = corner(n, h, w, valid, m0, images, ROWS, W, 1, MODE)
    R1: tl.constexpr = (C1 + BC - 1) // BC * BC
    acc = accumulate(
        tl.zeros([BN, BM], dtype=tl.float32), x, weight, 0, 0, an, ah, aw, m0, -(SIZE // 2), -(SIZE // 2), images,
        H, W, C1, K, SIZE * SIZE * R1, R1, SIZE, MODE, BM, BN, BC, WIDEN,
    )  # fmt: skip

    c = tl.arange(0, CP)
    out = _half(acc, 0, BN, BM, CP)
    v = out
    if VARIANCE:
        v = _half(acc, 1, BN, BM, CP)
    if bias is not None:
        out += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[:, None]
        if VARIANCE:
            v += tl.load(bias + C + c, mask=c < C, other=0.0).to(tl.float32)[:, None]

    image = (m0 // ROWS).to(tl.int64)
    p0 = m0 % ROWS
    p = (p0 + tl.arange(0, BM))[None, :]
    mask = (c[:, None] < C) & (p < H * W)
    row = tl.load(counter)
    x_now = tl.load(x_t + image * x_n + c[:, None] * x_c + p * x_p, mask=mask, other=0.0)
    z = tile_noise(seed, ids + image, row, 0, p0, H * W, CP, BM, ALIGNED)
    y = step_update(x_now, out, v, z, table, row, VARIANCE)
    tl.debug_barrier()  # x_prev may be x_t, and a small tile's elements are loaded by several threads
    tl.store(x_prev + image * y_n + c[:, None] * y_c + p * y_p, y, mask=mask)
    if low is not None:
        store_low(low + image * low_n, y, 0, p0, C, H * W, LOW_C, low_c, low_p, CP, LOW_CP, BM)
    advance(counter, row, programs)


def step_specialization(
    shape: ConvShape,  # of the convolution; out_channels are the rows of its packed weights
    arch: int,
    image_channels: int,
    *,
    variance: str = "fixed",
    low_channels: int = 0,  # 0 without a low-precision copy
    low_dtype: torch.dtype = torch.bfloat16,
    layout: tuple[int, ...] = (),  # channel and pixel strides of x_t, x_prev and low; (): all in channels_last
    launch: Launch | None = None,
) -> Specialization:
    """What `conv_step` compiles to and how it is launched, from shapes alone."""
    h, w = shape.height, shape.width
    chosen = launch or step_launch(h * w, shape.out_channels, shape.dtype, arch)
    bm, bn = chosen.meta["BM"], chosen.meta["BN"]
    rows = cdiv(h * w, bm) * bm
    mode, _ = fetch_modes(shape, arch, rows)
    boxes = source_boxes(shape, mode, GATHER, bm, bn)
    dtype = DTYPES[shape.dtype]
    present = {
        "x": dtype, "weight": dtype, "bias": shape.bias, "x_t": "fp32", "x_prev": "fp32",
        "low": low_channels and DTYPES[low_dtype], "table": "fp32", "counter": "i32", "seed": "i64", "ids": "i64",
    }  # fmt: skip
    types = {
        name: f"tensordesc<{dtype}{list(boxes[name])}>" if name in boxes else f"*{kind}" if kind else "constexpr"
        for name, kind in present.items()
    } | dict.fromkeys(("images", "programs", "x_n", "y_n", "low_n"), "i32")
    rows_each = step_rows(image_channels)
    names = ("x_c", "x_p", "y_c", "y_p", "low_c", "low_p")
    values: dict[str, Any] = {name: None for name, kind in types.items() if kind == "constexpr"}
    values |= dict(zip(names, layout or (1, image_channels) * 2 + (1, low_channels), strict=True)) | {
        "H": h, "W": w, "ROWS": rows, "C1": shape.channels[0], "C": image_channels, "K": shape.out_channels,
        "LOW_C": low_channels, "SIZE": shape.size, "VARIANCE": sampler_step.VARIANCES[variance],
        "ALIGNED": h * w % 4 == 0, "MODE": mode, "CP": rows_each,
        "LOW_CP": max(rows_each, next_power_of_2(low_channels)), "BC": shape.depth, "WIDEN": interpreted(),
        "BM": bm, "BN": bn, "PDL": False,
    }  # fmt: skip
    return Specialization(
        kernel=conv_step_kernel,
        signature=types | dict.fromkeys(values, "constexpr"),
        constexprs=values,
        boxes=boxes,
        launch=chosen,
        programs=shape.images * rows // bm,
    )


def conv_step(
    x: Tensor,  # [N, C1, H, W] channels_last: what the last normalisation wrote
    weight: Tensor | PackedConv,  # [C or 2C, C1, k, k], or `pack_step_conv` of it
    bias: Tensor | None,  # [C or 2C]
    x_t: Tensor,  # [N, C, H, W] float32
    table: Tensor,  # [T, TABLE_WIDTH] float32
    counter: Tensor,  # int32 [2]: the row to read, and the ticket word (0 between launches); row += 1 on return
    seed: Tensor,  # int64 [1]
    ids: Tensor,  # int64 [N]: the sample ids
    *,
    variance: str = "fixed",  # fixed | learned | learned_range
    x_prev: Tensor | None = None,  # float32: where to write; may be x_t itself
    low: Tensor | None = None,  # [N, C' >= C, H, W]: x_prev in low precision, zeros above C, for the next conv_in
    launch: Launch | None = None,
    arch: int | None = None,
    pdl: bool = False,  # as a programmatic dependent launch; see launch.start
) -> Tensor:  # [N, C, H, W] float32: x_{t-1}
    """`reference.conv`, then `reference.sampler_step` on its output, in one launch.

    The output is used as the float32 sum that it is; apart, it would be rounded to x's dtype between the two.
    Raises ValueError for shapes and dtypes that do not fit.
    """
    n, channels = x_t.shape[:2]
    outputs = weight.out_channels if isinstance(weight, PackedConv) else weight.shape[0]
    packed = weight if isinstance(weight, PackedConv) else pack_step_conv(weight, channels, dtype=x.dtype)
    out = x_t.new_empty((n, outputs, *x.shape[2:]), device="meta")  # what the step would read, were it apart
    sampler_step._check_step(x_t, out, table, counter, seed, ids, variance, x_prev, low, None)
    check_packed("weight", packed, x.dtype, (x.shape[1],), outputs)
    rows = packed.matrix.shape[0]
    if rows != step_rows(channels) * (outputs // channels):
        raise ValueError(f"conv_step needs weights from pack_step_conv for {channels} channels; got {rows} rows")
    half = packed.size // 2
    shape = ConvShape(
        n, x.shape[2], x.shape[3], (x.shape[1],), rows, packed.size, 1, (half, half),
        bias="" if bias is None else DTYPES[bias.dtype], dtype=x.dtype,
        aligned=x.data_ptr() % 16 == packed.matrix.data_ptr() % 16 == 0,
    )  # fmt: skip
    check_size(shape)
    tensors: dict[str, Tensor | None] = {"x": x, "weight": packed.matrix}
    check_operands(shape, tensors, x.dtype)
    if bias is not None and (tuple(bias.shape) != (outputs,) or not bias.is_contiguous()):
        raise ValueError(f"conv_step needs bias as contiguous [{outputs}]; got {list(bias.shape)}; convert it")
    y = torch.empty_like(x_t) if x_prev is None else x_prev
    tensors |= {"bias": bias, "x_t": x_t, "x_prev": y, "low": low}
    tensors |= {"table": table, "counter": counter, "seed": seed, "ids": ids}
    require(conv_step_kernel, *tensors.values())
    x_n, *x_layout = strides(x_t, "x_t")
    y_n, *y_layout = strides(y, "x_prev")
    low_n, *low_layout = (0, 0, 0) if low is None else strides(low, "low")
    spec = step_specialization(
        shape, architecture(x) if arch is None else arch, channels, variance=variance,
        low_channels=0 if low is None else low.shape[1], low_dtype=x.dtype if low is None else low.dtype,
        layout=(*x_layout, *y_layout, *low_layout), launch=launch,
    )  # fmt: skip
    scalars = {"images": n, "programs": spec.programs, "x_n": x_n, "y_n": y_n, "low_n": low_n}
    enqueue(spec, tensors, scalars, pdl)
    return y
