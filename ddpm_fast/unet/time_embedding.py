"""How the U-Net sees a timestep: features of t, and the small network that embeds them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
