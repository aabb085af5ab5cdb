"""The betas of lucidrains' GaussianDiffusion by name, and what its buffers tell of schedule and objective."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}  # Schedule's words for them
SCHEDULES = ("linear", "cosine", "sigmoid")


def named_betas(name: str, timesteps: int) -> Tensor:  # [T] float64
    """The package's schedule of that name, with its default arguments."""
    if name == "linear":
        scale = 1000 / timesteps
        return torch.linspace(scale * 0.0001, scale * 0.02, timesteps, dtype=torch.float64)
    u = torch.linspace(0, timesteps, timesteps + 1, dtype=torch.float64) / timesteps
    if name == "cosine":  # Nichol and Dhariwal 2021, equation 17
        a = torch.cos((u + 0.008) / 1.008 * (math.pi / 2)) ** 2
    else:  # Jabri et al. 2022, figure 8, from -3 to 3
        # The ends are float32 there, which near the last timestep, where a is tiny, can be seen.
        start, end = (float(torch.tensor(v).sigmoid()) for v in (-3.0, 3.0))
        width = float(torch.tensor(end) - torch.tensor(start))
        a = (end - torch.sigmoid(6 * u - 3)) / width
    a = a / a[0]
    return (1 - a[1:] / a[:-1]).clamp(0, 0.999)


def betas_of(buffers: Mapping[str, Tensor]) -> Tensor:  # [T] float64
    """The stored betas, each from the buffer that says it best: near 1 the quotient of alphas_cumprod does.

    1 - beta of a float32 beta is off by 6e-8 of 1, and near beta = 1 that is much of it.
    """
    betas = buffers["betas"].double()
    a = buffers.get("alphas_cumprod")
    if a is None or a.shape != betas.shape:
        return betas
    a = a.double()
    before = torch.cat((torch.ones(1, dtype=torch.float64), a[:-1]))
    return torch.where(betas < 0.5, betas, 1 - a / before)


def objective_of(buffers: Mapping[str, Tensor]) -> str | None:
    """The objective that loss_weight [T] (since 1.5.0) is of, with or without min-SNR; None where it tells none.

    With snr = a / (1 - a), clipped to gamma where min_snr_loss_weight was set (Hang et al. 2023), it is clipped / snr
    for pred_noise, clipped for pred_x0 and clipped / (snr + 1) for pred_v.
    """
    weight = buffers.get("loss_weight")
    if weight is None or "betas" not in buffers or weight.shape != buffers["betas"].shape:
        return None
    weight, a = weight.double(), torch.cumprod(1 - betas_of(buffers), 0)
    snr = a / (1 - a)
    fitting = []
    for objective, clipped in (("pred_noise", weight * snr), ("pred_x0", weight), ("pred_v", weight * (snr + 1))):
        if torch.allclose(clipped, snr.clamp(max=float(clipped.max())), rtol=1e-3, atol=0):
            fitting.append(objective)
    return fitting[0] if len(fitting) == 1 else None
