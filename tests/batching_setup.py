"""A small chain and models that are alike in any batch, for tests of batches."""

from __future__ import annotations

from typing import Any

import torch
from models import TINY
from torch import Tensor

import ddpm_fast as df

SHAPE, STEPS = (3, 4, 4), 12
SCHEDULE = df.Schedule(num_train_timesteps=STEPS, beta_start=4e-3, beta_end=0.3)
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {**TINY, "block_out_channels": (4, 8), "norm_num_groups": 2}


def half(x: Tensor, t: Tensor) -> Tensor:
    """Elementwise: exactly the same in any batch."""
    return 0.5 * x + 0.01 * t.to(x.dtype)[:, None, None, None]


def sampler(model: Any = half, **kwargs: Any) -> df.Sampler:
    return df.Sampler(model, SCHEDULE, **{"image_shape": SHAPE, **kwargs})


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]
