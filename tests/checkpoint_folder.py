"""A small sound checkpoint folder for tests to damage, and what a refusal must look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_fast.checkpoints import CheckpointError, load, save
from ddpm_fast.config import UNetConfig
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import UNet

CONFIG = UNetConfig(
    sample_size=4,
    block_out_channels=(4, 4),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=2,
    attention_head_dim=2,
)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def tiny() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG)


def sound_folder(path: Path) -> Path:
    """A sound checkpoint in path / "model", for a test to damage."""
    save(path / "model", tiny(), Schedule())
    return path / "model"


def refused(source: Path, match: str, **kwargs: Any) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(source, **kwargs)
    message = str(caught.value)
    assert message.isprintable(), "an error is one line"
    assert str(source) in message or kwargs or "configuration" in message
    return message


def as_bin(folder: Path, content: Any, **kwargs: Any) -> Path:
    """The folder with content as its only weights, a torch.save file."""
    (folder / WEIGHTS).unlink()
    path = folder / WEIGHTS.replace(".safetensors", ".bin")
    torch.save(content, path, **kwargs)
    return path


def edit(path: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**content, **values}))
