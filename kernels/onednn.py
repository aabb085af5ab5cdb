"""Convolutions on a CPU over weights that lie as oneDNN computes with them, arranged once for each input shape.

Without oneDNN, or on a processor for which it has no kernel in a dtype, the same functions compute in float32:
by oneDNN where it has that, else by torch's own convolution.
"""

from __future__ import annotations

import platform
from collections import OrderedDict
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import Shortcut

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORTH = 1 << 16  # weights of a convolution from which arranging them anew at each call costs more than packed calls do
CACHED_SHAPES = 2  # input shapes whose arrangement of a weight is kept: whole batches, and the last partial one


def available() -> bool:
    """Whether torch has oneDNN, it is not switched off, and this is a processor whose kernels want packed weights."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch._C._get_mkldnn_enabled())
        and platform.machine().lower() in ("x86_64", "amd64")
    )


def computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves in ``dtype`` here; tried once on a small convolution, for flags may mislead."""
    return dtype in DTYPES and available() and _tried(dtype)


@cache
def _tried(dtype: torch.dtype) -> bool:
    x = torch.ones(1, 16, 4, 4, dtype=dtype, device="cpu").contiguous(memory_format=torch.channels_last)
    weight = torch.ones(16, 16, 3, 3, dtype=dtype, device="cpu")
    bias = torch.ones(16, dtype=torch.float32, device="cpu")
    try:
        y = _convolve(x, _arranged(weight, x.shape, 1, 1), bias, 1, 1)
        y = _accumulate(y, x, _arranged(weight, x.shape, 1, 1), None, 1, 1)
    except (RuntimeError, AttributeError):
        return False
    return bool((y[:, :, 1:3, 1:3] == 2 * 16 * 9 + 1).all() or (dtype != torch.float32 and y[0, 0, 1, 1] == 288))


class _Calls(NamedTuple):
    """torch's calls into oneDNN. Found by name once: that costs as much as a small convolution."""

    arrange: Any
    convolve: Any
    add: Any
    accumulate: Any


@cache
def _calls() -> _Calls:
    ops = torch.ops.mkldnn
    plain, in_place = ops._convolution_pointwise, ops._convolution_pointwise_
    return _Calls(ops._reorder_convolution_weight.default, plain.default, plain.binary, in_place.binary)


def _arranged(weight: Tensor, shape: torch.Size, stride: int, padding: int) -> Tensor:
    """The weights in the blocked layout that oneDNN prefers for an input of ``shape``."""
    weight = weight.contiguous(memory_format=torch.channels_last)
    return _calls().arrange(weight, [padding, padding], [stride, stride], [1, 1], 1, list(shape))


def _convolve(x: Tensor, arranged: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    return _calls().convolve(x, arranged, bias, [padding, padding], [stride, stride], [1, 1], 1, "none", [], "")


def _add(x: Tensor, other: Tensor, arranged: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """other + the convolution, as a new tensor."""
    bias = None if bias is None else bias.to(x.dtype)  # this form takes no other
    return _calls().add(
        x, other, arranged, bias, [padding, padding], [stride, stride], [1, 1], 1, "add", None, None, [], None
    )


def _accumulate(y: Tensor, x: Tensor, arranged: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """y += the convolution."""
    return _calls().accumulate(
        y, x, arranged, bias, [padding, padding], [stride, stride], [1, 1], 1, "add", 1.0, None, [], None
    )


class Weight:
    """[K, C, k, k] for one input, in the dtype that is computed in: as given until the first use, then arranged."""

    def __init__(self, weight: Tensor):
        self.shape, self.dtype = weight.shape, weight.dtype
        self._packs = weight.numel() >= WORTH and computes(weight.dtype)
        self._plain: Tensor | None = weight.clone(memory_format=torch.channels_last)
        self._arranged: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as given: an arrangement is oneDNN's own, and for this processor.

        As bytes: torch sends a tensor to another process as an open file, which would be closed with this one.
        """
        plain = self.plain().permute(0, 2, 3, 1)  # as it lies
        return _weight, (plain.reshape(-1).view(torch.uint8).numpy(), tuple(plain.shape), self.dtype)

    def tensors(self) -> list[Tensor]:
        """All memory held."""
        return [t for t in (self._plain, *self._arranged.values()) if t is not None]

    def plain(self) -> Tensor:
        """[K, C, k, k], channels_last."""
        if self._plain is not None:
            return self._plain
        return next(iter(self._arranged.values())).to_dense().contiguous(memory_format=torch.channels_last)

    def _for(self, shape: torch.Size, stride: int, padding: int) -> Tensor:
        key = (shape, stride, padding)
        found = self._arranged.get(key)
        if found is None:
            found = _arranged(self.plain(), shape, stride, padding)
            while len(self._arranged) >= CACHED_SHAPES:
                self._arranged.popitem(last=False)
            self._arranged[key], self._plain = found, None
        else:
            self._arranged.move_to_end(key)
        return found

    def convolve(
        self,
        x: Tensor,  # [N, C, H, W], channels_last, in `dtype`
        bias: Tensor | None = None,  # float32 [K]
        stride: int = 1,
        padding: int = 0,
        into: Tensor | None = None,  # [N, K, H', W'], to which the result is added in place
        add: Tensor | None = None,  # [N, K, H', W'], added; not together with into
    ) -> Tensor:
        if not self._packs:
            y = F.conv2d(x, self.plain(), None if bias is None else bias.to(x.dtype), stride, padding)
            y = y if add is None else y.add_(add)
            return y if into is None else into.add_(y)
        arranged = self._for(x.shape, stride, padding)
        if into is not None:
            return _accumulate(into, x, arranged, bias, stride, padding)
        if add is not None:
            return _add(x, add, arranged, bias, stride, padding)
        return _convolve(x, arranged, bias, stride, padding)


def _weight(content: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Weight:
    return Weight(torch.tensor(content, device="cpu").view(dtype).view(shape).permute(0, 3, 1, 2))


class PackedConv:
    """Weights of `conv` rounded to ``dtype``, one `Weight` for each input that is read side by side (x, and the skip
    behind it)."""

    phases = 1

    def __init__(self, weight: Tensor, channels: tuple[int, ...], dtype: torch.dtype):
        self.out_channels, self.channels, self.size = weight.shape[0], channels, weight.shape[2]
        self.dtype, self.device = dtype, weight.device
        self.computed = compute_dtype(dtype)
        rounded = weight.detach().to(dtype).to(self.computed)
        self.parts = [Weight(part) for part in rounded.split(list(channels), dim=1)]

    def tensors(self) -> list[Tensor]:
        return [t for part in self.parts for t in part.tensors()]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What convolutions of ``dtype`` compute in on this machine."""
    return dtype if computes(dtype) else torch.float32


def pack_conv(
    weight: Tensor,  # [K, C, k, k]
    *,
    dtype: torch.dtype | None = None,  # None: the weight's
    channels: tuple[int, ...] | None = None,  # (C1, C2) with a skip
) -> PackedConv:
    """Pack the weights of `conv`, or of a shortcut (k = 1), rounded to ``dtype``."""
    channels = (weight.shape[1],) if channels is None else tuple(channels)
    if weight.shape[2] != weight.shape[3] or sum(channels) != weight.shape[1]:
        raise ValueError(
            f"pack_conv needs [K, C, k, k] weights and channels that sum to C; got {list(weight.shape)} and "
            f"channels={channels}; name the channels of x and of the skip"
        )
    return PackedConv(weight, channels, dtype or weight.dtype)


def conv(
    x: Tensor,  # [N, C1, H, W], channels_last
    weight: PackedConv | Tensor,
    bias: Tensor | None = None,  # [K]
    *,
    skip: Tensor | None = None,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    time: Tensor | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Shortcut | None = None,
    scale: float = 1.0,
) -> Tensor:
    """`reference.conv`, with everything behind the product in one pass where oneDNN adds it itself."""
    if not isinstance(weight, PackedConv):
        y = reference.conv(
            x,
            weight,
            bias,
            skip=skip,
            stride=stride,
            padding=padding,
            time=time,
            row=row,
            residual=residual,
            shortcut=shortcut,
            scale=scale,
        )
        assert isinstance(y, Tensor)
        return y.contiguous(memory_format=torch.channels_last)
    before, after = (weight.size // 2,) * 2 if padding is None else padding
    sources = _sources(x, skip, weight)
    if before != after:
        sources = [_padded(s, before, after) for s in sources]
        before = 0
    start, total = around(x, bias, time, row, shortcut, weight.computed)
    add = None
    if start is None and residual is not None:
        add = residual.to(weight.computed)
    for source, part in zip(sources, weight.parts):
        if start is None:
            start = part.convolve(source, total, stride, before, add=add)
        else:
            start = part.convolve(source, total, stride, before, into=start)
        total = None
    assert start is not None
    left_over = residual if add is None else None
    return finish(start, time_of_images(x, time, row), left_over, scale, x.dtype)


def _sources(x: Tensor, skip: Tensor | None, weight: PackedConv) -> list[Tensor]:
    """What the weight's parts read, in their dtype: x and skip, or both as one where it was packed for that."""
    given = [x] if skip is None else [x, skip]
    if tuple(g.shape[1] for g in given) != weight.channels:
        given = [torch.cat(given, dim=1)]
        if len(weight.channels) > 1:
            given = list(given[0].split(list(weight.channels), dim=1))
    return [_lying(g, weight.computed) for g in given]


def _lying(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    return F.pad(x, (before, after, before, after)).contiguous(memory_format=torch.channels_last)


def around(
    x: Tensor,
    bias: Tensor | None,
    time: Tensor | None,
    row: Tensor | None,
    shortcut: Shortcut | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """What a product starts from: the shortcut's convolution or None; one bias of all that is alike for all images."""
    total = None if bias is None else bias.float()
    if time is not None and time_of_images(x, time, row) is None:
        one = time[0] if row is None else time.index_select(0, row[:1])[0]
        total = one.float() if total is None else total + one
    if shortcut is None:
        return None, total
    if shortcut.bias is not None:
        total = shortcut.bias.float() if total is None else total + shortcut.bias
    y = None
    if not isinstance(shortcut.weight, PackedConv):
        weight = PackedConv(shortcut.weight, (shortcut.weight.shape[1],), dtype)
    else:
        weight = shortcut.weight
    for source, part in zip(_sources(shortcut.x, shortcut.skip, weight), weight.parts):
        y = part.convolve(source, total, into=y)
        total = None
    return y, total


def time_of_images(x: Tensor, time: Tensor | None, row: Tensor | None) -> Tensor | None:
    """The rows [N, K] of ``time`` where each image has its own."""
    return time if time is not None and row is None and len(time) > 1 else None


def finish(y: Tensor, time: Tensor | None, residual: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """What is behind the product and not in it yet, in place; then the result in ``dtype``."""
    if time is not None:
        y = y.add_(time[:, :, None, None])
    if residual is not None:
        y = y.add_(residual)
    if scale != 1.0:
        y = y.mul_(scale)
    return y if y.dtype == dtype else y.to(dtype)
