"""accelerate(pipeline) follows what becomes of the pipeline, and says in one line what it does not take."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, EMAModel
from dropin_setup import SHORT, SMALL, agrees, difference, drawn, pipeline
from models import diffusers_unet
from torch import nn

import ddpm_fast as df
from ddpm_fast.dropin import Accelerated


def same(fast: Accelerated, p: Any, **kwargs: Any) -> bool:
    return agrees(drawn(fast, **kwargs), p, **kwargs)


# --- what becomes of the pipeline ---


def train(p: Any) -> None:
    optimizer = torch.optim.SGD(p.unet.parameters(), lr=0.1)
    p.unet(torch.ones(1, 3, 8, 8), 3).sample.square().sum().backward()
    optimizer.step()


def average(p: Any) -> None:
    """EMAModel writes through ``.data``, which leaves the version counters as they were."""
    averages = EMAModel(diffusers_unet(SMALL, seed=5).parameters())
    versions = [w._version for w in p.unet.parameters()]
    averages.copy_to(p.unet.parameters())
    assert [w._version for w in p.unet.parameters()] == versions


def one_weight(p: Any) -> None:
    p.unet.conv_in.weight.data[0, 0, 0, 0] += 0.5


def swap_two(p: Any) -> None:
    """The same bits in other places."""
    with torch.no_grad():
        p.unet.conv_out.bias.copy_(p.unet.conv_out.bias.flip(0).clone())


def put(name: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda p: setattr(p, name, make(p))


CHANGES: dict[str, Callable[[Any], None]] = {
    "trained": train,
    "averaged": average,
    "one weight": one_weight,
    "two swapped": swap_two,
    "loaded": lambda p: p.unet.load_state_dict(diffusers_unet(SMALL, seed=3).state_dict()),
    "unet": put("unet", lambda p: diffusers_unet({**SMALL, "sample_size": 4}, seed=4)),
    "scheduler": put("scheduler", lambda p: DDPMScheduler(**SHORT, variance_type="fixed_large")),
    "ddim": put("scheduler", lambda p: DDIMScheduler.from_config(p.scheduler.config)),
    "wrapped": put("unet", lambda p: nn.DataParallel(p.unet).eval()),
}


def put_config(part: str, **values: Any) -> Callable[[Any], None]:
    """Edit a configuration by its attributes, which diffusers' code reads; the items stay as they were."""

    def change(p: Any) -> None:
        config = getattr(p, part).config
        for name, value in values.items():
            setattr(config, name, value)
            assert config[name] != value

    return change


CONFIGS: dict[str, Callable[[Any], None]] = {
    "clip_sample": put_config("scheduler", clip_sample=False),
    "prediction_type": put_config("scheduler", prediction_type="sample"),
    "timestep_spacing": put_config("scheduler", timestep_spacing="trailing"),
    "center_input_sample": put_config("unet", center_input_sample=True),
    "sample_size": put_config("unet", sample_size=12),
    "two sizes": put_config("unet", sample_size=(12, 8)),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_edited_by_its_attributes_is_followed(name: str, when: str):
    p = pipeline()
    plain = drawn(p)
    fast = df.accelerate(p) if when == "after" else None
    assert fast is None or agrees(drawn(fast), p, plain)
    CONFIGS[name](p)
    expected = drawn(p)
    assert expected.shape != plain.shape or difference(expected, plain) > 1e-3
    fast = fast or df.accelerate(p)
    assert agrees(drawn(fast), p, expected)
    if name == "two sizes":
        assert "for images of 3x12x8" in repr(fast)


class Tenth(DDPMScheduler):
    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return (lambda *a, **k: DDPMScheduler.step(self, *a, **k).__class__(a[2] * 0.1)) if name == "step" else value


def test_a_scheduler_of_another_class_than_before_is_compared_again():
    p = pipeline()
    fast = df.accelerate(p)
    assert same(fast, p)
    p.scheduler.__class__ = Tenth
    with pytest.raises(ValueError, match="the Tenth takes other steps than its configuration says"):
        drawn(fast)


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "wrapped"])
def test_the_pipeline_is_followed(change: str):
    p = pipeline()
    fast = df.accelerate(p)
    before = drawn(fast)
    assert same(fast, p)
    CHANGES[change](p)
    after = drawn(fast)
    assert same(fast, p)
    assert after.shape != before.shape or np.abs(after - before).max() > 1e-3


def test_a_half_precision_pipeline_is_followed():
    p = pipeline()
    fast = df.accelerate(p)
    assert (fast.dtype, fast.device) == (torch.float32, torch.device("cpu"))
    p.to(torch.float16)
    assert fast.dtype == torch.float16
    exact = drawn(df.accelerate(p, dtype=torch.float32), generator=None, num_inference_steps=1)
    assert exact.dtype == np.float32
    fast.to(dtype=torch.float32, device="cpu")
    assert fast.dtype == torch.float32 and p.unet.dtype == torch.float16


def test_its_parts_are_the_pipeline_s_in_both_directions():
    p = pipeline()
    fast = df.accelerate(p)
    fast.scheduler = DDIMScheduler.from_config(fast.scheduler.config)
    fast.unet = diffusers_unet(SMALL, seed=8)
    assert p.scheduler is fast.scheduler and p.unet is fast.unet and same(fast, p)


def test_weights_are_prepared_once_while_nothing_changes(monkeypatch: pytest.MonkeyPatch):
    made = []
    begin = df.Sampler.__init__
    monkeypatch.setattr(df.Sampler, "__init__", lambda *a, **k: made.append(k["batch_size"]) or begin(*a, **k))
    fast = df.accelerate(pipeline())
    for n in (2, 1, 2):
        fast(n, num_inference_steps=2, output_type="np")
    assert made == [2]
    fast(3, num_inference_steps=2, output_type="np")  # ops="auto" is chosen by the length of a batch
    assert made == [2, 3] and fast._sampler is not None and fast._sampler[1].ops.name == "cpu"


def test_progress_bars_are_the_pipeline_s_until_set_here(capsys: pytest.CaptureFixture[str]):
    p = pipeline()
    fast = df.accelerate(p)
    p.set_progress_bar_config(desc="theirs", ascii=True)
    drawn(fast)
    assert "theirs" in capsys.readouterr().err
    fast.set_progress_bar_config(disable=True)
    drawn(fast)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ops", ["auto", "winograd"])
def test_it_is_copied_and_pickled_with_the_pipeline(ops: str):
    p = pipeline(DDIMPipeline, DDIMScheduler)
    try:
        fast = df.accelerate(p, ops=ops)
        expected = drawn(fast)
    except RuntimeError as error:
        pytest.skip(str(error))
    for other in (copy.copy(fast), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert np.array_equal(drawn(other), expected)


def test_a_network_wrapped_for_several_devices_is_looked_through():
    p, plain = pipeline(), pipeline()
    CHANGES["wrapped"](p)
    assert same(df.accelerate(p), plain)


# --- arguments and results ---


def test_the_result_is_a_mapping_too():
    result = df.accelerate(pipeline())(num_inference_steps=2)
    assert list(result) == ["images"] and "images" in result and len(result) == 1
    assert dict(result)["images"] is result.images is result.get("images")


@pytest.mark.parametrize(
    "call, message",
    [
        ({"generator": "torch"}, "generator must be a torch.Generator, a list of one an image, or None; got 'torch'"),
        ({"generator": []}, r"generator must be a torch.Generator, a list of one an image, or None; got \[\]"),
        ({"batch_size": -1}, "batch_size must be 0 or more; got -1"),
        ({"batch_size": 1.5}, "batch_size must be a whole number; got 1.5"),
        ({"num_inference_steps": None}, "num_inference_steps must be a whole number; got None"),
        ({"num_inference_steps": "5"}, "num_inference_steps must be a whole number; got '5'"),
    ],
)
def test_wrong_arguments(call: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        df.accelerate(pipeline())(**{"num_inference_steps": 2, **call})


def test_numpy_s_numbers():
    fast = df.accelerate(pipeline())
    assert len(fast(np.int64(2), num_inference_steps=np.int64(2)).images) == 2


def test_pictures_of_two_channels_are_refused_before_they_are_drawn(monkeypatch: pytest.MonkeyPatch):
    fast = df.accelerate(pipeline(in_channels=2, out_channels=2))
    assert drawn(fast).shape == (2, 8, 8, 2)
    monkeypatch.setattr(df.Sampler, "sample", None)
    with pytest.raises(ValueError, match="1, 3 or 4 channels; got 2; take output_type='np'"):
        fast(num_inference_steps=2)


def offloaded(p: Any) -> None:
    p.unet.to("meta")


def fused(p: Any) -> None:
    p.unet.conv_in.register_parameter("lora_A", nn.Parameter(torch.zeros(1)))


@pytest.mark.parametrize(
    "config, change, message",
    [
        ({}, lambda p: p.unet.double(), r"computes in float32, bfloat16, float16; got torch.float64; name one of them"),
        ({}, offloaded, "must be in memory; some are on meta"),
        ({}, fused, "those of its configuration; not so: conv_in.lora_A; merge or remove adapters"),
        (
            {"num_class_embeds": 3},
            lambda p: None,
            r"passes no class labels, and this network needs them; save it, then",
        ),
    ],
    ids=["float64", "offloaded", "adapter", "classes"],
)
def test_pipelines_that_it_does_not_take(config: dict[str, Any], change: Callable[[Any], Any], message: str):
    p = pipeline(**config)
    change(p)
    with pytest.raises(ValueError, match=message) as error:
        df.accelerate(p)
    assert "\n" not in str(error.value)
