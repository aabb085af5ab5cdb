"""GroupNorm, time embedding and activation on a CPU, over channels_last maps and without copies into another layout.

torch's own kernel for channels_last takes the variance as the mean of squares less the square of the mean, which
loses what a large mean hides. Here each channel's mean and centred square are taken in two passes, merged into
groups (Chan et al. 1979), and applied as one factor and one summand a channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = 16384  # elements of an image up to which a few operations over the batch beat one call an image
PART = 4096  # pixels summed in one go: float32 sums of many more would round
CACHED = 131072  # elements that a core keeps in its cache from one operation to the next


class ChannelStats(NamedTuple):
    """Of the pixels of each of P equal parts of an image, by channel."""

    mean: Tensor  # float32 [N, P, C]
    var: Tensor  # float32 [N, P, C], biased


def channel_stats(x: Tensor) -> ChannelStats:  # [N, C, H, W], channels_last
    """Mean and variance of each channel, centred before it is squared."""
    n, channels, h, w = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(n, h * w, channels)
    if (n > 1 and channels * h * w <= SMALL) or x.dtype == torch.float16:
        pixels = pixels.float()
        mean = pixels.mean(1, keepdim=True)
        return ChannelStats(mean, (pixels - mean).square_().mean(1, keepdim=True))
    parts = next(p for p in range(-(-h * w // PART), h * w + 1) if h * w % p == 0)
    rows = pixels.view(n * parts, 1, h * w // parts, channels).permute(0, 3, 1, 2)
    # With them float32, the statistics of bfloat16 are float32 too.
    running = (x.new_zeros(channels, dtype=torch.float32),) * 2 if x.dtype != torch.float32 else (None, None)
    found = [torch.batch_norm_update_stats(row, *running, 0.0) for row in rows.split(1)]
    mean, var = (torch.stack(values).view(n, parts, channels) for values in zip(*found))
    return ChannelStats(mean, var)


def coefficients(
    stats: list[ChannelStats],  # of x, and of the skip
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    groups: int,
    eps: float,
    bias_row: Tensor | None = None,
    scale_shift: Tensor | None = None,
    row: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # float32 [N, C, 1, 1]
    """(factor, summand): the normalisation and all that surrounds it, as factor * x + summand for each channel."""
    mean, var = stats[0] if len(stats) == 1 else (torch.cat(values, dim=2) for values in zip(*stats))
    n, parts, channels = mean.shape
    added = None if bias_row is None else _rows(bias_row, row)[:, None]
    if added is not None:
        mean = mean + added
    between, centre = torch.var_mean(mean.view(n, parts, groups, -1), dim=(1, 3), correction=0)  # [N, G]
    within = var.view(n, parts, groups, -1).mean(dim=(1, 3))
    rstd = within.add_(between).add_(eps).rsqrt_()[:, :, None]
    width = channels // groups
    if weight is None:
        factor = rstd.expand(n, groups, width)
    else:
        factor = rstd * weight.float().view(groups, width)
    summand = -centre[:, :, None] * factor
    if bias is not None:
        summand += bias.float().view(groups, width)
    factor, summand = factor.reshape(n, channels), summand.view(n, channels)
    if added is not None:
        summand = torch.addcmul(summand, added[:, 0], factor)
    if scale_shift is not None:
        scale, shift = _rows(scale_shift, row).chunk(2, dim=1)
        factor, summand = factor * (1 + scale), torch.addcmul(shift, summand, 1 + scale)
    return factor[:, :, None, None], summand[:, :, None, None]


def _rows(table: Tensor, row: Tensor | None) -> Tensor:
    return (table if row is None else table.index_select(0, row[:1])).float()


def norm_act(
    x: Tensor,  # [N, C1, H, W], channels_last
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    *,
    skip: Tensor | None = None,  # [N, C2, H, W], channels_last
    act: str = "silu",
    bias_row: Tensor | None = None,
    scale_shift: Tensor | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # [N, C, H, W], channels_last, in x's dtype
    """`reference.norm_act`. The concatenation is never made: each part is read where it lies."""
    sources = [x] if skip is None else [x, skip]
    channels = sum(s.shape[1] for s in sources)
    if x.dtype not in DTYPES or channels % groups:
        return reference.norm_act(
            x,
            weight,
            bias,
            groups,
            eps,
            skip=skip,
            act=act,
            bias_row=bias_row,
            scale_shift=scale_shift,
            row=row,
            residual=residual,
        )
    sources = [s.contiguous(memory_format=torch.channels_last) for s in sources]
    factor, summand = coefficients(
        [channel_stats(s) for s in sources], weight, bias, groups, eps, bias_row, scale_shift, row
    )
    n, _, h, w = x.shape
    out = torch.empty((n, channels, h, w), dtype=x.dtype, memory_format=torch.channels_last)
    first = 0
    for source in sources:
        mine = slice(first, first + source.shape[1])
        first = mine.stop
        apply(
            source,
            factor[:, mine],
            summand[:, mine],
            act,
            out[:, mine],
            None if residual is None else residual[:, mine],
        )
    return out


def apply(
    x: Tensor,  # [N, C, H, W], channels_last
    factor: Tensor,  # [N, C, 1, 1]
    summand: Tensor,  # [N, C, 1, 1]
    act: str,
    out: Tensor,  # [N, C, H, W]
    residual: Tensor | None = None,
) -> None:
    """out = act(factor * x + summand) (+ residual), as many images at once as stay in the cache; rounded once."""
    images = max(1, CACHED * torch.get_num_threads() // x[0].numel())
    for i in range(0, len(x), images):
        part = slice(i, i + images)
        y = out[part]
        if x.dtype == torch.float32:
            torch.addcmul(summand[part], x[part], factor[part], out=y)
            wide = y
        else:
            wide = torch.addcmul(summand[part], x[part].float(), factor[part])
        if act in ("silu", "swish"):
            F.silu(wide, inplace=True)
        elif act != "none":
            wide = ACTIVATIONS[act](wide)
        if residual is not None:
            wide = wide.add_(residual[part])
        if wide is not y:
            y.copy_(wide)
