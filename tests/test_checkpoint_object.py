"""A Checkpoint as an object: what a notebook shows of it, and that it survives pickle and copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folder import sound_folder, tiny
from lucidrains_oracle import Diffusion, Net, betas, trainer_file

from ddpm_fast.checkpoints import Checkpoint, load
from ddpm_fast.schedule import Schedule


def lucidrains(tmp_path: Path) -> Checkpoint:
    torch.save(trainer_file(Net(), Diffusion(betas("cosine", 40), "pred_v")), tmp_path / "model-1.pt")
    return load(tmp_path / "model-1.pt")


def test_what_a_notebook_shows(tmp_path: Path) -> None:
    folder = sound_folder(tmp_path)
    count = sum(p.numel() for p in tiny().parameters())
    assert repr(load(folder)).splitlines() == [
        "Checkpoint(",
        f"  source: {folder}",
        "  family: diffusers",
        f"  model: UNet, {count:,} parameters",
        "  images: 3 x 4 x 4",
        "  schedule: 1000 timesteps, linear betas, epsilon, fixed_small",
        ")",
    ]
    other = lucidrains(tmp_path)
    count = sum(p.numel() for p in other.model.parameters())
    assert repr(other).splitlines() == [
        "Checkpoint(",
        f"  source: {tmp_path / 'model-1.pt'}",
        "  family: lucidrains",
        f"  model: LucidrainsUnet, {count:,} parameters",
        "  images: 3 channels, size not stated",
        "  schedule: 40 timesteps, betas of its own, v_prediction, fixed_small",
        f"  notes: {len(other.notes)} (checkpoint.notes)",
        ")",
    ]
    labelled = Checkpoint(tiny(), Schedule(method="ddim"), "here", "diffusers", [], [str(i) + "th" for i in range(12)])
    assert "  labels: 0th, 1th, 2th, 3th, 4th, 5th, 6th, 7th, 8th, 9th, ...\n" in repr(labelled)
    assert "epsilon, ddim\n" in repr(labelled)


def test_the_network_s_own_repr_is_torch_s(tmp_path: Path) -> None:
    text = repr(load(sound_folder(tmp_path)).model)
    assert text.startswith("UNet(\n  (conv_in): Conv2d(3, 4,") and len(text.splitlines()) > 50


@pytest.mark.parametrize("again", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", ["bundled", "lucidrains"])
def test_copies(kind: str, again: Any, tmp_path: Path) -> None:
    """The copy is equal in every part, and its weights are its own."""
    checkpoint = load() if kind == "bundled" else lucidrains(tmp_path)
    other = again(checkpoint)
    assert repr(other) == repr(checkpoint) and other.notes == checkpoint.notes and other.labels == checkpoint.labels
    assert torch.equal(other.schedule.betas, checkpoint.schedule.betas) and other.schedule == checkpoint.schedule
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([3])
    with torch.no_grad():
        assert torch.equal(other.model(x, t), checkpoint.model(x, t))
        next(iter(other.model.parameters())).add_(1)
        assert not torch.equal(other.model(x, t), checkpoint.model(x, t))
    assert not other.model.training
