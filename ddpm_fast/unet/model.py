"""The U-Net of Ho et al. 2020, with the names and semantics of diffusers' UNet2DModel.

Written once, over an `Ops` value: the same `run` serves training, the reference and the fused kernels.
A feature map is [N, C, H, W]; `UNet.forward` is the plain way in, `UNet.run` the engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..arguments import check_class_features, check_labels, labels_tensor
from ..config import SKIP_DOWN, SKIP_UP, UNetConfig
from ..kernels.reference import ACTIVATIONS
from ..ops import Feature, Ops, reference
from .blocks import Attention, Block, Level, MidBlock, Resampler, ResnetBlock, TimeRows, norm_act
from .skip import SkipDownBlock, SkipUpBlock
from .time_embedding import FourierProjection, TimeEmbedding, sinusoid

__all__ = [
    "Attention",
    "Resampler",
    "ResnetBlock",
    "SkipDownBlock",
    "SkipUpBlock",
    "TimeRows",
    "UNet",
    "sinusoid",
]


class UNet(nn.Module):
    """Noise predictor eps_theta(x_t, t). State-dict keys and outputs are those of diffusers' UNet2DModel.

    config: UNetConfig. Call with x [N, C, H, W], t an int, or a tensor of one or N timesteps (fractional
    ones are fine), labels [N] where the model has classes -> [N, out_channels, H, W].
    """

    label_names: tuple[str, ...] | None = None  # of the classes, where a checkpoint has them
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
        for i, kind in enumerate(c.down_block_types):
            build: Callable[..., Level] = SkipDownBlock if kind in SKIP_DOWN else Block
            self.down_blocks.append(build(c, kind, c.down_inputs(i), widths[i], "down" if i + 1 < c.levels else ""))
        self.mid_block = MidBlock(c, widths[-1]) if c.mid_block_type is not None else None
        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(c.up_block_types):
            build = SkipUpBlock if kind in SKIP_UP else Block
            self.up_blocks.append(build(c, kind, c.up_inputs(i), widths[-1 - i], "up" if i + 1 < c.levels else ""))
        self.conv_norm_out = nn.GroupNorm(c.groups(widths[0]), widths[0], c.norm_eps)
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
        labels = labels_tensor(labels, t.device)
        labels = labels.reshape(1) if labels.ndim == 0 else labels
        self.check_labels(labels)
        self._check_range(labels)
        if len(labels) not in (1, len(t)):
            raise ValueError(f"one label an image is needed; got {len(labels)} for {len(t)}")
        if self.config.class_embed_type == "timestep":
            labels = self._time_features(labels)
        elif self.config.class_embed_type is None:
            labels = labels.long()  # an embedding takes no smaller integers
        return ACTIVATIONS[self.config.act_fn](emb + self.class_embedding(labels).to(emb.dtype))

    def _check_range(self, labels: Tensor) -> None:
        """ValueError for a number that is no class. A GPU is not asked, since the host would have to wait for it."""
        classes = self.config.num_class_embeds
        if self.config.class_embed_type is not None or classes is None or torch.compiler.is_compiling():
            return
        if type(labels) is Tensor and labels.device.type == "cpu" and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= classes:
                got = f"{low}..{high}" if low < high else low
                raise ValueError(f"labels must be in 0..{classes - 1}; got {got}")

    def check_labels(self, labels: Tensor) -> None:
        """ValueError unless the labels have the shape and the kind of numbers that this model takes."""
        if self.config.class_embed_type == "identity":
            check_class_features(labels, self.config.time_width)
        elif self.config.class_embed_type != "timestep" or labels.ndim > 1:  # a time may be a fraction
            check_labels(labels)

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
        h, image = self._features(x, time, ops)
        y = ops.leave(ops.conv(h, self.conv_out.weight, self.conv_out.bias, residual=image))
        return time.divide(y) if self.config.time_embedding_type == "fourier" else y

    def features(self, x: Tensor, time: TimeRows, ops: Ops) -> Feature:
        """All of `run` before the last convolution, where that is the end: `UNetConfig.ends_in_conv_out`."""
        return self._features(x, time, ops)[0]

    def _features(self, x: Tensor, time: TimeRows, ops: Ops) -> tuple[Feature, Feature | None]:
        """What the last convolution reads, and the image of the Skip blocks, which joins its output."""
        if self.config.center_input_sample:
            x = 2 * x - 1
        image = ops.enter(x)
        first = partial(ops.conv, image, self.conv_in.weight, self.conv_in.bias, with_stats=True)
        h = first()
        skips = [ops.lay_by(h, first)]
        for block in self.down_blocks:
            h = cast(Level, block).down(ops, h, skips, time)
            if isinstance(block, SkipDownBlock) and block.resnet_down is not None:
                h, image = block.shrink(ops, h, image, time)
                skips.append(h)
        image = None
        if self.mid_block is not None:
            h = self.mid_block(ops, h, time)
        # Not a method of Block: this frame would hold the block's input, the largest map there is, to its end.
        for block in cast(Iterator[Level], iter(self.up_blocks)):
            for resnet, attention in block.stages():
                h = resnet(ops, h, _taken_up(skips.pop()), time)
                h = h if attention is None else attention(ops, h)
            if isinstance(block, SkipUpBlock):
                image = block.add_to(ops, image, h)
            if (upsampler := block.upsampler()) is not None:
                h = upsampler(ops, h, None, time)
        return norm_act(ops, self.conv_norm_out, h, "silu"), image


def _taken_up(skip: Feature | Callable[[], Feature]) -> Feature:
    """What `Ops.lay_by` laid by."""
    return skip() if isinstance(skip, partial) else skip
