"""The paper's equations against their float64 formulas, and Algorithm 2 against diffusers' DDPMPipeline."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler
from dropin_setup import TABLES
from models import TINY, diffusers_unet, normal, unet
from tensors import same_chain
from torch import Tensor, nn

from ddpm_fast import diffusion
from ddpm_fast.schedule import PREDICTION_TYPES, Schedule

# The paper's own: T = 1000, beta from 1e-4 to 0.02, alpha_bar the product of 1 - beta (section 4).
BETA = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.cumprod(1 - BETA)
TIMES = [0, 1, 10, 500, 999]


def images(n: int = 4, seed: int = 0) -> Tensor:
    return normal(n, 3, 4, 4, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize("t", TIMES)
def test_equation_4(t: int):
    x0, noise = images(seed=1), images(seed=2)
    expected = math.sqrt(ALPHA_BAR[t]) * x0 + math.sqrt(1 - ALPHA_BAR[t]) * noise
    torch.testing.assert_close(diffusion.q_sample(Schedule(), x0, t, noise), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", TIMES)
def test_equation_15(t: int):
    x, epsilon = images(seed=1), images(seed=2)
    expected = (x - math.sqrt(1 - ALPHA_BAR[t]) * epsilon) / math.sqrt(ALPHA_BAR[t])
    torch.testing.assert_close(diffusion.x0_from_epsilon(Schedule(), x, t, epsilon), expected, rtol=1e-11, atol=1e-11)
    times = torch.full((4,), t)
    torch.testing.assert_close(
        diffusion.x0_from_epsilon(Schedule(), x, times, epsilon), expected, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("t", TIMES)
def test_equation_7(t: int):
    x0, x = images(seed=1), images(seed=2)
    a_t, a_p = ALPHA_BAR[t], ALPHA_BAR[t - 1] if t else 1.0
    mean = math.sqrt(a_p) * BETA[t] / (1 - a_t) * x0 + math.sqrt(1 - BETA[t]) * (1 - a_p) / (1 - a_t) * x
    # beta_t is 1 - a_t / a_p here, which cancels at most four of sixteen digits
    torch.testing.assert_close(diffusion.posterior_mean(Schedule(), x0, x, t), mean, rtol=0, atol=1e-10)
    variance = (1 - a_p) / (1 - a_t) * BETA[t]
    assert diffusion.posterior_variance(Schedule(), t) == pytest.approx(variance, rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("t", TIMES)
def test_equation_11_and_that_it_is_7_with_15(t: int):
    x, epsilon = images(seed=1), images(seed=2)
    expected = (x - BETA[t] / math.sqrt(1 - ALPHA_BAR[t]) * epsilon) / math.sqrt(1 - BETA[t])
    got = diffusion.p_mean(Schedule(), x, t, epsilon)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    schedule = Schedule(clip_sample=False)
    by_x0 = diffusion.posterior_mean(schedule, diffusion.x0_from_epsilon(schedule, x, t, epsilon), x, t)
    torch.testing.assert_close(got, by_x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.step(epsilon, t, x, torch.zeros_like(x)), got, rtol=0, atol=1e-9)


def test_steps_of_the_forward_process_add_up_to_its_closed_form():
    """Iterating q(x_t | x_{t-1}) (equation 2) gives the mean and deviation of equation 4.

    100,000 walkers: the mean has a standard error of 1 / 316, the deviation of 1 / 447; the bounds are five.
    """
    schedule = Schedule(num_train_timesteps=50, beta_end=0.1)
    n = 100_000
    generator = torch.Generator().manual_seed(0)
    x0 = 0.8
    x = torch.full((n,), x0, dtype=torch.float64)
    for t in range(50):
        beta = float(schedule.betas[t])
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(n, generator=generator, dtype=torch.float64)
        if t in (0, 9, 49):
            signal = diffusion.q_sample(schedule, torch.tensor(x0), t, torch.tensor(0.0)).item()
            sigma = diffusion.q_sample(schedule, torch.tensor(0.0), t, torch.tensor(1.0)).item()
            assert abs(x.mean().item() - signal) <= 5 * sigma / math.sqrt(n)
            assert abs(x.std().item() / sigma - 1) <= 5 / math.sqrt(2 * n)


def test_a_posterior_step_undoes_a_forward_step():
    """x_t ~ q(x_t | x_0), then x_{t-1} ~ q(x_{t-1} | x_t, x_0), is distributed as q(x_{t-1} | x_0)."""
    schedule = Schedule(num_train_timesteps=50, beta_end=0.1)
    n, t, x0 = 100_000, 20, torch.full((100_000,), -0.6, dtype=torch.float64)
    x = schedule.add_noise(x0, normal(n, seed=1, dtype=torch.float64), t)
    deviation = math.sqrt(diffusion.posterior_variance(schedule, t))
    back = diffusion.posterior_mean(schedule, x0, x, t) + deviation * normal(n, seed=2, dtype=torch.float64)
    a_p = float(schedule.alphas_cumprod[t - 1])
    assert abs(back.mean().item() + 0.6 * math.sqrt(a_p)) <= 5 * math.sqrt((1 - a_p) / n)
    assert abs(back.std().item() / math.sqrt(1 - a_p) - 1) <= 5 / math.sqrt(2 * n)


class Constant(nn.Module):
    """A network whose output is a parameter, and that keeps what it was given."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.out = nn.Parameter(normal(1, channels, 4, 4, seed=9, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        self.seen = (x.detach(), t, labels)
        return self.out.expand(len(x), -1, -1, -1)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_training_loss_by_hand(prediction: str):
    model = Constant()
    x0, noise, t = images(seed=1), images(seed=2), torch.tensor([0, 10, 500, 999])
    loss = diffusion.training_loss(model, Schedule(prediction_type=prediction), x0, t, noise)
    a = torch.tensor(ALPHA_BAR[t.numpy()])[:, None, None, None]
    target = {"epsilon": noise, "sample": x0, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0}[prediction]
    assert loss.item() == pytest.approx(((model.out - target) ** 2).mean().item(), rel=1e-12)
    torch.testing.assert_close(model.seen[0], a.sqrt() * x0 + (1 - a).sqrt() * noise, rtol=0, atol=1e-12)
    assert torch.equal(model.seen[1], t) and model.seen[2] == ()
    loss.backward()
    gradient = 2 * (model.out - target).sum(0, keepdim=True) / x0.numel()
    torch.testing.assert_close(model.out.grad, gradient, rtol=1e-10, atol=1e-14)


def test_training_loss_does_not_see_a_learned_variance_and_passes_labels():
    model, labels = Constant(6), torch.tensor([3, 1, 4, 1])
    x0, noise, t = images(seed=1), images(seed=2), torch.tensor([0, 10, 500, 999])
    loss = diffusion.training_loss(model, Schedule(variance_type="learned_range"), x0, t, noise, labels)
    assert loss.item() == pytest.approx(((model.out[:, :3] - noise) ** 2).mean().item(), rel=1e-12)
    loss.backward()
    assert (model.out.grad[:, 3:] == 0).all() and (model.out.grad[:, :3] != 0).all()
    assert torch.equal(model.seen[2][0], labels)


def test_training_loss_draws_t_uniformly_and_noise_from_its_generator():
    model, x0 = Constant(), torch.zeros(20_000, 3, 4, 4, dtype=torch.float64)
    schedule = Schedule(num_train_timesteps=10)
    losses = [
        diffusion.training_loss(model, schedule, x0, generator=torch.Generator().manual_seed(s)).item()
        for s in (5, 5, 6)
    ]
    assert losses[0] == losses[1] != losses[2]
    counts = model.seen[1].bincount(minlength=10).double()
    # chi squared with 9 degrees of freedom exceeds 33.7 once in 10,000 seeds
    assert len(counts) == 10 and ((counts - 2000) ** 2 / 2000).sum() < 33.7
    noise = model.seen[0] / (1 - schedule.alphas_cumprod[model.seen[1]]).sqrt()[:, None, None, None]
    assert abs(noise.mean().item()) < 5 / math.sqrt(noise.numel())
    assert abs(noise.std().item() - 1) < 5 / math.sqrt(2 * noise.numel())


def test_training_step_is_one_step_of_the_optimizer():
    """Algorithm 1, lines 2 to 5, with plain gradient descent: out - lr * 2 (out - eps) / size."""
    model = Constant()
    start = model.out.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x0, noise, t = images(seed=1), images(seed=2), torch.tensor([0, 10, 500, 999])
    for _ in range(2):  # gradients of the first step must not stay for the second
        expected = model.out.detach() - 0.5 * 2 * (model.out.detach() - noise).sum(0, keepdim=True) / x0.numel()
        loss = diffusion.training_step(model, Schedule(), optimizer, x0, t=t, noise=noise)
        torch.testing.assert_close(model.out.detach(), expected, rtol=1e-10, atol=1e-14)
        assert not loss.requires_grad
    assert loss.item() < ((start - noise) ** 2).mean().item()


def test_training_a_diffusers_network_takes_the_steps_of_its_own_loop():
    """The loop of diffusers' training example, and `training_step` on the same network and on ours."""
    scheduler, schedule = DDPMScheduler(), Schedule()
    batches = [
        (normal(2, 3, 8, 8, seed=i), normal(2, 3, 8, 8, seed=10 + i), torch.tensor([i, 999 - i])) for i in (1, 2)
    ]
    theirs, same, ours = diffusers_unet(TINY), diffusers_unet(TINY), unet(TINY)
    for network, by_us in ((theirs, False), (same, True), (ours, True)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for x0, noise, t in batches:
            if by_us:
                diffusion.training_step(network, schedule, optimizer, x0, t=t, noise=noise)
                continue
            optimizer.zero_grad()
            F.mse_loss(network(scheduler.add_noise(x0, noise, t), t).sample, noise).backward()
            optimizer.step()
    start = diffusers_unet(TINY).state_dict()
    assert max(float((value - start[name]).abs().max()) for name, value in theirs.state_dict().items()) > 0.02
    for other in (same, ours):
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("wrapped", [lambda out: (out, "more"), lambda out: SimpleNamespace(sample=out)])
def test_networks_may_wrap_their_output(wrapped: Any):
    model = unet(TINY)
    x0, noise, t = normal(2, 3, 8, 8, seed=1), normal(2, 3, 8, 8, seed=2), torch.tensor([3, 700])
    plain = diffusion.training_loss(model, Schedule(), x0, t, noise)
    assert torch.equal(diffusion.training_loss(lambda x, s: wrapped(model(x, s)), Schedule(), x0, t, noise), plain)
    chain = [40, 3]
    drawn = [
        diffusion.sample(f, Schedule(), (1, 3, 8, 8), torch.Generator().manual_seed(1), timesteps=chain)
        for f in (model, lambda x, s: wrapped(model(x, s)))
    ]
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"noise": images()[:1]}, r"noise must have x0's shape \(4, 3, 4, 4\); got \(1, 3, 4, 4\)"),
        ({"t": torch.tensor([1, 2, 3])}, r"t must be one timestep, or one for each of 4 images; got \(3,\)"),
        ({"t": torch.tensor([1.0, 2, 3, 4])}, r"timesteps must be integers; got torch.float32"),
        ({"t": 2.5}, r"t must be a whole number; got 2.5"),
        ({"x0": images()[:0]}, r"x0 must be floating-point images .*; got torch.float64 \(0, 3, 4, 4\)"),
        ({"x0": images().to(torch.uint8)}, r"x0 must be floating-point images .*; got torch.uint8"),
        ({"x0": images()[0]}, r"x0 must be floating-point images .*; got torch.float64 \(3, 4, 4\)"),
        ({"model": lambda x, t: x[:, :2]}, r"output must be \[4, 3, 4, 4\], or of 6 channels; got \[4, 2, 4, 4\]"),
    ],
)
def test_what_a_loss_cannot_be_of(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        diffusion.training_loss(**{"model": Constant(), "schedule": Schedule(), "x0": images(), **changed})


@pytest.mark.parametrize(
    "options, n",
    [
        ({}, None),
        ({"variance_type": "fixed_large"}, 5),
        ({"prediction_type": "v_prediction", "timestep_spacing": "trailing"}, 7),
        ({"prediction_type": "sample", "variance_type": "fixed_small_log", "thresholding": True}, None),
    ],
)
def test_algorithm_2_is_the_pipeline(options: dict[str, Any], n: int | None):
    """The same images from the same generator, but for rounding and upstream's tables in float32."""
    betas = {"num_train_timesteps": 25, "beta_start": 4e-3, "beta_end": 0.3}
    schedule = Schedule(**betas, **options)
    pipeline = DDPMPipeline(diffusers_unet(TINY), DDPMScheduler(**betas, **options))
    pipeline.set_progress_bar_config(disable=True)
    steps = n or 25

    def draw() -> torch.Tensor:
        return pipeline(3, torch.Generator().manual_seed(3), steps, output_type="pt").images

    expected = draw()
    got = diffusion.sample(
        unet(TINY), schedule, (3, 3, 8, 8), torch.Generator().manual_seed(3), timesteps=n and schedule.timesteps(n)
    )
    assert same_chain((got / 2 + 0.5).clamp(0, 1), expected, pipeline.unet, draw, TABLES)
    assert expected.std() > 0.05
