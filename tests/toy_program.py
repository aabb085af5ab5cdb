"""A step program as the engine's, small enough to see through, and its runner on the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from graph_stand_in import StandIn
from torch import Tensor

from ddpm_fast import graphs
from ddpm_fast.graphs import GraphCache, Runner
from ddpm_fast.kernels import reference
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table

FORMS = ("step", "chunk", "loop")


class Toy:
    """A step program as the engine's: one convolution and a time row for a network, all in static buffers."""

    def __init__(self, steps: int = 7, n: int = 2, dtype: torch.dtype = torch.bfloat16):
        fixed = torch.Generator().manual_seed(1)
        self.device, self.steps = torch.device("cpu"), steps
        self.x = torch.full((n, 3, 6, 5), float("nan"))
        self.low = torch.full((n, 8, 6, 5), float("nan"), dtype=dtype)
        self.counter = torch.zeros(2, dtype=torch.int32)
        self.seed, self.ids = torch.zeros(1, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
        self.table = step_table(Schedule(num_train_timesteps=steps)).rows.float()
        self.times = torch.randn(steps, 3, generator=fixed)
        self.weight = torch.randn(3, 8, 3, 3, generator=fixed).to(dtype) / 6

    def begin(self, seed: int, ids: Tensor) -> None:
        self.seed.fill_(seed)
        self.ids.copy_(ids)
        self.counter.zero_()
        start = torch.full((1,), reference.INITIAL_STEP, dtype=torch.int64)
        self.x.copy_(reference.philox_normal(self.seed, self.ids, start, self.x.shape[1:]))
        self.low.zero_()
        self.low[:, :3] = self.x

    def predict(self) -> Tensor:
        row = self.times.index_select(0, self.counter[:1])[:, :, None, None]
        return torch.nn.functional.conv2d(self.low, self.weight, padding=1).float() + row

    def step(self) -> None:
        reference.sampler_step(
            self.x, self.predict(), self.table, self.counter, self.seed, self.ids, x_prev=self.x, low=self.low
        )

    def buffers(self) -> list[Tensor]:
        return [self.x, self.low, self.counter]


def eager(seed: int, ids: Tensor, steps: int = 7, done: int | None = None, toy: type[Toy] = Toy) -> list[Tensor]:
    """The oracle: a program of its own, stepped by hand."""
    program = toy(steps, len(ids))
    program.begin(seed, ids)
    for _ in range(steps if done is None else done):
        program.step()
    return program.buffers()


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(s.numpy(force=True).tobytes() == t.numpy(force=True).tobytes() for s, t in zip(_plain(a), _plain(b)))


def _plain(tensors: list[Tensor]) -> Iterator[Tensor]:
    return (t.contiguous().view(torch.uint8) for t in tensors)


def make(program: Toy, graph: str, cache: GraphCache | None = None, **faults: Any) -> tuple[Runner, StandIn]:
    backend = StandIn(written=program.buffers, **faults)
    run = graphs.runner(program, graph, backend=backend, cache=GraphCache() if cache is None else cache)
    assert backend.log == []  # labels, say, are not known yet
    assert run.kind in ("none", *FORMS)  # captures
    return run, backend
