"""A sampler as a table: one row of coefficients a step, computed in float64, read by one kernel.

    x0     = clamp(kx x + ko out, -clip, clip)
    x_prev = c0 x0 + cx x + co out + sigma z

DDPM with any variance and prediction type, respaced chains, DDIM with any eta, and the predictors of Score-SDE are all
of this form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .arguments import number, whole_number
from .kernels.reference import C0, CLIP, CO, CX, KO, KX, LOGVAR_A, LOGVAR_B, SIGMA, TABLE_WIDTH, TIME
from .respacing import sections
from .schedule import LEAST_SIGNAL, METHODS, SECTIONS, SPACINGS, Schedule
from .vp_sde import CONTINUOUS, PREDICTORS, by_grid, by_respacing, why_not


@dataclass(frozen=True)
class StepTable:
    """What a sampler does, step by step. Row 0 is the first step taken, from x_T."""

    rows: Tensor  # [S, TABLE_WIDTH] float64, the columns of kernels/reference.py
    timesteps: tuple[int, ...]  # [S], descending
    variance: str  # fixed | learned | learned_range: how the network states it
    thresholding: tuple[float, float] | None = None  # (ratio, largest) of dynamic thresholding
    learned: bool = False  # the network has 2C output channels, whether or not the second half is read
    draws: tuple[bool, ...] = ()  # [S]: whether the step takes noise from a stream, as the model's own code does

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
    method: str | None = None,  # ddpm, ddim, a predictor; None: the schedule's, with its eta and its number of steps
    eta: float | None = None,  # of DDIM: 0 deterministic, 1 the posterior deviation
    time_scale: float | None = None,  # the network is given time_scale * t; None: the schedule's
) -> StepTable:
    """The table of DDPM (Ho et al. 2020, Algorithm 2), DDIM (Song et al. 2021, equation 12) or a Score-SDE predictor.

    DDIM keeps the network's own noise estimate beside a clipped x_0, as diffusers' DDIMScheduler does, or takes it
    from the clipped x_0, as OpenAI's does, where the schedule has use_clipped_model_output. With a DDIMScheduler's
    schedule, n steps use a stride of T // n from each timestep, whatever the spacing, as diffusers does.
    """
    own = method in (None, schedule.method)  # the schedule speaks of this method
    method = schedule.method if method is None else method
    if eta is None:
        eta = schedule.eta if own else 0.0
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if not 0 <= number("eta", eta) <= 1:
        raise ValueError(f"eta must be in [0, 1]; got {eta}")
    if method != "ddim" and eta:
        raise ValueError(f"eta belongs to method='ddim'; got eta={eta} with method={method!r}")
    if method in PREDICTORS and time_scale is not None:
        raise ValueError(f"time_scale does not go with method={method!r}, which has times of its own; got {time_scale}")
    time_scale = schedule.time_scale if time_scale is None else number("time_scale", time_scale, positive=True)
    if steps is None and schedule.timestep_respacing:
        steps = schedule.timestep_respacing
    if steps is None and own:
        steps = schedule.num_inference_steps
    if hasattr(steps, "__index__") and getattr(steps, "ndim", 0) == 0:  # numpy's integers too
        steps = whole_number("steps", steps)
    upstream = schedule.method == "ddim" and schedule.timestep_spacing in SPACINGS
    by_stride = upstream and method == "ddim" and (steps is None or isinstance(steps, int))
    if steps is None or isinstance(steps, int):
        chain = schedule.timesteps(steps)
    elif isinstance(steps, str):
        chain = sections(steps, schedule.num_train_timesteps)
    else:
        chain = _custom_chain(schedule, steps)
    if method in PREDICTORS:
        return _predictor_table(schedule, method, chain, counted=steps is None or isinstance(steps, int))
    rows = torch.zeros(len(chain), TABLE_WIDTH, dtype=torch.float64, device="cpu")
    clips = schedule.clip_sample and not schedule.thresholding
    following = chain[1:] + [-1]
    if by_stride:
        following = [t - schedule.num_train_timesteps // len(chain) for t in chain]
    for row, t, prev_t in zip(rows, chain, following):
        row[KX], row[KO] = _x0_from_output(schedule, t)
        row[CLIP] = schedule.clip_sample_range if clips else math.inf
        row[TIME] = time_scale * t + schedule.time_offset
        if method == "ddpm":
            _ddpm_row(schedule, row, t, prev_t)
        else:
            _ddim_row(schedule, row, t, prev_t, eta)
    limit = (schedule.dynamic_thresholding_ratio, schedule.sample_max_value) if schedule.thresholding else None
    # DDIM's deviation is eta's; what a learned-variance network says of it is not read.
    variance = schedule.learned if method == "ddpm" else "fixed"
    if schedule.timestep_spacing == SECTIONS:  # OpenAI's loops draw at every step and multiply by zero
        draws = (True,) * len(chain)
    else:
        draws = tuple(t > 0 if method == "ddpm" else eta > 0 for t in chain)
    return StepTable(rows, tuple(chain), variance, limit, learned=schedule.learned != "fixed", draws=draws)


def _predictor_table(schedule: Schedule, method: str, chain: list[int], counted: bool) -> StepTable:
    """A predictor of Score-SDE. counted: the chain was asked for by its length alone."""
    if reason := why_not(schedule):
        raise ValueError(f"method={method!r} is for Score-SDE's VP models; this schedule has {reason}")
    if method == "ancestral_sampling" and schedule.beta_schedule != CONTINUOUS:
        steps = by_respacing(schedule, chain)
    elif counted:
        steps = by_grid(schedule, method, len(chain))
    else:
        raise ValueError(f"method={method!r} takes a number of steps, spaced evenly in time, not a list of timesteps")
    rows = torch.zeros(len(chain), TABLE_WIDTH, dtype=torch.float64, device="cpu")
    signal = (1 - steps.std**2).clamp(min=LEAST_SIGNAL**2).sqrt()
    columns = {KX: 1 / signal, KO: -steps.std / signal, CX: steps.cx, CO: steps.co, SIGMA: steps.sigma}
    for column, values in (columns | {TIME: steps.labels}).items():
        rows[:, column] = values
    rows[:, CLIP] = math.inf
    # score_sde_pytorch draws at every step, and leaves the noise of the last one out
    return StepTable(rows, tuple(steps.timesteps), "fixed", draws=(True,) * len(chain))


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
    if prev_t < 0 and not schedule.set_alpha_to_one:
        a_p = float(schedule.alphas_cumprod[0])
    sigma = eta * math.sqrt(max((1 - a_p) / (1 - a_t) * (1 - a_t / a_p), 0))
    along = math.sqrt(max(1 - a_p - sigma**2, 0))  # the factor of epsilon = ex x + eo out
    row[C0], row[SIGMA] = math.sqrt(a_p), sigma
    if schedule.use_clipped_model_output:  # epsilon = (x - sqrt(a_t) x0) / sqrt(1 - a_t)
        row[CX] = along / math.sqrt(1 - a_t)
        row[C0] -= math.sqrt(a_t) * row[CX]
        return
    if schedule.prediction_type == "epsilon":
        ex, eo = 0.0, 1.0
    elif schedule.prediction_type == "v_prediction":
        ex, eo = math.sqrt(1 - a_t), math.sqrt(a_t)
    else:
        ex, eo = 1 / math.sqrt(1 - a_t), -math.sqrt(a_t / (1 - a_t))
    row[CX], row[CO] = along * ex, along * eo


def _custom_chain(schedule: Schedule, timesteps: Sequence[int]) -> list[int]:
    if not isinstance(timesteps, Iterable):
        raise ValueError(f"steps must be a whole number, a list of timesteps or text; got {timesteps!r}")
    chain = [whole_number("a timestep", t) for t in timesteps]
    last = schedule.num_train_timesteps - 1
    if not chain or any(not 0 <= t <= last for t in chain):
        raise ValueError(f"timesteps must be a non-empty list within 0..{last}; got {chain}")
    if any(b >= a for a, b in pairwise(chain)):
        raise ValueError(f"timesteps must descend strictly; got {chain}")
    return chain
