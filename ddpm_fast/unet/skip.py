"""The levels of NCSN++ (Song et al. 2021): FIR resampling, and an RGB image beside the network that shrinks and grows.

diffusers' (Attn)SkipDownBlock2D and (Attn)SkipUpBlock2D. Sums are divided by sqrt(2); norms have min(C // 4, 32)
groups, and those of attention 32, whatever the configuration says.
"""

from __future__ import annotations

import math

from torch import nn

from ..config import SKIP_ATTENTION_GROUPS, SKIP_UP, UNetConfig
from ..ops import Feature, Ops
from .blocks import Attention, Level, ResnetBlock, TimeRows, norm_act

RGB = 3  # channels of the image, whatever the model's
FACTOR = math.sqrt(2)


class SkipBlock(Level):
    """What both ways have: residual blocks, and attention after each on the way down, after the last on the way up."""

    def __init__(self, c: UNetConfig, kind: str, inputs: list[tuple[int, int]], channels: int):
        super().__init__()
        if kind.startswith("Attn"):
            count = 1 if kind in SKIP_UP else len(inputs)
            self.attentions = nn.ModuleList(Attention(c, channels, SKIP_ATTENTION_GROUPS, FACTOR) for _ in range(count))
        self.resnets = nn.ModuleList()
        for h, skip in inputs:
            groups = c.groups(h, kind, skip), c.groups(channels, kind)
            self.resnets.append(ResnetBlock(c, h + skip, channels, "", FACTOR, skip, groups))


def _resampling(c: UNetConfig, kind: str, channels: int, resample: str) -> ResnetBlock | None:
    if not resample:
        return None
    groups = c.groups(channels, kind), c.groups(channels, kind)
    return ResnetBlock(c, channels, channels, f"fir_{resample}", FACTOR, groups=groups, shortcut=True)


class SkipDownBlock(SkipBlock):
    """Down: the image shrinks too, and joins the feature map through a 1x1 convolution."""

    def __init__(self, c: UNetConfig, kind: str, inputs: list[tuple[int, int]], channels: int, resample: str):
        super().__init__(c, kind, inputs, channels)
        self.resnet_down = _resampling(c, kind, channels, resample)
        self.skip_conv = nn.Conv2d(RGB, channels, 1) if resample else None

    def shrink(self, ops: Ops, h: Feature, image: Feature, time: TimeRows) -> tuple[Feature, Feature]:
        """To the next level: (feature map, image [N, 3, H, W]), both at half the size."""
        assert self.resnet_down is not None and self.skip_conv is not None
        h, image = self.resnet_down(ops, h, None, time), ops.fir_downsample(image)
        return ops.conv(image, self.skip_conv.weight, self.skip_conv.bias, residual=h, with_stats=True), image


class SkipUpBlock(SkipBlock):
    """Up: the image grows too, and a 3x3 convolution of the normalised feature map is added to it."""

    def __init__(self, c: UNetConfig, kind: str, inputs: list[tuple[int, int]], channels: int, resample: str):
        super().__init__(c, kind, inputs, channels)
        self.resnet_up = _resampling(c, kind, channels, resample)
        self.skip_conv = nn.Conv2d(channels, RGB, 3, padding=1) if resample else None
        self.skip_norm = nn.GroupNorm(c.groups(channels, kind), channels, c.norm_eps) if resample else None

    def add_to(self, ops: Ops, image: Feature | None, h: Feature) -> Feature | None:
        """The image at this level's size, with what this level adds: [N, 3, H, W]. None: there is none yet."""
        if image is not None:
            image = ops.fir_upsample(image)
        if self.skip_conv is None:
            return image
        assert self.skip_norm is not None
        normed = norm_act(ops, self.skip_norm, h, "silu")
        return ops.conv(normed, self.skip_conv.weight, self.skip_conv.bias, residual=image)

    def upsampler(self) -> nn.Module | None:
        return self.resnet_up
