"""The variance preserving SDE of Song et al. 2021 (Score-SDE), and the discretisations of its reverse as table rows.

Time runs from 1 (noise) to 1e-3, beta(t) from beta_min to beta_max. The score is -out / std, so every predictor step
is linear in x, the network's output and the noise: x_prev = cx x + co out + sigma z. Nothing is clipped, and the last
step adds no noise. Source: score_sde_pytorch (sde_lib, sampling, models.utils), with its ``noise_removal``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .schedule import Schedule

PREDICTORS = ("ancestral_sampling", "euler_maruyama", "reverse_diffusion")
CONTINUOUS = "vp_sde"  # the beta_schedule whose a_t is the SDE's own marginal, not a product over timesteps
LAST_TIME = 1e-3  # sampling_eps
LAST_LABEL = 999  # what a continuously trained network is given at t = 1, whatever the number of timesteps


class Rows(NamedTuple):
    """One value a step, float64, first step first."""

    timesteps: list[int]
    labels: Tensor  # what the network is given
    std: Tensor  # of x_t given x_0
    cx: Tensor
    co: Tensor
    sigma: Tensor


def why_not(schedule: Schedule) -> str:
    """The first field of a schedule that does not fit the predictors, and what they need; "" where all fit."""
    needed: dict[str, tuple[Any, ...]] = {
        "beta_schedule": ("linear", CONTINUOUS),
        "trained_betas": (None,),
        "rescale_betas_zero_snr": (False,),
        "prediction_type": ("epsilon",),
        "variance_type": ("fixed_large",),
        "clip_sample": (False,),
        "thresholding": (False,),
    }
    for name, allowed in needed.items():
        if getattr(schedule, name) not in allowed:
            return f"{name}={getattr(schedule, name)!r}, where it needs {' or '.join(map(repr, allowed))}"
    return ""


def alphas_cumprod(beta_start: float, beta_end: float, total: int) -> Tensor:
    """a(t) at t = 1/T, 2/T, ..., 1 of the SDE with beta_min = T beta_start and beta_max = T beta_end: [T] float64."""
    t = torch.arange(1, total + 1, dtype=torch.float64, device="cpu") / total
    return _log_signal(t, total * beta_start, total * beta_end).mul(2).exp()


def by_respacing(schedule: Schedule, chain: list[int]) -> Rows:
    """Ancestral sampling of a network trained on whole timesteps, over those of ``chain`` (descending).

    With all T of them it is score_sde_pytorch's, which gives the network 999, 998.001, ..., 0.999 for 999, 998, ..., 0.
    """
    a = schedule.alphas_cumprod[chain]
    before = torch.cat((a[1:], torch.ones(1, dtype=torch.float64, device="cpu")))
    total = schedule.num_train_timesteps
    labels = (_times(total) * (total - 1))[[total - 1 - t for t in chain]]
    return _ancestral(chain, labels, (1 - a).sqrt(), 1 - a / before)


def by_grid(schedule: Schedule, method: str, steps: int) -> Rows:
    """A predictor over ``steps`` times from 1 to 1e-3, evenly spaced, which is also the number its betas are for.

    Raises ValueError where a step would be so large that its beta is 1 or more.
    """
    total = schedule.num_train_timesteps
    low, high = total * schedule.beta_start, total * schedule.beta_end
    t = _times(steps)
    wide = t.double()
    if schedule.beta_schedule == CONTINUOUS:
        labels = t * LAST_LABEL
        std = _log_signal(wide, low, high).mul(2).expm1().neg().sqrt()
    else:
        labels = t * (total - 1)
        std = (1 - schedule.alphas_cumprod[labels.long()]).sqrt()
    chain = [min(int(label), total - 1) for label in labels]
    if method == "euler_maruyama":
        beta = (low + wide * (high - low)) / steps
        return _without_last_noise(Rows(chain, labels, std, 1 + beta / 2, -beta / std, beta.sqrt()))
    if max(low, high) >= steps:
        raise ValueError(
            f"method={method!r} needs more than {max(low, high):g} steps, since a step's variance is beta_max / steps; "
            f"got {steps}; take more, or method='euler_maruyama'"
        )
    beta = torch.linspace(low / steps, high / steps, steps, dtype=torch.float64, device="cpu")
    beta = beta[(t * (steps - 1)).long()]
    if method == "ancestral_sampling":
        return _ancestral(chain, labels, std, beta)
    return _without_last_noise(Rows(chain, labels, std, 2 - (1 - beta).sqrt(), -beta / std, beta.sqrt()))


def _ancestral(chain: list[int], labels: Tensor, std: Tensor, beta: Tensor) -> Rows:
    root = (1 - beta).sqrt()
    return _without_last_noise(Rows(chain, labels, std, 1 / root, -beta / (std * root), beta.sqrt()))


def _without_last_noise(rows: Rows) -> Rows:
    rows.sigma[-1] = 0
    return rows


def _times(steps: int) -> Tensor:
    """In float32, as there: the last bits decide what the network is given."""
    return torch.linspace(1, LAST_TIME, steps, dtype=torch.float32, device="cpu")


def _log_signal(t: Tensor, low: float, high: float) -> Tensor:
    """log sqrt(a(t)) (Song et al. 2021, equation 33)."""
    return -(t**2) * (high - low) / 4 - t * low / 2
