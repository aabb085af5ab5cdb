"""What a caller has set in torch (autocast, default dtype and device, modes) changes nothing of what is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from models import TINY, unet
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.ops import compiled

SCHEDULE = df.Schedule(num_train_timesteps=20, beta_start=4e-3, beta_end=0.3)
# Wide enough for the Winograd set's own convolutions.
WIDE: dict[str, Any] = {**TINY, "block_out_channels": (16, 32), "num_class_embeds": 3}


def _compiler() -> bool:
    try:
        return bool(compiled.compiler())
    except RuntimeError:
        return False


SETS = ["reference", "cpu", pytest.param("winograd", marks=pytest.mark.skipif(not _compiler(), reason="no compiler"))]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, Any] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),  # stands for any that the sampler is not on
    "inference": torch.inference_mode,
}


def draw(ops: str, model: df.UNet, schedule: df.Schedule) -> Tensor:
    return df.Sampler(model, schedule, steps=5, ops=ops, guidance_scale=1.5).sample(2, seed=3, labels=[0, 1])


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("ops", SETS)
def test_the_same_images_under(around: str, ops: str):
    """The compiled functions write where they are told: into buffers of a wrong type, that was other memory."""
    model = unet(WIDE)
    plain = draw(ops, model, SCHEDULE)
    with AROUND[around]():
        drawn = draw(ops, model, df.Schedule(**SCHEDULE.to_dict()))
    assert drawn.dtype == torch.float32 and drawn.device == torch.device("cpu")
    assert torch.equal(drawn, plain)


def test_a_sampler_made_under_autocast_is_as_any_other():
    model = unet(WIDE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sampler = df.Sampler(model, SCHEDULE, steps=3, ops="cpu")
    assert torch.equal(sampler.sample(1, labels=1), df.Sampler(model, SCHEDULE, steps=3, ops="cpu").sample(1, labels=1))


def test_a_callable_keeps_its_caller_s_autocast():
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x @ x).dtype)
        return 0.5 * x

    sampler = df.Sampler(model, SCHEDULE, steps=1, image_shape=(3, 4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sampler.sample(1)
    sampler.sample(1)
    assert seen == [torch.bfloat16, torch.float32]


def test_images_are_ordinary_tensors():
    """They may be changed in place and trained on."""
    x = df.Sampler(unet(TINY), SCHEDULE, steps=2).sample(1)
    assert not x.is_inference()
    weight = torch.ones((), requires_grad=True)
    (weight * x.clamp_(-0.5, 0.5)).sum().backward()
    assert weight.grad is not None and float(weight.grad) == pytest.approx(float(x.sum()))


def test_numbers_may_be_numpy_s_or_tensors():
    model = unet(TINY)
    plain = df.Sampler(model, SCHEDULE, batch_size=2, steps=4).sample(3, seed=5, first_id=7)
    for kind in (np.int64, torch.tensor):
        sampler = df.Sampler(model, SCHEDULE, batch_size=kind(2), steps=kind(4))
        assert torch.equal(sampler.sample(kind(3), seed=kind(5), first_id=kind(7)), plain)
    chain = df.Sampler(model, SCHEDULE, steps=np.array([15, 10, 5, 0]))
    assert chain.table.timesteps == (15, 10, 5, 0)
    streams = [df.Sampler(model, SCHEDULE, steps=2, noise="torch").sample(1, seed=s) for s in (-1, 2**64 - 1)]
    assert torch.equal(streams[0], streams[1])


NOISES = "'philox', 'torch', a torch.Generator or a list of one an image"


@pytest.mark.parametrize(
    "options, call, message",
    [
        ({"batch_size": 2.0}, {}, "batch_size must be a positive integer or 'auto'; got 2.0"),
        ({"batch_size": True}, {}, "batch_size must be a positive integer or 'auto'; got True"),
        ({"steps": 5.0}, {}, "steps must be a whole number, a list of timesteps or text; got 5.0"),
        ({"steps": [9.5, 3]}, {}, "a timestep must be a whole number; got 9.5"),
        ({}, {"n": 1.5}, "n must be a whole number; got 1.5"),
        ({}, {"n": "2"}, "n must be a whole number; got '2'"),
        ({}, {"n": 1, "seed": 0.5}, "seed must be a whole number; got 0.5"),
        ({}, {"n": 1, "first_id": None}, "first_id must be a whole number; got None"),
        ({}, {"n": 1, "interval": 1.5}, "interval must be a whole number; got 1.5"),
        ({"image_shape": (8, 8)}, {}, "image_shape must be (C, H, W), three positive integers; got (8, 8)"),
        ({"image_shape": (3, 8.0, 8)}, {}, "image_shape must be (C, H, W), three positive integers; got (3, 8.0, 8)"),
        ({"image_shape": (3, 0, 0)}, {}, "image_shape must be (C, H, W), three positive integers; got (3, 0, 0)"),
        ({"image_shape": 8}, {}, "image_shape must be (C, H, W), three positive integers; got 8"),
        ({"method": "ddim", "eta": "1"}, {}, "eta must be a finite number; got '1'"),
        ({"time_scale": -1.0}, {}, "time_scale must be above 0; got -1.0"),
        ({"time_scale": float("nan")}, {}, "time_scale must be a finite number; got nan"),
        ({"guidance_scale": float("inf")}, {}, "guidance_scale must be a finite number; got inf"),
        ({"noise": 5}, {}, f"noise must be {NOISES}; got 5"),
        ({"noise": []}, {}, f"noise must be {NOISES}; got []"),
        ({"noise": [None]}, {}, f"noise must be {NOISES}; got [None]"),
    ],
)
def test_what_is_no_number(options: dict[str, Any], call: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        df.Sampler(unet(TINY), SCHEDULE, **options).sample(**call)
    assert str(error.value) == message


@pytest.mark.parametrize("labels", ["a", 0.5, [0, 1.5], True, torch.tensor([0.0, 1.0])], ids=str)
def test_labels_are_whole_numbers(labels: Any):
    sampler = df.Sampler(unet({**TINY, "num_class_embeds": 3}), SCHEDULE, steps=1)
    with pytest.raises(ValueError, match=r"^labels must be whole numbers; got .*$"):
        sampler.sample(2, labels=labels)


def test_what_is_no_model_or_schedule():
    scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match=r"got UNet and DDPMScheduler \(.*Schedule.from_dict\(scheduler.config\)\)$"):
        df.Sampler(unet(TINY), scheduler)
    assert df.Schedule.from_dict(scheduler.config) == df.Schedule()  # what the message recommends
    with pytest.raises(ValueError, match="a model that can be called and a Schedule; got NoneType and Schedule"):
        df.Sampler(None, SCHEDULE)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here():
    with pytest.raises(ValueError, match="device='cuda:1' cannot be had: torch sees no CUDA GPU here; see ddpm-fast"):
        df.Sampler(unet(TINY), SCHEDULE, device="cuda:1")
