"""Images as a sampler computes them, made into the levels that files hold."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(x: Tensor, truncate: bool = False) -> Tensor:
    """Images [n, C, H, W] in [-1, 1] -> [n, H, W, C] uint8, rounded half to even as diffusers and Pillow do.

    truncate: as OpenAI's and Ho et al.'s scripts instead, (x + 1) * 127.5 without its fraction.
    """
    if truncate:
        return ((x.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
