"""The U-Net of lucidrains' denoising-diffusion-pytorch, versions 0.22 to 2.x: its arithmetic under its tensor names.

Letters: N images, C channels, H, W pixels, D channels of a head, M memory entries. Norms, softmaxes and the time
embedding are float32 (float64 for a float64 model) whatever the convolutions' dtype.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.reference import norm_act

EPS = 1e-5  # of GroupNorm, of the channel LayerNorm and of standardised weights


@dataclass(frozen=True)
class LucidrainsConfig:
    """What builds the network: the arguments of lucidrains' Unet, and how its version computes."""

    dim: int
    init_dim: int
    widths: tuple[int, ...]  # after each level: dim times dim_mults
    channels: int
    out_dim: int
    self_condition: bool = False
    full_attn: tuple[bool, ...] = ()  # by level; the middle is full
    attn_heads: tuple[int, ...] = ()
    attn_dim_head: tuple[int, ...] = ()
    num_mem_kv: int = 4  # 0: before 1.9.0
    learned_sinusoidal_dim: int | None = None  # of learned_sinusoidal_cond or random_fourier_features
    sinusoidal_pos_emb_theta: float = 10000
    image_size: tuple[int, int] | None = None
    # what versions differ in
    block_norm: str = "rms"  # rms; group before 2.0.0
    resnet_block_groups: int = 8
    channel_norm: str = "rms"  # rms; layer before 1.7.1
    standardised: str | None = None  # weights of the 3x3 block convolutions: "added" or "clamped" eps
    values_over_pixels: bool = False  # linear attention divides v by H * W, before 1.7.4
    cosine_scale: float | None = None  # the middle attention compares directions, times this: 0.26 and 0.27
    downsample: str = "unshuffle"  # unshuffle: 2x2 pixels to channels; conv: 4x4 of stride 2, before 0.32

    @property
    def dim_mults(self) -> tuple[float, ...]:
        return tuple(w // self.dim if w % self.dim == 0 else w / self.dim for w in self.widths)

    @property
    def learned_variance(self) -> bool:
        return self.out_dim == 2 * self.channels

    # Under UNetConfig's names, for code that takes either.
    @property
    def in_channels(self) -> int:
        return self.channels

    @property
    def out_channels(self) -> int:
        return self.out_dim

    num_class_embeds = None
    class_embed_type = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the derived arguments."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k != "widths"}
        return values | {"dim_mults": list(self.dim_mults), "learned_variance": self.learned_variance}


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class ChannelNorm(nn.Module):
    """Over the channels of each pixel: RMSNorm, or a LayerNorm without bias. x [N, C, H, W]."""

    def __init__(self, channels: int, kind: str):
        super().__init__()
        self.kind = kind
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = _wide(x)
        if self.kind == "rms":
            h = F.normalize(h, dim=1) * (self.g * h.shape[1] ** 0.5)
        else:
            mean = h.mean(1, keepdim=True)
            h = (h - mean) * (h.var(1, unbiased=False, keepdim=True) + EPS).rsqrt() * self.g
        return h.to(x.dtype)


class BlockConv(nn.Conv2d):
    """3x3; before 1.7.3 with weights standardised by filter (Qiao et al. 2019)."""

    def __init__(self, inputs: int, outputs: int, standardised: str | None):
        super().__init__(inputs, outputs, 3, padding=1)
        self.standardised = standardised

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.effective_weight(), self.bias, padding=1)

    def effective_weight(self) -> Tensor:
        if self.standardised is None:
            return self.weight
        w = _wide(self.weight)
        centred = w - w.mean((1, 2, 3), keepdim=True)
        variance = centred.square().mean((1, 2, 3), keepdim=True)
        floor = variance + EPS if self.standardised == "added" else variance.clamp(min=EPS)
        return (centred * floor.rsqrt()).to(self.weight.dtype)


class Block(nn.Module):
    """Convolution, norm, h * (1 + scale) + shift, SiLU."""

    def __init__(self, inputs: int, outputs: int, c: LucidrainsConfig):
        super().__init__()
        self.proj = BlockConv(inputs, outputs, c.standardised)
        self.groups = c.resnet_block_groups
        group = c.block_norm == "group"
        self.norm: nn.Module = nn.GroupNorm(self.groups, outputs) if group else ChannelNorm(outputs, "rms")

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
        scale_shift: Tensor | None = None,  # [N, 2K]
    ) -> Tensor:  # [N, K, H, W]
        h = self.proj(x)
        if isinstance(self.norm, nn.GroupNorm):
            return norm_act(h, self.norm.weight, self.norm.bias, self.groups, EPS, scale_shift=scale_shift)
        h = self.norm(h)
        if scale_shift is not None:
            scale, shift = scale_shift[:, :, None, None].to(h.dtype).chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        return F.silu(h)


class ResnetBlock(nn.Module):
    """Two blocks, the first conditioned on the time, around a 1x1 convolution where the widths differ."""

    def __init__(self, inputs: int, outputs: int, c: LucidrainsConfig):
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(4 * c.dim, 2 * outputs))
        self.block1 = Block(inputs, outputs, c)
        self.block2 = Block(outputs, outputs, c)
        self.res_conv = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
        time: Tensor,  # [N, 4 dim], after its SiLU
    ) -> Tensor:
        return self.block2(self.block1(x, self.mlp[1](time))) + self.res_conv(x)


class Attention(nn.Module):
    """Over pixels and M learned memory entries, full or linear (Shen et al. 2018): x [N, C, H, W], without residual."""

    def __init__(self, channels: int, heads: int, dim_head: int, full: bool, c: LucidrainsConfig, middle: bool = False):
        super().__init__()
        self.heads, self.full, self.over_pixels = heads, full, c.values_over_pixels
        self.cosine_scale = c.cosine_scale if middle else None
        self.norm = ChannelNorm(channels, c.channel_norm)
        self.mem_kv: nn.Parameter | None = None
        if c.num_mem_kv:
            entries = (c.num_mem_kv, dim_head) if full else (dim_head, c.num_mem_kv)
            self.mem_kv = nn.Parameter(torch.zeros(2, heads, *entries))
        inner = heads * dim_head
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        out = nn.Conv2d(inner, channels, 1)
        self.to_out: nn.Module = out if full else nn.Sequential(out, ChannelNorm(channels, c.channel_norm))

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        qkv = self.to_qkv(self.norm(x))
        q, k, v = qkv.reshape(n, 3, self.heads, -1, height * width).unbind(1)  # [N, heads, D, H * W]
        y = self._full(q, k, v) if self.full else self._linear(q, k, v)
        return self.to_out(y.reshape(n, -1, height, width))

    def _memory(self, i: int, like: Tensor) -> Tensor:
        assert self.mem_kv is not None
        memory = self.mem_kv[i].to(like.dtype)
        return memory.expand(len(like), *memory.shape)

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(2, 3).contiguous() for t in (q, k, v))  # [N, heads, H * W, D]
        if self.mem_kv is not None:
            k, v = torch.cat((self._memory(0, k), k), 2), torch.cat((self._memory(1, v), v), 2)
        if self.cosine_scale is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, scale=self.cosine_scale).transpose(2, 3)

    def _linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dim_head, pixels = q.shape[2:]
        if self.over_pixels:
            v = v / pixels
        if self.mem_kv is not None:
            k, v = torch.cat((self._memory(0, k), k), 3), torch.cat((self._memory(1, v), v), 3)
        q = _wide(q).softmax(2) * dim_head**-0.5
        context = _wide(k).softmax(3) @ _wide(v).transpose(2, 3)  # [N, heads, D, D]
        return (context.transpose(2, 3) @ q).to(v.dtype)


class Times(nn.Module):
    """t [N] -> its features: a sinusoid [N, dim], or t beside the sines of learned frequencies [N, 1 + dim]."""

    def __init__(self, c: LucidrainsConfig):
        super().__init__()
        self.count, self.theta = c.dim // 2, c.sinusoidal_pos_emb_theta
        if c.learned_sinusoidal_dim is not None:
            self.weights = nn.Parameter(torch.zeros(c.learned_sinusoidal_dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        if "weights" in self._parameters:
            angles = t[:, None] * self.weights[None] * 2 * math.pi
            return torch.cat((t[:, None], angles.sin(), angles.cos()), dim=1)
        rate = math.log(self.theta) / (self.count - 1)
        angles = t[:, None] * torch.exp(torch.arange(self.count, device=t.device, dtype=t.dtype) * -rate)
        return torch.cat((angles.sin(), angles.cos()), dim=1)


class LucidrainsUnet(nn.Module):
    """lucidrains' Unet. Its state dict has the names and shapes of version 2.x, whatever the version.

    `Sampler` takes it as it takes a `UNet`: with its image shape, its dtype, and where it conditions on itself with
    the x_0 predicted at the step before.
    """

    class_embedding = None  # as a UNet says that it takes no labels

    def __init__(self, config: LucidrainsConfig):
        super().__init__()
        self.config = c = config
        widths = (c.init_dim, *c.widths)
        levels = list(pairwise(widths))
        self.init_conv = nn.Conv2d(c.channels * (2 if c.self_condition else 1), c.init_dim, 7, padding=3)
        features = c.dim if c.learned_sinusoidal_dim is None else 1 + c.learned_sinusoidal_dim
        wide = 4 * c.dim
        self.time_mlp = nn.Sequential(Times(c), nn.Linear(features, wide), nn.GELU(), nn.Linear(wide, wide))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, (inputs, outputs) in enumerate(levels):
            self.downs.append(self._level((inputs, inputs), i, inputs, self._down(inputs, outputs, i)))
        self.mid_block1 = ResnetBlock(widths[-1], widths[-1], c)
        self.mid_attn = Attention(widths[-1], c.attn_heads[-1], c.attn_dim_head[-1], True, c, middle=True)
        self.mid_block2 = ResnetBlock(widths[-1], widths[-1], c)
        for i, (inputs, outputs) in reversed(list(enumerate(levels))):
            conv = nn.Conv2d(outputs, inputs, 3, padding=1)
            up = nn.Sequential(nn.Upsample(scale_factor=2), conv) if i else conv
            self.ups.append(self._level((outputs + inputs, outputs), i, outputs, up))
        self.final_res_block = ResnetBlock(2 * c.init_dim, c.init_dim, c)
        self.final_conv = nn.Conv2d(c.init_dim, c.out_dim, 1)

    def _level(self, block: tuple[int, int], i: int, channels: int, resample: nn.Module) -> nn.ModuleList:
        c = self.config
        attention = Attention(channels, c.attn_heads[i], c.attn_dim_head[i], c.full_attn[i], c)
        return nn.ModuleList([ResnetBlock(*block, c), ResnetBlock(*block, c), attention, resample])

    def _down(self, inputs: int, outputs: int, i: int) -> nn.Module:
        if i + 1 == len(self.config.widths):
            return nn.Conv2d(inputs, outputs, 3, padding=1)
        if self.config.downsample == "conv":
            return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)
        return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * inputs, outputs, 1))

    @property
    def dtype(self) -> torch.dtype:
        return self.init_conv.weight.dtype

    @property
    def time_dtype(self) -> torch.dtype:
        return self.get_parameter("time_mlp.1.weight").dtype

    @property
    def device(self) -> torch.device:
        return self.init_conv.weight.device

    @property
    def self_condition(self) -> bool:
        return self.config.self_condition

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        size = self.config.image_size
        return None if size is None else (self.config.channels, *size)

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
        t: Tensor | int,  # [N], or one for all
        x_self_cond: Tensor | None = None,  # [N, C, H, W]: x_0 as predicted at the step before; None: zeros
    ) -> Tensor:  # [N, C or 2C, H, W]
        """Raises ValueError for an image that does not halve as often as there are levels, or a third input that the
        network does not take."""
        self._check(x, x_self_cond)
        if self.self_condition:
            x = torch.cat((torch.zeros_like(x) if x_self_cond is None else x_self_cond, x), dim=1)
        first = x = self.init_conv(x.to(self.dtype))
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        features = self.time_mlp[0](torch.as_tensor(t, device=x.device).to(wide).expand(len(x)))
        time = F.silu(self.time_mlp[1:](features.to(self.time_dtype)))  # each block's own SiLU, once
        skips = []
        downs: Any = self.downs
        ups: Any = self.ups
        for block1, block2, attention, down in downs:
            x = block1(x, time)
            skips.append(x)
            x = block2(x, time)
            x = attention(x) + x
            skips.append(x)
            x = down(x)
        x = self.mid_block1(x, time)
        x = self.mid_attn(x) + x
        x = self.mid_block2(x, time)
        for block1, block2, attention, up in ups:
            x = block1(torch.cat((x, skips.pop()), dim=1), time)
            x = block2(torch.cat((x, skips.pop()), dim=1), time)
            x = up(attention(x) + x)
        return self.final_conv(self.final_res_block(torch.cat((x, first), dim=1), time))

    def _check(self, x: Tensor, x_self_cond: Tensor | None) -> None:
        factor = 2 ** (len(self.downs) - 1)
        if x.ndim != 4 or x.shape[1] != self.config.channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(
                f"this lucidrains U-Net takes [N, {self.config.channels}, H, W] with H and W divisible by {factor}; "
                f"got {list(x.shape)}"
            )
        if x_self_cond is not None and not self.self_condition:
            raise ValueError("this lucidrains U-Net takes x and t alone: it has no classes and no self_condition")

    def for_sampling(self, dtype: torch.dtype, device: torch.device | str) -> LucidrainsUnet:
        """A copy for inference: convolutions in dtype, all else float32; standardised weights are kept so."""
        with torch.inference_mode(False), torch.no_grad():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            made = copy.deepcopy(self).to(device, wide).eval().requires_grad_(False)
            for module in made.modules():
                if isinstance(module, BlockConv):
                    module.weight.copy_(module.effective_weight())
                    module.standardised = None
                target = dtype if isinstance(module, nn.Conv2d) else wide
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
                        module._parameters[name] = nn.Parameter(
                            parameter.to(target, memory_format=layout), requires_grad=False
                        )
            return made
