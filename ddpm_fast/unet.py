"""The U-Net of Ho et al. 2020, with the names and semantics of diffusers' UNet2DModel.

Written once, over an `Ops` value: the same `run` serves training, the reference and the fused kernels.
A feature map is [N, C, H, W]; `UNet.forward` is the plain way in, `UNet.run` the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import UNetConfig
from .kernels.reference import ACTIVATIONS, Shortcut
from .ops import Feature, Ops, reference


class TimeRows:
    """What every residual block adds of the time embedding, as (rows, row) for `conv` and `norm_act`.

    Either one row an image, projected as needed from the embedding [N, E] (training), or all blocks'
    projections at once, one row a step with the device counter that names it, or one an image (sampling).
    """

    def __init__(
        self,
        embedding: Tensor | None = None,  # [N, E], activated
        table: Tensor | None = None,  # [R, total]: UNet.time_table
        row: Tensor | None = None,  # int [1+]; None: R = N
        t: Tensor | None = None,  # the timesteps, [N], or [R] beside a table; divides fourier outputs
        parts: Sequence[Tensor] | None = None,  # a table cut up: each block's own, contiguous
    ):
        self.embedding, self.table, self.row, self.t, self.parts = embedding, table, row, t, parts

    def of(self, block: ResnetBlock) -> tuple[Tensor, Tensor | None]:
        if self.parts is not None:
            return self.parts[block.time_index], self.row
        if self.table is not None:
            return self.table[:, block.time_slice], self.row
        assert self.embedding is not None
        return block.time_emb_proj(self.embedding), None

    def divide(self, y: Tensor) -> Tensor:
        assert self.t is not None
        t = self.t if self.row is None else self.t.index_select(0, self.row[:1])
        return y / t.to(y.dtype)[:, None, None, None]


class ResnetBlock(nn.Module):
    """norm, act, (resample), conv + time, norm, act, conv, + shortcut. Diffusers' ResnetBlock2D."""

    time_slice: slice  # this block's columns of a time table, and its number; set by UNet
    time_index: int

    def __init__(
        self,
        c: UNetConfig,
        in_channels: int,  # of x and the skip together
        out_channels: int,
        resample: str = "",
        factor: float = 1.0,
        skip_channels: int = 0,
    ):
        super().__init__()
        self.inputs = (in_channels - skip_channels, skip_channels) if skip_channels else (in_channels,)
        self.scale_shift = c.resnet_time_scale_shift == "scale_shift"
        self.resample, self.scale = resample, 1.0 / factor
        self.act, self.dropout = c.act_fn, c.dropout
        self.norm1 = nn.GroupNorm(c.norm_num_groups, in_channels, c.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(c.time_width, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(c.norm_num_groups, out_channels, c.norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, ops: Ops, x: Feature, skip: Feature | None, time: TimeRows) -> Feature:
        rows, row = time.of(self)
        h = _norm_act(ops, self.norm1, x, self.act, skip=skip)
        added = {} if self.scale_shift else {"time": rows, "row": row}
        if self.resample == "up":
            h = ops.upsample_conv(h, self.conv1.weight, self.conv1.bias, with_stats=True, **added)
            x = ops.upsample(x)
        else:
            if self.resample == "down":
                h, x = ops.downsample(h), ops.downsample(x)
            h = ops.conv(h, self.conv1.weight, self.conv1.bias, with_stats=True, **added)
        shift = {"scale_shift": rows, "row": row} if self.scale_shift else {}
        h = _norm_act(ops, self.norm2, h, self.act, **shift)
        if self.dropout and self.training:
            h = F.dropout(h, self.dropout)
        if self.conv_shortcut is None:
            around = {"residual": x}
        else:
            around = {"shortcut": Shortcut(x, skip, self.conv_shortcut.weight, self.conv_shortcut.bias)}
        return ops.conv(h, self.conv2.weight, self.conv2.bias, scale=self.scale, with_stats=True, **around)


class Attention(nn.Module):
    """norm, q k v, softmax attention over the pixels, projection, + input. Diffusers' Attention."""

    def __init__(self, c: UNetConfig, channels: int, groups: int | None, factor: float = 1.0):
        super().__init__()
        head_dim = c.head_dim(channels)
        self.heads, self.scale = channels // head_dim, 1.0 / factor
        inner = self.heads * head_dim
        self.group_norm = None if groups is None else nn.GroupNorm(groups, channels, c.norm_eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    # (qkv weight, bias, projection weight, bias) as a set packs them, in a prepared copy
    packed: tuple[Any, Tensor, Any, Tensor] | None = None

    def qkv(self) -> tuple[Any, Tensor]:
        """The three projections as one 1x1 convolution: weight [3 * inner, C, 1, 1], bias [3 * inner]."""
        if self.packed is not None:
            return self.packed[:2]
        parts = (self.to_q, self.to_k, self.to_v)
        return torch.cat([p.weight for p in parts])[:, :, None, None], torch.cat([p.bias for p in parts])

    def projection(self) -> tuple[Any, Tensor]:
        if self.packed is not None:
            return self.packed[2:]
        out = self.to_out[0]
        assert isinstance(out, nn.Linear)
        return out.weight[:, :, None, None], out.bias

    def forward(self, ops: Ops, x: Feature) -> Feature:
        h = x if self.group_norm is None else _norm_act(ops, self.group_norm, x, "none")
        h = ops.attention(ops.conv(h, *self.qkv()), self.heads)
        return ops.conv(h, *self.projection(), residual=x, scale=self.scale, with_stats=True)


class Resampler(nn.Module):
    """A strided convolution down, or nearest-neighbour times 2 and a convolution up."""

    def __init__(self, channels: int, resample: str, padding: int = 1):
        super().__init__()
        self.resample, self.padding = resample, (padding, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if resample == "down" else 1)

    def forward(self, ops: Ops, x: Feature, skip: None, time: TimeRows) -> Feature:
        if self.resample == "up":
            return ops.upsample_conv(x, self.conv.weight, self.conv.bias, with_stats=True)
        return ops.conv(x, self.conv.weight, self.conv.bias, stride=2, padding=self.padding, with_stats=True)


class Block(nn.Module):
    """One level, down or up: residual blocks, each with its attention, then the resampler."""

    def __init__(self, c: UNetConfig, kind: str, inputs: list[tuple[int, int]], channels: int, resample: str):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c, h + skip, channels, skip_channels=skip) for h, skip in inputs)
        if kind.startswith("Attn"):
            self.attentions = nn.ModuleList(Attention(c, channels, c.norm_num_groups) for _ in inputs)
        if resample:
            by_resnet = kind.startswith("Resnet") or (
                kind.startswith("Attn") and (c.downsample_type if resample == "down" else c.upsample_type) == "resnet"
            )
            sampler: nn.Module = (
                ResnetBlock(c, channels, channels, resample)
                if by_resnet
                else Resampler(channels, resample, c.downsample_padding)
            )
            self.add_module(f"{resample}samplers", nn.ModuleList([sampler]))

    def stages(self) -> Iterator[tuple[ResnetBlock, Attention | None]]:
        attentions = getattr(self, "attentions", None) or [None] * len(self.resnets)
        yield from zip(self.resnets, attentions)  # type: ignore[misc]

    def down(self, ops: Ops, h: Feature, skips: list[Feature], time: TimeRows) -> Feature:
        for resnet, attention in self.stages():
            h = resnet(ops, h, None, time)
            h = h if attention is None else attention(ops, h)
            skips.append(h)
        for sampler in getattr(self, "downsamplers", ()):
            h = sampler(ops, h, None, time)
            skips.append(h)
        return h

    def upsampler(self) -> nn.Module | None:
        return next(iter(getattr(self, "upsamplers", ())), None)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, c: UNetConfig, channels: int):
        super().__init__()
        factor = c.mid_block_scale_factor
        groups = c.attn_norm_num_groups or (c.norm_num_groups if c.resnet_time_scale_shift == "default" else None)
        self.resnets = nn.ModuleList(ResnetBlock(c, channels, channels, factor=factor) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(c, channels, groups, factor)] if c.add_attention else [])

    def forward(self, ops: Ops, h: Feature, time: TimeRows) -> Feature:
        h = self.resnets[0](ops, h, None, time)
        for attention in self.attentions:
            h = attention(ops, h)
        return self.resnets[1](ops, h, None, time)


class TimeEmbedding(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(channels, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class FourierProjection(nn.Module):
    """sin and cos of 2 pi w log(t), with fixed random w (Song et al. 2021, score SDE)."""

    def __init__(self, channels: int, deviation: float = 16.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels) * deviation, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = torch.log(t.float())[:, None] * self.weight * 2 * math.pi
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


def sinusoid(t: Tensor, channels: int, freq_shift: float = 0, flip_sin_to_cos: bool = True) -> Tensor:
    """Sinusoidal time embedding [N, channels] of t [N]: frequencies 10000^(-i / (channels / 2 - freq_shift)).

    sin then cos, or cos then sin with flip_sin_to_cos; a zero at the end where channels is odd. Float32, or
    float64 where t is (Vaswani et al. 2017; diffusers' get_timestep_embedding).
    """
    half = channels // 2
    t = t if t.dtype == torch.float64 else t.float()
    exponent = -math.log(10000) * torch.arange(half, dtype=t.dtype, device=t.device) / (half - freq_shift)
    angle = t[:, None] * exponent.exp()
    parts = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, channels % 2))


class UNet(nn.Module):
    """Noise predictor eps_theta(x_t, t). State-dict keys and outputs are those of diffusers' UNet2DModel.

    config: UNetConfig. Call with x [N, C, H, W], t an int, or a tensor of one or N timesteps (fractional
    ones are fine), labels [N] where the model has classes -> [N, out_channels, H, W].
    """

    ops: Ops | None = None  # the set whose weights a prepared copy has; None: `reference`, or who is asked

    def __init__(self, config: UNetConfig):
        super().__init__()
        c = self.config = config
        widths = c.block_out_channels
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        time_channels = c.time_proj_channels or widths[0]
        if c.time_embedding_type == "fourier":
            self.time_proj: nn.Module = FourierProjection(widths[0])
            time_channels = 2 * widths[0]
        elif c.time_embedding_type == "learned":
            assert c.num_train_timesteps is not None
            self.time_proj = nn.Embedding(c.num_train_timesteps, widths[0])
        self.time_embedding = TimeEmbedding(time_channels, c.time_width)
        if c.class_embed_type == "timestep":
            self.class_embedding: nn.Module | None = TimeEmbedding(time_channels, c.time_width)
        elif c.class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif c.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(c.num_class_embeds, c.time_width)
        else:
            self.class_embedding = None

        self.down_blocks = nn.ModuleList()
        before = widths[0]
        for i, kind in enumerate(c.down_block_types):
            inputs = [(before, 0)] + [(widths[i], 0)] * (c.layers_per_block - 1)
            self.down_blocks.append(Block(c, kind, inputs, widths[i], "down" if i + 1 < c.levels else ""))
            before = widths[i]
        self.mid_block = MidBlock(c, widths[-1]) if c.mid_block_type is not None else None
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(c.up_block_types):
            channels = widths[-1 - i]
            skips = [channels] * c.layers_per_block + [widths[max(c.levels - 2 - i, 0)]]
            inputs = [(before if j == 0 else channels, skip) for j, skip in enumerate(skips)]
            self.up_blocks.append(Block(c, kind, inputs, channels, "up" if i + 1 < c.levels else ""))
            before = channels
        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[0], c.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)

        start = 0
        for index, block in enumerate(self.residual_blocks()):
            block.time_index, block.time_slice = index, slice(start, start + block.time_emb_proj.out_features)
            start = block.time_slice.stop

    def residual_blocks(self) -> list[ResnetBlock]:
        """Every residual block, in a fixed order: that of a time table's columns."""
        return [m for m in self.modules() if isinstance(m, ResnetBlock)]

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv_in.weight.device

    def forward(self, x: Tensor, t: int | float | Tensor, labels: Tensor | None = None) -> Tensor:
        self.check_input(x)
        t = torch.as_tensor(t, device=x.device).reshape(-1)
        if len(t) not in (1, len(x)):
            raise ValueError(f"UNet needs one timestep, or one an image; got {len(t)} for {len(x)} images")
        time = TimeRows(self.embed(t.expand(len(x)), labels), t=t)
        return self.run(x.to(self.dtype), time)

    def check_input(self, x: Tensor) -> None:
        """ValueError unless x is [N, in_channels, H, W] with H and W multiples of 2^(levels - 1)."""
        c, multiple = self.config, 2 ** (self.config.levels - 1)
        if x.ndim != 4 or x.shape[1] != c.in_channels:
            raise ValueError(f"UNet needs x of shape [N, {c.in_channels}, H, W]; got {tuple(x.shape)}")
        if x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(
                f"UNet halves the image {c.levels - 1} times, so H and W must be multiples of {multiple}; "
                f"got {x.shape[2]}x{x.shape[3]}; pad or resize the images"
            )

    def embed(self, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """The activated time (and class) embedding [N, time_width] of timesteps [N]."""
        emb = self.time_embedding(self._time_features(t))
        if self.class_embedding is None:
            if labels is not None:
                raise ValueError("this model has no classes (num_class_embeds is null), so it takes no labels")
            return ACTIVATIONS[self.config.act_fn](emb)
        if labels is None:
            raise ValueError("this model is class-conditional: pass labels")
        if len(labels) not in (1, len(t)):
            raise ValueError(f"one label an image is needed; got {len(labels)} for {len(t)}")
        if self.config.class_embed_type == "timestep":
            labels = self._time_features(labels)
        return ACTIVATIONS[self.config.act_fn](emb + self.class_embedding(labels).to(emb.dtype))

    def _time_features(self, t: Tensor) -> Tensor:
        c = self.config
        if c.time_embedding_type == "positional":
            features = sinusoid(t, c.time_proj_channels or c.block_out_channels[0], c.freq_shift, c.flip_sin_to_cos)
        else:
            features = cast(nn.Module, self.time_proj)(t)
        return features.to(cast(TimeEmbedding, self.time_embedding).linear_1.weight.dtype)

    def time_table(self, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Every residual block's time projection at each timestep [T] -> [T, total]; see `TimeRows`."""
        emb = self.embed(timesteps, labels)
        return torch.cat([block.time_emb_proj(emb) for block in self.residual_blocks()], dim=1)

    def run(self, x: Tensor, time: TimeRows, ops: Ops | None = None) -> Tensor:
        """The network after the time embedding: x [N, C, H, W] in the model's dtype -> [N, out, H, W]."""
        ops = ops or self.ops or reference()
        h = self.features(x, time, ops)
        y = ops.leave(ops.conv(h, self.conv_out.weight, self.conv_out.bias))
        return time.divide(y) if self.config.time_embedding_type == "fourier" else y

    def features(self, x: Tensor, time: TimeRows, ops: Ops) -> Feature:
        """All of `run` before the last convolution."""
        if self.config.center_input_sample:
            x = 2 * x - 1
        h = ops.conv(ops.enter(x), self.conv_in.weight, self.conv_in.bias, with_stats=True)
        skips = [h]
        for block in self.down_blocks:
            h = cast(Block, block).down(ops, h, skips, time)
        if self.mid_block is not None:
            h = self.mid_block(ops, h, time)
        # Not a method of Block: this frame would hold the block's input, the largest map there is, to its end.
        for block in cast(Iterator[Block], iter(self.up_blocks)):
            for resnet, attention in block.stages():
                h = resnet(ops, h, skips.pop(), time)
                h = h if attention is None else attention(ops, h)
            if (upsampler := block.upsampler()) is not None:
                h = upsampler(ops, h, None, time)
        return _norm_act(ops, self.conv_norm_out, h, "silu")


def _norm_act(ops: Ops, norm: nn.GroupNorm, x: Feature, act: str, **kwargs: object) -> Feature:
    return ops.norm_act(x, norm.weight, norm.bias, norm.num_groups, norm.eps, act=act, **kwargs)
