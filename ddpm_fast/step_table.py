"""A sampler as a table: one row of coefficients a step, computed in float64, read by one kernel.

    x0     = clamp(kx x + ko out, -clip, clip)
    x_prev = c0 x0 + cx x + co out + sigma z

DDPM with any variance and prediction type, respaced chains, and DDIM with any eta are all of this form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .kernels.reference import C0, CLIP, CO, CX, KO, KX, LOGVAR_A, LOGVAR_B, SIGMA, TABLE_WIDTH, TIME
from .schedule import LEAST_SIGNAL, Schedule

METHODS = ("ddpm", "ddim")


@dataclass(frozen=True)
class StepTable:
    """What a sampler does, step by step. Row 0 is the first step taken, from x_T."""

    rows: Tensor  # [S, TABLE_WIDTH] float64, the columns of kernels/reference.py
    timesteps: tuple[int, ...]  # [S], descending
    variance: str  # fixed | learned | learned_range: how the network states it
    thresholding: tuple[float, float] | None = None  # (ratio, largest) of dynamic thresholding
    learned: bool = False  # the network has 2C output channels, whether or not the second half is read

    def __len__(self) -> int:
        return len(self.timesteps)

    def times(self) -> Tensor:
        """The network's time input at each step [S]: int64, or float32 where a scale made it fractional."""
        times = self.rows[:, TIME]
        whole = bool((times == times.round()).all())
        return times.to(torch.int64 if whole else torch.float32)


def step_table(
    schedule: Schedule,
    steps: int | str | Sequence[int] | None = None,  # how many (by timestep_spacing), which, or `sections`; None: all
    method: str = "ddpm",
    eta: float = 0.0,  # of DDIM: 0 deterministic, 1 the posterior deviation
    time_scale: float = 1.0,  # the network is given time_scale * t (1000 / T for OpenAI's rescale_timesteps)
) -> StepTable:
    """The table of DDPM (Ho et al. 2020, Algorithm 2) or DDIM (Song et al. 2021, equation 12).

    DDIM keeps the network's own noise estimate beside a clipped x_0, as diffusers' DDIMScheduler does.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1]; got {eta}")
    if method == "ddpm" and eta:
        raise ValueError(f"eta belongs to method='ddim'; got eta={eta} with method='ddpm'")
    if steps is None or isinstance(steps, int):
        chain = schedule.timesteps(steps)
    elif isinstance(steps, str):
        chain = sections(steps, schedule.num_train_timesteps)
    else:
        chain = _custom_chain(schedule, steps)
    rows = torch.zeros(len(chain), TABLE_WIDTH, dtype=torch.float64)
    clips = schedule.clip_sample and not schedule.thresholding
    for row, t, prev_t in zip(rows, chain, chain[1:] + [-1]):
        row[KX], row[KO] = _x0_from_output(schedule, t)
        row[CLIP] = schedule.clip_sample_range if clips else math.inf
        row[TIME] = time_scale * t
        if method == "ddpm":
            _ddpm_row(schedule, row, t, prev_t)
        else:
            _ddim_row(schedule, row, t, prev_t, eta)
    limit = (schedule.dynamic_thresholding_ratio, schedule.sample_max_value) if schedule.thresholding else None
    # DDIM's deviation is eta's; what a learned-variance network says of it is not read.
    variance = schedule.learned if method == "ddpm" else "fixed"
    return StepTable(rows, tuple(chain), variance, limit, learned=schedule.learned != "fixed")


def sections(rule: str, total: int) -> list[int]:
    """OpenAI's respacing rule: timesteps of a chain of ``total``, descending.

    "10,15,20" cuts the chain into three sections of (nearly) one length and takes so many steps of each, first
    and last included, evenly spaced, rounded half to even; "250" is one section. "ddimN" takes every k-th
    timestep for the whole k that gives N of them. Improved and guided-diffusion's ``timestep_respacing``.
    """
    if rule.startswith("ddim"):
        wanted = _count(rule, rule[len("ddim") :])
        strides = [k for k in range(1, total) if len(range(0, total, k)) == wanted]
        if not strides:
            raise ValueError(f"steps={rule!r}: no whole stride takes {wanted} of {total} timesteps; choose another")
        return list(range(0, total, strides[0]))[::-1]
    counts = [_count(rule, part) for part in rule.split(",")]
    chain: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if count > size:
            raise ValueError(f"steps={rule!r}: section {i} has {size} timesteps, fewer than {count}; ask for fewer")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0  # added up, not multiplied: upstream's rounding depends on it
        for _ in range(count):
            chain.append(start + round(place))
            place += stride
        start += size
    return chain[::-1]


def _count(rule: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f'steps as text must be like "250", "10,15,20" or "ddim50"; got {rule!r}')
    return int(text)


def _x0_from_output(schedule: Schedule, t: int) -> tuple[float, float]:
    """(kx, ko) with x_0 = kx x + ko out."""
    a_t, _ = schedule.alphas(t)
    signal, sigma = math.sqrt(a_t), math.sqrt(1 - a_t)
    if schedule.prediction_type == "sample":
        return 0.0, 1.0
    if schedule.prediction_type == "v_prediction":
        return signal, -sigma
    signal = max(signal, LEAST_SIGNAL)
    return 1 / signal, -sigma / signal


def _ddpm_row(schedule: Schedule, row: Tensor, t: int, prev_t: int) -> None:
    row[C0], row[CX], _ = schedule.posterior(t, prev_t)
    if t == 0:  # noise is withheld by the timestep, not by the position in the chain, as upstream
        return
    if schedule.learned == "fixed":
        variance = schedule.variance(t, prev_t)
        assert isinstance(variance, float)
        row[SIGMA] = math.sqrt(variance)
        return
    row[SIGMA] = 1
    low, high = schedule.log_variances(t, prev_t)
    row[LOGVAR_A], row[LOGVAR_B] = (low + high) / 2, (high - low) / 2


def _ddim_row(schedule: Schedule, row: Tensor, t: int, prev_t: int, eta: float) -> None:
    a_t, a_p = schedule.alphas(t, prev_t)
    sigma = eta * math.sqrt(schedule.posterior(t, prev_t)[2])
    along = math.sqrt(max(1 - a_p - sigma**2, 0))  # the factor of epsilon = ex x + eo out
    row[C0], row[SIGMA] = math.sqrt(a_p), sigma
    if schedule.prediction_type == "epsilon":
        ex, eo = 0.0, 1.0
    elif schedule.prediction_type == "v_prediction":
        ex, eo = math.sqrt(1 - a_t), math.sqrt(a_t)
    else:
        ex, eo = 1 / math.sqrt(1 - a_t), -math.sqrt(a_t / (1 - a_t))
    row[CX], row[CO] = along * ex, along * eo


def _custom_chain(schedule: Schedule, timesteps: Sequence[int]) -> list[int]:
    chain = [int(t) for t in timesteps]
    last = schedule.num_train_timesteps - 1
    if not chain or any(not 0 <= t <= last for t in chain):
        raise ValueError(f"timesteps must be a non-empty list within 0..{last}; got {chain}")
    if any(b >= a for a, b in pairwise(chain)):
        raise ValueError(f"timesteps must descend strictly; got {chain}")
    return chain
