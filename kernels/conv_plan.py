"""What a convolution compiles to: from shapes alone, so that whoever compiles ahead of time compiles what runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from . import conv_kernel as device_code
from .conv_pack import slice_channels
from .launch import Launch, cdiv, interpreted
from .launch_conv import conv_launch, has_descriptors, part_pixels
from .reference import sides

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
BOX, FLAT, HALVES, GATHER = range(4)  # conv_kernel's
LARGEST_TILE = 128  # pixels


@dataclass(frozen=True)
class ConvShape:
    """All that a launch depends on: shapes, dtypes, and which operands are there."""

    images: int
    height: int  # of the input
    width: int
    channels: tuple[int, ...]  # of x and of the skip
    out_channels: int
    size: int = 3  # taps an axis
    stride: int = 1
    padding: tuple[int, ...] = (1, 1)  # (before, after) on both axes, or reference.Sides
    upsample: bool = False
    shortcut: tuple[int, ...] = ()  # channels of its x and skip
    bias: str = ""  # a key of DTYPES' values; "" without
    shortcut_bias: str = ""
    time: str = ""
    time_rows: str = "none"  # none | one | row (chosen by the device) | image
    row: str = "i32"
    residual: bool = False
    scaled: bool = False
    with_stats: bool = False
    dtype: torch.dtype = torch.bfloat16
    aligned: bool = True  # inputs and weights start at multiples of 16 bytes

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of pixels that M runs over: the output's, or one phase's."""
        if self.upsample:
            return self.height, self.width
        top, bottom, left, right = sides(self.padding, self.size)
        rows, columns = self.height + top + bottom, self.width + left + right
        return (rows - self.size) // self.stride + 1, (columns - self.size) // self.stride + 1

    @property
    def output(self) -> tuple[int, int]:
        """Height and width of the result."""
        rows, columns = self.grid
        return (2 * rows, 2 * columns) if self.upsample else (rows, columns)

    @property
    def phases(self) -> int:
        return 4 if self.upsample else 1

    @property
    def depth(self) -> int:
        """Channels of a K slice."""
        return slice_channels(self.channels, self.dtype)

    @property
    def part(self) -> int:
        """Pixels in an entry of the statistics; 1 without."""
        return part_pixels(*self.grid) if self.with_stats else 1

    @property
    def parts(self) -> int:
        """P of the statistics [N, P, 3, K]; it depends on height, width and dtype, never on the batch."""
        return self.phases * cdiv(math.prod(self.grid), part_pixels(*self.grid))


@dataclass(frozen=True)
class Specialization:
    """One compiled kernel and its launch. `signature` and `constexprs` are what triton's ASTSource takes."""

    kernel: Any
    signature: Mapping[str, str]  # argument -> type; "constexpr" for all in `constexprs`
    constexprs: Mapping[str, Any]
    boxes: Mapping[str, tuple[int, ...]]  # argument -> block of its descriptor
    launch: Launch
    programs: int


def specialization(shape: ConvShape, arch: int, launch: Launch | None = None) -> Specialization:
    """The kernel that ``shape`` runs on compute capability ``arch`` (90 for sm_90), under ``launch`` if given."""
    return _specialize(shape, arch, launch) if launch else _chosen(shape, arch)


@cache
def _chosen(shape: ConvShape, arch: int) -> Specialization:
    return _specialize(shape, arch, None)


def _specialize(shape: ConvShape, arch: int, launch: Launch | None) -> Specialization:
    mh, mw = shape.grid
    rows = cdiv(mh * mw, shape.part) * shape.part
    pixels = shape.images * rows
    if launch is None:
        depth = max(shape.depth, _short_depth(shape))
        launch = conv_launch(pixels * shape.phases, shape.out_channels, depth, shape.part, shape.dtype, arch)
    bm, bn = launch.meta["BM"], launch.meta["BN"]
    if bm % shape.part:
        raise ValueError(f"a tile must hold whole parts of {shape.part} pixels; got BM={bm}; choose a multiple")
    mode, short_mode = fetch_modes(shape, arch, rows)
    dtype = DTYPES[shape.dtype]
    boxes = source_boxes(shape, mode, short_mode, bm, bn)
    types = _argument_types(shape, dtype, boxes)
    channels, shortcut = (*shape.channels, 0), (*shape.shortcut, 0, 0)
    top, _, left, _ = sides(shape.padding, shape.size)
    values = {name: None for name, kind in types.items() if kind == "constexpr"} | {
        "H": shape.height, "W": shape.width, "MH": mh, "MW": mw, "ROWS": rows,
        "C1": channels[0], "C2": channels[1], "S1": shortcut[0], "S2": shortcut[1], "K": shape.out_channels,
        "SIZE": 2 if shape.upsample else shape.size, "STRIDE": shape.stride, "TOP": top, "LEFT": left,
        "PHASES": shape.phases, "TIME": {"none": 0, "one": 1, "row": 1, "image": 2}[shape.time_rows],
        "SCALED": shape.scaled, "MODE": mode, "SHORT_MODE": short_mode,
        "BC": shape.depth, "SHORT_BC": _short_depth(shape), "PART": shape.part, "WIDEN": interpreted(), "PDL": False,
        **launch.meta,
    }  # fmt: skip
    return Specialization(
        kernel=device_code.conv_kernel,
        signature=types | dict.fromkeys(values, "constexpr"),
        constexprs=values,
        boxes=boxes,
        launch=launch,
        programs=cdiv(pixels, bm) * cdiv(shape.out_channels, bn) * shape.phases,
    )


def _short_depth(shape: ConvShape) -> int:
    return slice_channels(shape.shortcut, shape.dtype) if shape.shortcut else shape.depth


def fetch_modes(
    shape: ConvShape,
    arch: int,
    rows: int,  # of M an image
) -> tuple[int, int]:
    """How slices of the inputs and of the shortcut's inputs are fetched. No result depends on it."""
    mh, mw = shape.grid
    lines = 16 // shape.dtype.itemsize  # channels in 16 bytes, the unit of descriptors' strides
    usable = has_descriptors(arch) and shape.aligned and rows == mh * mw
    # Then a tile of any size is whole images, whole rows of one image, or a run inside one row.
    whole = all(n % LARGEST_TILE == 0 or LARGEST_TILE % n == 0 for n in (mw, mh * mw))
    flat = GATHER if shape.dtype == torch.float32 else FLAT  # as a descriptor, float32 runs out of registers
    mode = short_mode = GATHER
    if usable and all(c % lines == 0 for c in shape.channels):
        if shape.size == shape.stride == 1 and not any(shape.padding):
            mode = flat
        elif shape.stride == 1 and whole:
            mode = BOX
        elif shape.stride == 2 and whole and shape.height % 2 == shape.width % 2 == 0:
            mode = HALVES if all(c % shape.depth == 0 for c in shape.channels) else GATHER
    if usable and not shape.upsample and all(c % lines == 0 for c in shape.shortcut):
        short_mode = flat
    return mode, short_mode


def source_boxes(shape: ConvShape, mode: int, short_mode: int, bm: int, bn: int) -> dict[str, tuple[int, ...]]:
    """The block of each descriptor, for tiles of ``bm`` pixels and ``bn`` output channels."""
    depth, short_depth = shape.depth, _short_depth(shape)
    mh, mw = shape.grid
    w = min(mw, bm)
    h = min(mh, bm // w)
    boxes: dict[str, tuple[int, ...]] = {}
    if mode != GATHER:
        images = bm // (h * w)
        box = {BOX: (images, h, w, depth), FLAT: (bm, depth), HALVES: (images, h, 1, w, depth)}[mode]
        boxes |= dict.fromkeys(("x", "skip")[: len(shape.channels)], box) | {"weight": (bn, depth)}
    if shape.shortcut and short_mode != GATHER:
        boxes |= dict.fromkeys(("short_x", "short_skip")[: len(shape.shortcut)], (bm, short_depth))
        boxes["short_weight"] = (bn, short_depth)
    return boxes


def _argument_types(shape: ConvShape, dtype: str, boxes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Type of each run-time argument, in the kernel's order; "constexpr" (None) for what is not there."""
    skip, shortcut = len(shape.channels) > 1, bool(shape.shortcut)
    present = {
        "x": dtype, "skip": skip and dtype, "weight": dtype,
        "short_x": shortcut and dtype, "short_skip": len(shape.shortcut) > 1 and dtype,
        "short_weight": shortcut and dtype, "bias": shape.bias, "short_bias": shape.shortcut_bias,
        "time": shape.time_rows != "none" and shape.time, "row": shape.time_rows == "row" and shape.row,
        "residual": shape.residual and dtype, "y": dtype, "stats": shape.with_stats and "fp32",
    }  # fmt: skip
    types = {
        name: f"tensordesc<{dtype}{list(boxes[name])}>" if name in boxes else f"*{kind}" if kind else "constexpr"
        for name, kind in present.items()
    }
    return types | {"images": "i32", "scale": "fp32"}
