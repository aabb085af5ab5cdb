"""Small models for the tests: configurations, networks whose every parameter is random, tensors by seed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.config import UNetConfig
from ddpm_fast.unet import UNet

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values, the same in every dtype up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomised(model: Any) -> Any:
    """``model`` with random biases and norms too: what starts at 0 or 1 would hide a mistake."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def diffusers_unet(config: dict[str, Any], seed: int = 0) -> Any:
    """UNet2DModel, every parameter random."""
    import diffusers  # here: on a machine for GPU tests alone it may be missing

    torch.manual_seed(seed)
    return randomised(diffusers.UNet2DModel(**config).eval())


def unet(config: dict[str, Any], seed: int = 0) -> UNet:
    """Ours with the weights of `diffusers_unet`; where diffusers is not installed, with random ones of its own."""
    if find_spec("diffusers") is None:
        torch.manual_seed(seed)
        return randomised(UNet(UNetConfig(**config)).eval())
    model = UNet(UNetConfig(**config)).eval()
    model.load_state_dict(diffusers_unet(config, seed).state_dict())
    return model
