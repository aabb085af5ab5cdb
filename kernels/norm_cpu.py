"""GroupNorm, time embedding and activation on a CPU, over channels_last maps and without copies into another layout.

torch's own kernel for channels_last takes the variance as the mean of squares less the square of the mean, from one
running sum: of 128x128 pixels with a mean of one deviation it has float32 errors of 5e-6, of larger means more. Here
squares are centred and sums cascade, which costs one pass more; the rest is one factor and one summand a channel.
Torch's kernel is taken where it does no harm: of small maps in float64, of a few pixels whose groups are nearly
centred, and while means are mild of what is rounded to bfloat16 in the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .reference import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CACHED = 1 << 19  # elements for each core that are taken through all passes before the next images
# |mean| in deviations up to which torch's kernel is off by a tenth at most of what bfloat16 rounds: 4e-4 of 512x512.
MILD = 8.0
# The same in float32, where it is a few times off what centring gives, 2e-7 in RMS: less than a convolution's rounding.
CENTRED, FEW_PIXELS = 1.0, 1 << 10
SMALL = 1 << 15  # elements that torch's kernel takes in float64 sooner than ours its passes


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
    """`reference.norm_act`, in float32 and rounded once."""
    n, channels, h, w = x.shape
    channels += 0 if skip is None else skip.shape[1]
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
    before, after = _rows(bias_row, row, n), _rows(scale_shift, row, n)
    plain = before is None and after is None and residual is None
    if plain and n * channels * h * w <= SMALL:
        y = _by_torch(_wide(x, skip).double(), weight, bias, groups, eps)[0]
        return _activate(y.float(), act).to(x.dtype)
    images = max(1, CACHED * torch.get_num_threads() // (channels * h * w))
    if plain and x.dtype == torch.float32 and h * w <= FEW_PIXELS:
        y, mean, rstd = _by_torch(_wide(x, skip), weight, bias, groups, eps)
        if float((mean * rstd).abs().max()) <= CENTRED:  # not so for NaN
            return _activate(y, act)
    if images >= n and x.dtype == torch.float32:
        wide = _wide(x, skip)
        out = torch.empty_like(wide) if wide is x else wide
        return _normalise(wide, weight, bias, groups, eps, act, before, after, residual, out)
    out = torch.empty((n, channels, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for i in range(0, n, images):
        part = slice(i, i + images)
        wide = _wide(x[part], None if skip is None else skip[part])
        into = out[part] if x.dtype == torch.float32 else wide
        before_part, after_part, beside = (None if t is None else t[part] for t in (before, after, residual))
        if plain and x.dtype == torch.bfloat16:
            y, mean, rstd = _by_torch(wide, weight, bias, groups, eps)
            if float((mean * rstd).abs().max()) <= MILD:  # not so for NaN
                out[part].copy_(_activate(y, act))
                continue
        y = _normalise(wide, weight, bias, groups, eps, act, before_part, after_part, beside, into)
        if y is not into or into is wide:
            out[part].copy_(y)
    return out


def _wide(x: Tensor, skip: Tensor | None) -> Tensor:
    """[x, skip] in float32, channels_last."""
    if skip is None or x.dtype == torch.float32:
        joined = x if skip is None else torch.cat((x, skip), dim=1)
        return joined.float().contiguous(memory_format=torch.channels_last)
    n, channels, h, w = x.shape
    wide = x.new_empty((n, h, w, channels + skip.shape[1]), dtype=torch.float32).permute(0, 3, 1, 2)
    wide[:, :channels].copy_(x)
    wide[:, channels:].copy_(skip)
    return wide


def _rows(table: Tensor | None, row: Tensor | None, n: int) -> Tensor | None:
    """The row of each image: [N, C], float32."""
    if table is None:
        return None
    return (table if row is None else table.index_select(0, row[:1])).float().expand(n, -1).contiguous()


def _by_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised x [N, C, H, W], and each group's mean and reciprocal deviation [N, G], in x's dtype."""
    n, channels, h, w = x.shape
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return torch.native_group_norm(x, weight, bias, n, channels, h * w, groups, eps)


def _activate(x: Tensor, act: str) -> Tensor:
    """act(x); x may be overwritten."""
    return F.silu(x, inplace=True) if act in ("silu", "swish") else ACTIVATIONS[act](x)


def _normalise(
    x: Tensor,  # [N, C, H, W] float32, channels_last
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    act: str,
    before: Tensor | None,  # [N, C], added to x
    after: Tensor | None,  # [N, 2C]: scale, then shift of the result
    residual: Tensor | None,
    out: Tensor,  # float32, channels_last; may be x
) -> Tensor:
    n, channels, h, w = x.shape
    width = channels // groups
    pixels = x.permute(0, 2, 3, 1).view(n, h * w, channels)
    mean = pixels.mean(1).double()  # what follows is small, and where means are large each rounding would show
    if before is not None:
        mean += before
    centre = mean.view(n, groups, width).mean(2, keepdim=True).expand(n, groups, width)
    if before is not None:  # what x itself is centred by, channel by channel
        centre = centre - before.view(n, groups, width)
    squares = F.mse_loss(pixels, centre.float().reshape(n, 1, channels).expand_as(pixels), reduction="none")
    factor = squares.mean(1).view(n, groups, width).mean(2, keepdim=True).double().add_(eps).rsqrt_()
    del squares
    factor = factor.expand(n, groups, width) if weight is None else factor * weight.view(groups, width)
    beside = factor.new_zeros(()) if bias is None else bias.double().view(groups, width)
    summand = torch.addcmul(beside, centre, factor, value=-1)
    factor, summand = factor.reshape(n, 1, channels), summand.view(n, 1, channels)
    if after is not None:
        scale, shift = after[:, None].double().chunk(2, dim=2)
        factor, summand = factor * (1 + scale), torch.addcmul(shift, summand, 1 + scale)
    y = out.permute(0, 2, 3, 1).view(n, h * w, channels)
    torch.addcmul(summand.float(), pixels, factor.float(), out=y)
    active = _activate(out, act)
    if active is not out:
        out.copy_(active)
    return out if residual is None else out.add_(residual)
