"""The operations of a CPU for long runs: Winograd convolutions, with normalisation and transforms in one pass.

A normalised map is never written: `norm_act` returns one factor and one summand a channel (`Normalised`), and the
input transform of the convolution applies them. The output transform adds bias, time row and residual, and measures
what the next normalisation needs. What has no such form (1x1, strided, small images) runs as in `ops.cpu()`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import host_memory, norm_compiled, onednn, winograd
from ..kernels.native import ELEMENTS
from ..kernels.norm_compiled import table_rows, vector
from ..kernels.onednn import PackedConv
from ..kernels.reference import Shortcut
from ..kernels.winograd import UP, Kernels, PartStats, Products, Scheme, Source, scheme_for
from ..kernels.winograd_source import SOURCE
from ..stages import stage
from . import compiled, cpu_set
from .sets import Ops


@dataclass(eq=False)
class FeatureMap:
    """Pixels [N, C, H, W] in channels_last, and what their producer measured of them."""

    data: Tensor
    stats: PartStats | None = None

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype


@dataclass(eq=False)
class Normalised:
    """A norm_act that nobody has computed yet: act(scale * [x, skip] + shift)."""

    source: Source

    @property
    def shape(self) -> torch.Size:
        n, _, h, w = self.source.x.shape
        return torch.Size((n, self.source.channels, h, w))

    @property
    def dtype(self) -> torch.dtype:
        return self.source.x.dtype

    @property
    def data(self) -> Tensor:
        """The map itself, for whoever cannot take it so."""
        return kernels(self.dtype).norm_apply(self.source)


class PackedWinograd:
    """3x3 weights, arranged for the form that an image's size asks for when it is first seen.

    They are kept in float32 as they came, so that whatever is made of them is rounded once.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, upsample: bool = False):  # [K, C, 3, 3]
        self.out_channels, self.channels = weight.shape[0], (weight.shape[1],)
        self.size, self.phases = (2, 4) if upsample else (3, 1)
        self.dtype, self.device = dtype, weight.device
        self._exact = weight.detach().to(torch.float32, copy=True)
        self._direct: PackedConv | None = None
        self._products: dict[Scheme, Products] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as they came; what was made of them is made again."""
        return PackedWinograd, (self._exact, self.dtype, self.phases == 4)

    def direct(self) -> PackedConv:
        if self._direct is None:
            self._direct = onednn.pack_conv(self._exact, dtype=self.dtype)
        return self._direct

    def products(self, scheme: Scheme) -> Products:
        if scheme not in self._products:
            self._products[scheme] = Products(self._exact, scheme, self.dtype)
        return self._products[scheme]

    def tensors(self) -> list[Tensor]:
        """All memory held."""
        direct = [] if self._direct is None else self._direct.tensors()
        return [self._exact, *direct, *(t for p in self._products.values() for t in p.tensors())]


def kernels(dtype: torch.dtype) -> Kernels:
    """The compiled functions for a dtype; RuntimeError where they cannot be compiled."""
    if dtype not in _KERNELS:
        defines = {"ELEMENT": ELEMENTS[dtype]}
        with stage("compiling the transforms of winograd"):
            _KERNELS[dtype] = Kernels(compiled.library("winograd", SOURCE, defines))
    return _KERNELS[dtype]


_KERNELS: dict[torch.dtype, Kernels] = {}
_cpu = cache(partial(cpu_set.build, keep_memory=False))  # what computes all that has no form of its own here
CHUNK_BYTES = 64 * 2**20  # of transformed patches and products at once; less memory, and no slower than all
_SCRATCH = threading.local()  # transformed patches, from one convolution to the next of a thread


def build(keep_memory: bool = True) -> Ops:
    """The set; RuntimeError, in one line, where no C++ compiler is found. ``keep_memory``: see `ops.cpu`."""
    compiled.compiler()
    if keep_memory:
        host_memory.keep_freed_memory()
    cpu = _cpu()
    return Ops(
        name="winograd",
        norm_act=norm_act,
        conv=conv,
        upsample_conv=upsample_conv,
        upsample=lambda x: FeatureMap(cpu.upsample(x.data)),
        downsample=lambda x: FeatureMap(cpu.downsample(x.data)),
        fir_upsample=lambda x: FeatureMap(cpu_set.channels_last(cpu.fir_upsample(x.data))),
        fir_downsample=lambda x: FeatureMap(cpu_set.channels_last(cpu.fir_downsample(x.data))),
        attention=lambda qkv, heads: FeatureMap(cpu.attention(qkv.data, heads)),
        sampler_step=cpu.sampler_step,
        enter=lambda x: FeatureMap(cpu.enter(x)),
        leave=lambda x: x.data,
        pack_conv=pack_conv,
        pack_upsample_conv=pack_upsample_conv,
        falls_back=falls_back,
    )


def falls_back(operation: str, arguments: Mapping[str, Any]) -> str | None:
    return cpu_set.falls_back(operation, arguments)


def computes(dtype: torch.dtype) -> bool:
    """Whether Winograd products are worth it: in float32 always, in bfloat16 where the processor has it."""
    return dtype == torch.float32 or (dtype in ELEMENTS and onednn.computes(dtype))


def pack_conv(weight: Tensor, *, dtype: torch.dtype, channels: tuple[int, ...] | None = None) -> Any:
    k, c, size, _ = weight.shape
    suits = size == 3 and min(k, c) >= winograd.PAD and (channels is None or len(channels) == 1)
    if not (suits and weight.device.type == "cpu" and computes(dtype)):
        return cpu_set.pack_conv(weight, dtype=dtype, channels=channels)
    kernels(dtype)
    return PackedWinograd(weight, dtype)


def pack_upsample_conv(weight: Tensor, *, dtype: torch.dtype) -> Any:
    if weight.device.type != "cpu" or not computes(dtype) or weight.shape[2] != 3:
        return cpu_set.pack_upsample_conv(weight, dtype=dtype)
    kernels(dtype)
    return PackedWinograd(weight, dtype, upsample=True)


def norm_act(
    x: FeatureMap | Normalised,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    *,
    skip: FeatureMap | None = None,
    act: str = "silu",
    bias_row: Tensor | None = None,
    scale_shift: Tensor | None = None,
    row: Tensor | None = None,
    residual: FeatureMap | None = None,
    stats: None = None,
    skip_stats: None = None,
    out: Tensor | None = None,
) -> FeatureMap | Normalised:
    """`reference.norm_act`, postponed where the next operation can apply it."""
    pixels = x.data
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    if not norm_compiled.suits(pixels, channels, groups, act):
        y = _cpu().norm_act(
            pixels, weight, bias, groups, eps, skip=_pixels(skip), act=act, bias_row=bias_row,
            scale_shift=scale_shift, row=row, residual=_pixels(residual), out=out,
        )  # fmt: skip
        return FeatureMap(y)
    run = kernels(x.dtype)
    scale, shift = run.norm_affine(
        pixels,
        _stats(run, x),
        None if skip is None else _stats(run, skip),
        groups,
        eps,
        vector(weight),
        vector(bias),
        table_rows(bias_row, row, len(pixels)),
        table_rows(scale_shift, row, len(pixels)),
    )
    lazy = Normalised(Source(pixels, _pixels(skip), scale, shift, norm_compiled.ACTS[act]))
    if residual is None and out is None:
        return lazy
    y = run.norm_apply(lazy.source, _pixels(residual))
    return FeatureMap(y if out is None else out.copy_(y))


def conv(
    x: FeatureMap | Normalised,
    weight: Any,
    bias: Tensor | None = None,
    *,
    skip: FeatureMap | None = None,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    time: Tensor | None = None,
    row: Tensor | None = None,
    residual: FeatureMap | None = None,
    shortcut: Shortcut | None = None,
    scale: float = 1.0,
    with_stats: bool = False,
    out: Tensor | None = None,
) -> FeatureMap:
    """`reference.conv`."""
    scheme = None
    if (
        isinstance(weight, PackedWinograd)
        and x.dtype == weight.dtype
        and stride == 1
        and padding in (None, (1, 1))
        and skip is None
    ):
        n, c, h, w = x.shape
        scheme = scheme_for(weight.dtype, n, c, h, w, weight.out_channels)
    if scheme is None:
        weight = weight.direct() if isinstance(weight, PackedWinograd) else weight
        y = _cpu().conv(
            x.data, weight, bias, skip=_pixels(skip), stride=stride, padding=padding, time=time, row=row,
            residual=_pixels(residual), shortcut=_plain(shortcut), scale=scale, out=out,
        )  # fmt: skip
        return FeatureMap(y)
    return _transformed(x, weight, scheme, bias, time, row, residual, shortcut, scale, with_stats, out)


def upsample_conv(
    x: FeatureMap | Normalised,
    weight: Any,
    bias: Tensor | None = None,
    *,
    time: Tensor | None = None,
    row: Tensor | None = None,
    residual: FeatureMap | None = None,
    shortcut: Shortcut | None = None,
    scale: float = 1.0,
    with_stats: bool = False,
    out: Tensor | None = None,
) -> FeatureMap:
    """`reference.upsample_conv`."""
    if not isinstance(weight, PackedWinograd):
        y = _cpu().upsample_conv(
            x.data, weight, bias, time=time, row=row, residual=_pixels(residual), shortcut=_plain(shortcut),
            scale=scale, out=out,
        )  # fmt: skip
        return FeatureMap(y)
    return _transformed(x, weight, UP, bias, time, row, residual, shortcut, scale, with_stats, out)


def _transformed(
    x: FeatureMap | Normalised,
    weight: PackedWinograd,
    scheme: Scheme,
    bias: Tensor | None,
    time: Tensor | None,
    row: Tensor | None,
    residual: FeatureMap | None,
    shortcut: Shortcut | None,
    scale: float,
    with_stats: bool,
    out: Tensor | None,
) -> FeatureMap:
    run, products = kernels(weight.dtype), weight.products(scheme)
    n, c, h, w = x.shape
    if c != weight.channels[0]:
        raise ValueError(f"the weights are for {weight.channels[0]} channels; got a map of {c}")
    added = _pixels(residual)
    s = _plain(shortcut)
    if s is not None:
        beside = _cpu().conv(s.x, s.weight, s.bias, skip=s.skip)
        added = beside if added is None else beside.add_(added)
    source = x.source if isinstance(x, Normalised) else Source(x.data)
    up = scheme.out // scheme.step
    shape = n, weight.out_channels, h * up, w * up
    y = torch.empty(shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    stats = run.stats_of(scheme, y) if with_stats else None
    around = vector(bias), table_rows(time, row, n), added, scale, stats
    _, down, across = scheme.tiles(n, h, w)
    whole = across * scheme.positions * (products.cp + products.kp) * x.dtype.itemsize
    for begin, rows in _chunks(n * down, whole):
        v = _scratch(rows * across, scheme.positions, products.cp, x.dtype)
        run.input_transform(scheme, source, v, begin)
        run.output_transform(scheme, products(v), y, *around, begin)
    return FeatureMap(y if out is None else out.copy_(y), stats)


@cache
def _chunks(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """(first, count) of about equal runs of rows of tiles, of at most `CHUNK_BYTES` where a row is not more."""
    count = -(-rows // max(1, CHUNK_BYTES // row_bytes))
    size = -(-rows // count)
    return [(first, min(size, rows - first)) for first in range(0, rows, size)]


def _scratch(tiles: int, positions: int, channels: int, dtype: torch.dtype) -> Tensor:
    size = tiles * positions * channels
    bytes_needed = size * dtype.itemsize
    held: Tensor | None = getattr(_SCRATCH, "bytes", None)
    if held is None or held.numel() < bytes_needed:
        _SCRATCH.bytes = held = torch.empty(bytes_needed, dtype=torch.uint8, device="cpu")
    return held[:bytes_needed].view(dtype).view(tiles, positions, channels)


def _stats(run: Kernels, x: FeatureMap | Normalised) -> PartStats:
    if isinstance(x, Normalised):
        return run.statistics(x.data)
    if x.stats is None:
        x.stats = run.statistics(x.data)
    return x.stats


def _pixels(x: Any) -> Tensor | None:
    return None if x is None else x.data


def _plain(s: Shortcut | None) -> Shortcut | None:
    return None if s is None else Shortcut(s.x.data, _pixels(s.skip), s.weight, s.bias)
