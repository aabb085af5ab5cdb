"""Damaged state dicts of the other families: each loads whole, or is refused in one line.

These are 400 of the 10,000 reproducible cases that test_reader_fuzz.py counts.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import openai_oracle as openai
import pytest
import score_sde_oracle
import test_checkpoints_ho as ho_oracle
import torch
from torch import Tensor

from ddpm_fast.checkpoints import CheckpointError, ho, identify, score_sde
from ddpm_fast.checkpoints import openai as family
from ddpm_fast.checkpoints.layout import Layout

NET = openai.Net(32, 1, (1, 2), (2,), heads=4, classes=3)
OPENAI = {"num_heads": 4, "diffusion_steps": 10, "noise_schedule": "linear", "rescale_timesteps": False}
FAMILIES = {
    "openai": (openai.weights(NET), OPENAI, family.load),
    "ddpm of Score-SDE": (score_sde_oracle.weights(score_sde_oracle.DDPM), {}, score_sde.load),
    "ddpm++ of Score-SDE": (score_sde_oracle.weights(score_sde_oracle.DDPMPP), {}, score_sde.load),
    "ho": (ho_oracle.weights(ho_oracle.TINY), {"var_type": "fixedlarge"}, ho.load),
}

CASES = 400 // len(FAMILIES)  # of each


def damaged(state: dict[str, Tensor], rng: random.Random) -> dict[str, Any]:
    """One to three changes: a tensor lost, renamed, moved by a number, of another shape, dtype or layout."""
    state = dict(state)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(sorted(state))
        tensor = state[name]
        change = rng.randrange(8)
        if change == 0:
            del state[name]
        elif change == 1:
            del state[name]
            parts = name.split(".")
            at = rng.randrange(len(parts))
            parts[at] = str(rng.choice([0, 1, 2, 7, 999, 10**12])) if parts[at].isdigit() else parts[at] + "x"
            state[".".join(parts)] = tensor
        elif change == 2:
            prefix = name.rsplit(".", 2)[0]
            state = {key: value for key, value in state.items() if not key.startswith(prefix)} or state
        elif change == 3:
            state[name] = torch.zeros(rng.choice([(), (0,), (1,), (3, 5), (96,), (7, 3, 1), (2, 3, 1, 1, 1)]))
        elif change == 4:
            state[name] = torch.zeros(1).expand(rng.choice([1 << 40, 3 << 20]), *tensor.shape[1:])
        elif change == 5:
            state[name] = tensor.to(rng.choice([torch.int64, torch.complex64, torch.bool, torch.float16]))
        elif change == 6:
            state[name] = tensor.to_sparse() if tensor.ndim else tensor
        else:
            state[name] = tensor * float("inf")
    return state


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_or_refused_in_one_line(name: str) -> None:
    state, overrides, load = FAMILIES[name]
    path, refusals = Path("weights.pt"), 0
    for seed in range(CASES):
        content = damaged(state, random.Random(seed))
        try:
            found, kind = identify(content, Layout(path, None, None, None, []), "weights.pt", overrides=overrides)
            assert kind.load is not None
            checkpoint = load(found) if kind.load is load else None
        except CheckpointError as error:
            refusals += 1
            assert "\n" not in str(error) and len(str(error)) > 20, seed
            continue
        assert checkpoint is None or all(bool(p.isfinite().all()) for p in checkpoint.model.parameters()), seed
    assert refusals > 0.85 * CASES
