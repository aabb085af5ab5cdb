"""accelerate follows a scheduler's own numbers, and refuses steps that its table does not take.

The oracle is the pipeline itself, in the same process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from dropin_setup import LONG_TABLES, SHORT, SMALL, agrees, difference, drawn, pipeline
from models import diffusers_unet

import ddpm_fast as df
from ddpm_fast.pipelines import schedule_of
from ddpm_fast.scheduler_check import checked_steps


def zero_snr(p: Any) -> None:
    s = p.scheduler
    s.betas = rescale_zero_terminal_snr(s.betas)
    s.alphas = 1 - s.betas
    s.alphas_cumprod = torch.cumprod(s.alphas, dim=0)


def last_alpha(p: Any) -> None:
    p.scheduler.alphas_cumprod[-1] = 0


def flat_start(p: Any) -> None:
    """Betas that float32 loses beside 1."""
    a = p.scheduler.alphas_cumprod
    a[2] = a[1]


class Chosen(DDPMScheduler):
    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, timesteps: Any = None) -> None:
        super().set_timesteps(timesteps=[19, 12, 7, 3, 2, 0])


class Named(DDPMScheduler):
    pass


def scheduler(kind: Any, **options: Any) -> Callable[[Any], None]:
    return lambda p: setattr(p, "scheduler", kind(**{**SHORT, **options}))


FOLLOWED: dict[str, Callable[[Any], None]] = {
    "zero SNR by hand": zero_snr,
    "zero SNR by configuration": scheduler(DDPMScheduler, rescale_betas_zero_snr=True),
    "the last alpha": last_alpha,
    "a beta of zero": flat_start,
    "timesteps of a subclass": scheduler(Chosen),
    "a subclass": scheduler(Named),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_scheduler_s_own_numbers_are_followed(name: str, when: str):
    p = pipeline()
    plain = drawn(p, num_inference_steps=20)
    fast = df.accelerate(p) if when == "after" else None
    assert fast is None or agrees(drawn(fast, num_inference_steps=20), p, plain, num_inference_steps=20)
    FOLLOWED[name](p)
    expected = drawn(p, num_inference_steps=20)
    assert difference(expected, plain) > 1e-3 or name in ("a subclass", "a beta of zero")
    fast = df.accelerate(p) if fast is None else fast
    assert agrees(drawn(fast, num_inference_steps=20), p, expected, num_inference_steps=20)


def test_the_zero_snr_of_1000_steps_is_followed():
    p = DDPMPipeline(diffusers_unet(SMALL), DDPMScheduler())
    p.set_progress_bar_config(disable=True)
    plain = drawn(p, num_inference_steps=50)
    zero_snr(p)
    expected = drawn(p, num_inference_steps=50)
    assert difference(expected, plain) > 1e-2
    ours = drawn(df.accelerate(p), num_inference_steps=50)
    assert agrees(ours, p, expected, LONG_TABLES, num_inference_steps=50)


def replaced_step(p: Any) -> None:
    step = p.scheduler.step
    p.scheduler.step = lambda out, t, x, **kwargs: step(out * 0.9, t, x, **kwargs)


def replaced_timesteps(p: Any) -> None:
    set_timesteps = p.scheduler.set_timesteps
    p.scheduler.set_timesteps = lambda n: set_timesteps(n // 2)


class Late(DDPMScheduler):
    """Another step at two timesteps of twenty."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        result = super().step(model_output, timestep, sample, **kwargs)
        if 0 < timestep < 3:
            result.prev_sample = result.prev_sample + 0.01
        return result


class Twice(DDPMScheduler):
    """Takes more noise than its steps need."""

    def step(self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, **kwargs: Any) -> Any:
        result = super().step(model_output, timestep, sample, generator=generator, **kwargs)
        torch.rand((), generator=generator)
        return result


def upside_down(p: Any) -> None:
    p.scheduler.alphas_cumprod = p.scheduler.alphas_cumprod.flip(0)


def one_less(p: Any) -> None:
    p.scheduler.alphas_cumprod = torch.cat((p.scheduler.alphas_cumprod, torch.zeros(1)))


SCHEDULERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "step": (replaced_step, r"the scheduler's step was replaced by .*lambda.*del pipeline.scheduler.step"),
    "set_timesteps": (replaced_timesteps, r"the scheduler's set_timesteps was replaced by .*lambda"),
    "late step": (
        scheduler(Late),
        "the Late takes other steps than its configuration says: at timestep 2 x differs by 0.01",
    ),
    "more noise": (scheduler(Twice), "the Twice takes other steps than its configuration says"),
    "variance": (
        lambda p: setattr(p.scheduler, "variance_type", "fixed_small_log"),
        r"the DDPMScheduler takes other steps .* pipeline.scheduler = DDPMScheduler.from_config\(",
    ),
    "alphas": (upside_down, "alphas_cumprod must be 20 numbers that fall"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_of_other_steps_is_refused(name: str, when: str):
    change, message = SCHEDULERS[name]
    p = pipeline()
    plain = drawn(p, num_inference_steps=20)
    fast = df.accelerate(p) if when == "after" else None
    assert fast is None or agrees(drawn(fast, num_inference_steps=20), p, plain, num_inference_steps=20)
    change(p)
    assert not difference(drawn(p, num_inference_steps=20), plain) <= 1e-3  # or NaN
    with pytest.raises(ValueError, match=message) as error:
        drawn(fast or df.accelerate(p), num_inference_steps=20)
    assert "\n" not in str(error.value)


def test_alphas_of_another_length_are_refused():
    p = pipeline()
    one_less(p)
    with pytest.raises(ValueError, match="alphas_cumprod must be 20 numbers"):
        df.accelerate(p)


class DressedLate(DDPMScheduler):
    """Another step at one timestep of a hundred."""

    @functools.wraps(DDPMScheduler.step)
    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        result = super().step(model_output, timestep, sample, **kwargs)
        if timestep == 59:
            result.prev_sample = result.prev_sample + 0.5
        return result


def test_every_step_of_a_scheduler_with_code_of_its_own_is_compared():
    p = pipeline()
    fast = df.accelerate(p)
    p.scheduler = DDPMScheduler(100)
    plain = drawn(p, num_inference_steps=100)
    assert agrees(drawn(fast, num_inference_steps=100), p, plain, LONG_TABLES, num_inference_steps=100)
    p.scheduler = DressedLate(100)
    assert difference(drawn(p, num_inference_steps=100), plain) > 1e-3
    with pytest.raises(ValueError, match=r"the DressedLate takes other steps .* at timestep 59 "):
        drawn(fast, num_inference_steps=100)


def test_a_ddim_scheduler_s_last_alpha():
    p = pipeline(DDIMPipeline, DDIMScheduler)
    fast, plain = df.accelerate(p), drawn(p)
    assert agrees(drawn(fast), p, plain)
    p.scheduler.final_alpha_cumprod = torch.tensor(0.999)
    assert difference(drawn(p), plain) > 1e-5
    with pytest.raises(
        ValueError, match="the DDIMScheduler takes other steps than its configuration says: at timestep 0"
    ):
        drawn(fast)


def test_a_ddpm_scheduler_put_in_a_ddim_pipeline_fails_there_too():
    p = pipeline(DDIMPipeline, DDIMScheduler)
    fast = df.accelerate(p)
    p.scheduler = DDPMScheduler(**SHORT)
    with pytest.raises(TypeError):
        drawn(p)
    with pytest.raises(ValueError, match="DDPMScheduler does not take this pipeline's steps: TypeError"):
        drawn(fast)


def test_steps_for_which_diffusers_gives_one_timestep_too_many():
    """numpy's arange yields a 62nd value, which is timestep -1."""
    p = pipeline()
    p.scheduler = DDPMScheduler(timestep_spacing="trailing")
    p.scheduler.set_timesteps(61)
    assert p.scheduler.timesteps.tolist()[-2:] == [15, -1]
    fast = df.accelerate(p)
    with pytest.raises(ValueError, match="for 61 steps the DDPMScheduler gives 62 timesteps, from 999 to -1; "):
        drawn(fast, num_inference_steps=61)
    assert agrees(drawn(fast, num_inference_steps=60), p, tables=LONG_TABLES, num_inference_steps=60)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("total", [100, 4000])
def test_right_schedulers_are_not_refused(betas: str, total: int):
    """Every row against diffusers' float32 arithmetic, whose 1 - a_t / a_p is coarse where betas are small."""
    for options in (
        {},
        {"variance_type": "learned_range"},
        {"variance_type": "fixed_small_log", "clip_sample": False},
        {"prediction_type": "v_prediction", "timestep_spacing": "linspace"},
        {"prediction_type": "sample", "variance_type": "fixed_large", "rescale_betas_zero_snr": True},
        {"thresholding": True, "sample_max_value": 2.0, "timestep_spacing": "trailing"},
    ):
        channels = (3, 6 if "learned_range" in options.values() else 3)
        config = {"num_train_timesteps": total, "beta_schedule": betas, **options}

        class Checked(DDPMScheduler):  # a step of its own: all rows are compared
            def step(self, *args: Any, **kwargs: Any) -> Any:
                return super().step(*args, **kwargs)

        p = pipeline()
        p.scheduler = Checked(**config)
        schedule = schedule_of(p, False)
        for steps in (100, 20):
            assert checked_steps(p.scheduler, schedule, steps, channels) == steps
        if betas == "sigmoid" or "learned_range" in options.values():
            continue
        config.pop("variance_type", None)
        p.scheduler = DDIMScheduler(**config)
        schedule = schedule_of(p, True)
        for eta, clipped in ((0.0, None), (1.0, None), (0.3, True), (0.0, True)):
            given = {"eta": eta, "use_clipped_model_output": clipped}
            asked = replace(schedule, use_clipped_model_output=bool(clipped))
            assert checked_steps(p.scheduler, asked, 50, channels, eta, given) == 50


@pytest.mark.parametrize(
    "options", [{"variance_type": "fixed_large_log"}, {"rescale_betas_zero_snr": True, "clip_sample": False}]
)
def test_schedulers_that_draw_nothing_in_diffusers_are_refused(options: dict[str, Any]):
    p = pipeline()
    p.scheduler = DDPMScheduler(**SHORT, **options)
    assert np.isnan(drawn(p, num_inference_steps=20)).any()
    with pytest.raises(ValueError, match="the DDPMScheduler gives NaN or infinity at timestep 19, so the pipe"):
        drawn(df.accelerate(p), num_inference_steps=20)


def test_a_schedule_beyond_float32_is_taken_by_its_configuration():
    """float32's alphas_cumprod end in several zeros, which no betas give."""
    p = pipeline(DDIMPipeline, DDIMScheduler)
    p.scheduler = DDIMScheduler(num_train_timesteps=4000, beta_end=0.06)
    assert (p.scheduler.alphas_cumprod == 0).sum() > 1
    assert agrees(drawn(df.accelerate(p)), p, tables=LONG_TABLES)


def test_advice_is_for_solvers_of_a_ddpm_alone():
    p = pipeline()
    advice = "set pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)"
    for name in (
        "PNDM",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "DEISMultistep",
    ):
        p.scheduler = getattr(diffusers, f"{name}Scheduler")()
        with pytest.raises(ValueError, match=f"this pipeline has a {name}Scheduler; ") as error:
            df.accelerate(p)
        assert advice in str(error.value)
        p.scheduler = DDIMScheduler.from_config(p.scheduler.config)
        assert agrees(drawn(df.accelerate(p)), p, tables=LONG_TABLES)
    flow = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    others = ("CMStochasticIterative", "RePaint", "ScoreSdeVe", "EDMEuler", "FlowMatchEulerDiscrete", "VQDiffusion")
    made = [getattr(diffusers, f"{n}Scheduler")(*([8] if n == "VQDiffusion" else [])) for n in others]
    for other in (*made, flow):
        p.scheduler = other
        with pytest.raises(ValueError, match=f"this pipeline has a {type(other).__name__}; its process") as error:
            df.accelerate(p)
        assert "DDIMScheduler.from_config" not in str(error.value) and "by the pipeline itself" in str(error.value)


def test_nan_of_the_network_ends_the_call_and_names_the_step():
    """diffusers' images are NaN: the logarithm of timestep 0, or of a negative variance."""
    fourier, learned = pipeline(time_embedding_type="fourier"), pipeline(out_channels=6)
    learned.scheduler = DDPMScheduler(**SHORT, variance_type="learned")
    for p, step in ((fourier, r"step 10 of 10 \(t = 0\)"), (learned, r"step 1 of 10 \(t = 18\)")):
        assert np.isnan(drawn(p)).any()
        with pytest.raises(RuntimeError, match=rf"images must be finite; .* id 0 from {step}"):
            drawn(df.accelerate(p))
