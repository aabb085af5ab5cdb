"""Small diffusers pipelines, what they draw, and whether two drawings are the same images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from models import TINY, diffusers_unet
from tensors import same_chain

SMALL: dict[str, Any] = {**TINY, "block_out_channels": (4, 8), "norm_num_groups": 2}
SHORT: dict[str, Any] = {"num_train_timesteps": 20, "beta_start": 4e-3, "beta_end": 0.3}
# diffusers' betas are float32: a mean of SHORT's is off by as much (tests/test_schedule.py), in each of few steps.
TABLES = 3 * 2.0**-25 / 4e-3
# Where beta is 1e-4 a mean is off by 9e-4, but only in the last steps of 1000, which move x least.
LONG_TABLES = 1e-4


def pipeline(kind: Any = DDPMPipeline, scheduler: Any = DDPMScheduler, **config: Any) -> Any:
    p = kind(diffusers_unet({**SMALL, **config}), scheduler(**SHORT))
    p.set_progress_bar_config(disable=True)
    return p


def drawn(p: Any, **kwargs: Any) -> Any:
    call = {"num_inference_steps": 10, "output_type": "np", "generator": torch.Generator().manual_seed(1), **kwargs}
    return p(2, **call).images


def difference(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max())


def agrees(images: Any, p: Any, theirs: Any = None, tables: float = TABLES, **kwargs: Any) -> bool:
    """Whether ``images`` are those that the pipeline draws, or those it drew, ``theirs``."""
    theirs = drawn(p, **kwargs) if theirs is None else theirs
    return same_chain(images, theirs, p.unet, lambda: drawn(p, **kwargs), tables)
