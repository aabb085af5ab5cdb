"""Launch choices of the convolution: pure functions of shape, dtype and architecture."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from .launch import Launch, cdiv, next_power_of_2

# Streaming multiprocessors of the largest common part of each architecture (A100, RTX 3090, RTX 4090,
# H100 SXM, B200, RTX 5090). Only the size of tiles follows from it, never a result.
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170}


def part_pixels(height: int, width: int) -> int:
    """Pixels in one entry of the partial statistics of an image (or phase) of height x width.

    Every tile holds whole parts, so small parts let small images use small tiles, and large parts write
    less: 12 bytes a part and channel. At most 128, so that a batch of 1 can still take narrow tiles.
    """
    pixels = height * width
    if pixels <= 256:
        return min(32, max(8, next_power_of_2(pixels)))
    return 64 if pixels < 128 * 128 else 128


def has_descriptors(arch: int) -> bool:
    """Bulk-tensor copies exist from sm_90 on; before, Triton turns a descriptor into 2-byte loads."""
    return arch >= 90


def in_order(arch: int, dtype: torch.dtype, channels: int) -> int:
    """Pixels whose sum may be left to one reduction over the product's layout; see conv_kernel._part_sums.

    A tile of ``channels`` rows. mma.sync (sm_80 to sm_89, sm_120, narrow tiles) deals 8 columns to a warp and the
    next 8 to whichever warp the tile puts there; tcgen05 halves the columns of a 64-row tile. wgmma keeps the
    columns of a row in one warp, given one warpgroup for each 64 rows (`TILES` does), so there a whole part is
    summed in registers first, with fewer shuffles. Float32 products have no fixed layout at all.
    """
    if dtype == torch.float32:
        return 1
    return 128 if arch == 90 and channels >= 64 else 8


def _has_groups(arch: int) -> bool:
    return 90 <= arch < 120


class Tile(NamedTuple):
    channels: int  # output channels
    pixels: int
    warps: int
    efficiency: float  # of the matrix units while the loop runs, guessed from the operand bytes a product needs
    why: str


TILES = (
    Tile(128, 128, 8, 1.0, "square, 3 stages in 96 KB: two programs a multiprocessor overlap loop and epilogue"),
    Tile(64, 128, 4, 0.8, "half a square: for few channels, or where squares leave multiprocessors idle"),
    Tile(64, 64, 4, 0.65, "small: spreads a small batch"),
    Tile(64, 32, 4, 0.45, "smaller: spreads a batch of 1"),
    Tile(64, 16, 4, 0.3, "smallest: a batch of 1 at 8x8 and below"),
)
# Except wgmma, all need 8 warps for 64 x 128, 4 spill: mma.sync (its operands are registers too) and tcgen05.
EIGHT_WARP_TILES = tuple(t._replace(warps=8) if t.channels * t.pixels == 64 * 128 else t for t in TILES)
NARROW_TILES = (
    Tile(16, 128, 4, 0.5, "at most 16 output channels: 16 is the least that a matrix instruction takes"),
    Tile(16, 64, 4, 0.4, "at most 16 output channels, spread wider"),
)
FULL_PRECISION_TILES = (
    Tile(64, 64, 4, 1.0, "float32 multiplies on the ordinary units: an accumulator that fits the registers"),
    Tile(32, 128, 8, 0.9, "float32, where an entry of the statistics takes 128 pixels; 4 warps would spill"),
    Tile(32, 32, 4, 0.7, "float32, spread wider"),
)
NARROW_FULL_PRECISION_TILES = (
    Tile(16, 128, 4, 0.6, "float32, at most 16 output channels, whole entries of the statistics"),
    Tile(16, 32, 2, 0.5, "float32, at most 16 output channels, spread wider"),
)


@cache
def conv_launch(
    pixels: int,  # columns of the product, all images and phases
    out_channels: int,
    depth: int,  # channels of the deepest K slice
    part: int,  # pixels that a tile must hold at least (statistics), or 1
    dtype: torch.dtype,
    arch: int,  # compute capability, 90 for sm_90
) -> Launch:
    """The tile that finishes first: rounds over the multiprocessors times the time of one round."""
    narrow = out_channels <= 16
    if dtype == torch.float32:
        tiles: tuple[Tile, ...] = NARROW_FULL_PRECISION_TILES if narrow else FULL_PRECISION_TILES
    else:
        tiles = NARROW_TILES if narrow else TILES if arch == 90 else EIGHT_WARP_TILES
    usable = [t for t in tiles if t.pixels >= part]
    sms = MULTIPROCESSORS.get(arch, 128)
    tile = min(usable, key=lambda t: _time(t, pixels, out_channels, sms))
    return Launch(
        num_warps=tile.warps,
        num_stages=_stages(tile, depth, dtype, arch),
        meta={"BN": tile.channels, "BM": tile.pixels, "RUN": min(part, in_order(arch, dtype, tile.channels))},
        reason=tile.why,
    )


@cache
def step_launch(
    pixels: int,  # of one image
    out_channels: int,  # rows of the packed weights
    dtype: torch.dtype,
    arch: int,
) -> Launch:
    """A tile of `conv_step`: all output channels, pixels of a single image (one sample id a program)."""
    channels = max(16, next_power_of_2(out_channels))
    largest = 32 if dtype == torch.float32 else 64
    tile = Tile(channels, max(16, min(largest, next_power_of_2(pixels))), 4, 1.0, "")
    return Launch(
        num_warps=tile.warps,
        num_stages=_stages(tile, 64, dtype, arch),
        meta={"BN": tile.channels, "BM": tile.pixels},
        reason="the whole output in one tile, so that the epilogue has every channel of its pixels; few pixels, since "
        "there is little to reuse and the noise wants registers",
    )


def _time(tile: Tile, pixels: int, out_channels: int, sms: int) -> float:
    """Relative. A slice of a small tile takes as long as its copies' latency, whatever the tile."""
    programs = cdiv(pixels, tile.pixels) * cdiv(out_channels, tile.channels)
    area = tile.channels * tile.pixels / tile.efficiency
    rounds = programs / sms if programs > 4 * sms else cdiv(programs, sms)
    return rounds * max(area, 64 * 32)


def _stages(tile: Tile, depth: int, dtype: torch.dtype, arch: int) -> int:
    """Copies in flight: deep where tiles are small, within the shared memory of the architecture.

    The limit leaves room for two programs on sm_80, sm_90 and sm_100 (164 and 228 KB), and for one in the
    100 KB of sm_86, sm_89 and sm_120. Without warpgroups a loop of s stages keeps s - 1 tiles.
    """
    if dtype == torch.float32:
        return 2
    stage = (tile.channels + tile.pixels) * depth * dtype.itemsize
    if _has_groups(arch) and tile.channels >= 64:
        return max(2, min(5, 104 * 1024 // stage))
    return max(2, min(5, 80 * 1024 // stage + 1))
