"""Schedule against diffusers' DDPMScheduler in the same process, and against float64 formulas."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from models import normal
from torch import Tensor

from ddpm_fast.schedule import BETA_SCHEDULES, EXTENSIONS, PREDICTION_TYPES, SPACINGS, VARIANCE_TYPES, Schedule

TRAINED = tuple(float(b) for b in 0.001 + 0.3 * np.sin(np.linspace(0.05, 1.5, 40)) ** 2)
BETAS: dict[str, dict[str, Any]] = {name: {"beta_schedule": name} for name in BETA_SCHEDULES}
BETAS["trained_betas"] = {"trained_betas": TRAINED, "num_train_timesteps": len(TRAINED)}
BETAS["zero_snr"] = {"rescale_betas_zero_snr": True}
CLIPS: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip_to_a_half": {"clip_sample_range": 0.5},
    "thresholding": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    "none": {"clip_sample": False},
}
EPS32 = 2.0**-23


def theirs(options: dict[str, Any]) -> DDPMScheduler:
    trained = options.get("trained_betas")
    return DDPMScheduler(**{**options, "trained_betas": None if trained is None else list(trained)})


def alphas_cumprod(schedule: str, T: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """a_t in float64, each from its source's formula rather than from a table of betas where it has one."""
    u = np.arange(T + 1) / T
    if schedule == "linear":
        betas = start + (end - start) * np.arange(T) / (T - 1)
    elif schedule == "scaled_linear":
        betas = (start**0.5 + (end**0.5 - start**0.5) * np.arange(T) / (T - 1)) ** 2
    elif schedule == "sigmoid":
        betas = start + (end - start) / (1 + np.exp(-(-6 + 12 * np.arange(T) / (T - 1))))
    elif schedule == "trained_betas":
        betas = np.array(TRAINED)
    else:
        if schedule == "squaredcos_cap_v2":
            a = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        else:  # laplace, as upstream: the root of the signal's share in place of the share
            snr = np.exp(-0.5 * np.copysign(1, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6))
            a = np.sqrt(snr / (1 + snr))
        betas = np.minimum(1 - a[1:] / a[:-1], 0.999)
    return np.cumprod(1 - betas)


def test_fields_and_defaults_are_upstream_s():
    upstream = {n: p.default for n, p in inspect.signature(DDPMScheduler.__init__).parameters.items() if n != "self"}
    assert {f.name: f.default for f in fields(Schedule) if f.name not in EXTENSIONS} == upstream
    assert Schedule().to_dict().keys() == upstream.keys()


@pytest.mark.parametrize("name", BETAS)
def test_tables(name: str):
    ours, upstream = Schedule(**BETAS[name]), theirs(BETAS[name])
    a = ours.alphas_cumprod.numpy()
    if name == "zero_snr":  # Lin et al. 2023, algorithm 1
        root = np.sqrt(alphas_cumprod("linear", 1000))
        expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        assert a[-1] == 0
    else:
        expected = alphas_cumprod(name, ours.num_train_timesteps)
    np.testing.assert_allclose(a, expected, rtol=1e-12, atol=1e-30)
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == torch.float64
    if name != "zero_snr":  # there upstream's float32 quotients are 1e-3 off; a_t is what enters a step
        torch.testing.assert_close(ours.betas.float(), upstream.betas, rtol=4 * EPS32, atol=0)
    # Upstream multiplies up to 1000 float32 factors, each rounded by 2^-24; near a beta of 0.999 the factor
    # 1 - beta has lost digits too (its error is 2^-25, its value 0.001).
    worst = float((EPS32 / 2 / (1 - ours.betas).clamp(min=1e-30)).cumsum(0)[:-1].max()) if name != "zero_snr" else 1e-4
    torch.testing.assert_close(upstream.alphas_cumprod.double()[:-1], ours.alphas_cumprod[:-1], rtol=worst, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("T", [7, 50, 1000])
def test_timesteps_are_upstream_s_list(spacing: str, T: int):
    ours, upstream = (c(num_train_timesteps=T, timestep_spacing=spacing) for c in (Schedule, DDPMScheduler))
    assert ours.timesteps() == list(range(T - 1, -1, -1))
    for n in range(1, T + 1):
        upstream.set_timesteps(n)
        expected = upstream.timesteps.tolist()
        if len(expected) == n + 1:  # upstream's extra timestep of -1, past the end, for 62 of 1000 step counts
            assert spacing == "trailing" and expected.pop() == -1
        assert ours.timesteps(n) == expected, n
        assert len(expected) == n


@pytest.mark.parametrize("offset, n", [(1, 30), (1, 999 // 2), (7, 10), (33, 30)])
def test_steps_offset(offset: int, n: int):
    ours, upstream = (c(steps_offset=offset) for c in (Schedule, DDPMScheduler))
    upstream.set_timesteps(n)
    assert ours.timesteps(n) == upstream.timesteps.tolist()


def test_an_offset_past_the_end_is_refused():
    with pytest.raises(ValueError, match="steps_offset=1 with 1000 steps starts past the last timestep, 999"):
        Schedule(steps_offset=1).timesteps()


# --- one step ---


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The noise that upstream's step adds: the last tensor of this list, in the dtype it asks for."""
    import diffusers.schedulers.scheduling_ddpm as module

    given: list[Tensor] = []

    def randn_tensor(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None) -> Tensor:
        assert tuple(shape) == tuple(given[-1].shape)
        return given[-1].to(dtype)

    monkeypatch.setattr(module, "randn_tensor", randn_tensor)
    return given


def magnitudes(a_t: float, a_p: float, prediction: str, variance: str) -> np.ndarray:
    """What multiplies (|x| + |out|) / by way of x_0, |x|, and |z| in a step: equations 7 and 15 of the paper."""
    bt = 1 - a_t / a_p
    signal = math.sqrt(a_t) if prediction == "epsilon" else 1.0
    c0 = math.sqrt(a_p) * bt / (1 - a_t) / signal
    cx = math.sqrt(a_t / a_p) * (1 - a_p) / (1 - a_t)
    pv = max(bt * (1 - a_p) / (1 - a_t), 1e-20)
    sigma = {"fixed_large": bt, "learned_range": max(bt, pv), "learned": 1.0}.get(variance, pv)
    return np.array([c0, cx, math.sqrt(sigma)])


def points(schedule: Schedule, scheduler: DDPMScheduler, n: int | None) -> list[tuple[int, int]]:
    """(t, the next timestep visited) at the ends and in the middle of a chain; -1 past the last."""
    if n is not None:
        scheduler.set_timesteps(n)
    chain = schedule.timesteps(n)
    pairs = list(zip(chain, chain[1:] + [-1]))
    return [pairs[0], pairs[len(pairs) // 2], pairs[-2], pairs[-1]]


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("betas", BETAS)
def test_step_equals_upstream_s(betas: str, prediction: str, draws: list[Tensor]):
    """Over variance types, clips and spacings, with the same noise.

    1. Their formulas in float64 on our table: equal to 1e-10 (beta_t = 1 - a_t / a_p cancels up to four digits).
    2. Ours on float32 tensors: within 8 roundings of each term.
    3. Theirs in float32, as it is: besides the roundings, its beta_t has an error of 2^-23, which is up to
       2^-23 / 1e-4 of itself (CHECKPOINTS: "differs by up to 5e-4"), and its table has drifted.
    """
    x, eps, z = (normal(2, 3, 4, 4, seed=s) for s in (1, 2, 3))
    draws.append(z)
    v = normal(2, 3, 4, 4, seed=4).tanh()
    chains = (({}, None), ({"timestep_spacing": "trailing"}, 10), ({"steps_offset": 1}, 8))
    for variance, clip, (spacing, n) in itertools.product(VARIANCE_TYPES, CLIPS, chains):
        if variance == "fixed_large_log":
            continue  # below
        options = {
            "num_train_timesteps": 200,
            **BETAS[betas],
            **CLIPS[clip],
            **spacing,
            "variance_type": variance,
            "prediction_type": prediction,
        }
        ours, upstream, exact = Schedule(**options), theirs(options), theirs(options)
        exact.alphas_cumprod = ours.alphas_cumprod
        spread = v.abs() if variance == "learned" else v
        out = torch.cat((eps, spread), dim=1) if variance.startswith("learned") else eps
        if n is not None:
            exact.set_timesteps(n)
        for t, prev_t in points(ours, upstream, n):
            a_t, a_p = ours.alphas(t, prev_t)
            if a_t == 0 and prediction == "epsilon":
                continue  # below
            case = f"{variance} {clip} {spacing} t={t}"
            # torch draws noise of the C-channel shape only for a learned variance; both have it here
            truth = exact.step(out.double(), t, x.double()).prev_sample
            mine64 = ours.step(out.double(), t, x.double(), z.double(), prev_t)
            scale = magnitudes(a_t, a_p, prediction, variance)
            reach = float(scale @ [float(x.abs().max() + eps.abs().max()), float(x.abs().max()), float(z.abs().max())])
            torch.testing.assert_close(mine64, truth, rtol=0, atol=1e-10 * reach, msg=lambda m: f"{case}: {m}")

            mine32 = ours.step(out, t, x, z, prev_t)
            assert mine32.dtype == torch.float32
            assert float((mine32 - truth).abs().max()) <= 8 * EPS32 * reach, case

            theirs32 = upstream.step(out, t, x).prev_sample
            table = upstream.alphas_cumprod.double()
            drifted = magnitudes(float(table[t]), float(table[prev_t]) if prev_t >= 0 else 1.0, prediction, variance)
            drift = float((np.abs(drifted - scale) / np.maximum(scale, 1e-9)).max())
            cancelled = 1 / min(1 - a_t / a_p, 1 - a_p if prev_t >= 0 else 1)
            bound = (8 * EPS32 + 2 * EPS32 * cancelled + 2 * drift) * reach
            assert float((mine32 - theirs32).abs().max()) <= bound, case


def test_step_of_the_default_scheduler_over_all_its_timesteps(draws: list[Tensor]):
    """One number for what people run: 9e-4 at any of the 1000 steps, 1e-5 from t = 30 on.

    beta_t = 1 - a_t / a_p has three roundings of 2^-25 upstream (a_t, a_p, quotient), and may be as small as 1e-4;
    the mean's factors are at most 1."""
    ours, upstream = Schedule(), DDPMScheduler()
    x, eps, z = (normal(1, 3, 4, 4, seed=s) for s in (1, 2, 3))
    draws.append(z)
    error = torch.stack(
        [(ours.step(eps, t, x, z) - upstream.step(eps, t, x).prev_sample).abs().max() for t in range(1000)]
    )
    assert error.max() <= 3 * 2.0**-25 / 1e-4
    assert error[30:].max() <= 1e-5


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_fixed_large_log_is_nan_upstream_and_fixed_large_here(prediction: str, draws: list[Tensor]):
    x, eps, z = (normal(2, 3, 4, 4, seed=s) for s in (1, 2, 3))
    draws.append(z)
    log, large = (Schedule(variance_type=f"fixed_large{suffix}", prediction_type=prediction) for suffix in ("_log", ""))
    upstream = DDPMScheduler(variance_type="fixed_large_log", prediction_type=prediction)
    for t in (999, 500, 1):
        assert upstream.step(eps, t, x).prev_sample.isnan().all()
        assert torch.equal(log.step(eps, t, x, z), large.step(eps, t, x, z))
    torch.testing.assert_close(log.step(eps, 0, x), upstream.step(eps, 0, x).prev_sample, rtol=0, atol=1e-3)


@pytest.mark.parametrize("clip", ["clip", "clip_to_a_half", "thresholding"])
def test_the_first_step_from_a_terminal_snr_of_zero(clip: str, draws: list[Tensor]):
    """Epsilon says nothing of x_0 there: it is +-infinity, and the clip makes of it the end of the range."""
    options = {"rescale_betas_zero_snr": True, **CLIPS[clip]}
    ours, upstream = Schedule(**options), DDPMScheduler(**options)
    x, eps, z = (normal(2, 3, 4, 4, seed=s) for s in (1, 2, 3))
    draws.append(z)
    y = ours.step(eps, 999, x, z)
    assert y.isfinite().all()
    # x_0 = s sign(x - eps) with beta = 1, so x_t drops out: sqrt(a_p) x_0 + sqrt(1 - a_p) z
    a_p = ours.alphas(999)[1]
    s = {"clip": 1.0, "clip_to_a_half": 0.5, "thresholding": 1.0}[clip]
    expected = math.sqrt(a_p) * s * torch.sign(x - eps).double() + math.sqrt(1 - a_p) * z.double()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=8 * EPS32 * 4)
    if clip == "thresholding":  # the quantile of infinities is NaN; what is meant is +-s, divided by s
        assert upstream.step(eps, 999, x).prev_sample.isnan().all()
    else:
        torch.testing.assert_close(upstream.step(eps, 999, x).prev_sample, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", BETAS)
def test_add_noise_and_velocity(name: str):
    ours, upstream = Schedule(**BETAS[name]), theirs(BETAS[name])
    x0, noise = normal(5, 3, 4, 4, seed=1), normal(5, 3, 4, 4, seed=2)
    T = ours.num_train_timesteps
    t = torch.tensor([0, 1, T // 2, T - 2, T - 1])
    a = ours.alphas_cumprod.numpy()[t][:, None, None, None]
    exact = np.sqrt(a) * x0.double().numpy() + np.sqrt(1 - a) * noise.double().numpy()
    np.testing.assert_allclose(ours.add_noise(x0.double(), noise.double(), t), exact, rtol=0, atol=1e-13)
    np.testing.assert_allclose(ours.add_noise(x0, noise, t), exact, rtol=0, atol=8 * EPS32 * 4)
    exact = np.sqrt(a) * noise.double().numpy() - np.sqrt(1 - a) * x0.double().numpy()
    np.testing.assert_allclose(ours.velocity(x0.double(), noise.double(), t), exact, rtol=0, atol=1e-13)
    # 1 - a_t of a_t near 1 is 2^-24 off upstream, and sqrt(1 - a_t) half of that over sqrt(1 - a_t) >= 0.006:
    # 1e-5 / 2; its drifted table adds as much in the middle.
    bound = 2e-5
    assert (ours.add_noise(x0, noise, t) - upstream.add_noise(x0, noise, t)).abs().max() <= bound
    assert (ours.velocity(x0, noise, t) - upstream.get_velocity(x0, noise, t)).abs().max() <= bound
    for n, one in enumerate(t.tolist()):  # an int is the tensor's one
        assert (ours.add_noise(x0[n], noise[n], one) - ours.add_noise(x0, noise, t)[n]).abs().max() <= 4 * EPS32


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_predictions_undo_add_noise(prediction: str):
    """From what the network ought to say, x_0 and the noise come back: equation 15, and its like for x_0 and v."""
    s = Schedule(prediction_type=prediction)
    x0, noise = normal(4, 3, 4, 4, seed=1, dtype=torch.float64), normal(4, 3, 4, 4, seed=2, dtype=torch.float64)
    t = torch.tensor([0, 3, 500, 999])
    x = s.add_noise(x0, noise, t)
    target = s.target(x0, noise, t)
    torch.testing.assert_close(s.predict_x0(target, t, x), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(s.predict_epsilon(target, t, x), noise, rtol=0, atol=1e-11)


def test_the_posterior_is_bayes_rule():
    """q(x_p | x_t, x_0) from the product of two Gaussians, in place of the paper's simplified form (equation 7)."""
    s = Schedule()
    for t, prev_t in ((999, 998), (500, 480), (3, 0), (1, 0)):
        a_t, a_p = float(s.alphas_cumprod[t]), float(s.alphas_cumprod[prev_t])
        # q(x_t | x_p) = N(sqrt(a_t / a_p) x_p, forward); q(x_p | x_0) = N(sqrt(a_p) x_0, 1 - a_p)
        forward = 1 - a_t / a_p
        precision = (a_t / a_p) / forward + 1 / (1 - a_p)
        expected = (math.sqrt(a_p) / (1 - a_p) / precision, math.sqrt(a_t / a_p) / forward / precision, 1 / precision)
        np.testing.assert_allclose(s.posterior(t, prev_t), expected, rtol=1e-9)
    assert s.posterior(0) == (1.0, 0.0, 0.0)


def test_learned_range_interpolates_logs():
    """Nichol and Dhariwal 2021, equation 15: v = 1 is beta_t, v = -1 the posterior's, v = 0 their geometric mean."""
    s = Schedule(variance_type="learned_range")
    large = float(s.betas[500])
    small = large * (1 - float(s.alphas_cumprod[499])) / (1 - float(s.alphas_cumprod[500]))
    got = s.variance(500, v=torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(got, [small, math.sqrt(small * large), large], rtol=1e-10)


def test_json_round_trip():
    s = Schedule(trained_betas=TRAINED, num_train_timesteps=len(TRAINED), variance_type="fixed_large")
    text = json.dumps(s.to_dict())
    assert Schedule.from_dict({**json.loads(text), "_class_name": "DDPMScheduler"}) == s
    with pytest.warns(UserWarning, match="ignores unknown fields: colour"):
        Schedule.from_dict({"colour": "red"})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"beta_schedule": "cosine"}, "Schedule.beta_schedule must be one of linear, scaled_linear, squaredcos_cap_v2"),
        ({"variance_type": "small"}, "variance_type must be one of fixed_small, .*learned_range; got 'small'"),
        ({"prediction_type": "eps"}, "prediction_type must be one of epsilon, sample, v_prediction; got 'eps'"),
        (
            {"timestep_spacing": "even"},
            "timestep_spacing must be one of leading, linspace, trailing, sections, truncated; got 'even'",
        ),
        ({"clip_sample": 1}, "clip_sample must be true or false; got 1"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer of at least 1; got 0"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps must be an integer of at least 1; got 10.0"),
        ({"steps_offset": -1}, "steps_offset must be an integer of at least 0; got -1"),
        ({"beta_start": 0}, "beta_start must be a positive number; got 0"),
        ({"beta_end": 1.5}, "beta_end must be below 1; got 1.5"),
        ({"beta_end": math.nan}, "beta_end must be a positive number; got nan"),
        ({"clip_sample_range": "1"}, "clip_sample_range must be a positive number; got '1'"),
        ({"dynamic_thresholding_ratio": 2.0}, r"dynamic_thresholding_ratio must be in \(0, 1\]; got 2.0"),
        ({"trained_betas": (0.1, 0.2)}, r"trained_betas must be 1000 numbers in \(0, 1\]; got '2 values'"),
    ],
)
def test_a_wrong_field_says_which_what_came_and_what_is_allowed(values: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Schedule(**values)


def test_errors_of_calls():
    s = Schedule()
    x = normal(1, 3, 4, 4)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"steps must be between 1 and num_train_timesteps=1000; got {steps}"):
            s.timesteps(steps)
    with pytest.raises(ValueError, match=r"t must be in 0..999; got 1000"):
        s.step(x, 1000, x, x)
    with pytest.raises(ValueError, match="step needs noise at t > 0; got none at t=5"):
        s.step(x, 5, x)
    with pytest.raises(ValueError, match=r"output \(1, 6, 4, 4\) must have x's shape \(1, 3, 4, 4\)"):
        s.step(torch.cat((x, x), 1), 5, x, x)
    with pytest.raises(ValueError, match="variance_type='learned_range' needs a network with 2C output channels"):
        Schedule(variance_type="learned_range").step(x, 5, x, x)
