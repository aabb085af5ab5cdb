"""Rows of the step table, applied in float64, against Schedule.step and diffusers' DDIMScheduler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from models import normal
from torch import Tensor

from ddpm_fast.kernels import reference
from ddpm_fast.schedule import PREDICTION_TYPES, VARIANCE_TYPES, Schedule
from ddpm_fast.step_table import StepTable, step_table

CHAINS: dict[str, Any] = {"all": None, "respaced": 7, "custom": [99, 98, 40, 7, 3], "one": 1, "to_zero": [50, 0]}
CLIPS: dict[str, dict[str, Any]] = {
    "clip": {"clip_sample_range": 0.7},
    "thresholding": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    "none": {"clip_sample": False},
}


def apply(table: StepTable, i: int, x: Tensor, out: Tensor, z: Tensor) -> Tensor:
    """Row i on float64 values, by the definition of the operation."""
    counter = torch.tensor([i, 0], dtype=torch.int32)
    nothing = torch.zeros(1, dtype=torch.int64)
    y = reference.sampler_step(
        x,
        out,
        table.rows,
        counter,
        nothing,
        nothing,
        variance=table.variance,
        noise=z,
        thresholding=table.thresholding,
    )
    assert counter.tolist() == [i + 1, 0]
    return y


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, eps, v in (-1, 1), z: float64."""
    x, eps, v, z = (normal(2, 3, 4, 4, seed=s, dtype=torch.float64) for s in range(4))
    return x, eps, v.tanh(), z


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("chain", CHAINS)
def test_a_row_is_a_step_of_the_schedule(chain: str, variance: str, prediction: str):
    x, eps, v, z = tensors()
    out = torch.cat((eps, v.abs() if variance == "learned" else v), 1) if variance.startswith("learned") else eps
    for clip in CLIPS.values():
        schedule = Schedule(100, variance_type=variance, prediction_type=prediction, **clip)
        table = step_table(schedule, CHAINS[chain])
        steps = CHAINS[chain]
        expected_chain = schedule.timesteps(steps) if steps is None or isinstance(steps, int) else steps
        assert list(table.timesteps) == table.rows[:, reference.TIME].tolist() == expected_chain
        assert len(table) == len(expected_chain)
        for i, (t, prev_t) in enumerate(zip(expected_chain, expected_chain[1:] + [-1])):
            if 5 < i < len(table) - 5:
                continue
            expected = schedule.step(out, t, x, z, prev_t)
            torch.testing.assert_close(apply(table, i, x, out, z), expected, rtol=1e-12, atol=1e-12)
            if t == 0:  # noise is withheld by the timestep, whatever z is
                torch.testing.assert_close(apply(table, i, x, out, 100 * z), expected, rtol=1e-12, atol=1e-12)
            else:  # and added wherever it is not 0, at the chain's end too
                change = apply(table, i, x, out, z) - apply(table, i, x, out, torch.zeros_like(z))
                a_t, a_p = schedule.alphas(t, prev_t)
                if variance.startswith("fixed_large"):
                    torch.testing.assert_close(change, math.sqrt(1 - a_t / a_p) * z, rtol=1e-9, atol=1e-12)
                assert (change != 0).all()


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", CLIPS)
def test_ddim_rows_are_upstream_s_steps(clip: str, prediction: str, eta: float):
    """In float64, theirs on our table. It goes on to t - T // n, which is the chain's next where n divides T."""
    x, eps, _, z = tensors()
    options = {"prediction_type": prediction, **CLIPS[clip]}
    schedule, theirs = Schedule(100, **options), DDIMScheduler(100, **options)
    theirs.alphas_cumprod = schedule.alphas_cumprod
    for n in (100, 10, 4):
        theirs.set_timesteps(n)
        table = step_table(schedule, n, "ddim", eta)
        assert list(table.timesteps) == theirs.timesteps.tolist()
        assert table.variance == "fixed"
        for i in {0, 1, n // 2, n - 2, n - 1}:
            expected = theirs.step(eps, table.timesteps[i], x, eta=eta, variance_noise=z).prev_sample
            torch.testing.assert_close(apply(table, i, x, eps, z), expected, rtol=1e-10, atol=1e-10)
        assert (table.rows[:, reference.SIGMA] == 0).all() == (eta == 0)
        assert table.rows[-1, reference.SIGMA] == 0  # the last step ends at x_0


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_s_variance():
    """Song et al. 2021, section 4.1: the same Markov chain, where nothing is clipped."""
    schedule = Schedule(100, clip_sample=False)
    x, eps, _, z = tensors()
    ddpm, ddim = step_table(schedule, 20), step_table(schedule, 20, "ddim", 1.0)
    for i in range(20):
        torch.testing.assert_close(apply(ddim, i, x, eps, z), apply(ddpm, i, x, eps, z), rtol=1e-9, atol=1e-9)


def test_ddim_follows_a_custom_chain_to_its_next_entry():
    """Equation 12 with sigma = 0, from the chain's own a_p."""
    schedule = Schedule(100, clip_sample=False)
    x, eps, _, z = tensors()
    table = step_table(schedule, [90, 33, 5], "ddim")
    for i, (t, prev_t) in enumerate(((90, 33), (33, 5), (5, -1))):
        a_t = float(schedule.alphas_cumprod[t])
        a_p = float(schedule.alphas_cumprod[prev_t]) if prev_t >= 0 else 1.0
        expected = math.sqrt(a_p) * (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t) + math.sqrt(1 - a_p) * eps
        torch.testing.assert_close(apply(table, i, x, eps, z), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_a_terminal_snr_of_zero_stays_finite(method: str):
    """The row holds a large factor in place of infinity, in float32 as the kernels read it."""
    schedule = Schedule(100, rescale_betas_zero_snr=True)
    table = step_table(schedule, method=method)
    assert table.rows.float()[:, : reference.CLIP].isfinite().all()
    x, eps = (a.float() for a in tensors()[:2])
    single = StepTable(table.rows.float(), table.timesteps, "fixed")
    y = apply(single, 0, x, eps, torch.zeros_like(x))
    a_p = schedule.alphas(99)[1]
    expected = math.sqrt(a_p) * torch.sign(x - eps) + (math.sqrt(1 - a_p) * eps if method == "ddim" else 0)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"method": "euler"},
            "method must be one of ddpm, ddim, ancestral_sampling, euler_maruyama, reverse_diffusion; got 'euler'",
        ),
        ({"method": "ddim", "eta": 1.5}, r"eta must be in \[0, 1\]; got 1.5"),
        ({"eta": 0.5}, "eta belongs to method='ddim'; got eta=0.5 with method='ddpm'"),
        ({"steps": 101}, "steps must be between 1 and num_train_timesteps=100; got 101"),
        ({"steps": 0}, "steps must be between 1 and num_train_timesteps=100; got 0"),
        ({"steps": []}, r"timesteps must be a non-empty list within 0..99; got \[\]"),
        ({"steps": [100, 3]}, r"timesteps must be a non-empty list within 0..99; got \[100, 3\]"),
        ({"steps": [5, -1]}, r"timesteps must be a non-empty list within 0..99; got \[5, -1\]"),
        ({"steps": [5, 5]}, r"timesteps must descend strictly; got \[5, 5\]"),
        ({"steps": [3, 5]}, r"timesteps must descend strictly; got \[3, 5\]"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        step_table(Schedule(100), **arguments)
