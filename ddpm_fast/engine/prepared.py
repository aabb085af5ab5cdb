"""An inference copy of a `UNet`: the same code over weights that one set of operations has packed for itself.

What can be decided once is: weights in the set's own layout and dtype, q, k and v as one matrix, the biases of a
residual block where they cost nothing, the time embedding in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Ops
from ..stages import stage
from ..unet import Attention, Resampler, ResnetBlock, SkipDownBlock, SkipUpBlock, UNet


@stage("preparing the network")
def prepare(model: UNet, dtype: torch.dtype, device: torch.device | str, ops: Ops) -> UNet:
    """A copy of ``model`` for inference with ``ops``, computing in ``dtype``; the model is not touched.

    Biases, norms and the time embedding stay float32 (float64 for that dtype): they are small, and rounding them
    would cost accuracy. ``dtype`` may be any floating one for the reference set. The copy cannot be trained,
    moved or saved. Made layer by layer, so that beside it one layer's weights are in memory, no second model.
    """
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            copy = UNet(model.config)
        copy.eval().requires_grad_(False)
        copy.ops = ops
        return _Packing(model, copy, dtype, torch.device(device), ops).run()


def weight_bytes(prepared: UNet) -> int:
    """Bytes of all weights of a prepared copy."""
    return sum(t.numel() * t.element_size() for t in _tensors(prepared))


def _tensors(prepared: UNet) -> Iterator[Tensor]:
    for module in prepared.modules():
        held: list[Any] = [*module._parameters.values()]
        held += [module.__dict__.get(name) for name in ("weight", "step_weight")]
        held += module.packed or () if isinstance(module, Attention) else ()
        for weight in held:
            tensor = getattr(weight, "matrix", weight)
            if isinstance(tensor, Tensor):
                yield tensor
            elif tensor is not None:  # a set's own packing, that names what it holds
                yield from tensor.tensors()


class _Packing:
    def __init__(self, model: UNet, copy: UNet, dtype: torch.dtype, device: torch.device, ops: Ops):
        self.source, self.copy, self.dtype, self.device, self.ops = model, copy, dtype, device, ops
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def run(self) -> UNet:
        source = dict(self.source.named_modules())
        for name, module in list(self.copy.named_modules()):
            if isinstance(module, ResnetBlock):
                self.block(source[name], module)
            elif isinstance(module, Attention):
                self.attention(source[name], module)
            elif isinstance(module, Resampler):
                self.convolution(source[name].conv, module.conv, upsample=module.resample == "up")
            elif isinstance(module, SkipDownBlock) and module.skip_conv is not None:
                self.convolution(source[name].skip_conv, module.skip_conv, channels=self.image_channels())
            elif isinstance(module, SkipUpBlock) and module.skip_conv is not None:
                self.convolution(source[name].skip_conv, module.skip_conv)
        model, copy = self.source, self.copy
        channels = copy.config.in_channels
        self.convolution(model.conv_in, copy.conv_in, channels=self.image_channels())
        self.convolution(model.conv_out, copy.conv_out)
        fits = copy.config.ends_in_conv_out and copy.config.out_channels in (channels, 2 * channels)
        if self.ops.pack_step_conv is not None and fits:
            weight = model.conv_out.weight.detach().to(self.device)
            copy.conv_out.__dict__["step_weight"] = self.ops.pack_step_conv(weight, channels, dtype=self.dtype)
        for name, module in copy.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    module._parameters[key] = self.kept(source[name]._parameters[key])
        return copy

    def image_channels(self) -> tuple[int, ...] | None:
        """How an image that has entered lies, where it is padded."""
        channels = self.copy.config.in_channels
        lying = self.ops.input_channels(channels, self.dtype)
        return (lying,) if lying != channels else None

    def kept(self, value: Any) -> nn.Parameter:
        """A value in full precision on the device, in memory of its own."""
        return nn.Parameter(value.detach().to(self.device, self.wide, copy=True), requires_grad=False)

    def convolution(
        self, source: nn.Conv2d, conv: nn.Conv2d, upsample: bool = False, channels: tuple[int, ...] | None = None
    ) -> None:
        weight = source.weight.detach().to(self.device)
        if upsample:
            packed = self.ops.pack_upsample_conv(weight, dtype=self.dtype)
        else:
            packed = self.ops.pack_conv(weight, dtype=self.dtype, channels=channels)
        # Not a parameter: what a set packs need not be a tensor.
        del conv._parameters["weight"]
        conv.__dict__["weight"] = packed

    def block(self, source: Any, block: ResnetBlock) -> None:
        self.convolution(source.conv1, block.conv1, upsample=block.resample == "up")
        self.convolution(source.conv2, block.conv2)
        if not block.scale_shift:  # what the embedding adds follows conv1 directly, so its bias may come along
            block.time_emb_proj._parameters["bias"] = self.sum(source.time_emb_proj.bias, source.conv1.bias)
            block.conv1._parameters["bias"] = None
        if block.conv_shortcut is not None:
            channels = block.inputs if len(block.inputs) > 1 else None
            self.convolution(source.conv_shortcut, block.conv_shortcut, channels=channels)
            block.conv2._parameters["bias"] = self.sum(source.conv2.bias, source.conv_shortcut.bias)
            block.conv_shortcut._parameters["bias"] = None

    def sum(self, a: Tensor, b: Tensor) -> nn.Parameter:
        return self.kept(a.detach().double() + b.detach().double().to(a.device))

    def attention(self, source: Any, attention: Attention) -> None:
        packed: list[Any] = []
        for weight, bias in (source.qkv(), source.projection()):
            packed += [
                self.ops.pack_conv(weight.detach().to(self.device), dtype=self.dtype, channels=None),
                bias.detach().to(self.device, self.wide, copy=True),
            ]
        attention.packed = (packed[0], packed[1], packed[2], packed[3])
        for name in ("to_q", "to_k", "to_v", "to_out"):
            delattr(attention, name)
