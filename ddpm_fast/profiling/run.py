"""Drives a sampler for some steps: timed call by call, without instruments, and watched by NVML."""

from __future__ import annotations

import contextlib
import copy
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..ops import Ops
from ..sampler import Sampler
from ..unet import UNet
from .nvml import Series, Watch
from .probe import Clock, Probe

ROUNDS = 4  # turns that the steps with and without instruments take, so that a busy machine is busy for both


class _Enough(Exception):
    """Ends a chain before its last step."""


def run_steps(
    sampler: Sampler,
    count: int,  # of the chain, from its beginning
    begin: Callable[[], None],
    end: Callable[[], None],
    labels: Tensor | int | None,
) -> None:
    """The first ``count`` steps of a batch as `Sampler.sample` runs them, noise and all."""

    def callback(done: int, x: Tensor) -> None:
        if done:
            end()
        if done == count:
            raise _Enough
        begin()

    with contextlib.suppress(_Enough):
        sampler.sample(sampler.batch_size, labels=labels, callback=callback, interval=1)


def with_ops(sampler: Sampler, ops: Ops, graph: str = "none") -> Sampler:
    """The same sampler over the same weights, its operations replaced by ``ops``, with programs of its own."""
    other = copy.copy(sampler)
    other.ops, other.graph, other._programs = ops, graph, OrderedDict()
    if isinstance(sampler.model, UNet):
        other.model = copy.copy(sampler.model)
        other.model.ops = ops
    return other


def measure(
    sampler: Sampler,  # graph="none"
    steps: int,
    clock: Clock,
    labels: Tensor | int | None,
) -> tuple[Probe, list[float]]:
    """``steps`` steps timed call by call, and the seconds of as many without instruments, taking turns."""
    probe = Probe(clock)
    watched = with_ops(sampler, probe.instrument(sampler.ops))
    if isinstance(watched.model, UNet):
        probe.name_layers(watched.model)
    else:
        watched.model = probe.whole(watched.model)
    plain: list[float] = []
    chain = len(sampler.table)
    run_steps(watched, min(2, chain), probe.begin, lambda: probe.end(keep=False), labels)
    run_steps(sampler, min(2, chain), clock.ready, lambda: None, labels)
    for part in _parts(steps):
        # The first step after the other's turn finds the caches full of other data.
        count = min(part + 1, chain)
        first = len(plain)
        run_steps(sampler, count, *_stopwatch(clock, plain), labels)
        del plain[first : first + (count > 1)]
        first = len(probe.steps)
        run_steps(watched, count, probe.begin, probe.end, labels)
        del probe.steps[first : first + (count > 1)]
    return probe, plain


def _parts(steps: int) -> list[int]:
    """The steps dealt out to at most ROUNDS turns."""
    turns = min(ROUNDS, steps)
    return [steps // turns + (i < steps % turns) for i in range(turns)]


def _stopwatch(clock: Clock, seconds: list[float]) -> tuple[Callable[[], None], Callable[[], None]]:
    marks = []

    def begin() -> None:
        clock.ready()
        marks.append(clock.mark())

    def end() -> None:
        seconds.extend(clock.since(marks[-1], [clock.mark()]))

    return begin, end


@dataclass(frozen=True)
class Run:
    """The sampler at work, as it is used: in a graph where it makes one."""

    graph: str
    steps: int
    seconds: float
    began: float  # of the watch, on time.perf_counter's scale
    gpus: tuple[Series, ...]
    note: str | None  # why a GPU was not watched


def watched_run(
    sampler: Sampler,
    graph: str,
    seconds: float,  # at least
    labels: Tensor | int | None,
    watch: Watch,
    wait: Callable[[], None],  # for the device
) -> Run:
    """Sample for a while with ``watch`` on, after an unwatched beginning in which graphs are captured."""
    at_work = with_ops(sampler, sampler.ops, graph)
    interval = min(50, len(sampler.table))  # steps between two looks at the clock

    def sample(deadline: float) -> int:
        """Steps done until time.perf_counter() is past the deadline."""
        total = before = 0

        def callback(done: int, x: Tensor) -> None:
            nonlocal total, before
            wait()
            total, before = total + max(0, done - before), done
            if done and time.perf_counter() >= deadline:
                raise _Enough

        while True:
            try:
                at_work.sample(at_work.batch_size, labels=labels, callback=callback, interval=interval)
            except _Enough:
                return total

    sample(0)
    with watch:
        began = time.perf_counter()
        steps = sample(began + seconds)
        spent = time.perf_counter() - began
    return Run(graph, steps, spent, watch.began, watch.series, watch.reason)
