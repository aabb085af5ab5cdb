"""OpenAI guided-diffusion's way to use half precision, on our U-Net's weights, in plain eager torch.

There, convolutions between input and output compute in half precision; normalisations, the time embedding, the last
convolution and x_t stay float32 (fp16_util.py, nn.py's GroupNorm32 and unet.py of that repository say so). It is a
peer, not a part of the engine: nothing is fused, and each step is launched by the host.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import reference
from ..ops import Ops
from ..sampler import Sampler
from ..unet import TimeRows, UNet
from .providers import Case


def _norm_act(
    x: Tensor,  # [N, C1, H, W]
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    *,
    skip: Tensor | None = None,
    act: str = "silu",
    scale_shift: Tensor | None = None,
    row: Tensor | None = None,
) -> Tensor:
    """Float32 statistics and arithmetic, back to the input's precision before the activation."""
    h = x if skip is None else torch.cat((x, skip), dim=1)
    normed = F.group_norm(h.float(), groups, weight, bias, eps).to(h.dtype)
    if scale_shift is not None:
        scale, shift = scale_shift.to(h.dtype)[:, :, None, None].chunk(2, dim=1)
        normed = normed * (1 + scale) + shift
    return reference.ACTIVATIONS[act](normed)


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    time: Tensor | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: reference.Shortcut | None = None,
    scale: float = 1.0,
    with_stats: bool = False,
) -> Tensor:
    x = x.to(weight.dtype)
    before, after = (weight.shape[-1] // 2,) * 2 if padding is None else padding
    if before != after:
        x, before = F.pad(x, (before, after, before, after)), 0
    y = F.conv2d(x, weight, _as(bias, weight), stride, before)
    if time is not None:
        y = y + time.to(y.dtype)[:, :, None, None]
    if shortcut is not None:
        joined = shortcut.x if shortcut.skip is None else torch.cat((shortcut.x, shortcut.skip), dim=1)
        residual = F.conv2d(joined, shortcut.weight, _as(shortcut.bias, shortcut.weight))
    if residual is not None:
        y = residual + y
    return y if scale == 1.0 else y * scale


def _as(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(weight.dtype)


def _upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
    return _conv(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, **kwargs)


def _attention(qkv: Tensor, heads: int) -> Tensor:  # [N, 3D, H, W] -> [N, D, H, W]
    """Two products with the scale split between q and k, the softmax in float32."""
    n, width, h, w = qkv.shape
    q, k, v = qkv.reshape(n, 3, heads, width // 3 // heads, h * w).transpose(1, 2).flatten(0, 1).unbind(1)
    scale = q.shape[1] ** -0.25
    scores = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    weights = scores.float().softmax(dim=-1).to(scores.dtype)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(n, width // 3, h, w)


OPS = Ops(
    name="guided",
    norm_act=_norm_act,
    conv=_conv,
    upsample_conv=_upsample_conv,
    upsample=lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    downsample=lambda x: F.avg_pool2d(x, 2),
    attention=_attention,
    sampler_step=reference.sampler_step,
)


class HalfTorso(nn.Module):
    """A U-Net whose convolutions and attention, but for the last convolution, are in ``dtype``."""

    def __init__(self, model: UNet, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.unet = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        for name, module in self.unet.named_modules():
            attention = ".attentions." in name and isinstance(module, nn.Linear)
            if (isinstance(module, nn.Conv2d) and module is not self.unet.conv_out) or attention:
                module.to(dtype)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        time = TimeRows(self.unet.embed(t.expand(len(x)), labels), t=t)
        return self.unet.run(x, time, OPS)


class Guided:
    """`HalfTorso` in the plain loop: float32 x_t, torch's noise, each operation launched by itself."""

    noise = "torch"

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.labels = case, case.labels()
        self.module = HalfTorso(case.model, dtype, case.device)
        self.sampler = Sampler(
            self.module,
            case.schedule,
            batch_size=case.batch,
            steps=case.steps,
            method="ddpm",
            device=case.device,
            ops="reference",
            graph="none",
            noise="torch",
            image_shape=case.shape[1:],
        )
        self.times = self.sampler.table.times().to(case.device)

    @torch.inference_mode()
    def network(self, x: Tensor, i: int) -> Tensor:
        return self.module(x, self.times[i : i + 1], self.labels)

    def chain(self, seed: int) -> Tensor:
        return self.sampler.sample(self.case.batch, seed, self.labels)


def make(case: Case, dtype: torch.dtype) -> Guided:
    return Guided(case, dtype)
