"""Small diffusers pipelines, what they draw, and how far apart two drawings are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from models import TINY, diffusers_unet

SMALL: dict[str, Any] = {**TINY, "block_out_channels": (4, 8), "norm_num_groups": 2}
SHORT: dict[str, Any] = {"num_train_timesteps": 20, "beta_start": 4e-3, "beta_end": 0.3}


def pipeline(kind: Any = DDPMPipeline, scheduler: Any = DDPMScheduler, **config: Any) -> Any:
    p = kind(diffusers_unet({**SMALL, **config}), scheduler(**SHORT))
    p.set_progress_bar_config(disable=True)
    return p


def drawn(p: Any, **kwargs: Any) -> Any:
    call = {"num_inference_steps": 10, "output_type": "np", "generator": torch.Generator().manual_seed(1), **kwargs}
    return p(2, **call).images


def difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max())
