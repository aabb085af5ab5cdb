"""One step program as CUDA graphs: warm-up, capture, and the checks that a graph computes what the step computes."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .backend import Backend, Graph
from .loop import LoopUnavailable

CHUNK_STEPS = 50  # a launch costs some microseconds: a fiftieth of that, and capture still takes well under a second
TRIAL_STEPS = 3


class Program(Protocol):
    """What a runner needs of a step program.

    ``state()``, where the program has it, names every tensor that a step writes and a later step reads; without
    it these are x and counter, and ``low`` where there is one. ``host_bound``, where it has that, says in words
    why a step needs the host each time (noise from a generator there); such a program is never captured.
    ``weights``, where it has that, is a value that changes when tensors which a step reads are replaced by others.
    """

    @property
    def x(self) -> Tensor:
        """[N, C, H, W]: x_t."""

    @property
    def counter(self) -> Tensor:
        """int32 [2]: the row that the next step reads, and a scratch word; the step advances it."""

    @property
    def device(self) -> torch.device:
        """Where all of it is."""

    @property
    def steps(self) -> int:
        """Of a whole trajectory."""

    def step(self) -> Any:
        """Enqueue one step: static buffers, nothing from the host."""


class GraphCaptureError(RuntimeError):
    """A step could not be captured; the message names the operation."""


class Captured:
    """The graphs of one program in one form, and the word that tells the loop where to stop."""

    def __init__(
        self,
        kind: str,
        backend: Backend | None = None,
        step: Graph | None = None,
        reason: str | None = None,
    ):
        self.kind, self.backend, self.step, self.reason = kind, backend, step, reason
        self.chunk: Graph | None = None
        self.chunk_steps = 1
        self.loop: Graph | None = None
        self.stop: Tensor | None = None  # int32 [1]: the row before which the loop ends
        self._stops_at_end = False
        self.signature: object = None

    def advance(self, program: Program, k: int) -> int:
        """Run k steps; returns how often the host launched."""
        if self.kind == "loop" and k > 1:
            return self.advance_loop(program, k)
        chunks, rest = divmod(k, self.chunk_steps) if self.chunk is not None else (0, k)
        for _ in range(chunks):
            assert self.chunk is not None
            self.chunk.replay()
        run = program.step if self.step is None else self.step.replay
        for _ in range(rest):
            run()
        return chunks + rest

    def advance_loop(self, program: Program, k: int) -> int:
        """The same by the loop; of one step, which the captured step does without a stop word, only to check it."""
        assert self.loop is not None and self.stop is not None
        launches = 1
        whole = k >= program.steps
        if not whole:  # from wherever the device stands: the host never asks where that is
            torch.add(program.counter[:1], k, out=self.stop)
            self._stops_at_end = False
            launches += 1
        elif not self._stops_at_end:
            self.stop_at_end(program)
            launches += 1
        self.loop.replay()
        return launches

    def stop_at_end(self, program: Program) -> None:
        """Let the loop run to the last step."""
        assert self.stop is not None
        self.stop.fill_(program.steps)
        self._stops_at_end = True

    def reset(self) -> None:
        """Free the graphs, after what they still run."""
        if self.backend is not None:
            self.backend.synchronize()
        for graph in (self.loop, self.chunk, self.step):  # the loop was built from the step's graph
            if graph is not None:
                graph.reset()
        self.loop = self.chunk = self.step = None


@torch.inference_mode()
def capture(program: Program, graph: str, backend: Backend) -> Captured:
    """Warm up, capture and check ``program`` in the form ``graph``; the program's state is put back, and so are
    torch's own generators."""
    drawn_from = [program.device] if program.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(drawn_from, device_type="cuda"), backend.side_stream():
            trial = _Trial(program)
            try:
                return _capture_form(program, graph, backend, trial)
            finally:
                trial.put_back()
    except GraphCaptureError as error:
        if graph != "auto":
            raise
        warnings.warn(f"{error}; sampling without graphs, each kernel launched by the host", stacklevel=2)
        return Captured("none", reason=str(error))


def _capture_form(program: Program, graph: str, backend: Backend, trial: _Trial) -> Captured:
    captured = Captured(graph, backend, _capture_step(program, backend, trial))
    if graph == "auto" and getattr(program, "noise", None) is not None:
        # The host writes each step's noise, so no graph of several steps would ever run.
        captured.kind = "step"
        return captured
    try:
        if graph in ("auto", "loop"):
            try:
                _add_loop(captured, program, trial)
                return captured
            except LoopUnavailable as error:
                captured.reason = str(error)
                if graph == "loop" or isinstance(error, _LoopDiffers):
                    warnings.warn(f"graph='loop' becomes 'chunk': {error}", stacklevel=3)
        captured.kind = "step"
        if graph != "step":
            _add_chunk(captured, program, backend, required=graph != "auto")
    except BaseException:
        captured.reset()
        raise
    return captured


def _capture_step(program: Program, backend: Backend, trial: _Trial) -> Graph:
    """One step, captured; after trial runs that compile what is compiled at first use."""
    first = trial.run(lambda k: _eagerly(program, k))
    try:
        # An operation that waits for the GPU breaks a capture, and leaves torch's allocator the worse for it;
        # here it only raises.
        second = trial.run(lambda k: _eagerly(program, k), backend.no_synchronisation)
        graph = backend.capture(program.step)
    except Exception as error:
        raise _capture_error(program, backend, trial, error) from error
    captured = Captured("step", step=graph)
    replayed = trial.run(lambda k: captured.advance(program, k))
    if _same(first, second) and not _same(first, replayed):
        graph.reset()
        raise GraphCaptureError(
            "the captured step does not compute what the step computes: something in it changes with the host "
            "from step to step; read it from the device's counter instead"
        )
    return graph


class _LoopDiffers(LoopUnavailable):
    """The loop ran, and computed something else: a defect, ours or the driver's, and not a matter of versions."""


def _add_loop(captured: Captured, program: Program, trial: _Trial) -> None:
    """The loop form, checked bitwise against the step form; LoopUnavailable where it cannot be had."""
    assert captured.backend is not None
    stepped = trial.run(lambda k: Captured("step", step=captured.step).advance(program, k))
    row = int(program.counter[0])
    if row != trial.steps:  # nothing else ends the loop
        raise LoopUnavailable(f"{trial.steps} captured steps must advance the counter as often; it is at {row}")
    with torch.inference_mode(False):  # so that it can be written in or out of inference mode
        captured.stop = torch.zeros(1, dtype=torch.int32, device=program.device)
    captured.loop = captured.backend.loop(captured.step, program.counter, captured.stop, program.steps)
    captured.kind = "loop"

    def in_two_parts(k: int) -> None:
        captured.advance_loop(program, 1)
        if k > 1:
            captured.advance_loop(program, k - 1)

    try:
        looped = trial.run(in_two_parts)
        if not _same(stepped, looped):
            raise _LoopDiffers(f"over {trial.steps} steps the loop's result differs from the captured step's")
    except RuntimeError as error:
        captured.loop.reset()
        captured.loop = None
        raise error if isinstance(error, LoopUnavailable) else LoopUnavailable(str(error)) from error
    captured.stop_at_end(program)


def _add_chunk(captured: Captured, program: Program, backend: Backend, required: bool) -> None:
    """The chunk form, where a trajectory has more than one step; without it the form stays step."""
    steps = min(CHUNK_STEPS, program.steps)
    try:
        if steps > 1:
            captured.chunk = backend.capture(lambda: _eagerly(program, steps))
        captured.chunk_steps, captured.kind = steps, "chunk"
    except Exception as error:  # such as too little memory for so large a graph
        if required:
            raise GraphCaptureError(f"graph='chunk' cannot be captured, at {_place(error)}: {_line(error)}") from error
        captured.reason = f"{steps} steps in one graph: {_line(error)}"


def _eagerly(program: Program, k: int) -> None:
    for _ in range(k):
        program.step()


def _state(program: Program) -> list[Tensor]:
    """What a step writes and a later one reads; x and the counter first."""
    state = getattr(program, "state", None)
    extra = state() if callable(state) else [getattr(program, "low", None)]
    known = {id(program.x), id(program.counter)}
    return [program.x, program.counter, *(t for t in extra if t is not None and id(t) not in known)]


def signature_of(program: Program) -> object:
    """What a capture is of and no other: the tensors that the program holds, its model's weights, autocast."""
    held = {name: value for name, value in vars(program).items() if isinstance(value, Tensor)}
    kind = program.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    tensors = tuple((name, t.data_ptr(), t.shape, t.stride(), t.dtype) for name, t in held.items())
    return tensors, getattr(program, "weights", None), autocast


class _Trial:
    """Runs of the first steps, each from one and the same state, and the program's own state to go back to.

    All of that is kept on the host: the device's memory, and the most of it that was ever in use, are the program's.
    """

    def __init__(self, program: Program):
        self.steps = min(TRIAL_STEPS, program.steps)
        self.state = _state(program)
        self.kept = _on_host(self.state)
        self.noise = torch.randn(program.x.shape, generator=torch.Generator().manual_seed(0), device="cpu")

    def run(
        self, advance: Callable[[int], object], watch: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> list[Tensor]:
        """What ``steps`` steps from the start leave behind. ``watch``: around the steps alone."""
        x, *others = self.state
        x.copy_(self.noise)
        for tensor in others:
            tensor.zero_()  # buffers may hold anything, and NaN would hide every difference
        with watch():
            advance(self.steps)
        return _on_host(self.state)

    def put_back(self) -> None:
        for tensor, value in zip(self.state, self.kept):
            tensor.copy_(value)


def _on_host(tensors: list[Tensor]) -> list[Tensor]:
    return [t.to("cpu", copy=True) for t in tensors]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit, NaN included."""
    return all(torch.equal(s.view(_BITS[s.itemsize]), t.view(_BITS[t.itemsize])) for s, t in zip(a, b))


class _LastOperation(TorchDispatchMode):
    """Remembers the torch operation that ran last. On for a diagnosis alone: compiled code runs otherwise under it."""

    name: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.name = str(func)
        return func(*args, **(kwargs or {}))


def _capture_error(program: Program, backend: Backend, trial: _Trial, error: Exception) -> GraphCaptureError:
    """The error, with the operation: the one that fails when the step runs once more under watch, and its line."""
    last = _LastOperation()
    found = f"at {_place(error)}: {_line(error)}"

    @contextmanager
    def watch() -> Iterator[None]:
        with backend.no_synchronisation(), last:
            yield

    try:
        trial.run(lambda k: _eagerly(program, 1), watch)
    except Exception as again:  # not kept: its traceback holds the step's tensors
        found = f"operation {last.name}, at {_place(again)}: {_line(again)}"
    return GraphCaptureError(f"the step cannot be captured: {found}")


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _place(error: BaseException) -> str:
    """The innermost line outside torch and triton that the error passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if f.name == "__torch_dispatch__" or any(part in f.filename for part in _LIBRARIES)]
    ours = [f for f in frames if f not in inside]
    if not ours:
        return "the end of the capture"
    frame = ours[-1]
    name = "/".join(frame.filename.replace("\\", "/").split("/")[-2:])
    return f"{name}:{frame.lineno} in {frame.name}" + (f" ({frame.line})" if frame.line else "")


_LIBRARIES = (
    os.path.dirname(torch.__file__) + os.sep,
    "/triton/",
    "/contextlib.py",
    "/ddpm_fast/graphs/capture.py",
    "/ddpm_fast/graphs/backend.py",
)
