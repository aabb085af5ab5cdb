"""Labels of the wrong shape or kind: one clear ValueError at every entry that takes labels, before torch meets them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, normal, unet

from ddpm_fast.checkpoints import Checkpoint
from ddpm_fast.diffusion import training_loss
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule
from ddpm_fast.verification import verify

N = 4
SCHEDULE = Schedule(num_train_timesteps=3)
MODEL = unet({**TINY, "num_class_embeds": 5})
X, T = normal(N, 3, 8, 8), torch.tensor([0, 1, 2, 0])
RIGHT = torch.tensor([0, 4, 1, 2])

WRONG: dict[str, tuple[Any, str]] = {
    "a column": (RIGHT[:, None], r"of shape \[n\], one an image; got shape \[4, 1\]: pass labels\.reshape\(-1\)"),
    "one-hot": (torch.eye(5)[RIGHT], r"got shape \[4, 5\], one-hot rows: pass labels\.argmax\(1\)"),
    "one-hot integers": (torch.eye(5).long()[RIGHT], r"got shape \[4, 5\], one-hot rows: pass labels\.argmax\(1\)"),
    "a table": (torch.ones(4, 5), r"labels must be class numbers of shape \[n\], one an image; got shape \[4, 5\]$"),
    "fractions": (RIGHT + 0.5, r"labels must be whole numbers; got float32 numbers"),
    "too large": (RIGHT + 1, r"labels must be in 0\.\.[34]; got 1\.\.5$"),
    "negative": (RIGHT - 1, r"labels must be in 0\.\.[34]; got -1\.\.3$"),
    "words": (["cat"] * N, r"labels must be whole numbers; got .*cat"),
    "truth values": (RIGHT > 1, "labels must be whole numbers; got bool"),
}
ENTRIES: dict[str, Callable[[Any], Any]] = {
    "sample": lambda labels: Sampler(MODEL, SCHEDULE).sample(N, labels=labels),
    "sample by guidance": lambda labels: Sampler(MODEL, SCHEDULE, guidance_scale=2.0).sample(N, labels=labels),
    "forward": lambda labels: MODEL(X, T, labels),
    "time_table": lambda labels: MODEL.time_table(T, labels),
    "training_loss": lambda labels: training_loss(MODEL, SCHEDULE, X, T, X, labels=labels),
    "verify": lambda labels: verify(Checkpoint(MODEL, SCHEDULE, "here", "diffusers", []), n=N, label=labels),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_labels(entry: str, name: str) -> None:
    labels, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        ENTRIES[entry](labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", ["sample", "forward", "training_loss"])
def test_what_the_message_says_to_pass_is_right(entry: str) -> None:
    """The advice gives what the labels themselves give."""
    torch.manual_seed(0)
    expected = ENTRIES[entry](RIGHT)
    for advised in (RIGHT[:, None].reshape(-1), torch.eye(5)[RIGHT].argmax(1)):
        torch.manual_seed(0)
        assert torch.equal(ENTRIES[entry](advised), expected)


@pytest.mark.parametrize("given", [[0, 4, 1, 2], np.array([0, 4, 1, 2]), np.array([0, 4, 1, 2], np.uint8)])
def test_lists_and_arrays(given: Any) -> None:
    assert torch.equal(MODEL(X, T, given), MODEL(X, T, RIGHT))
    sampled = ENTRIES["sample"](RIGHT)
    assert torch.equal(ENTRIES["sample"](given), sampled)


@pytest.mark.parametrize("given", [[[0], [4]], [[0], [4, 1]], "cat", ["cat", "dog"], [None]])
def test_what_are_no_labels(given: Any) -> None:
    with pytest.raises(ValueError, match="labels must be") as caught:
        ENTRIES["sample"](given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_one_label_for_all() -> None:
    assert torch.equal(MODEL(X, T, torch.tensor(3)), MODEL(X, T, torch.full((N,), 3)))


def test_models_that_take_embeddings_or_times() -> None:
    """class_embed_type "identity" takes [n, time_width], "timestep" one number an image."""
    identity = unet({**TINY, "class_embed_type": "identity"})
    width = identity.config.time_width
    assert MODEL.config.time_width == width
    right = normal(N, width, seed=3)
    assert Sampler(identity, SCHEDULE).sample(N, labels=right).shape == (N, 3, 8, 8)
    message = rf"this model takes class embeddings for labels, of shape \[n, {width}\]"
    for wrong in (RIGHT, right[:, :-1], right[None]):
        with pytest.raises(ValueError, match=message):
            identity(X, T, wrong)
        with pytest.raises(ValueError, match=message):
            Sampler(identity, SCHEDULE).sample(N, labels=wrong)
    by_time = unet({**TINY, "class_embed_type": "timestep"})
    assert torch.isfinite(by_time(X, T, RIGHT + 0.5)).all()
    with pytest.raises(ValueError, match=r"pass labels\.reshape\(-1\)"):
        by_time(X, T, RIGHT[:, None])
    with pytest.raises(ValueError, match=r"pass labels\.reshape\(-1\)"):
        Sampler(by_time, SCHEDULE).sample(N, labels=RIGHT[:, None])
