"""CUDA graphs on the CPU: what a capture records and a replay repeats, by torch's own operations.

A capture runs the step once under a dispatch mode and keeps every operation with the very tensors it read and
wrote; a replay repeats them on those tensors. So whatever the host decided in the capture is decided for good, a
tensor that was replaced rather than written stays the old one, and reading a value on the host fails: as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ddpm_fast.graphs.loop import LoopUnavailable

SYNCHRONISING = ("aten.item.default", "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default")


def waits(func: Any, args: Any) -> bool:
    """Whether the host waits for the device. A tensor made of a list of numbers goes there by a copy that waits."""
    return str(func) in SYNCHRONISING or (str(func) == "aten.lift_fresh.default" and args[0].ndim > 0)


class NoSynchronisation(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            raise RuntimeError("operation not permitted when stream is capturing")
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, [t for t in tree_leaves(results) if isinstance(t, Tensor)]))
        return results


class RecordedGraph:
    """What one capture recorded."""

    def __init__(self, calls: list[tuple[Any, Any, Any, list[Tensor]]], device: StandIn):
        self.calls, self.device, self.replays, self.freed = calls, device, 0, False

    def run(self) -> None:
        """On the device: no launch of the host's."""
        assert not self.freed, "a freed graph was launched"
        with _disable_current_modes():
            for func, args, kwargs, outputs in self.calls:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                for kept, new in zip(outputs, again):
                    if kept.data_ptr() != new.data_ptr():  # a view, or an operation in place, wrote it already
                        kept.copy_(new)

    def replay(self) -> None:
        self.replays += 1
        self.device.log.append("graph")
        self.run()

    def raw_cuda_graph(self) -> RecordedGraph:
        return self

    def reset(self) -> None:
        self.freed = True
        self.calls = []


class LoopGraph:
    """The loop form, as graphs.loop.WhileGraph defines it."""

    def __init__(self, step: RecordedGraph, counter: Tensor, stop: Tensor, total: int):
        self.step, self.counter, self.stop, self.total = step, counter, stop, total
        self.freed = False

    def replay(self) -> None:
        assert not self.freed, "a freed graph was launched"
        self.step.device.log.append("loop")
        with _disable_current_modes():
            for _ in range(10_000):
                if not int(self.counter[0]) < min(int(self.stop[0]), self.total):
                    return
                self.step.run()
        raise AssertionError("the loop would never end")

    def reset(self) -> None:
        self.freed = True


@dataclass
class StandIn:
    """A `Backend`. ``log`` says what was done, in order; faults are set by the tests."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    log: list[str] = field(default_factory=list)
    captured: list[RecordedGraph] = field(default_factory=list)
    loops: list[Any] = field(default_factory=list)
    make_loop: Callable[..., Any] | None = None  # in place of LoopGraph
    no_loop: str | None = None  # why there is none
    fail_capture: int | None = None  # which capture runs out of memory, counted from 0
    on_side: bool = False
    written: Callable[[], list[Tensor]] | None = None  # a capture executes nothing: these are put back after it

    def __call__(self, device: torch.device) -> StandIn:
        self.log.append("backend")
        return self

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        self.log.append("side stream")
        self.on_side = True
        try:
            yield
        finally:
            self.on_side = False
            self.log.append("main stream")

    @contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        with NoSynchronisation():
            yield

    def capture(self, run: Callable[[], Any]) -> RecordedGraph:
        assert self.on_side, "capture must be on the side stream"
        self.log.append("capture")
        if self.fail_capture == sum(entry == "capture" for entry in self.log) - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore lines")
        tensors = self.written() if self.written else []
        kept = [t.clone() for t in tensors]
        for tensor in tensors:
            if tensor.dtype == torch.int32:
                tensor.zero_()  # recording executes, which must not run past the last row
        with _Recorder() as recorder:
            run()
        for tensor, value in zip(tensors, kept):
            tensor.copy_(value)
        self.captured.append(RecordedGraph(recorder.calls, self))
        return self.captured[-1]

    def loop(self, step: Any, counter: Tensor, stop: Tensor, total: int) -> Any:
        if self.no_loop is not None:
            raise LoopUnavailable(self.no_loop)
        self.log.append("loop built")
        self.loops.append((self.make_loop or LoopGraph)(step, counter, stop, total))
        return self.loops[-1]

    def synchronize(self) -> None:
        self.log.append("synchronize")
