"""What ``inspect`` says: of what is drawn, of heads and times, and of what no fused kernel computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import TINY
from test_unet import NCSNPP

from ddpm_fast.checkpoints import Checkpoint
from ddpm_fast.config import UNetConfig
from ddpm_fast.inspection import describe, describe_text
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import UNet


def described(config: dict[str, Any], schedule: Schedule) -> tuple[dict[str, Any], list[str]]:
    with torch.device("meta"):
        model = UNet(UNetConfig(**config))
    facts = describe(Checkpoint(model, schedule, "here", "diffusers", []))
    return facts, describe_text(facts).splitlines()


def test_plain_ddpm_has_nothing_to_say_of_it():
    facts, lines = described(TINY, Schedule())
    assert facts["steps"] == 1000 and facts["on_torch_operations"] == {}
    assert not [line for line in lines if line.split()[0] in ("draws", "times", "operations")]
    assert any("attention_head_dim=4" in line for line in lines)


def test_skip_blocks_are_named_as_torch_s_operations():
    facts, lines = described(NCSNPP, Schedule(thresholding=True))
    # three levels: on each of two ways twice h, its input and the image
    assert facts["on_torch_operations"] == {
        "FIR resampling has no kernel": 12,
        "dynamic thresholding sorts whole images, for which there is no kernel": 1,
    }
    assert "  operations  12 x FIR resampling has no kernel, so on torch's operations" in lines
    assert any(line.startswith("  level 1       64 channels  2 blocks  AttnSkipDownBlock2D / AttnSk") for line in lines)
    assert any("attention_head_dim=None (one head)" in line for line in lines)


def test_an_activation_without_a_kernel_is_named():
    facts, _ = described({**TINY, "act_fn": "gelu"}, Schedule())
    # two norms in each of 2 + 4 + 2 residual blocks; attention's have none, the last is silu
    assert facts["on_torch_operations"] == {"norm_act has no kernel with gelu": 16}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (
            Schedule(method="ddim", num_inference_steps=50),
            "  draws       DDIM of 50 steps, eta 0, unless asked otherwise",
        ),
        (Schedule(method="ddim", eta=0.3), "  draws       DDIM of 1000 steps, eta 0.3, unless asked otherwise"),
        (Schedule(timestep_respacing="250"), "  draws       DDPM of 250 steps, unless asked otherwise"),
        (Schedule(time_scale=0.25), "  times       the network is given time_scale=0.25 times the timestep"),
    ],
)
def test_what_is_drawn_and_what_the_network_is_given(schedule: Schedule, expected: str):
    facts, lines = described(TINY, schedule)
    assert expected in lines
    assert facts["gflop_per_image"] == facts["gflop_per_image_and_step"] * facts["steps"]


def test_heads_by_number_a_wide_sinusoid_and_a_size_that_is_not_stated():
    _, lines = described({**TINY, "num_attention_heads": 2, "time_proj_channels": 24, "sample_size": None}, Schedule())
    assert "num_attention_heads=2" in "".join(lines) and "attention_head_dim" not in "".join(lines)
    assert "time_proj_channels=24" in "".join(lines)
    assert lines[1] == "  images      size not stated, 3 channels"
