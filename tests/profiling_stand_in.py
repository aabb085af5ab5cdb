"""A clock that only operations move, and operations that take a known time each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from models import TINY, unet

import ddpm_fast as df
from ddpm_fast import ops as ops_module
from ddpm_fast.ops import Ops
from ddpm_fast.profiling import Profile, profile
from ddpm_fast.profiling.nvml import Series, Watch
from ddpm_fast.profiling.run import Run
from ddpm_fast.roofline import Roofs

SECONDS = {  # of a call
    "norm_act": 0.002,
    "conv": 0.010,
    "upsample_conv": 0.030,
    "attention": 0.005,
    "sampler_step": 0.001,
    "downsample": 0.004,
    "upsample": 0.004,
}
BEFORE = 0.003  # of what comes before the first operation
SCHEDULE = df.Schedule(num_train_timesteps=12)


@dataclass
class FakeClock:
    """Seconds that pass when someone says so."""

    now: float = 100.0
    prepared: int = 0

    def mark(self) -> float:
        return self.now

    def ready(self) -> None:
        self.prepared += 1

    def since(self, origin: float, marks: list[float]) -> list[float]:
        return [mark - origin for mark in marks]

    def when(self, mark: float) -> float:
        return mark


@dataclass
class Timed:
    """`ops`: the reference operations, each of which moves the clock by its time times the step's factor."""

    clock: FakeClock = field(default_factory=FakeClock)
    seconds: Mapping[str, float] = field(default_factory=lambda: SECONDS)
    factor: Callable[[int], float] = lambda step: 1.0
    step: int = 0

    @property
    def ops(self) -> Ops:
        base = ops_module.reference()
        return replace(base, name="timed", enter=self._enter, **{n: self._around(n, getattr(base, n)) for n in SECONDS})

    def _enter(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.now += BEFORE * self.factor(self.step)
        return x

    def _around(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.clock.now += self.seconds[name] * self.factor(self.step)
            self.step += name == "sampler_step"
            return operation(*args, **kwargs)

        return call


def roofs(device: torch.device, dtype: torch.dtype) -> Roofs:
    """4 MB/s, 8 MFLOP/s of convolution and 2 of products: calls of both kinds, above and below them."""
    return Roofs("made up", str(dtype).removeprefix("torch."), 1, torch.__version__, 4e6, 2e6, 8e6)


def made_up_profile(timed: Timed | None = None, steps: int = 5, **more: Any) -> Profile:
    """Of the tiny model: a second's work in a fake one."""
    timed = Timed() if timed is None else timed
    settings: dict[str, Any] = {"batch_size": 2, "steps": steps, "ops": timed.ops, "title": "a tiny model"}
    settings |= {"clock": timed.clock, "find_roofs": roofs, "command": ["ddpm-fast", "profile", "a&b", "<i>"]}
    return profile(more.pop("model", None) or unet(TINY), SCHEDULE, **(settings | more))


def with_gpus(p: Profile, *gpus: Series, note: str | None = None) -> Profile:
    """The same, as if it had been at work for 10 steps and 0.5 s on a GPU."""
    return replace(p, run=Run("loop", 10, 0.5, p.steps[-1].began + 60, gpus, note))


class FakeWatch(Watch):
    """Watches nothing, and says what it is told to."""

    def __init__(self, *series: Series):
        self.series, self.reason, self.began, self.on = series, None, 7.0, 0

    def __enter__(self) -> FakeWatch:
        self.on += 1
        return self

    def __exit__(self, *_: Any) -> None:
        self.on += 1
