"""What `CudaBackend` does around a capture, on a stand-in for the parts of torch.cuda that it touches.

As torch 2.11 is: a capture that fails leaves the allocator's pool in use and the generator as if it went on, and the
generator's device tensors are made in the mode in which the first capture began.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ddpm_fast.graphs import backend as graph_backend
from ddpm_fast.graphs.backend import CudaBackend
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Machine:
    """The state of a process."""

    def __init__(self) -> None:
        self.current: list[Stream] = [Stream()]
        self.pools: list[Any] = []  # that the allocator allocates to
        self.drawing_in_graph = False  # the default generator's state
        self.inference = False  # whether the generator's tensors are inference tensors
        self.invalid = False  # the capture that goes on has failed
        self.graphs: list[str] = []

    def draw(self) -> None:
        if self.drawing_in_graph:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


class Graph:
    """`torch.cuda.CUDAGraph`."""

    machine: Machine

    def __init__(self, keep_graph: bool = False):
        pass

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        assert self.machine.current[-1] is not self.machine.current[0], "on the side stream"
        assert capture_error_mode == "thread_local"
        self.pool = object() if pool is None else pool
        self.machine.pools.append(self.pool)
        self.machine.drawing_in_graph = True
        self.machine.inference |= torch.is_inference_mode_enabled()

    def capture_end(self) -> None:
        invalid, self.machine.invalid = self.machine.invalid, False
        if invalid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.machine.pools.remove(self.pool)
        self.machine.drawing_in_graph = False

    def instantiate(self) -> None:
        self.machine.graphs.append("instantiated")

    def reset(self) -> None:
        self.machine.graphs.append("reset")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        assert wanted.index == 1
        yield

    @contextmanager
    def stream(wanted: Stream) -> Iterator[None]:
        made.current.append(wanted)
        try:
            yield
        finally:
            made.current.pop()

    def end(index: int, pool: Any) -> None:
        made.pools.remove(pool)

    replaced = {
        "device": device,
        "stream": stream,
        "Stream": Stream,
        "CUDAGraph": type("CUDAGraph", (Graph,), {"machine": made}),
        "current_stream": lambda: made.current[-1],
        "graph_pool_handle": lambda: (0, 7),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda index, pool: None, raising=False)
    monkeypatch.setattr(graph_backend, "_FAILED", [])
    return made


def test_the_generator_s_tensors_are_no_inference_tensors(machine: Machine) -> None:
    """They are shared by all graphs of a process, and another may be captured for training."""
    backend = CudaBackend(torch.device("cuda", 1))
    with torch.inference_mode(), backend.side_stream():
        seen = []
        graph = backend.capture(lambda: seen.append(machine.inference))
        assert torch.is_inference_mode_enabled()
    assert isinstance(graph, Graph) and seen == [False] and machine.graphs == ["instantiated"]


@pytest.mark.parametrize("raises", [True, False])
def test_a_failed_capture_leaves_a_process_that_draws_and_captures(machine: Machine, raises: bool) -> None:
    backend = CudaBackend(torch.device("cuda", 1))
    outer = machine.current[0]

    def step() -> None:
        machine.invalid = True
        if raises:
            raise ValueError("operation not permitted when stream is capturing")

    with pytest.raises(ValueError if raises else RuntimeError), backend.side_stream():
        backend.capture(step)
    assert machine.current == [outer]
    assert machine.pools == []
    machine.draw()
    assert machine.graphs == ["reset"], "the empty capture's, never launched"
    assert len(graph_backend._FAILED) == 1, "which the allocator of pinned memory still asks"
    with backend.side_stream():
        backend.capture(lambda: None)
    assert machine.graphs == ["reset", "instantiated"]


def test_a_sampler_stays_on_the_gpu_that_was_the_current_one_when_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    how: Any = {"ops": "reference", "image_shape": (3, 4, 4)}
    for device, wanted in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        sampler = Sampler(lambda x, t: x, Schedule(num_train_timesteps=2), 1, device=device, **how)
        assert sampler.device == torch.device(wanted)
