"""Every touch of CUDA that graphs need, behind a few methods, so that all else can be tested without a GPU."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from .loop import WhileGraph


class Graph(Protocol):
    """A captured graph: `torch.cuda.CUDAGraph`, or `loop.WhileGraph`."""

    def replay(self) -> None:
        """Launch it on the current stream."""

    def reset(self) -> None:
        """Free it, and what memory it alone holds."""


class Backend(Protocol):
    """Captures the graphs of one program, into one memory pool."""

    def side_stream(self) -> AbstractContextManager[None]:
        """Work inside goes to a stream of its own, after what was enqueued before and before what comes later."""

    def no_synchronisation(self) -> AbstractContextManager[None]:
        """An operation inside that would wait for the device raises instead."""

    def capture(self, run: Callable[[], Any]) -> Graph:
        """What ``run`` enqueues, captured and not executed. Whatever ``run`` or the capture raises passes through."""

    def loop(self, step: Any, counter: Tensor, stop: Tensor, total: int) -> Graph:
        """A graph that runs the captured ``step`` while counter[0] < min(stop[0], total); or LoopUnavailable."""

    def synchronize(self) -> None:
        """Wait for the device."""


class CudaBackend:
    """Capture on one side stream of ``device``, into a private memory pool that all of a program's graphs share.

    They may share it because they run one after another and leave nothing in it that a later one reads.
    """

    def __init__(self, device: torch.device):
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        with torch.cuda.device(self.device):
            self.stream = torch.cuda.Stream()
            self.pool: Any = torch.cuda.graph_pool_handle()

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        with torch.cuda.device(self.device):
            outer = torch.cuda.current_stream()
            self.stream.wait_stream(outer)
            try:
                with torch.cuda.stream(self.stream):
                    yield
            finally:
                outer.wait_stream(self.stream)

    @contextmanager
    def no_synchronisation(self) -> Iterator[None]:
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def capture(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        # `torch.cuda.graph` is not used: when a capture fails it leaves its stream the current one.
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # kept, for the loop is built from it
        self.synchronize()
        torch.cuda.empty_cache()  # a private pool cannot take from the blocks cached outside it
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream), _no_collection():
            _begin(graph, self.pool)
            try:
                run()
            except BaseException:
                with suppress(Exception):  # it repeats what is being raised
                    self._end(graph)
                raise
            self._end(graph)
            graph.instantiate()
        return graph

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except BaseException:
            # torch leaves its allocators and its generator as if the capture went on.
            _FAILED.append(graph)
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
                torch._C._cuda_releasePool(self.device.index, self.pool)
            with suppress(Exception):
                _capture_nothing()
            raise

    def loop(self, step: Any, counter: Tensor, stop: Tensor, total: int) -> Graph:
        with torch.cuda.device(self.device):
            return WhileGraph(step, counter, stop, total, self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


# The allocator of pinned memory asks a graph whose capture failed, again and again, whether it is still going on.
_FAILED: list[torch.cuda.CUDAGraph] = []


def _begin(graph: torch.cuda.CUDAGraph, pool: Any = None) -> None:
    # torch makes its generator's device tensors here, for all graphs of the process: as inference tensors they could
    # not be written by a graph that is captured outside inference mode.
    with torch.inference_mode(False):
        # thread_local: another thread's allocation must not break this capture
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")


def _capture_nothing() -> None:
    """End what a failed capture left going on in torch's default generator, which would not draw any more."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is empty
        _begin(graph)
        graph.capture_end()
    graph.reset()


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside: freeing CUDA objects that happen to be garbage can break a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
