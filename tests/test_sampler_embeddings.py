"""Every kind of time and class embedding, drawn from by each set, against a loop over upstream's network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import TINY, diffusers_unet, normal, unet
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.house_rule import check
from ddpm_fast.sampler import Sampler

CHAIN = (60, 20)
SCHEDULE = df.Schedule(num_train_timesteps=100)
TIMES: dict[str, dict[str, Any]] = {
    "positional": {},
    "fourier": {"time_embedding_type": "fourier"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 100},
}
CLASSES: dict[str, tuple[dict[str, Any], Any]] = {
    "none": ({}, None),
    "embedding": ({"num_class_embeds": 5}, torch.tensor([0, 4, 2])),
    "timestep": ({"class_embed_type": "timestep"}, torch.tensor([3, 11, 90])),
    "identity": ({"class_embed_type": "identity"}, normal(3, 32, seed=2)),
}


@torch.no_grad()
def loop(config: dict[str, Any], labels: Tensor | None, dtype: torch.dtype, chain: tuple[int, ...] = CHAIN) -> Tensor:
    """Three images in batches of two, by one generator and upstream's network, or in float64 by our own."""
    generator, images, size = torch.Generator().manual_seed(5), [], config["sample_size"]
    model = diffusers_unet(config) if dtype == torch.float32 else unet(config).to(dtype)
    for part in (slice(0, 2), slice(2, 3)):
        n = part.stop - part.start
        given = None if labels is None else labels[part] if labels.dtype == torch.int64 else labels[part].to(dtype)
        x = torch.randn(n, 3, size, size, generator=generator).to(dtype)
        for t, prev_t in zip(chain, [*chain[1:], -1]):
            z = torch.randn(n, 3, size, size, generator=generator).to(dtype)
            out = model(x, t, given)
            x = SCHEDULE.step(getattr(out, "sample", out), t, x, z, prev_t)
        images.append(x)
    return torch.cat(images)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("time", TIMES)
def test_images_are_those_of_upstream_s_network(time: str, classes: str):
    fields, labels = CLASSES[classes]
    config = {**TINY, **TIMES[time], **fields}
    truth, same = loop(config, labels, torch.float64), loop(config, labels, torch.float32)
    for ops in ("reference", "cpu"):
        sampler = Sampler(unet(config), SCHEDULE, 2, steps=CHAIN, noise="torch", ops=ops)
        check(sampler.sample(3, seed=5, labels=labels), same, truth, floor=2.0**-17, name=ops)


def test_a_fourier_network_with_classes_on_fused_operations(device: torch.device):
    """The arena is planned without times, and the output divided by them."""
    fields, labels = CLASSES["identity"]
    config = {**TINY, **TIMES["fourier"], **fields, "sample_size": 4}
    truth, same = (loop(config, labels, dtype, CHAIN[1:])[:2] for dtype in (torch.float64, torch.float32))
    sampler = Sampler(
        unet(config), SCHEDULE, 2, steps=CHAIN[1:], noise=torch.Generator().manual_seed(5), ops="triton", device=device
    )
    check(sampler.sample(2, labels=labels[:2]).cpu(), same, truth, floor=2.0**-17)
