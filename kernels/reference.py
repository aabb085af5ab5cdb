"""Every operation of the engine in plain torch: the definition that the fused kernels are held to.

Letters: N images, C channels, H, W pixels, K output channels, G groups, T steps, R table rows, P parts.
Feature maps are [N, C, H, W]; the fused operations want them in channels_last memory, these take any.
Arithmetic is float32, or float64 where the input is; results come back in the input's dtype.
Each function runs on any device (``meta`` too) and is differentiable; ``out=`` is for inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Columns of a step table [T, TABLE_WIDTH], float32. One row is one sampler step:
#   x0     = clamp(KX * x + KO * out, -CLIP, CLIP)
#   x_prev = C0 * x0 + CX * x + CO * out + sigma * z
# sigma is SIGMA, times exp((LOGVAR_A + LOGVAR_B * v) / 2) for variance="learned_range" and
# sqrt(v) for "learned", where v is the second half of the network's output.
# TIME is the network's time input at that row; the rest is padding to 16-byte multiples.
KX, KO, CLIP, C0, CX, CO, SIGMA, LOGVAR_A, LOGVAR_B, TIME = range(10)
TABLE_WIDTH = 12

# The step index under which the initial x_T is drawn.
INITIAL_STEP = 0xFFFFFFFF

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
    "none": lambda x: x,
}


class Shortcut(NamedTuple):
    """The 1x1 convolution around a residual block; its product joins the sum of the 3x3 one."""

    x: Tensor  # [N, C1, H, W]
    skip: Tensor | None  # [N, C2, H, W], behind x along C
    weight: Tensor  # [K, C1 + C2, 1, 1]
    bias: Tensor | None  # [K]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _join(x: Tensor, skip: Tensor | None) -> Tensor:
    return x if skip is None else torch.cat((x, skip), dim=1)


def _rows(table: Tensor, row: Tensor | None) -> Tensor:
    """[R, C] -> [R or 1, C, 1, 1]: row ``row`` for everyone, or one row an image."""
    if row is not None:
        table = table.index_select(0, row[:1])
    return table[:, :, None, None]


def _deliver(y: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return y.to(dtype) if out is None else out.copy_(y)


def channel_stats(x: Tensor) -> Tensor:
    """Per-channel statistics [N, 1, 3, C] of x [N, C, H, W]: pixel count, mean, centred sum of squares.

    The fused convolutions return [N, P, 3, C], one entry a tile; Chan's rule merges them.
    """
    wide = _wide(x).flatten(2)
    mean = wide.mean(2)
    m2 = (wide - mean[:, :, None]).square().sum(2)
    return torch.stack((torch.full_like(mean, wide.shape[2]), mean, m2), dim=1)[:, None]


def norm_act(
    x: Tensor,  # [N, C1, H, W]
    weight: Tensor | None,  # [C], C = C1 + C2
    bias: Tensor | None,  # [C]
    groups: int,
    eps: float,
    *,
    skip: Tensor | None = None,  # [N, C2, H, W]: the second part of a virtual concatenation
    act: str = "silu",  # a key of ACTIVATIONS
    bias_row: Tensor | None = None,  # [R, C]: time embedding added before the norm
    scale_shift: Tensor | None = None,  # [R, 2C]: scale, then shift: norm(x) * (1 + scale) + shift
    row: Tensor | None = None,  # int [1+]: the row of bias_row and scale_shift; None: row n is image n's
    residual: Tensor | None = None,  # [N, C, H, W], added to the result
    stats: Tensor | None = None,  # [N, P, 3, C1]: statistics of x from its producer; here recomputed
    skip_stats: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # [N, C, H, W] in x's dtype
    """Group normalisation (Wu and He 2018), time embedding, activation: act(norm([x, skip] + row))."""
    h = _wide(_join(x, skip))
    if h.shape[1] % groups:
        raise ValueError(
            f"norm_act needs C % groups == 0; got C={h.shape[1]}, groups={groups}; change the channels or the groups"
        )
    if bias_row is not None:
        h = h + _rows(_wide(bias_row), row)
    # torch's CPU kernel for channels_last subtracts squared means and loses what centring would keep.
    h = F.group_norm(
        h.contiguous(),
        groups,
        None if weight is None else weight.to(h.dtype),
        None if bias is None else bias.to(h.dtype),
        eps,
    )
    if scale_shift is not None:
        scale, shift = _rows(_wide(scale_shift), row).chunk(2, dim=1)
        h = h * (1 + scale) + shift
    h = ACTIVATIONS[act](h)
    if residual is not None:
        h = h + residual
    return _deliver(h, x.dtype, out)


class Sides(NamedTuple):
    """Zeros around an image."""

    top: int
    bottom: int
    left: int
    right: int


def sides(padding: Sequence[int] | None, kernel: int) -> Sides:
    """What `conv`'s ``padding`` says of an image's four sides."""
    given = (kernel // 2,) * 2 if padding is None else tuple(padding)
    return Sides(*(given if len(given) == 4 else given * 2))


def conv(
    x: Tensor,  # [N, C1, H, W]
    weight: Tensor,  # [K, C, 3, 3] or [K, C, 1, 1], C = C1 + C2
    bias: Tensor | None = None,  # [K]
    *,
    skip: Tensor | None = None,  # [N, C2, H, W], behind x along C
    stride: int = 1,
    padding: tuple[int, ...] | None = None,  # zeros (before, after) on both axes, or `Sides`; None: "same"
    time: Tensor | None = None,  # [R, K], added per channel
    row: Tensor | None = None,  # int [1+]: the row of time; None: row n is image n's
    residual: Tensor | None = None,  # [N, K, H', W']
    shortcut: Shortcut | None = None,
    scale: float = 1.0,  # multiplies the finished sum (diffusers' 1 / output_scale_factor)
    with_stats: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # [N, K, H', W'] in x's dtype (and [N, P, 3, K])
    """3x3 or 1x1 convolution, and all that follows it before the next normalisation."""
    h = _join(x, skip)
    weight = weight.to(h.dtype)
    top, bottom, left, right = sides(padding, weight.shape[-1])
    if (top, left) != (bottom, right):
        h = F.pad(h, (left, right, top, bottom))
        top = left = 0
    y = F.conv2d(h, weight, None if bias is None else bias.to(h.dtype), stride, (top, left))
    return _epilogue(y, time, row, residual, shortcut, scale, with_stats, out)


def upsample_conv(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [K, C, 3, 3]
    bias: Tensor | None = None,
    *,
    time: Tensor | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Shortcut | None = None,
    scale: float = 1.0,
    with_stats: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # [N, K, 2H, 2W]
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution with padding 1. Epilogue as in `conv`."""
    y = F.conv2d(upsample(x), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=1)
    return _epilogue(y, time, row, residual, shortcut, scale, with_stats, out)


def _epilogue(
    y: Tensor,
    time: Tensor | None,
    row: Tensor | None,
    residual: Tensor | None,
    shortcut: Shortcut | None,
    scale: float,
    with_stats: bool,
    out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = y.dtype
    if time is not None or residual is not None or shortcut is not None or scale != 1.0:
        y = _wide(y)
    if time is not None:
        y = y + _rows(_wide(time), row)
    if shortcut is not None:
        s = _join(shortcut.x, shortcut.skip)
        b = shortcut.bias
        y = y + F.conv2d(s, shortcut.weight.to(s.dtype), None if b is None else b.to(s.dtype))
    if residual is not None:
        y = y + residual
    if scale != 1.0:
        y = y * scale
    y = _deliver(y, dtype, out)
    return (y, channel_stats(y)) if with_stats else y


def upsample(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2: [N, C, H, W] -> [N, C, 2H, 2W]."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def downsample(x: Tensor) -> Tensor:
    """Mean over 2x2 pixels: [N, C, H, W] -> [N, C, H // 2, W // 2]."""
    return F.avg_pool2d(x, 2)


def fir_upsample(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W] by the filter (1, 3, 3, 1) / 4 on both axes, zeros outside the image.

    The resampling of NCSN++ (Song et al. 2021). Inside the image that is bilinear interpolation.
    """
    wide = F.pad(_wide(x), (1, 1, 1, 1))
    return F.interpolate(wide, scale_factor=2.0, mode="bilinear")[:, :, 2:-2, 2:-2].to(x.dtype)


def fir_downsample(x: Tensor) -> Tensor:
    """[N, C, H, W], H and W even -> [N, C, H / 2, W / 2] by the filter (1, 3, 3, 1) / 8, zeros outside."""
    h = F.pad(_wide(x), (1, 1, 1, 1))
    h = (h[..., 0:-3:2] + h[..., 3::2] + 3 * (h[..., 1:-2:2] + h[..., 2:-1:2])) / 8
    h = (h[:, :, 0:-3:2] + h[:, :, 3::2] + 3 * (h[:, :, 1:-2:2] + h[:, :, 2:-1:2])) / 8
    return h.to(x.dtype)


def attention(
    qkv: Tensor,  # [N, 3 * D, H, W]: all of q, then k, then v; inside each, head after head
    heads: int,
) -> Tensor:  # [N, D, H, W]
    """Self-attention over the H * W pixels with softmax(q k^T / sqrt(D / heads)) v (Vaswani et al. 2017)."""
    n, width, h, w = qkv.shape
    # Contiguous channels: torch's fast attention takes no other layout.
    pixels = qkv.permute(0, 2, 3, 1).contiguous().reshape(n, h * w, 3, heads, width // 3 // heads)
    q, k, v = pixels.permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v)  # [N, heads, H * W, D / heads]
    return y.transpose(1, 2).reshape(n, h, w, width // 3).permute(0, 3, 1, 2)


def threshold(x0: Tensor, ratio: float, largest: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022): clip each image [C, H, W] to its ratio-quantile s of |x0|,
    with s in [1, largest], and divide by s."""
    flat = _wide(x0).flatten(1)
    s = torch.quantile(flat.abs(), ratio, dim=1).clamp(min=1, max=largest)[:, None]
    return (torch.maximum(torch.minimum(flat, s), -s) / s).view_as(x0).to(x0.dtype)


def sampler_step(
    x: Tensor,  # [N, C, H, W] float32: x_t
    out: Tensor,  # [N, C, H, W], or [N, 2C, H, W] with a learned variance
    table: Tensor,  # [T, TABLE_WIDTH] float32
    counter: Tensor,  # int32 [2]: the row to read, and a scratch word of the fused kernel; row += 1 on return
    seed: Tensor,  # int64 [1]
    ids: Tensor,  # int64 [N]: the sample ids
    *,
    variance: str = "fixed",  # fixed | learned | learned_range
    x_prev: Tensor | None = None,  # where to write; may be x itself
    low: Tensor | None = None,  # [N, C' >= C, H, W]: x_prev in low precision, zeros above C, for the next conv_in
    noise: Tensor | None = None,  # [N, C, H, W]: z from elsewhere; None: philox_normal
    thresholding: tuple[float, float] | None = None,  # (ratio, largest): `threshold` in place of the clip
) -> Tensor:  # [N, C, H, W] float32: x_{t-1}
    """One step of Algorithm 2 (Ho et al. 2020), or of DDIM (Song et al. 2021): a row of the table."""
    channels = x.shape[1]
    c = table.index_select(0, counter[:1])[0].to(x.dtype)
    eps = out[:, :channels].to(x.dtype)
    x0 = c[KX] * x + c[KO] * eps
    x0 = torch.clamp(x0, -c[CLIP], c[CLIP]) if thresholding is None else threshold(x0, *thresholding)
    sigma: Tensor = c[SIGMA]
    if variance == "learned_range":
        v = out[:, channels:].to(x.dtype)
        sigma = sigma * torch.exp(0.5 * (c[LOGVAR_A] + c[LOGVAR_B] * v))
    elif variance == "learned":
        sigma = sigma * out[:, channels:].to(x.dtype).sqrt()
    if noise is None:
        noise = philox_normal(seed, ids, counter[:1], x.shape[1:])
    y = c[C0] * x0 + c[CX] * x + c[CO] * eps + sigma * noise.to(x.dtype)
    y = y if x_prev is None else x_prev.copy_(y)
    if low is not None:
        low[:, :channels] = y
        low[:, channels:] = 0
    counter[:1] += 1
    return y


# --- noise: Philox4x32-10 (Salmon et al. 2011), normals by Box-Muller ---

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox_words(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four 32-bit words (held in int64) for each counter. All arguments broadcast."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 products wrap, but their 64 bits are right; the mask after >> 32 undoes the sign.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def philox_normal(
    seed: Tensor,  # int64 [1]: its 64 bits are the key
    ids: Tensor,  # int64 [N]
    step: Tensor,  # int [1], or [S]: one step, or several at once
    shape: torch.Size | tuple[int, ...],  # of one sample: (C, H, W)
) -> Tensor:  # [N, *shape] float32, or [S, N, *shape]
    """z(seed, id, step, element): block b of the counter yields elements 4b to 4b+3 in C, H, W order.

    Words w0, w1 give elements 4b and 4b+1: r cos(a), r sin(a) with r = sqrt(-2 ln u0), a = 2 pi u1,
    u = float32(w) * 2^-32 + 2^-33; w2, w3 the other two.
    """
    count = math.prod(shape)
    blocks = torch.arange(-(-count // 4), device=ids.device)
    steps = step.to(torch.int64) & _MASK
    key = (seed & _MASK, (seed >> 32) & _MASK)
    counter = (blocks, steps[:, None, None], (ids & _MASK)[:, None], ((ids >> 32) & _MASK)[:, None])
    words = philox_words(key, counter)  # each [S, N, blocks]
    u = [w.float() * 2.0**-32 + 2.0**-33 for w in words]
    r0, r1 = (-2.0 * u[0].log()).sqrt(), (-2.0 * u[2].log()).sqrt()
    # The angle is rounded in float64: in float32, 2 pi u alone would cost a dozen ulp.
    a0, a1 = u[1].double() * (2 * math.pi), u[3].double() * (2 * math.pi)
    turns = (a0.cos().float(), a0.sin().float(), a1.cos().float(), a1.sin().float())
    z = torch.stack((r0 * turns[0], r0 * turns[1], r1 * turns[2], r1 * turns[3]), dim=-1)
    z = z.flatten(2)[:, :, :count].unflatten(2, tuple(shape))
    return z[0] if len(step) == 1 else z
