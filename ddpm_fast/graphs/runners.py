"""The sampling loop as graph launches: one captured step, chunks of steps, or the whole trajectory.

A step program reads its row, seed and ids from the device and advances its own counter, so one captured step is
every step of every trajectory of that shape, and a replay needs nothing from the host. The forms:

    step    the captured step, launched once a step
    chunk   `capture.CHUNK_STEPS` steps captured in a row, what is left over by the captured step
    loop    one launch for any number of steps: the captured step in a WHILE node (loop.py)
    none    eager

All of them, eager included, compute the same bits. `runner` chooses, captures and checks.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch

from .backend import Backend, CudaBackend
from .capture import Captured, GraphCaptureError, Program, capture, signature_of
from .loop import LoopUnavailable, bindings, compile_kernel

__all__ = ["GRAPHS", "GraphCache", "GraphCaptureError", "Program", "Runner", "runner", "why_no_graph", "why_no_loop"]

GRAPHS = ("auto", "none", "step", "chunk", "loop")
CACHED_PROGRAMS = 4  # each holds a private memory pool of about the program's own peak


def runner(
    program: Program,
    graph: str = "auto",
    *,
    backend: Callable[[torch.device], Backend] | None = None,
    cache: GraphCache | None = None,
) -> Runner:
    """A runner of ``program`` in the form ``graph``.

    It captures and checks at its first step (a class-conditional program knows its labels only then), and puts
    back what the program held.

    "auto" takes loop, chunk or step, the first that works, on a CUDA device, and eager elsewhere; where a step
    cannot be captured it warns once and runs eagerly. "loop" becomes chunk, with a warning, where the driver, the
    toolkit or the step does not allow it. backend and cache stand in for CUDA and for the process's own cache.

    Raises ValueError for a graph that the device or the program rules out. The runner raises GraphCaptureError
    when "step", "chunk" or "loop" was asked for and the step cannot be captured.
    """
    if graph not in GRAPHS:
        raise ValueError(f"graph must be one of {', '.join(GRAPHS)}; got {graph!r}")
    why_not = getattr(program, "host_bound", None)
    if backend is None:
        why_not = why_no_graph(program.device) or why_not
    if why_not and graph not in ("auto", "none"):
        raise ValueError(f"graph={graph!r} cannot be had: {why_not}; use graph='auto' or graph='none'")
    cache = GRAPH_CACHE if cache is None else cache
    return Runner(program, "none" if why_not else graph, backend or CudaBackend, cache, why_not)


def why_no_graph(device: torch.device) -> str | None:
    """Why a program on ``device`` cannot be captured, whatever it is; None where nothing is known against it."""
    return None if device.type == "cuda" else f"CUDA graphs need a CUDA device; got device={str(device)!r}"


def why_no_loop(device: torch.device) -> str | None:
    """Why a sampler on ``device`` cannot have graph="loop", whatever its step; None where nothing is known against it.

    Asks what a capture asks: the device, cuda-bindings, the driver, and whether the loop's condition compiles.
    """
    why_not = why_no_graph(device)
    if why_not is None:
        try:
            compile_kernel(bindings(), torch.cuda.get_device_capability(device))
        except LoopUnavailable as error:
            why_not = " ".join(str(error).split())  # a compiler says more than one line
    return why_not


class Runner:
    """Runs the next steps of one program. Use it under the stream that the program's other work is on."""

    def __init__(
        self,
        program: Program,
        graph: str,
        backend: Callable[[torch.device], Backend],
        cache: GraphCache,
        reason: str | None = None,
    ):
        self.program, self.graph = program, graph
        self.launches = 0  # by the host so far: graphs, and writes of the word that stops a loop; eagerly, steps
        self._backend, self._cache, self._closed = backend, cache, False
        self._eager = Captured("none", reason=reason) if graph == "none" else None
        self._form: tuple[str, str | None] | None = None

    @property
    def kind(self) -> str:
        """The form in use: none, step, chunk or loop. Captures where nothing is captured yet."""
        return self._known_form()[0]

    @property
    def reason(self) -> str | None:
        """Why it is not a better form, where something stood against one."""
        return self._known_form()[1]

    def _known_form(self) -> tuple[str, str | None]:
        if self._form is None:
            self._captured()
        assert self._form is not None
        return self._form

    @torch.inference_mode()
    def advance(self, k: int) -> None:
        """Run the next k steps on the current stream; returns without waiting for them.

        Captures at the first call, and later only where the program's buffers moved, or where more programs than
        the cache holds were used in between. ValueError for k outside 0..steps; that a trajectory gets no more
        steps than it has is the caller's.
        """
        if not 0 <= k <= self.program.steps:
            raise ValueError(f"advance(k) needs k in 0..{self.program.steps}, the program's steps; got {k}")
        if k:
            self.launches += self._captured().advance(self.program, k)

    def close(self) -> None:
        """Free the graphs and their memory; may be called twice."""
        self._closed = True
        self._cache.discard((id(self.program), self.graph))

    def _captured(self) -> Captured:
        if self._closed:
            raise RuntimeError("this runner is closed, and its graphs are freed; make another with graphs.runner")
        captured = self._eager or self._cache.fetch(self.program, self.graph, self._backend)
        self._form = captured.kind, captured.reason
        return captured


class GraphCache:
    """The captured graphs of the programs used last, and no more than ``size`` of them. Programs are not kept."""

    def __init__(self, size: int = CACHED_PROGRAMS):
        self.size = size
        self._entries: OrderedDict[tuple[int, str], tuple[Captured, weakref.finalize]] = OrderedDict()
        self._lock = threading.RLock()  # one capture at a time in a process

    def __len__(self) -> int:
        return len(self._entries)

    def fetch(self, program: Program, graph: str, backend: Callable[[torch.device], Backend]) -> Captured:
        """The entry of this program, form and buffers; captured now where there is none."""
        key = id(program), graph
        signature = signature_of(program)
        with self._lock:
            if key in self._entries:
                captured = self._entries[key][0]
                if captured.signature == signature:
                    self._entries.move_to_end(key)
                    return captured
                self.discard(key)
            while len(self._entries) >= self.size:  # first, so that their memory serves the new one
                self.discard(next(iter(self._entries)))
            captured = capture(program, graph, backend(program.device))
            captured.signature = signature
            finalizer = weakref.finalize(program, self.discard, key)
            finalizer.atexit = False  # the driver may be gone by then, and frees all itself
            self._entries[key] = captured, finalizer
            return captured

    def discard(self, key: tuple[int, str]) -> None:
        """Free an entry, if there is one."""
        with self._lock:
            found = self._entries.pop(key, None)
            if found is not None:
                found[1].detach()
                found[0].reset()


GRAPH_CACHE = GraphCache()
