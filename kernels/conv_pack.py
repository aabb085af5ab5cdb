"""Weights in the layout that the fused convolution reads, packed once for a prepared model."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import cdiv


class PackedConv(NamedTuple):
    """Convolution weights as one matrix: a row for an output channel, columns in the order of summation.

    Columns run over (phase,) tap row, tap column, source, channel; each source's channels are padded with
    zeros to a multiple of the slice depth `slice_channels`. Only upsampling has phases: four of 2x2 taps.
    """

    matrix: Tensor  # [rows, columns] in the compute dtype, contiguous
    out_channels: int  # K; rows beyond it are padding
    channels: tuple[int, ...]  # of x, and of the skip where there is one, as the activations have them
    size: int  # taps an axis: 1, 3, ...; 2 for the phases of upsampling
    phases: int  # 4 for upsampling, else 1
    in_channels: int  # C of the weights: fewer than `channels` sum to where an input lies padded with zeros

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device


def slice_channels(channels: tuple[int, ...], dtype: torch.dtype) -> int:
    """Depth of a K slice, from the sources' channel counts and the dtype alone (it fixes the order of sums).

    64 channels of half precision are one 128-byte line of swizzled shared memory, four matrix instructions
    deep. Fewer where that would multiply padding: a slice costs about as much as 16 channels beside its own.
    Full float32 multiplies in registers, which 32 channels already fill.
    """
    depths = (32, 16) if dtype == torch.float32 else (64, 32, 16)
    return min(depths, key=lambda d: sum(cdiv(c, d) for c in channels) * (d + 16))


def pack_conv(
    weight: Tensor,  # [K, C, k, k]
    *,
    dtype: torch.dtype | None = None,  # None: the weight's
    channels: tuple[int, ...] | None = None,  # (C1, C2) with a skip; (C',) with C' > C for an input padded by zeros
) -> PackedConv:
    """Pack the weights of `conv`, or of a shortcut (k = 1)."""
    total = weight.shape[1]
    channels = (total,) if channels is None else tuple(channels)
    if weight.shape[2] != weight.shape[3] or sum(channels) < total or (len(channels) > 1 and sum(channels) != total):
        raise ValueError(
            "pack_conv needs [K, C, k, k] weights and channels that sum to C (one source may have more); got "
            f"{list(weight.shape)} and channels={channels}; name the channels of x and of the skip"
        )
    wide = F.pad(weight, (0, 0, 0, 0, 0, sum(channels) - total))
    matrix = _columns(wide, channels, dtype or weight.dtype)
    return PackedConv(matrix, weight.shape[0], channels, weight.shape[2], phases=1, in_channels=total)


def pack_upsample_conv(weight: Tensor, *, dtype: torch.dtype | None = None) -> PackedConv:  # weight: [K, C, 3, 3]
    """The four phases of nearest upsampling by 2 followed by a 3x3 convolution, each with 2x2 taps.

    Output pixel 2i + a sees upsampled rows 2i + a - 1 to 2i + a + 1: input rows i - 1, i, i where a = 0 and
    i, i, i + 1 where a = 1. Taps that meet the same input pixel are summed in float32 and rounded once.
    """
    if tuple(weight.shape[2:]) != (3, 3):
        raise ValueError(f"upsample_conv needs [K, C, 3, 3] weights; got {list(weight.shape)}; use upsample, then conv")
    dtype = dtype or weight.dtype
    channels = (weight.shape[1],)
    rows = _fold(weight.float(), 2)
    phases = [_columns(p, channels, dtype) for r in rows for p in _fold(r, 3)]
    matrix = torch.cat(phases, dim=1)
    return PackedConv(matrix, weight.shape[0], channels, size=2, phases=4, in_channels=weight.shape[1])


def pack_step_conv(weight: Tensor, image_channels: int, *, dtype: torch.dtype | None = None) -> PackedConv:
    """Pack the weights [K, C, k, k] of `conv_step`: K is ``image_channels``, or twice that with a learned variance.

    Each half gets `step_rows` rows, so that the epilogue finds a channel's two outputs in matching rows.
    """
    rows = step_rows(image_channels)
    halves = [F.pad(half, (0, 0, 0, 0, 0, 0, 0, rows - len(half))) for half in weight.split(image_channels)]
    return pack_conv(torch.cat(halves), dtype=dtype)._replace(out_channels=weight.shape[0])


def step_rows(image_channels: int) -> int:
    """Rows of the product for each half of the network's output: a power of two, at least 4."""
    return max(4, 1 << (image_channels - 1).bit_length())


def _fold(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Three taps along ``axis`` to two, for the even and for the odd outputs."""
    first, middle, last = weight.unbind(axis)
    return torch.stack((first, middle + last), axis), torch.stack((first + middle, last), axis)


def _columns(weight: Tensor, channels: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[K, sum(channels), k, k] -> [K, k * k * padded channels]."""
    depth = slice_channels(channels, dtype)
    padded = [F.pad(w, (0, 0, 0, 0, 0, -w.shape[1] % depth)) for w in weight.split(list(channels), dim=1)]
    return torch.cat(padded, dim=1).permute(0, 2, 3, 1).to(dtype).flatten(1).contiguous()
