"""Denoising diffusion as the paper writes it (Ho et al. 2020), in plain torch.

Timesteps are counted from 0, so the paper's t is ours plus one. `Sampler` is the engine; `sample` here is
its definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .schedule import Schedule


def q_sample(schedule: Schedule, x0: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps (equation 4): any step of the forward process at once."""
    return schedule.add_noise(x0, noise, t)


def x0_from_epsilon(schedule: Schedule, x: Tensor, t: int | Tensor, epsilon: Tensor) -> Tensor:
    """x_0 = (x_t - sqrt(1 - a_t) eps) / sqrt(a_t) (equation 15)."""
    signal, sigma = schedule._at(t, x)
    return (x - sigma * epsilon) / signal


def posterior_mean(schedule: Schedule, x0: Tensor, x: Tensor, t: int) -> Tensor:
    """mu~_t(x_t, x_0), the mean of q(x_{t-1} | x_t, x_0) (equation 7)."""
    c0, cx, _ = schedule.posterior(t)
    return c0 * x0 + cx * x


def posterior_variance(schedule: Schedule, t: int) -> float:
    """beta~_t, the variance of q(x_{t-1} | x_t, x_0) (equation 7)."""
    return schedule.posterior(t)[2]


def p_mean(schedule: Schedule, x: Tensor, t: int, epsilon: Tensor) -> Tensor:
    """mu_theta(x_t, t) = (x_t - beta_t / sqrt(1 - a_t) eps_theta) / sqrt(1 - beta_t) (equation 11)."""
    beta = float(schedule.betas[t])
    a_t, _ = schedule.alphas(t)
    return (x - beta / (1 - a_t) ** 0.5 * epsilon) / (1 - beta) ** 0.5


def output_tensor(out: Any) -> Tensor:
    """What a network returned, as a tensor: itself, the first of a tuple, or diffusers' ``.sample``."""
    if isinstance(out, (tuple, list)):
        out = out[0]
    return getattr(out, "sample", out)


def training_loss(
    model: Callable[..., Any],  # (x_t, t[, labels]) -> [N, C or 2C, H, W], or see `output_tensor`
    schedule: Schedule,
    x0: Tensor,  # [N, C, H, W] in [-1, 1]
    t: Tensor | None = None,  # [N]; None: uniform over all timesteps
    noise: Tensor | None = None,  # like x0; None: standard normal
    labels: Tensor | None = None,  # [N]
    generator: torch.Generator | None = None,
) -> Tensor:  # scalar
    """L_simple = E || eps - eps_theta(x_t, t) ||^2 (equation 14), averaged over every element: a scalar, in x0's
    dtype and with its graph.

    x0: images [N, C, H, W] in [-1, 1]. t: timesteps [N] int64 in 0 .. num_train_timesteps - 1, or one for all; by
    default uniformly drawn. noise: eps, of x0's shape; by default standard normal. labels: [N], of a model that takes
    them. What is drawn comes from ``generator``.

    With prediction_type "sample" or "v_prediction" the target is x_0 or v. Of a network that also outputs a
    variance (2C channels) the first C are trained: L_simple does not see the variance.
    Raises ValueError for shapes that do not fit: they would be stretched to fit, and the loss be of something else.
    """
    if x0.ndim != 4 or 0 in x0.shape or not x0.is_floating_point():
        raise ValueError(f"x0 must be floating-point images [N, C, H, W] in [-1, 1]; got {x0.dtype} {tuple(x0.shape)}")
    if t is None:
        t = torch.randint(schedule.num_train_timesteps, (len(x0),), generator=generator, device=x0.device)
    if noise is None:
        noise = torch.empty_like(x0).normal_(generator=generator)
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have x0's shape {tuple(x0.shape)}; got {tuple(noise.shape)}")
    if isinstance(t, Tensor) and t.shape not in ((), (1,), (len(x0),)):
        raise ValueError(f"t must be one timestep, or one for each of {len(x0)} images; got {tuple(t.shape)}")
    x = schedule.add_noise(x0, noise, t)
    time = schedule.network_time(t)
    out = output_tensor(model(x, time) if labels is None else model(x, time, labels))
    n, c, *size = x0.shape
    if out.shape not in ((n, c, *size), (n, 2 * c, *size)):
        raise ValueError(f"the model's output must be {[n, c, *size]}, or of {2 * c} channels; got {list(out.shape)}")
    return F.mse_loss(out[:, : x0.shape[1]].to(x0.dtype), schedule.target(x0, noise, t))


def training_step(
    model: nn.Module, schedule: Schedule, optimizer: torch.optim.Optimizer, x0: Tensor, **kwargs: Any
) -> Tensor:
    """Algorithm 1, lines 2 to 5: one gradient step on a batch x0 [N, C, H, W]; returns the loss, detached."""
    optimizer.zero_grad(set_to_none=True)
    loss = training_loss(model, schedule, x0, **kwargs)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    schedule: Schedule,
    shape: tuple[int, int, int, int],  # [N, C, H, W]
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    timesteps: list[int] | None = None,
) -> Tensor:
    """Algorithm 2: x_0 [N, C, H, W] from noise, by every step of the chain."""
    chain = schedule.timesteps() if timesteps is None else timesteps
    x = torch.randn(shape, generator=generator, device=device)
    for t, prev_t in zip(chain, chain[1:] + [-1]):
        out = output_tensor(model(x, schedule.network_time(torch.full((shape[0],), t, device=x.device))))
        z = torch.randn(shape, generator=generator, device=device) if t > 0 else None
        x = schedule.step(out, t, x, z, prev_t)
    return x
