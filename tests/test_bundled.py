"""The bundled model: its size, its loss on portraits, and what a few of its steps draw."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline

import ddpm_fast as df
from ddpm_fast.checkpoints import BUNDLED
from ddpm_fast.data import load_data
from ddpm_fast.house_rule import check


def test_it_is_small_and_diffusers_reads_it() -> None:
    weights = BUNDLED / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 3_000_000
    checkpoint = df.load()
    theirs = DDPMPipeline.from_pretrained(BUNDLED).unet
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    with torch.no_grad():
        ours, upstream = checkpoint.model(x, t), theirs.float()(x, t).sample
        truth = theirs.double()(x.double(), t).sample
    check(ours, upstream, truth)
    assert checkpoint.schedule == df.Schedule()


def test_it_predicts_the_noise_of_portraits() -> None:
    """The card's loss is 0.0124 over training's last steps; 256 portraits at spread timesteps give it to a few %."""
    pytest.importorskip("dicebear")
    pixels = torch.from_numpy(load_data("avatars:pixel-art:256").images[:]).permute(0, 3, 1, 2)
    x0 = pixels.float() / 127.5 - 1
    checkpoint, fixed = df.load(), torch.Generator().manual_seed(0)
    t = torch.linspace(0, 999, 256).long()
    noise = torch.randn(x0.shape, generator=fixed)
    with torch.no_grad():
        loss = float(df.training_loss(checkpoint.model, checkpoint.schedule, x0, t, noise))
    assert loss < 0.016


def test_its_samples_are_flat_colours_on_white() -> None:
    """Of clean portraits, most pixels equal a neighbour; of noise, next to none."""
    checkpoint = df.load()
    x = df.Sampler(checkpoint.model, checkpoint.schedule, steps=100).sample(8, seed=1)
    flat = (x[..., 1:] - x[..., :-1]).abs().amax(1) < 0.1
    assert flat.float().mean() > 0.5
    corner = x[:, :, 0, 0]
    assert (corner > 0.9).float().mean() > 0.8
