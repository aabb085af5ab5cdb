"""What the fused convolution asks of its operands; each error says what to do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .conv_pack import PackedConv
from .conv_plan import DTYPES, LARGEST_TILE, ConvShape


def check_packed(
    name: str, packed: PackedConv, dtype: torch.dtype, channels: tuple[int, ...], out_channels: int, size: int = 0
) -> None:
    """Raise ValueError unless ``packed`` weights fit sources of ``channels`` and ``dtype``; size 0: any."""
    want = (channels, out_channels, size or packed.size, dtype)
    got = (packed.channels, packed.out_channels, packed.size, packed.matrix.dtype)
    if want != got:
        raise ValueError(
            f"{name} must be packed for channels {want[0]} to {want[1]}, {want[2]} taps an axis, {want[3]}; got "
            f"channels {got[0]} to {got[1]}, {got[2]} taps, {got[3]}; pack it with channels=(C of x, C of skip) "
            "and the dtype of x"
        )


def check_size(shape: ConvShape) -> None:
    """Raise ValueError unless there is a result, of as many pixels as the kernel can count."""
    n, k, (height, width) = shape.images, shape.out_channels, shape.output
    if min(height, width, n, k) < 1:
        raise ValueError(f"conv needs a result of at least one pixel; got {[n, k, height, width]}; check the padding")
    # An image's pixels may be padded to whole parts of the statistics, and the last tile reaches beyond them.
    if n * (height * width + 2 * LARGEST_TILE) >= 2**31 or n * k >= 2**31:
        raise ValueError(
            f"conv counts pixels and channels in 32 bits; got {n} images of {height} x {width} and {k} channels; "
            "split the batch"
        )
    if shape.height * shape.width * max(shape.channels) >= 2**31:
        raise ValueError(
            f"conv counts the values of one image in 32 bits; got {shape.height} x {shape.width} of "
            f"{max(shape.channels)} channels; use smaller images, or reference"
        )


def check_operands(shape: ConvShape, tensors: Mapping[str, Tensor | None], dtype: torch.dtype) -> None:
    """Raise ValueError unless each operand has the shape, dtype and memory that the kernel reads."""
    n, k, (height, width) = shape.images, shape.out_channels, shape.output
    channels = {"short_x": 0, "short_skip": 0} | dict(zip(("short_x", "short_skip"), shape.shortcut, strict=False))
    maps = {
        "x": (n, shape.channels[0], shape.height, shape.width),
        "skip": (n, shape.channels[-1], shape.height, shape.width),
        "short_x": (n, channels["short_x"], height, width),
        "short_skip": (n, channels["short_skip"], height, width),
        "residual": (n, k, height, width),
        "y": (n, k, height, width),
    }
    for name, want in maps.items():
        t = tensors.get(name)
        if t is not None and (tuple(t.shape) != want or t.dtype != dtype or not _is_nhwc(t)):
            raise ValueError(
                f"conv needs {name} as {dtype} {list(want)} in channels_last memory; got {_say(t)}; "
                "use .contiguous(memory_format=torch.channels_last) and one dtype for all feature maps"
            )
    for name in ("bias", "short_bias"):
        t = tensors.get(name)
        if t is not None and (tuple(t.shape) != (k,) or t.dtype not in DTYPES or not t.is_contiguous()):
            raise ValueError(f"conv needs {name} as contiguous [{k}] in {_names()}; got {_say(t)}; convert it")
    _check_time(shape, tensors.get("time"), tensors.get("row"))


def _check_time(shape: ConvShape, time: Tensor | None, row: Tensor | None) -> None:
    if time is None:
        return
    k, n = shape.out_channels, shape.images
    if time.dim() != 2 or time.shape[1] != k or time.dtype not in DTYPES or not time.is_contiguous():
        raise ValueError(f"conv needs time as contiguous [R, {k}] in {_names()}; got {_say(time)}; convert it")
    if row is None and len(time) not in (1, n):
        raise ValueError(f"without row, time needs 1 row or one an image ({n}); got {len(time)}; pass row")
    if row is not None and (row.dtype not in (torch.int32, torch.int64) or row.numel() < 1):
        raise ValueError(f"row must be int32 or int64 [1+] on the device; got {_say(row)}; pass the step counter")


def _is_nhwc(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _names() -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in DTYPES)


def _say(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)} with strides {list(x.stride())}"
