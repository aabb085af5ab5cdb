"""What the U-Net is built of: residual blocks, attention, resamplers, levels. Names are those of diffusers.

A block is called with the operations, its input and the time rows; feature maps are opaque to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UP_BLOCKS, UNetConfig
from ..kernels.reference import Shortcut
from ..ops import Feature, Ops


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
        if y.is_meta:  # a dry run, where t is not
            return y
        t = self.t if self.row is None else self.t.index_select(0, self.row[:1])
        return y / t.to(y.dtype)[:, None, None, None]


_RESAMPLERS: dict[str, Callable[[Ops], Callable[[Feature], Feature]]] = {
    "down": lambda ops: ops.downsample,
    "fir_down": lambda ops: ops.fir_downsample,
    "fir_up": lambda ops: ops.fir_upsample,
}


class ResnetBlock(nn.Module):
    """norm, act, (resample), conv + time, norm, act, conv, + shortcut. Diffusers' ResnetBlock2D."""

    time_slice: slice  # this block's columns of a time table, and its number; set by UNet
    time_index: int

    def __init__(
        self,
        c: UNetConfig,
        in_channels: int,  # of x and the skip together
        out_channels: int,
        resample: str = "",  # up, down; fir_up, fir_down: by the filter of NCSN++
        factor: float = 1.0,
        skip_channels: int = 0,
        groups: tuple[int, int] | None = None,  # of the two norms; None: the configuration's
        shortcut: bool = False,  # a 1x1 convolution around the block even where the channels stay
    ):
        super().__init__()
        self.inputs = (in_channels - skip_channels, skip_channels) if skip_channels else (in_channels,)
        self.scale_shift = c.resnet_time_scale_shift == "scale_shift"
        self.resample, self.scale = resample, 1.0 / factor
        self.act, self.dropout = c.act_fn, c.dropout
        first, second = groups or (c.groups(in_channels), c.groups(out_channels))
        self.norm1 = nn.GroupNorm(first, in_channels, c.norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(c.time_width, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(second, out_channels, c.norm_eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        around = shortcut or in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if around else None

    def forward(self, ops: Ops, x: Feature, skip: Feature | None, time: TimeRows) -> Feature:
        rows, row = time.of(self)
        h = norm_act(ops, self.norm1, x, self.act, skip=skip)
        added = {} if self.scale_shift else {"time": rows, "row": row}
        if self.resample == "up":
            h = ops.upsample_conv(h, self.conv1.weight, self.conv1.bias, with_stats=True, **added)
            x = ops.upsample(x)
        else:
            if self.resample:
                resample = _RESAMPLERS[self.resample](ops)
                h, x = resample(h), resample(x)
            h = ops.conv(h, self.conv1.weight, self.conv1.bias, with_stats=True, **added)
        shift = {"scale_shift": rows, "row": row} if self.scale_shift else {}
        h = norm_act(ops, self.norm2, h, self.act, **shift)
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
        h = x if self.group_norm is None else norm_act(ops, self.group_norm, x, "none")
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


class Level(nn.Module):
    """Shared by all levels: residual blocks, each followed by attention or not, then a resampler."""

    resnets: nn.ModuleList

    def stages(self) -> Iterator[tuple[ResnetBlock, Attention | None]]:
        """Each residual block with its attention; of fewer attentions than blocks, the last blocks have them."""
        attentions = list(getattr(self, "attentions", ()))
        missing = [None] * (len(self.resnets) - len(attentions))
        yield from zip(self.resnets, [*missing, *attentions])  # type: ignore[misc]

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


class Block(Level):
    """One level, down or up, of DDPM's U-Net."""

    def __init__(self, c: UNetConfig, kind: str, inputs: list[tuple[int, int]], channels: int, resample: str):
        super().__init__()
        factor = c.block_scale_factor
        self.resnets = nn.ModuleList(
            ResnetBlock(c, h + skip, channels, factor=factor, skip_channels=skip) for h, skip in inputs
        )
        if kind.startswith("Attn"):
            count = 1 if c.up_attention == "last" and kind in UP_BLOCKS else len(inputs)
            self.attentions = nn.ModuleList(Attention(c, channels, c.groups(channels), factor) for _ in range(count))
        if resample:
            by_resnet = kind.startswith("Resnet") or (
                kind.startswith("Attn") and (c.downsample_type if resample == "down" else c.upsample_type) == "resnet"
            )
            sampler: nn.Module = (
                ResnetBlock(c, channels, channels, resample, factor, shortcut=c.resnet_resample_shortcut)
                if by_resnet
                else Resampler(channels, resample, c.downsample_padding)
            )
            self.add_module(f"{resample}samplers", nn.ModuleList([sampler]))


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, c: UNetConfig, channels: int):
        super().__init__()
        factor = c.mid_block_scale_factor
        groups = c.attn_norm_num_groups or (c.groups(channels) if c.resnet_time_scale_shift == "default" else None)
        self.resnets = nn.ModuleList(ResnetBlock(c, channels, channels, factor=factor) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(c, channels, groups, factor)] if c.add_attention else [])

    def forward(self, ops: Ops, h: Feature, time: TimeRows) -> Feature:
        h = self.resnets[0](ops, h, None, time)
        for attention in self.attentions:
            h = attention(ops, h)
        return self.resnets[1](ops, h, None, time)


def norm_act(ops: Ops, norm: nn.GroupNorm, x: Feature, act: str, **kwargs: object) -> Feature:
    return ops.norm_act(x, norm.weight, norm.bias, norm.num_groups, norm.eps, act=act, **kwargs)
