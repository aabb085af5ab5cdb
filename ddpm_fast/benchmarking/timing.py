"""One way of timing: warm up, take turns, in a random order each round, and compare within rounds.

    timed = compare({"a": run_a, "b": run_b}, baseline="a")
    timed["b"].median_ms, timed.ratio("b")       # 1.9 (1.8 .. 2.0): a took 1.9 times as long as b

A machine that slows down slows all variants of a round, so a ratio is the median of the rounds' own ratios, with a
bootstrap interval over rounds (Efron 1979, the percentile form). Calls are ``run()`` without arguments; a clock says
how long one took. Calls shorter than a clock can see are repeated within a sample.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], object]
SHORTEST_SAMPLE_MS = 1.0  # calls are repeated until a sample takes this long: 20,000 times the clock's resolution
MOST_CALLS = 1 << 14  # of one sample
RESAMPLES = 1000
SETTLED = 5  # of fewer rounds nothing can be told
INTERVAL = (2.5, 97.5)  # percentiles of a ratio's interval


class Clock(Protocol):
    """Says how many milliseconds ``calls`` calls in a row took."""

    def __call__(self, run: Run, calls: int = 1) -> float: ...


class HostClock:
    """By a clock of this process. time.thread_time instead of the wall leaves out other processes, and threads."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now = now

    def __call__(self, run: Run, calls: int = 1) -> float:
        now = self.now
        began = now()
        for _ in range(calls):
            run()
        return (now() - began) * 1e3


class OwnClock:
    """By what runs say of themselves: each returns how many milliseconds it took, as those of other processes do."""

    def __call__(self, run: Callable[[], Any], calls: int = 1) -> float:
        return float(sum(run() for _ in range(calls)))


class CudaClock:
    """By CUDA events on the current stream.

    ahead: the GPU is kept busy while the host enqueues the calls, so that launching is not in the time: for kernels.
    Without it the time is what a caller waits, launching included: for samplers. ``cuda``: torch.cuda, or a stand-in.
    """

    AHEAD_CYCLES = 2_000_000  # about a millisecond

    def __init__(self, ahead: bool = False, cuda: Any = None):
        self.ahead, self.cuda = ahead, torch.cuda if cuda is None else cuda

    def __call__(self, run: Run, calls: int = 1) -> float:
        start, stop = (self.cuda.Event(enable_timing=True) for _ in range(2))
        if self.ahead:
            self.cuda._sleep(self.AHEAD_CYCLES)
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)


def clock_for(device: torch.device, ahead: bool = False) -> Clock:
    """CUDA events on a CUDA device, the wall elsewhere."""
    return CudaClock(ahead) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Timed:
    """Samples of one variant, in milliseconds a call and in the order of the rounds."""

    samples_ms: tuple[float, ...]
    calls: int  # of each sample

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.samples_ms, q))

    @property
    def median_ms(self) -> float:
        return self.quantile(0.5)

    @property
    def min_ms(self) -> float:
        return min(self.samples_ms)

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "median_ms": self.median_ms,
            "quartiles_ms": [self.quantile(0.25), self.quantile(0.75)],
            "min_ms": self.min_ms,
            "rounds": len(self.samples_ms),
            "calls": self.calls,
        }


@dataclass(frozen=True)
class Ratio:
    """How many times as long the baseline took, with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured. The rounds of all variants are the same ones."""

    timed: Mapping[str, Timed]
    baseline: str

    def __getitem__(self, name: str) -> Timed:
        return self.timed[name]

    def ratio(self, name: str) -> Ratio:
        """Of the baseline's time to ``name``'s, from rounds in which both ran. Above 1: ``name`` is faster."""
        return paired_ratio(self.timed[self.baseline].samples_ms, self.timed[name].samples_ms)


def paired_ratio(baseline_ms: Sequence[float], other_ms: Sequence[float], resamples: int = RESAMPLES) -> Ratio:
    """Median of baseline_ms[i] / other_ms[i], and the percentile interval of that median over resampled rounds.

    The same numbers give the same interval. ValueError unless both are as long, and not empty.
    """
    if len(baseline_ms) != len(other_ms) or not len(other_ms):
        raise ValueError(f"a paired ratio needs as many of both; got {len(baseline_ms)} and {len(other_ms)} rounds")
    ratios = np.asarray(baseline_ms) / np.asarray(other_ms)
    chosen = np.random.default_rng(0).integers(len(ratios), size=(resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[chosen], axis=1), INTERVAL)
    return Ratio(float(np.median(ratios)), float(low), float(high))


def compare(
    variants: Mapping[str, Run],
    baseline: str | None = None,  # default: the first
    clock: Clock | None = None,  # default: the wall
    *,
    warmup: int = 1,  # unmeasured calls of each
    rounds: tuple[int, int] = (5, 50),  # at least, at most
    budget_s: float = 30.0,  # of wall time for the rounds; the least number of rounds is run all the same
    most_s: float = math.inf,  # the round in which so much time has passed, warming up included, is the last
    precision: float = 0.02,  # stop when each ratio's interval is this narrow, as a share of the ratio
    repeat: bool = True,  # short calls within a sample; False: one call a sample
    seed: int = 0,
    now: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time ``variants`` in turns: each round runs each of them once, in a random order drawn from ``seed``.

    ValueError for no variants, an unknown baseline, or numbers that make no sense.
    """
    least, most = rounds
    if not variants:
        raise ValueError("compare needs at least one variant")
    baseline = next(iter(variants)) if baseline is None else baseline
    if baseline not in variants:
        raise ValueError(f"the baseline must be one of {', '.join(variants)}; got {baseline!r}")
    if not 1 <= least <= most or warmup < 0 or not budget_s >= 0 or not precision >= 0:
        raise ValueError(
            f"compare needs 1 <= rounds[0] <= rounds[1] and no negative numbers; got rounds={rounds}, "
            f"warmup={warmup}, budget_s={budget_s}, precision={precision}"
        )
    clock = HostClock() if clock is None else clock
    entered = now()
    for run in variants.values():
        for _ in range(warmup):
            run()
    calls = {name: _calls(run, clock) if repeat else 1 for name, run in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    names, order = list(variants), random.Random(seed)
    began = now()
    for done in range(1, most + 1):
        order.shuffle(names)
        for name in names:
            samples[name].append(clock(variants[name], calls[name]) / calls[name])
        spent = now() - began
        if began + spent - entered > most_s:
            break
        if done >= least and (spent * (done + 1) / done > budget_s or _settled(samples, baseline, precision)):
            break
    return Comparison({name: Timed(tuple(s), calls[name]) for name, s in samples.items()}, baseline)


def _calls(run: Run, clock: Clock) -> int:
    """How many calls make a sample long enough; found by doubling."""
    calls = 1
    while calls < MOST_CALLS:
        if clock(run, calls) >= SHORTEST_SAMPLE_MS:
            break
        calls *= 2
    return calls


def _settled(samples: Mapping[str, Sequence[float]], baseline: str, precision: float) -> bool:
    """Whether more rounds would tell little: the ratios' median lies between two of them that are near each other.

    The interval is the one of order statistics (n / 2 +- 1.96 sqrt(n) / 2), which costs microseconds where resampling
    costs a millisecond a look. Of one variant alone, its time takes the ratio's place.
    """
    base = samples[baseline]
    others = [s for name, s in samples.items() if name != baseline] or [[1.0] * len(base)]
    n = len(base)
    reach = 0.98 * math.sqrt(n)
    first, last = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    if n < SETTLED:
        return False
    for other in others:
        ratios = np.sort(np.divide(base, other))
        if ratios[last] - ratios[first] > precision * ratios[n // 2]:
            return False
    return True


def copies_for(nbytes: int, cache_bytes: int, most_bytes: int = 4 << 30) -> int:
    """How many copies of a call's ``nbytes`` of inputs make each of them leave a cache before its next turn.

    The others' bytes must be twice the cache. At least 1; never more than fit into ``most_bytes``.
    """
    wanted = 1 - (-2 * cache_bytes // max(nbytes, 1))
    return max(1, min(wanted, most_bytes // max(nbytes, 1)))


def rotated(call: Callable[..., object], inputs: Sequence[Sequence[Any]]) -> Run:
    """A run that takes the next set of arguments at each call, round and round: reads that find no warm cache."""
    state = {"next": 0}

    def run() -> object:
        i = state["next"]
        state["next"] = i + 1 if i + 1 < len(inputs) else 0
        return call(*inputs[i])

    return run


def copied(arguments: Sequence[Any], cache_bytes: int) -> list[list[Any]]:
    """``arguments``, and as many copies of their tensors as `copies_for` says. What is no tensor is shared."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    count = copies_for(sum(t.numel() * t.element_size() for t in tensors), cache_bytes)
    again = [[a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(count - 1)]
    return [list(arguments), *again]


def overhead(step_ms: float = 10.0, rounds: int = 30) -> dict[str, float]:
    """What the harness adds to a step of ``step_ms``, as shares of it.

    reported: the harness's time of a step beside the step's own account of it, the median over rounds.
    between: what of a round is in no sample, its own statistics included; the median too, since another process
    may take a core at any moment.
    """
    own: list[float] = []

    def step() -> None:
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) * 1e3 < step_ms:
            pass
        own.append(elapsed * 1e3)

    marks: list[float] = []

    def now() -> float:
        marks.append(time.perf_counter())
        return marks[-1]

    timed = compare({"step": step}, rounds=(1, rounds), precision=0.0, now=now)["step"]
    samples = timed.samples_ms
    excess = np.asarray(samples) - np.asarray(own[-len(samples) :])
    between = np.diff(marks[1:]) * 1e3 - np.asarray(samples)
    return {
        "step_ms": step_ms,
        "reported": float(np.median(excess)) / step_ms,
        "between": float(np.median(between)) / step_ms,
    }
