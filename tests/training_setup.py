"""A training run small enough for tests: three classes of 8x8 images, and a U-Net with every kind of part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddpm_fast import Schedule, UNetConfig
from ddpm_fast.data import ImageData
from ddpm_fast.presets import TrainConfig
from ddpm_fast.training import TrainResult, train
from ddpm_fast.training.step import Trainer

CPU = torch.device("cpu")
CLASSES = 3
COUNT = 20
MODEL = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    dropout=0.2,
    num_class_embeds=CLASSES + 1,
)
SCHEDULE = Schedule(num_train_timesteps=50, beta_end=0.2)
# Everything random is on: order, flips, label dropout, t, noise, dropout; and the rate differs at every step.
CONFIG = TrainConfig(
    batch_size=8,
    steps=6,
    lr=1e-2,
    optimizer="adamw",
    weight_decay=0.01,
    warmup_steps=2,
    lr_schedule="cosine",
    ema_decay=0.9,
    flip=True,
    label_dropout=0.25,
    checkpoint_every=3,
    sample_every=0,
    log_every=1,
)


def images(count: int = COUNT) -> ImageData:
    """Random pixels, labels 0, 1, 2, 0, ..."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return ImageData(pixels, np.arange(count) % CLASSES, tuple("abc"), source="random")


def trainer(data: ImageData | None = None, model: UNetConfig = MODEL, **changes: Any) -> Trainer:
    return Trainer(data or images(), model, SCHEDULE, replace(CONFIG, **changes), CPU)


def run(out: Path, data: ImageData | None = None, model: UNetConfig = MODEL, **changes: Any) -> TrainResult:
    """``train`` on the CPU with CONFIG but for ``changes``."""
    return train(data or images(), out, model, SCHEDULE, replace(CONFIG, **changes), device=CPU, progress=False)


def tensors_of(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists under a dotted name."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in tensors_of(item, f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in tensors_of(item, f"{name}.{i}").items()}
    return {name: value}


def assert_same_run(got: Path, want: Path, step: int) -> None:
    """Model, EMA, optimizer and exported weights of two runs at ``step`` are equal bit for bit."""
    states = [torch.load(out / "state" / f"step_{step:09d}.pt", weights_only=True) for out in (got, want)]
    for part in ("step", "model", "ema", "optimizer", "scaler"):
        ours, theirs = (tensors_of(state[part], part) for state in states)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
            assert same, f"{name} differs"
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (got / weights).read_bytes() == (want / weights).read_bytes()
