"""Nearest-neighbour upsampling by 2 and a 3x3 convolution, as 1x1 or 2x2 convolutions of the small map.

Two forms, both exact in real arithmetic, beside the direct one that small maps take:

- differences, 9 products a pixel instead of 36. Along one axis, with taps w0, w1, w2, S = w0 + w1 + w2 and
  e_i = d_i - d_{i-1} (zeros outside): y[2i] = S d_i - w0 e_i and y[2i+1] = S d_i + w2 e_{i+1}; both axes in turn.
  Sums of products that are rounded one by one: for float32.
- summed taps, 16 products: outputs of each of the four parities are a 2x2 convolution. As accurate as the direct
  form in any dtype, since each output is one sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onednn, reference
from .onednn import Weight
from .reference import Shortcut

DIRECT = 5e7  # FLOPs of the direct form, up to which the calls that the others take cost more than they save


class PackedUpsample:
    """Weights of `upsample_conv`, made into those of a form when it is first needed."""

    size, phases = 2, 4

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.out_channels, self.channels = weight.shape[0], (weight.shape[1],)
        self.dtype, self.device = dtype, weight.device
        self.computed = onednn.compute_dtype(dtype)
        self._weight = weight.detach().clone()
        self._parts: dict[str, list[Weight]] = {}

    def form(self, shape: torch.Size) -> str:  # [N, C, H, W]
        """Which of `_FORMS` an input takes."""
        n, channels, h, w = shape
        if 2 * 36 * n * h * w * channels * self.out_channels <= DIRECT:
            return "direct"
        return "differences" if self.dtype == torch.float32 else "taps"

    def parts(self, form: str) -> list[Weight]:
        """Weights of a form; taps are summed in float64 and rounded once."""
        if form not in self._parts:
            made = _FORMS[form](self._weight.double())
            self._parts[form] = [Weight(part.to(self.dtype).to(self.computed)) for part in made]
        return self._parts[form]

    def tensors(self) -> list[Tensor]:
        return [self._weight, *(t for parts in self._parts.values() for part in parts for t in part.tensors())]


def pack_upsample_conv(weight: Tensor, *, dtype: torch.dtype | None = None) -> PackedUpsample:  # [K, C, 3, 3]
    """Weights for ``dtype``. They are kept as they are beside the sums made of them."""
    if tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"upsample_conv needs [K, C, 3, 3] weights; got {list(weight.shape)}; use upsample, then conv")
    return PackedUpsample(weight, dtype or weight.dtype)


def _differences(weight: Tensor) -> list[Tensor]:
    """1x1 weights: both sums; sum down and both edges across [2K]; for each edge down the sum, and both across [2K].

    An edge's pair has the odd output before it, then the even one behind it: then pairs follow each other in memory
    as the outputs do.
    """

    def edges(w: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        return w.select(axis, 2), -w.select(axis, 0)

    rows = weight.sum(2), *edges(weight, 2)  # each [K, C, 3]
    both = [torch.cat(edges(r, 2)) for r in rows]
    parts = [rows[0].sum(2), both[0], rows[1].sum(2), rows[2].sum(2), both[1], both[2]]
    return [p[:, :, None, None] for p in parts]


def _summed_taps(weight: Tensor) -> list[Tensor]:
    """2x2 weights of the outputs at (even, even), (even, odd), (odd, even), (odd, odd)."""
    return [across for down in _fold(weight, 2) for across in _fold(down, 3)]


def _fold(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    first, middle, last = weight.unbind(axis)
    return torch.stack((first, middle + last), axis), torch.stack((first + middle, last), axis)


_FORMS = {"direct": lambda weight: [weight], "differences": _differences, "taps": _summed_taps}


def upsample_conv(
    x: Tensor,  # [N, C, H, W], channels_last
    weight: PackedUpsample | Tensor,
    bias: Tensor | None = None,
    *,
    time: Tensor | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Shortcut | None = None,
    scale: float = 1.0,
) -> Tensor:  # [N, K, 2H, 2W]
    """`reference.upsample_conv`."""
    if not isinstance(weight, PackedUpsample):
        y = reference.upsample_conv(
            x, weight, bias, time=time, row=row, residual=residual, shortcut=shortcut, scale=scale
        )
        assert isinstance(y, Tensor)
        return y.contiguous(memory_format=torch.channels_last)
    beside, total = onednn.around(x, bias, time, row, shortcut, weight.computed)
    source = x.to(weight.computed).contiguous(memory_format=torch.channels_last)
    form = weight.form(source.shape)
    parts = weight.parts(form)
    if form == "direct":
        y = parts[0].convolve(reference.upsample(source), total, padding=1)
    else:
        y = (_by_differences if form == "differences" else _by_taps)(source, parts, weight.out_channels, total)
    if beside is not None:
        y = y.add_(beside)
    return onednn.finish(y, onednn.time_of_images(x, time, row), residual, scale, x.dtype)


def _by_differences(x: Tensor, parts: list[Weight], k: int, bias: Tensor | None) -> Tensor:
    n, _, h, w = x.shape
    across, down = difference(x, 3), difference(x, 2)
    edge = difference(across, 2)

    def product(source: Tensor, part: int, bias: Tensor | None = None) -> Tensor:
        return parts[part].convolve(source, bias).permute(0, 2, 3, 1)

    def row_of_pairs(whole: Tensor, edges: Tensor) -> Tensor:
        """[N, h, W, K] + [N, h, W + 1, 2K] -> [N, h, W, 2, K]: what is common to two outputs, and their edges."""
        pairs = edges.reshape(n, edges.shape[1], 2 * (w + 1), k)[:, :, 1:-1].unflatten(2, (w, 2))
        return pairs.add_(whole[:, :, :, None])

    middle = row_of_pairs(product(x, 0, bias), product(across, 1))
    y = torch.empty((n, h, 2, w, 2, k), dtype=x.dtype, device=x.device)
    for parity, rows, part in ((1, slice(1, None), 2), (0, slice(-1), 3)):
        edges = row_of_pairs(product(down, part), product(edge, part + 2))
        torch.add(middle, edges[:, rows], out=y[:, :, parity])
    return y.view(n, 2 * h, 2 * w, k).permute(0, 3, 1, 2)


def difference(x: Tensor, axis: int) -> Tensor:  # [N, C, H, W], channels_last
    """x_i - x_{i-1} along an axis of length L, with zeros outside: L + 1 values."""
    length = x.shape[axis]
    shape = list(x.shape)
    shape[axis] += 1
    e = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    e.narrow(axis, 0, 1).copy_(x.narrow(axis, 0, 1))
    torch.sub(x.narrow(axis, 1, length - 1), x.narrow(axis, 0, length - 1), out=e.narrow(axis, 1, length - 1))
    torch.neg(x.narrow(axis, length - 1, 1), out=e.narrow(axis, length, 1))
    return e


def _by_taps(x: Tensor, parts: list[Weight], k: int, bias: Tensor | None) -> Tensor:
    n, _, h, w = x.shape
    padded = F.pad(x, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    y = torch.empty((n, h, 2, w, 2, k), dtype=x.dtype, device=x.device)
    for i, part in enumerate(parts):
        a, b = divmod(i, 2)
        y[:, :, a, :, b] = part.convolve(padded[:, :, a : a + h + 1, b : b + w + 1], bias).permute(0, 2, 3, 1)
    return y.view(n, 2 * h, 2 * w, k).permute(0, 3, 1, 2)
