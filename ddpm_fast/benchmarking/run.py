"""The benchmark itself: check every provider, time those that are right in turns, and say what was found."""

from __future__ import annotations

import gc
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints import Checkpoint, save
from ..house_rule import full_float32
from ..inspection import model_cost
from ..unet import UNet
from .checks import Judge
from .environment import environment, load_average
from .providers import DTYPES, Case, Provider, Sampling
from .startup import TIME_LIMIT_S, startup
from .timing import Comparison, OwnClock, Run, clock_for, compare
from .worker import BudgetSpent, Worker, WorkerError

if TYPE_CHECKING:
    from ..roofline import Roofs

BASELINE = "diffusers float32"
CONVOLUTION = "conv"
NOT_MEASURED = "not measured: the budget was spent"
ROUNDS_S = 120.0  # for the rounds of one batch size, once the least number of them is done
# Of the time of a batch size, when making and checking must be done, and when the rounds where first steps follow.
MAKING, ROUNDS = 0.6, 0.85
MODEL = "model"  # a folder of the diffusers layout


@dataclass(frozen=True)
class Settings:
    """What is timed, and how long."""

    batches: Sequence[int]
    dtypes: Sequence[str]
    steps: int | None = 20  # of the chain; None: all
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    baseline: str = BASELINE  # "PROVIDER DTYPE"; the first that is right, where it is not among them
    rounds: tuple[int, int] = (3, 20)
    budget_s: float = math.inf  # of wall time for everything; what does not fit is not measured, and says so
    clock: str = "wall"  # or "cpu": of a worker on all its cores, for ratios on a machine that others use too
    startups: bool = True  # also each provider's first step and memory, in processes of their own


def run(
    checkpoint: Checkpoint,
    providers: Sequence[Provider],
    settings: Settings,
    roofs: Sequence[Roofs] = (),
    say: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Check and time every provider at every batch size.

    The budget is that of the whole: each batch size gets an equal part of what is left of it when its turn comes. A
    worker that has not answered in time is ended; what runs in this process (float64, all providers on a GPU) is
    finished first.

    Args:
        checkpoint: the network and its schedule.
        providers: what is compared.
        settings: what is timed, and how long.
        roofs: the device's peaks, for shares of them.
        say: is told what is being done.
        keep: is given what was found so far, whenever a batch size has ended.

    Returns:
        Everything, JSON-ready: environment, roofs, the batch sizes that were asked for, and a row for each batch,
        provider and dtype. A row has either a ``reason`` (not available, failed, or not measured), or a ``check``; and
        a speed only where the check holds.
    """
    end = time.monotonic() + settings.budget_s
    chain = checkpoint.schedule.num_train_timesteps
    steps = chain if settings.steps is None else min(settings.steps, chain)
    model, size = fitting(checkpoint)
    cost = model_cost(model, *size)
    found: dict[str, Any] = {
        "environment": environment(settings.device),
        "source": checkpoint.source,
        "parameters": cost["parameters"],
        "gflop_per_image_and_step": cost["flops"] / 1e9,
        "chain": chain,
        "timed_steps": steps,
        "clock": settings.clock,
        "batches": list(settings.batches),
        "roofs": [r.facts() for r in roofs],
        "rows": [],
    }
    peaks = {r.dtype: r.flops_per_s(CONVOLUTION) for r in roofs}
    with tempfile.TemporaryDirectory(prefix="ddpm-fast-bench-") as folder:
        if settings.startups:
            settings = _with_weights_on_disk(checkpoint, settings, Path(folder), say)
        for i, batch in enumerate(settings.batches):
            case = Case(model, checkpoint.schedule, batch, steps, settings.device)
            part_s = (end - time.monotonic()) / (len(settings.batches) - i)
            rows = _Batch(case, settings, Path(folder), say, part_s).rows(providers)
            for row in rows:
                if "ms_a_step" in row:
                    _derive(row, chain, cost["flops"], peaks.get(row["dtype"]), settings.clock == "wall")
            found["rows"] += rows
            found["environment"]["load_average_after"] = load_average()
            keep(found)
            gc.collect()
    return found


def fitting(checkpoint: Checkpoint) -> tuple[UNet, tuple[int, int]]:
    """The network of a checkpoint that `run` can time, and its (height, width); ValueError for any other."""
    if not isinstance(checkpoint.model, UNet):
        raise ValueError(
            f"bench compares runtimes of diffusers' U-Net; {checkpoint.source} is a {checkpoint.family} network, which "
            "is none; ddpm-fast sample and verify take it"
        )
    if checkpoint.schedule.method != "ddpm":
        raise ValueError(
            f"bench times DDPM chains (Algorithm 2); what draws from {checkpoint.source} is "
            f"{checkpoint.schedule.method.upper()}; --set method=ddpm times its network in a DDPM chain"
        )
    size = checkpoint.model.config.image_size
    if size is None:
        raise ValueError("the model does not state its image size; give it as sample_size")
    return checkpoint.model, size


class _Batch:
    """One batch size: every provider built and checked, then all timed in turns.

    On a CPU each is a process of its own, and this one judges and asks. On a GPU they share this one: a context for
    each would take memory from all, and the driver would share the GPU out among contexts; what our operations set
    for a whole process is of the CPU.

    folder: for what processes are to find. part_s: the seconds that it may take.
    """

    def __init__(self, case: Case, settings: Settings, folder: Path, say: Callable[[str], None], part_s: float):
        self.case, self.settings, self.folder, self.say = case, settings, folder, say
        now = time.monotonic()
        self.until = now + part_s
        self.made_by = now + part_s * MAKING
        self.timed_by = now + part_s * (ROUNDS if settings.startups else 1.0)
        self.apart = case.device.type == "cpu"
        self.running = ExitStack()  # ends the workers, whatever happens
        self.judge = Judge(case)

    def rows(self, providers: Sequence[Provider]) -> list[dict[str, Any]]:
        pairs = [(provider, dtype) for provider in providers for dtype in self.settings.dtypes]
        order = sorted(pairs, key=lambda pair: f"{pair[0].name} {pair[1]}" != self.settings.baseline)
        if time.monotonic() < self.made_by:  # now: a reference that fails is no provider's failure
            self.say(f"batch {self.case.batch}: the truth, in float64")
            self.judge.truth()
            self.judge.chain("philox")
        found: dict[tuple[str, str], dict[str, Any]] = {}
        ready: dict[str, tuple[Sampling, bool]] = {}
        with self.running:
            for provider, dtype in order:  # the baseline first: without it there are no ratios to it
                row, sampling = self.prepared(provider, dtype)
                found[provider.name, dtype] = row
                if sampling is not None:
                    ready[_name(row)] = sampling, provider.ours
            rows = [found[provider.name, dtype] for provider, dtype in pairs]
            self.time(rows, ready)
        ready.clear()
        if self.settings.startups:
            self.start(rows, providers)
        return rows

    def prepared(self, provider: Provider, dtype: str) -> tuple[dict[str, Any], Sampling | None]:
        """A row, and what draws it where it is available and right."""
        case, precision = self.case, DTYPES[dtype]
        row: dict[str, Any] = {"provider": provider.name, "dtype": dtype, "batch": case.batch, "ours": provider.ours}
        reason = provider.missing(case.device, precision)
        if reason is not None:
            return row | {"reason": reason}, None
        if time.monotonic() >= self.made_by:
            return row | {"reason": NOT_MEASURED}, None
        self.say(f"batch {case.batch}: {provider.name} {dtype}: making and checking it")
        sampling: Sampling | None = None
        try:
            with full_float32(provider.ours):
                sampling = self.made(provider, dtype)
                verdict = self.judge.verdict(sampling, precision, strict=provider.ours)
        except BudgetSpent:
            _end(sampling)
            return row | {"reason": NOT_MEASURED}, None
        except Exception as error:  # other people's software fails in its own ways, and is not to stop the rest
            _end(sampling)
            return row | _failure(error), None
        if not verdict.ok:
            _end(sampling)
        return row | {"check": verdict.facts()}, sampling if verdict.ok else None

    def made(self, provider: Provider, dtype: str) -> Sampling:
        if not self.apart:
            return provider.make(self.case, DTYPES[dtype])
        return self.running.enter_context(
            Worker(provider, dtype, self.case, self.folder, self.settings.clock, self.made_by)
        )

    def time(self, rows: list[dict[str, Any]], ready: dict[str, tuple[Sampling, bool]]) -> None:
        """Fills the rows of what is ready.

        Of a worker that fails meanwhile the row says so, and the others begin again: ratios are of rounds in which
        both ran.
        """
        by_name = {_name(row): row for row in rows}
        while ready:
            try:
                timed = self.timed(ready)
            except BudgetSpent:  # not even one round of all
                for name in ready:
                    by_name[name] |= {"reason": NOT_MEASURED}
                break
            except WorkerError as error:
                (name,) = (name for name, (sampling, _) in ready.items() if sampling is error.worker)
                del ready[name], by_name[name]["check"]
                by_name[name] |= _failure(error)
                error.worker.end()
                continue
            for name in ready:
                _fill(by_name[name], timed, self.case.steps)
            break

    def timed(self, ready: dict[str, tuple[Sampling, bool]]) -> Comparison:
        self.say(f"batch {self.case.batch}: timing {', '.join(ready)}")
        for sampling, _ in ready.values():
            if isinstance(sampling, Worker):
                sampling.until = self.until
        baseline = self.settings.baseline if self.settings.baseline in ready else next(iter(ready))
        return compare(
            {name: _drawing(*made) for name, made in ready.items()},
            baseline,
            OwnClock() if self.apart else clock_for(self.case.device),
            warmup=1,
            rounds=self.settings.rounds,
            budget_s=ROUNDS_S,
            most_s=max(0.0, self.timed_by - time.monotonic()),
            repeat=False,
        )

    def start(self, rows: list[dict[str, Any]], providers: Sequence[Provider]) -> None:
        by_name = {p.name: p for p in providers}
        for row in rows:
            if "ms_a_step" in row:
                left_s = self.until - time.monotonic()
                if left_s <= 0:
                    row["startup"] = {"failed": NOT_MEASURED}
                    continue
                self.say(f"batch {self.case.batch}: {_name(row)}: its first step, in a process of its own")
                provider, case, limit_s = by_name[row["provider"]], self.case, min(left_s, TIME_LIMIT_S)
                row["startup"] = startup(provider, row["dtype"], self.folder / MODEL, case.batch, case.device, limit_s)


def _with_weights_on_disk(
    checkpoint: Checkpoint, settings: Settings, folder: Path, say: Callable[[str], None]
) -> Settings:
    """The model below ``folder`` for first steps; where its format cannot say it, settings without first steps."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the format says in other words
            save(folder / MODEL, checkpoint.model, checkpoint.schedule)
    except ValueError as error:
        say(f"no first steps are measured: {error}")
        return replace(settings, startups=False)
    return settings


def _drawing(sampling: Sampling, ours: bool) -> Run:
    """A trajectory, in the precision in which it was checked; a worker's says how long it took."""
    if isinstance(sampling, Worker):
        return sampling.turn

    def run() -> None:
        with full_float32(ours):
            sampling.chain(0)

    return run


def _end(sampling: Sampling | None) -> None:
    if isinstance(sampling, Worker):
        sampling.end()


def _failure(error: Exception) -> dict[str, Any]:
    return {"reason": f"failed: {_line(error)}", "failed": True}


def _name(row: dict[str, Any]) -> str:
    return f"{row['provider']} {row['dtype']}"


def _line(error: Exception) -> str:
    """One line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _fill(row: dict[str, Any], timed: Comparison, steps: int) -> None:
    """The times of one step, and the ratio to the baseline's."""
    name = _name(row)
    facts = timed[name].facts()
    row["ms_a_step"] = {
        "median": facts["median_ms"] / steps,
        "quartiles": [q / steps for q in facts["quartiles_ms"]],
        "min": facts["min_ms"] / steps,
        "rounds": facts["rounds"],
    }
    ratio = timed.ratio(name)
    row["times_as_fast"] = {"as": timed.baseline, "value": ratio.value, "low": ratio.low, "high": ratio.high}


def _derive(row: dict[str, Any], chain: int, flops: int, peak: float | None, wall: bool) -> None:
    """What follows from the time of a step: images/s, FLOP/s, and where it is of the wall, as those of the roofs and of
    the start are, the share of a roof and the first image."""
    step_s = row["ms_a_step"]["median"] / 1e3
    # Time of the processor adds up its cores.
    row["images_per_s"] = row["batch"] / (step_s * chain) if wall else None
    row["tflops"] = flops * row["batch"] / step_s / 1e12
    row["share_of_convolution_roof"] = row["tflops"] * 1e12 / peak if peak and wall else None
    start = row.get("startup")
    if start is not None and "failed" not in start and wall:
        start["first_image_s"] = start["load_s"] + start["first_step_s"] + (chain - 1) * step_s


def wrong(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows whose check does not hold, and rows of ours that failed."""
    return [
        row
        for row in found["rows"]
        if not row.get("check", {"ok": True})["ok"] or (row["ours"] and row.get("failed", False))
    ]
