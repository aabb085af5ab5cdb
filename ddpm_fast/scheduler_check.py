"""Does a pipeline's scheduler take the steps that the step table says?

A copy of the scheduler gives its timesteps, and steps from random x with random network outputs; the table's rows do
the same in float64. The pipeline's own scheduler is left as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .code_origin import is_from, is_stock, named, overridden
from .fingerprints import DRAWING
from .kernels.reference import C0, CLIP, CO, CX, KO, KX, SIGMA, sampler_step
from .schedule import Schedule
from .step_table import StepTable, step_table

SIZE = (4, 4)  # pixels
ROWS = 32  # compared where the steps are diffusers' own code, and only attributes can have been changed
ROUNDING = 2.0**-18  # of the sum of a step's terms: 32 units of float32's last place
# diffusers forms beta_t = 1 - a_t / a_p in float32, whose error is so much, however small beta_t is.
BETA_ROUNDING = 2.0**-21


def checked_steps(
    scheduler: Any,
    schedule: Schedule,
    steps: int,
    channels: tuple[int, int],  # of the image, of the network's output
    eta: float | None = None,
    step_options: dict[str, Any] | None = None,  # more arguments of the scheduler's ``step``
) -> int | list[int]:
    """The steps of `Sampler` with which it draws as the scheduler does: their number, or the timesteps where the
    scheduler chooses its own.

    Raises:
        ValueError: the scheduler has other steps than its configuration says, or methods that were replaced.
    """
    kind = type(scheduler).__name__
    plain = f"for the steps of its configuration, set pipeline.scheduler = {_plain(scheduler)}"
    for name in DRAWING:
        if name in vars(scheduler):
            raise ValueError(
                f"the scheduler's {name} was replaced by {named(vars(scheduler)[name])}, which accelerate would not "
                f"run: delete it (del pipeline.scheduler.{name}), or draw by the pipeline itself"
            )
    table = step_table(schedule, steps, eta=eta)
    own = copy.deepcopy(scheduler)
    vars(own).update({k: v.cpu() for k, v in vars(own).items() if isinstance(v, Tensor)})
    own.set_timesteps(steps)
    timesteps = [int(t) for t in own.timesteps]
    chosen: int | list[int] = steps
    if timesteps != list(table.timesteps):
        last = schedule.num_train_timesteps - 1
        if not timesteps or timesteps[0] > last or timesteps[-1] < 0 or any(b >= a for a, b in pairwise(timesteps)):
            raise ValueError(
                f"for {steps} steps the {kind} gives {len(timesteps)} timesteps, from {max(timesteps, default=None)} "
                f"to {min(timesteps, default=None)}; accelerate runs timesteps that fall, within {last}..0: take "
                "another number of steps, or draw by the pipeline itself"
            )
        table, chosen = step_table(schedule, timesteps, eta=eta), timesteps
    rows: Sequence[int] = range(len(table))
    cls, packages = type(scheduler), ("diffusers",)
    stock = all(is_stock(packages, cls, name) for name in DRAWING) and not any(overridden(packages, cls))
    if len(table) > ROWS and stock:
        rows = sorted({round(i * (len(table) - 1) / (ROWS - 1)) for i in range(ROWS)})
    try:
        fault = _fault(own, table, schedule, rows, channels, step_options or {}, plain)
    except Exception as error:  # a pipeline's call would end with it
        text = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"the {kind} does not take this pipeline's steps: {type(error).__name__}: {text}; {plain}"
        ) from error
    if fault is not None:
        raise ValueError(f"the {kind} {fault}")
    return chosen


def _plain(scheduler: Any) -> str:
    bases = [c for c in type(scheduler).__mro__ if is_from("diffusers", c)]
    return f"{bases[0].__name__ if bases else type(scheduler).__name__}.from_config(pipeline.scheduler.config)"


@torch.no_grad()
def _fault(
    own: Any,
    table: StepTable,
    schedule: Schedule,
    rows: Sequence[int],
    channels: tuple[int, int],
    options: dict[str, Any],
    plain: str,
) -> str | None:
    """The first of the table's rows that is not the scheduler's step: what the scheduler does, and what to do."""
    device: Any = {"device": "cpu", "dtype": torch.float32}
    inputs, theirs, ours = (torch.Generator("cpu").manual_seed(seed) for seed in (0, 1, 1))
    (image, given), zero = channels, torch.zeros(1, channels[0], *SIZE, **device)
    for i in rows:
        x = torch.randn(zero.shape, generator=inputs, **device)
        out = torch.randn(1, given, *SIZE, generator=inputs, **device)
        out[:, image:] = torch.rand(out[:, image:].shape, generator=inputs, **device)  # a variance is positive
        t = own.timesteps[i]
        got = own.step(out, t, x, generator=theirs, **options).prev_sample
        z = torch.randn(zero.shape, generator=ours, **device) if table.draws[i] else zero
        want, most = _row(table, i, x.double(), out.double(), z.double(), schedule, int(t))
        off = (got.double() - want).abs()
        if not got.isfinite().all():
            return (
                f"gives NaN or infinity at timestep {int(t)}, so the pipeline itself draws nothing: change its "
                "configuration (in diffusers, fixed_large_log is NaN, and so is an epsilon prediction without clipping "
                "where alphas_cumprod is 0)"
            )
        if (off > most).any():
            worst = int((off - most).argmax())
            found, limit = float(off.flatten()[worst]), float(most.flatten()[worst])
            return (
                f"takes other steps than its configuration says: at timestep {int(t)} x differs by {found:.2g}, where "
                f"rounding gives {limit:.1g} at most; {plain}"
            )
    if not torch.equal(theirs.get_state(), ours.get_state()):
        return f"takes other steps than its configuration says: it draws more noise, or less; {plain}"
    return None


def _row(
    table: StepTable, i: int, x: Tensor, out: Tensor, z: Tensor, schedule: Schedule, t: int
) -> tuple[Tensor, Tensor]:
    """x_{t-1} by row i, and by how much diffusers' float32 may differ from it."""
    rows, counter = table.rows[i : i + 1], torch.zeros(2, dtype=torch.int32, device="cpu")
    ids = torch.zeros(1, dtype=torch.int64, device="cpu")
    options: Any = {"variance": table.variance, "noise": z, "thresholding": table.thresholding}
    want = sampler_step(x, out, rows, counter, ids, ids, **options)
    r, eps = rows[0], out[:, : x.shape[1]]
    noise = want - sampler_step(x, out, rows, counter.zero_(), ids, ids, **{**options, "noise": torch.zeros_like(z)})
    x0 = ((r[KX] * x).abs() + (r[KO] * eps).abs()).clamp(max=float(r[CLIP]))
    # From a clipped x0, diffusers adds sqrt(a_p) x0 and subtracts what C0 has already taken off.
    cancelled = 2 * r[CX] if schedule.use_clipped_model_output else 0 * r[CX]
    loose = (r[C0].abs() + cancelled.abs()) * x0 + noise.abs()
    terms = loose + (r[CX] * x).abs() + (r[CO] * eps).abs()
    most = ROUNDING * terms + BETA_ROUNDING / max(float(schedule.betas[t]), 2.0**-24) * loose
    if schedule.method == "ddim" and r[SIGMA] > 0:
        most += _direction_rounding(r, schedule, t) * _direction(x, eps, x0, schedule, t)
    return want, most


def _direction_rounding(r: Tensor, schedule: Schedule, t: int) -> float:
    """The error of DDIM's sqrt(1 - a_p - sigma^2), where nothing may be left of the difference."""
    root = float(r[C0])
    if schedule.use_clipped_model_output:
        root += math.sqrt(schedule.alphas_cumprod[t]) * float(r[CX])
    left = math.sqrt(max(1 - root**2 - float(r[SIGMA]) ** 2, 0))
    return min(BETA_ROUNDING / max(left, 2.0**-24), math.sqrt(BETA_ROUNDING))


def _direction(x: Tensor, eps: Tensor, x0: Tensor, schedule: Schedule, t: int) -> Tensor:
    """What that factor multiplies, the noise in x_t: at most so large."""
    if schedule.prediction_type == "epsilon" and not schedule.use_clipped_model_output:
        return eps.abs()
    return (x.abs() + torch.maximum(eps.abs(), x0)) / math.sqrt(1 - schedule.alphas_cumprod[t])
