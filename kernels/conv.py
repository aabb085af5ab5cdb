"""3x3 and 1x1 convolution, and convolution of the upsampled, in one fused launch each: `reference.conv` on a GPU.

`specialization` says what a launch compiles to, from shapes alone; the functions here go through it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import conv_kernel as device_code
from .conv_check import check_operands, check_packed, check_size
from .conv_pack import PackedConv, pack_conv, pack_upsample_conv
from .conv_plan import DTYPES, ConvShape, Specialization, specialization
from .launch import Launch, require, start
from .reference import Shortcut, sides

__all__ = [
    "ConvShape",
    "PackedConv",
    "Specialization",
    "conv",
    "pack_conv",
    "pack_upsample_conv",
    "specialization",
    "upsample_conv",
]


def conv(
    x: Tensor,  # [N, C1, H, W] channels_last, bfloat16, float16 or float32
    weight: Tensor | PackedConv,  # [K, C, k, k], C = C1 + C2, or `pack_conv` of it
    bias: Tensor | None = None,  # [K]
    *,
    skip: Tensor | None = None,  # [N, C2, H, W], behind x along C
    stride: int = 1,
    padding: tuple[int, ...] | None = None,  # zeros (before, after) on both axes, or `Sides`; None: "same"
    time: Tensor | None = None,  # [R, K], added per channel
    row: Tensor | None = None,  # int [1+]: the row of time; None: row n is image n's
    residual: Tensor | None = None,  # [N, K, H', W']
    shortcut: Shortcut | None = None,  # its weight may be packed too
    scale: float = 1.0,
    with_stats: bool = False,
    out: Tensor | None = None,
    stats_out: Tensor | None = None,  # float32 [N, P, 3, K], contiguous: where the statistics go
    launch: Launch | None = None,  # instead of launch_conv's choice; BM, BN and RUN in its meta
    arch: int | None = None,  # whose choices to take; None: the device's
    pdl: bool = False,  # as a programmatic dependent launch; see launch.start
) -> Tensor | tuple[Tensor, Tensor]:  # [N, K, H', W'] in x's dtype (and float32 [N, P, 3, K])
    """`reference.conv` in one launch: the sum in float32, rounded once. Raises ValueError for what does not fit.

    A float32 ``x`` is multiplied in full float32. The row must be below R.
    """
    packed = weight if isinstance(weight, PackedConv) else pack_conv(weight, dtype=x.dtype, channels=_channels(x, skip))
    n, _, h, w = x.shape
    around = tuple(sides(padding, packed.size))
    shape = ConvShape(n, h, w, _channels(x, skip), packed.out_channels, packed.size, stride, around)
    if packed.phases != 1:
        raise ValueError("conv needs weights from pack_conv; got those of pack_upsample_conv; pack them again")
    return _run(
        shape, x, packed, bias, skip, time, row, residual, shortcut, scale, with_stats, out, stats_out, launch, arch,
        pdl,
    )  # fmt: skip


def upsample_conv(
    x: Tensor,  # [N, C, H, W] channels_last
    weight: Tensor | PackedConv,  # [K, C, 3, 3], or `pack_upsample_conv` of it
    bias: Tensor | None = None,
    *,
    time: Tensor | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Shortcut | None = None,
    scale: float = 1.0,
    with_stats: bool = False,
    out: Tensor | None = None,
    stats_out: Tensor | None = None,
    launch: Launch | None = None,
    arch: int | None = None,
    pdl: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # [N, K, 2H, 2W]
    """`reference.upsample_conv` in one launch: four 2x2 convolutions at the low resolution, 4/9 of the products.

    Exact in real arithmetic; the taps that meet one pixel are summed in float32 and rounded once.
    """
    packed = weight if isinstance(weight, PackedConv) else pack_upsample_conv(weight, dtype=x.dtype)
    if packed.phases != 4:
        raise ValueError("upsample_conv needs weights from pack_upsample_conv; got those of pack_conv; pack them again")
    n, _, h, w = x.shape
    shape = ConvShape(n, h, w, _channels(x, None), packed.out_channels, upsample=True)
    return _run(
        shape, x, packed, bias, None, time, row, residual, shortcut, scale, with_stats, out, stats_out, launch, arch,
        pdl,
    )  # fmt: skip


# Operands that a descriptor may describe.
_DESCRIBED = ("x", "skip", "weight", "short_x", "short_skip", "short_weight")


def _channels(x: Tensor, skip: Tensor | None) -> tuple[int, ...]:
    return (x.shape[1],) if skip is None else (x.shape[1], skip.shape[1])


def _run(
    shape: ConvShape,
    x: Tensor,
    packed: PackedConv,
    bias: Tensor | None,
    skip: Tensor | None,
    time: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
    shortcut: Shortcut | None,
    scale: float,
    with_stats: bool,
    out: Tensor | None,
    stats_out: Tensor | None,
    launch: Launch | None,
    arch: int | None,
    pdl: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if x.dtype not in DTYPES:
        raise ValueError(f"the fused convolution takes bfloat16, float16 or float32; got {x.dtype}; use reference")
    tensors: dict[str, Tensor | None] = {
        "x": x, "skip": skip, "weight": packed.matrix, "bias": bias, "residual": residual,
        "time": time, "row": None if time is None else row,
    }  # fmt: skip
    check_size(shape)
    check_packed("weight", packed, x.dtype, shape.channels, shape.out_channels)
    if shortcut is not None:
        channels = _channels(shortcut.x, shortcut.skip)
        weight = shortcut.weight
        short = weight if isinstance(weight, PackedConv) else pack_conv(weight, dtype=x.dtype, channels=channels)
        check_packed("shortcut.weight", short, x.dtype, channels, shape.out_channels, size=1)
        tensors |= {"short_x": shortcut.x, "short_skip": shortcut.skip, "short_weight": short.matrix}
        tensors["short_bias"] = shortcut.bias
        shape = replace(shape, shortcut=channels)
    n, k, (height, width) = shape.images, shape.out_channels, shape.output
    tensors["y"] = y = empty_map((n, k, height, width), x.dtype, x.device) if out is None else out
    check_operands(shape, tensors, x.dtype)
    shape = replace(
        shape,
        bias=_kind(bias), shortcut_bias=_kind(tensors.get("short_bias")), time=_kind(time),
        time_rows="none" if time is None else "row" if row is not None else "image" if len(time) == n else "one",
        row="i64" if row is not None and row.dtype == torch.int64 else "i32",
        residual=residual is not None, scaled=scale != 1.0, with_stats=with_stats, dtype=x.dtype,
        aligned=all(t.data_ptr() % 16 == 0 for name, t in tensors.items() if t is not None and name in _DESCRIBED),
    )  # fmt: skip
    tensors["stats"] = stats = empty_stats((n, shape.parts, 3, k), x.device, stats_out) if with_stats else None
    require(device_code.conv_kernel, *tensors.values())
    spec = specialization(shape, architecture(x) if arch is None else arch, launch)
    enqueue(spec, tensors, {"images": n, "scale": float(scale)}, pdl)
    return (y, stats) if stats is not None else y


def enqueue(
    spec: Specialization, tensors: Mapping[str, Tensor | None], scalars: Mapping[str, Any], pdl: bool = False
) -> None:
    """Launch ``spec`` on the current stream, its descriptors made from the tensors."""
    arguments: dict[str, Any] = dict(scalars)
    for name, kind in spec.signature.items():
        tensor = tensors.get(name)
        if kind != "constexpr" and tensor is not None:
            arguments[name] = _descriptor(tensor, spec.boxes[name]) if name in spec.boxes else tensor
    launch = spec.launch
    device = next(t.device for t in tensors.values() if t is not None)
    arguments |= {**spec.constexprs, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    start(spec.kernel, (spec.programs,), device, pdl=pdl, **arguments)


def _descriptor(x: Tensor, box: tuple[int, ...]) -> Any:
    """A view of a weight matrix or a feature map in the rank of ``box``; see conv_kernel's modes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if x.dim() == 4:
        n, c, h, w = x.shape
        dims = {2: (n * h * w, c), 4: (n, h, w, c), 5: (n, h // 2, 2, w // 2, 2 * c)}[len(box)]
    else:
        dims = tuple(x.shape)
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    return TensorDescriptor(x, list(dims), strides, list(box))


def empty_map(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where a feature map goes: [N, K, H, W] in channels_last memory."""
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def empty_stats(shape: tuple[int, ...], device: torch.device, out: Tensor | None = None) -> Tensor:
    """Where partial statistics go: [N, P, 3, K]."""
    if out is not None:
        if tuple(out.shape) != shape or out.dtype != torch.float32 or not out.is_contiguous():
            raise ValueError(
                f"stats_out must be contiguous float32 {list(shape)}; got {out.dtype} {list(out.shape)}; size it so"
            )
        return out
    return torch.empty(shape, dtype=torch.float32, device=device)


def architecture(x: Tensor) -> int:
    """Compute capability of x's device, 90 for sm_90; in the interpreter 90, so that descriptors are used."""
    if x.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _kind(x: Tensor | None) -> str:
    return "" if x is None else DTYPES[x.dtype]
