"""A norm_act and the convolution that reads it, cut up: some images of a batch at a time, or some rows of a single one.

So the normalised map never lies whole. Neither changes a bit: statistics are there beforehand, a sample does not
depend on the images beside it, and each pixel of a convolution is summed in the same order wherever a cut runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels import reference
from ..kernels.reference import Shortcut

LEAST_CHANNELS = 8  # that the launch of a norm_act, and with it the order of its sums, does not depend on the rows
ALL = slice(None)


class Part(NamedTuple):
    """What one pair of launches makes."""

    images: slice
    read: slice = ALL  # rows that are normalised
    written: slice = ALL  # rows of the convolution's result
    padding: reference.Sides | None = None  # of the convolution, where it has rows only

    def of_norm(self, a: Mapping[str, Any], n: int) -> dict[str, Any]:
        """A norm_act's arguments, of ``n`` images, for this part."""
        return _of(a, n, self.images, self.read)

    def of_conv(self, a: Mapping[str, Any], n: int) -> dict[str, Any]:
        """A convolution's arguments but x."""
        part = _of(a, n, self.images, self.written)
        return part if self.padding is None else part | {"padding": self.padding}

    def of_stats(self, stats: Tensor, height: int) -> Tensor:
        """Of the statistics [N, P, 3, K] of a result of so many rows."""
        if self.written == ALL:
            return stats[self.images]
        parts = stats.shape[1]
        return stats[:, self.written.start * parts // height : self.written.stop * parts // height]


def cut(
    operation: str,
    x: Sequence[int],  # [N, C, H, W]: the normalised map
    taps: int,  # an axis, of the convolution's weights
    a: Mapping[str, Any],  # the convolution's arguments by name
    parts: int,
) -> list[Part]:
    """At most so many parts; none where the two must run whole: an image is cut for 3x3 of stride 1 alone."""
    n, channels, h, w = x
    if n > 1:
        size = -(-n // parts)
        return [Part(slice(first, min(first + size, n))) for first in range(0, n, size)]
    plain = operation == "conv" and taps == 3 and a["stride"] == 1
    if not plain or channels < LEAST_CHANNELS or reference.sides(a["padding"], taps) != (1, 1, 1, 1):
        return []
    return [
        Part(
            slice(0, 1),
            slice(max(0, first - 1), min(last + 1, h)),
            slice(first, last),
            reference.Sides(int(first == 0), int(last == h), 1, 1),
        )
        for first, last in _runs(h, w, parts)
    ]


def _runs(height: int, width: int, parts: int) -> list[tuple[int, int]]:
    """Rows in at most so many runs of whole tiles, whose statistics are cut as the image's; or none."""
    from ..kernels.conv_plan import LARGEST_TILE
    from ..kernels.launch_conv import part_pixels

    rows = math.lcm(width, LARGEST_TILE) // width
    tiles = height // rows
    if height % rows or tiles < 2:
        return []
    ends = [tiles * i // min(parts, tiles) * rows for i in range(min(parts, tiles) + 1)]
    runs = list(itertools.pairwise(ends))
    alike = all(part_pixels(b - a, width) == part_pixels(height, width) for a, b in runs)
    return runs if alike else []


def _of(a: Mapping[str, Any], n: int, images: slice, rows: slice) -> dict[str, Any]:
    part = dict(a)
    for name in ("x", "skip", "residual", "out"):
        if part.get(name) is not None:
            part[name] = part[name][images, :, rows]
    for name in ("stats", "skip_stats"):
        if part.get(name) is not None:
            part[name] = part[name][images]
    for name in ("time", "bias_row", "scale_shift"):
        if part.get(name) is not None and part["row"] is None and len(part[name]) == n:
            part[name] = part[name][images]
    if part.get("shortcut") is not None:
        s = part["shortcut"]
        skip = None if s.skip is None else s.skip[images, :, rows]
        part["shortcut"] = Shortcut(s.x[images, :, rows], skip, s.weight, s.bias)
    return part
