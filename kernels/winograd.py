"""3x3 convolutions on a CPU by Winograd's minimal filtering (Lavin and Gray 2016), stride 1, padding 1.

A map is cut into overlapping patches; each is transformed, multiplied position by position with transformed weights,
and transformed back. All products are one grouped 1x1 convolution of oneDNN, a group a position: on a batch of
matrices that was 1.1 to 1.7 times as fast as bmm. Upsampling by 2 before a 3x3 convolution has the same form.

Letters: P positions of a patch, T patches (tiles), Cp and Kp channels filled up with zeros to multiples of `PAD`.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import onednn
from .native import at, functions
from .norm_compiled import RAW, rows_of_run, stride

PAD = 16  # channels: a vector of the widest registers, and what oneDNN blocks by


class Scheme(NamedTuple):
    """One axis of a transform: y = A^T ((G w) * (B^T d)), for patches of `patch` pixels that lie `step` apart."""

    number: int  # in the source
    name: str
    step: int
    out: int  # results a patch
    filter: tuple[tuple[float, float, float], ...]  # G [positions, 3]
    input: tuple[tuple[float, ...], ...]  # B^T [positions, patch]
    output: tuple[tuple[float, ...], ...]  # A^T [out, positions]

    @property
    def positions(self) -> int:
        """P: of both axes."""
        return len(self.filter) ** 2

    def tiles(self, n: int, h: int, w: int) -> tuple[int, int, int]:
        return n, -(-h // self.step), -(-w // self.step)


F2 = Scheme(
    0,
    "F(2x2, 3x3)",
    2,
    2,
    filter=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    input=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    output=((1, 1, 1, 0), (0, 1, -1, -1)),
)
F4 = Scheme(
    1,
    "F(4x4, 3x3)",
    4,
    4,
    filter=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    input=(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    output=((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)
# Nearest-neighbour upsampling, then 3 taps: y[2i] = S d_i - w0 (d_i - d_{i-1}), y[2i+1] = S d_i + w2 (d_{i+1} - d_i),
# S = w0 + w1 + w2; transforms of the map are exact.
UP = Scheme(
    2,
    "upsampling by differences",
    1,
    2,
    filter=((1, 1, 1), (1, 0, 0), (0, 0, 1)),
    input=((0, 1, 0), (-1, 1, 0), (0, -1, 1)),
    output=((1, -1, 0), (1, 0, 1)),
)


# Fitted on one core with AVX-512, in multiplications of a long product: only ratios are used.
FEW_PATCHES = 9  # a product over T patches takes the time of T + 9: weights are read, blocks not filled
DIRECT_GAIN = 1.17  # how much faster than a long product the direct convolution multiplies
MOVING = {torch.float32: 20, torch.bfloat16: 29}  # the transforms, for each element they write or read
SCHEMES = {torch.float32: (F2, F4), torch.bfloat16: (F2,)}  # F4 would cost bfloat16 ten times its rounding error


@cache
def scheme_for(dtype: torch.dtype, n: int, c: int, h: int, w: int, k: int) -> Scheme | None:
    """What a 3x3 convolution [n, c, h, w] -> k channels takes; None: the direct one.

    Of the least modelled time: F(4x4) has the fewest multiplications, but also the most positions, and with few
    patches (small images, small batches) reading its weights outweighs them.
    """
    best, least = None, 9 * n * h * w * c * k / DIRECT_GAIN
    cp, kp = _filled_up(c), _filled_up(k)
    for scheme in SCHEMES[dtype]:
        a, b, d = scheme.tiles(n, h, w)
        t = a * b * d
        time = scheme.positions * (cp * kp * (t + FEW_PATCHES) + MOVING[dtype] * t * (cp + kp))
        if time < least:
            best, least = scheme, time
    return best


def transformed_filter(weight: Tensor, scheme: Scheme) -> Tensor:
    """[K, C, 3, 3] -> float64 [P, K, C]."""
    g = torch.tensor(scheme.filter, dtype=torch.float64, device="cpu")
    both = torch.einsum("ia,jb->ijab", g, g).reshape(-1, 9)
    k, c = weight.shape[:2]
    return (both @ weight.double().reshape(k * c, 9).T).view(-1, k, c)


def _filled_up(channels: int) -> int:
    return -(-channels // PAD) * PAD


class Products:
    """Transformed weights as oneDNN multiplies with them, arranged once for each number of patches."""

    CACHED = 4  # numbers of patches: those of a whole batch's chunks, and of the last partial one

    def __init__(self, weight: Tensor, scheme: Scheme, dtype: torch.dtype):  # [K, C, 3, 3], unrounded
        k, c = weight.shape[:2]
        self.scheme, self.dtype = scheme, dtype
        self.kp, self.cp = _filled_up(k), _filled_up(c)
        filters = torch.zeros(scheme.positions, self.kp, self.cp, dtype=dtype, device="cpu")
        filters[:, :k, :c] = transformed_filter(weight, scheme)
        self._plain: Tensor | None = filters
        self._arranged: OrderedDict[int, Tensor] = OrderedDict()
        self._packs = onednn.computes(dtype)

    def tensors(self) -> list[Tensor]:
        return [t for t in (self._plain, *self._arranged.values()) if t is not None]

    def plain(self) -> Tensor:
        """[P, Kp, Cp]."""
        if self._plain is not None:
            return self._plain
        return next(iter(self._arranged.values())).to_dense().view(-1, self.kp, self.cp)

    def _for(self, tiles: int) -> Tensor:
        found = self._arranged.get(tiles)
        if found is None:
            p = self.scheme.positions
            shape = [1, p * self.cp, tiles, 1]
            flat = self.plain().reshape(p * self.kp, self.cp, 1, 1)
            found = torch.ops.mkldnn._reorder_convolution_weight(flat, [0, 0], [1, 1], [1, 1], p, shape)
            while len(self._arranged) >= self.CACHED:
                self._arranged.popitem(last=False)
            self._arranged[tiles], self._plain = found, None
        else:
            self._arranged.move_to_end(tiles)
        return found

    def __call__(self, v: Tensor) -> Tensor:  # [T, P, Cp] -> [T, P, Kp]
        tiles, p = v.shape[0], self.scheme.positions
        if not self._packs:
            return torch.bmm(v.transpose(0, 1), self.plain().transpose(1, 2)).transpose(0, 1).contiguous()
        # As an image of T x 1 pixels in channels_last.
        pixels = v.view(1, tiles, 1, p * self.cp).permute(0, 3, 1, 2)
        m = torch.ops.mkldnn._convolution_pointwise(
            pixels, self._for(tiles), None, [0, 0], [1, 1], [1, 1], p, "none", [], ""
        )
        return m.permute(0, 2, 3, 1).contiguous().view(tiles, p, self.kp)


class Source(NamedTuple):
    """What an input transform reads: act(scale * [x, skip] + shift), nothing of it computed yet."""

    x: Tensor  # [N, C1, H, W], channels_last
    skip: Tensor | None = None  # [N, C2, H, W], channels_last
    scale: Tensor | None = None  # float32 [N, C]
    shift: Tensor | None = None
    act: int = RAW

    @property
    def channels(self) -> int:
        return self.x.shape[1] + (0 if self.skip is None else self.skip.shape[1])


class PartStats(NamedTuple):
    """Mean and centred sum of squares of each channel over each run of ``rows`` rows of an image."""

    values: Tensor  # float32 [N, ceil(H / rows), 2, C]
    rows: int


class Kernels:
    """The functions of winograd_source.py, for one element type; tensors in, tensors out, torch's threads."""

    def __init__(self, library: ctypes.CDLL):
        self._functions = functions(library, _SIGNATURES)

    def input_transform(self, scheme: Scheme, s: Source, v: Tensor, begin: int = 0) -> None:
        """Write the transformed patches of whole rows of tiles, v [T, P, Cp], from row ``begin`` of the batch on."""
        n, c1, h, w = s.x.shape
        c2 = s.channels - c1
        rows = v.shape[0] // scheme.tiles(n, h, w)[2]
        arguments = at(v), at(s.x), at(s.skip), at(s.scale), at(s.shift), s.act, n, h, w, c1, c2, v.shape[2]
        self._functions["input_transform"](scheme.number, *arguments, begin, rows, torch.get_num_threads())

    def output_transform(
        self,
        scheme: Scheme,
        m: Tensor,  # [T, P, Kp]: products of whole rows of tiles
        y: Tensor,  # [N, K, H', W'], channels_last: where their results are written
        bias: Tensor | None = None,  # float32 [K]
        time: Tensor | None = None,  # float32 [1 or N, K]
        residual: Tensor | None = None,  # as y
        scale: float = 1.0,
        stats: PartStats | None = None,  # from `stats_of`: written too
        begin: int = 0,  # the first row of tiles, of those of the batch
    ) -> None:
        _, k, h, w = y.shape
        h, w = h * scheme.step // scheme.out, w * scheme.step // scheme.out
        rows = m.shape[0] // scheme.tiles(1, h, w)[2]
        values = None if stats is None else stats.values
        arguments = at(y), at(m), at(bias), at(time), stride(time), at(residual), scale, at(values), h, w, k, m.shape[2]
        self._functions["output_transform"](scheme.number, *arguments, begin, rows, torch.get_num_threads())

    @staticmethod
    def stats_of(scheme: Scheme, y: Tensor) -> PartStats:
        """Room for the statistics of a result [N, K, H', W']."""
        return PartStats(_floats(y.shape[0], -(-y.shape[2] // scheme.out), 2, y.shape[1]), scheme.out)

    def statistics(self, x: Tensor) -> PartStats:  # [N, C, H, W], channels_last
        n, c, h, w = x.shape
        rows = rows_of_run(h, w)
        stats = PartStats(_floats(n, -(-h // rows), 2, c), rows)
        self._functions["channel_statistics"](at(stats.values), at(x), n, h, w, c, rows, torch.get_num_threads())
        return stats

    def norm_affine(
        self,
        x: Tensor,  # [N, C1, H, W], for its shape
        stats: PartStats,
        skip: PartStats | None,
        groups: int,
        eps: float,
        weight: Tensor | None,  # float32 [C]
        bias: Tensor | None,
        bias_row: Tensor | None,  # float32 [1 or N, C]
        scale_shift: Tensor | None,  # float32 [1 or N, 2C]
    ) -> tuple[Tensor, Tensor]:  # float32 [N, C]
        """Normalisation and what surrounds it, as scale * x + shift."""
        n, c1, h, w = x.shape
        c2 = 0 if skip is None else skip.values.shape[3]
        scale, shift = _floats(2, n, c1 + c2).unbind()
        self._functions["norm_affine"](
            at(scale), at(shift), at(stats.values), c1, stats.rows, at(skip and skip.values), c2,
            1 if skip is None else skip.rows, n, h, w, groups, eps, at(weight), at(bias), at(bias_row),
            stride(bias_row), at(scale_shift), stride(scale_shift), torch.get_num_threads(),
        )  # fmt: skip
        return scale, shift

    def norm_apply(self, s: Source, residual: Tensor | None = None) -> Tensor:  # [N, C, H, W], channels_last
        n, c1, h, w = s.x.shape
        c2 = s.channels - c1
        y = torch.empty((n, c1 + c2, h, w), dtype=s.x.dtype, device="cpu", memory_format=torch.channels_last)
        arguments = at(y), at(s.x), at(s.skip), at(s.scale), at(s.shift), s.act, at(residual), n, h, w, c1, c2
        self._functions["norm_apply"](*arguments, torch.get_num_threads())
        return y


def _floats(*shape: int) -> Tensor:
    """Memory for the compiled functions to write: of their type and on the host, whatever torch's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


_P, _I, _J = c_void_p, c_int, c_int64
_SIGNATURES: dict[str, list[type]] = {
    "input_transform": [_I, *[_P] * 5, _I, *[_J] * 8, _I],
    "output_transform": [_I, *[_P] * 4, _J, _P, c_float, _P, *[_J] * 6, _I],
    "channel_statistics": [_P, _P, *[_J] * 5, _I],
    "norm_affine": [_P, _P, _P, _J, _J, _P, _J, _J, *[_J] * 4, c_double, _P, _P, _P, _J, _P, _J, _I],
    "norm_apply": [*[_P] * 5, _I, _P, *[_J] * 5, _I],
}
