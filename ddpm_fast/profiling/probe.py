"""A set of operations whose calls are written down once, with their costs, and then timed, step after step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..kernels.cost import Cost
from ..ops import Ops, recording
from ..ops.records import Record
from ..unet import UNet

Mark = Any  # a moment, as a clock keeps it


class Clock(Protocol):
    """Who says when."""

    def mark(self) -> Mark:
        """Now, in the order of the work."""

    def ready(self) -> None:
        """Be prepared for a step, so that its operations follow each other as fast as they run."""

    def since(self, origin: Mark, marks: list[Mark]) -> list[float]:
        """Seconds from ``origin`` to each mark."""

    def when(self, mark: Mark) -> float:
        """The mark on time.perf_counter's scale, in seconds."""


class HostClock:
    """time.perf_counter. wait: what to call first on a device that computes behind the caller's back."""

    def __init__(self, wait: Callable[[], None] | None = None):
        self._wait = wait

    def mark(self) -> Mark:
        if self._wait is not None:
            self._wait()
        return time.perf_counter_ns()

    def ready(self) -> None:
        pass

    def since(self, origin: Mark, marks: list[Mark]) -> list[float]:
        return [(mark - origin) / 1e9 for mark in marks]

    def when(self, mark: Mark) -> float:
        return mark / 1e9


class CudaClock:
    """Events on the current stream. ``cuda``: torch.cuda, or a stand-in.

    Before a step the stream is kept waiting for about as long as the host takes to launch one: then an operation's
    time is what the GPU needs, and not how fast Python is. How long that is, the second step says: the first may
    compile, and from the third on the host may itself wait for the stream, where its queue is full.
    """

    CYCLES_A_SECOND = 2e9  # of torch.cuda._sleep, at least: the GPU's clock is below this
    LONGEST_S = 0.5  # that the stream is kept waiting

    def __init__(self, device: torch.device, cuda: Any = None):
        self.device, self.cuda = device, torch.cuda if cuda is None else cuda
        self._launching_s = 0.0
        self._began, self._timed = 0.0, 0
        self.cuda.synchronize(device)
        self._origin, self._origin_s = self.mark(), time.perf_counter()

    def mark(self) -> Mark:
        event = self.cuda.Event(enable_timing=True)
        event.record(self.cuda.current_stream(self.device))
        return event

    def ready(self) -> None:
        self.cuda.synchronize(self.device)
        if self._launching_s:
            self.cuda._sleep(int(1.2 * self._launching_s * self.CYCLES_A_SECOND))
        self._began = time.perf_counter()

    def since(self, origin: Mark, marks: list[Mark]) -> list[float]:
        self._timed += 1
        if self._timed == 2:
            self._launching_s = min(time.perf_counter() - self._began, self.LONGEST_S)
        self.cuda.synchronize(self.device)
        return [origin.elapsed_time(mark) / 1e3 for mark in marks]

    def when(self, mark: Mark) -> float:
        return self._origin_s + self._origin.elapsed_time(mark) / 1e3


def clock_for(device: torch.device) -> Clock:
    """Events on a CUDA GPU, the host's clock elsewhere."""
    if device.type == "cuda":
        return CudaClock(device)
    return HostClock(torch.mps.synchronize if device.type == "mps" else None)


@dataclass(frozen=True)
class Step:
    """One timed step: ``began`` on time.perf_counter's scale, the rest in seconds from there."""

    began: float
    seconds: float
    calls: tuple[tuple[float, float], ...] = ()  # (begin, end) of each operation

    @property
    def gaps(self) -> tuple[float, float, float]:
        """Seconds in no operation: before the first, between them, after the last."""
        if not self.calls:
            return self.seconds, 0.0, 0.0
        between = sum(b[0] - a[1] for a, b in zip(self.calls, self.calls[1:]))
        return self.calls[0][0], between, self.seconds - self.calls[-1][1]


class Probe:
    """`instrument` a set of operations, then run steps between `begin` and `end`.

    The first step is written down: each call's shapes, cost and layer. The later ones are timed call by call, and
    call k of a step is line k of the first. Between steps the operations are what they were.
    """

    def __init__(self, clock: Clock):
        self.clock = clock
        self.records: list[Record] = []
        self.layers: list[str] = []  # of each record; "" where the operation has no weights
        self.steps: list[Step] = []
        self._names: dict[int, str] = {}
        self._doing = ""  # "record", "time", or nothing
        self._start: Mark = None
        self._marks: list[Mark] = []

    def instrument(self, ops: Ops) -> Ops:
        recorded, log = recording(ops)
        names = [f.name for f in fields(Ops) if getattr(recorded, f.name) is not getattr(ops, f.name)]
        wrapped: dict[str, Any] = {n: self._around(n, getattr(ops, n), getattr(recorded, n), log) for n in names}
        placed = ops.placed
        if placed is not None:
            wrapped["placed"] = lambda memory: self.instrument(placed(memory))
        return replace(ops, **wrapped)

    def whole(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """A model that is not written in these operations, as one operation."""
        log: list[Record] = []
        return WholeModel(model, self._around("model", model, priced(model, log), log))

    def name_layers(self, model: UNet) -> None:
        """Learn which weights belong to which layer of a prepared copy, which must outlive the steps."""
        self._names = layer_names(model)

    def begin(self) -> None:
        """A step begins."""
        self._doing, self._marks = "time" if self.records else "record", []
        self.clock.ready()
        self._start = self.clock.mark()

    def end(self, keep: bool = True) -> None:
        """The step is over. keep: it counts, unless it was the one that is written down."""
        seconds = self.clock.since(self._start, [*self._marks, self.clock.mark()])
        doing, self._doing = self._doing, ""
        if doing == "record" or not keep:
            return
        if len(self._marks) != 2 * len(self.records):
            raise RuntimeError(
                f"every step must make the same calls; the first made {len(self.records)} and this one "
                f"{len(self._marks) // 2}"
            )
        calls = tuple(zip(seconds[:-1:2], seconds[1:-1:2]))
        self.steps.append(Step(self.clock.when(self._start), seconds[-1], calls))

    def _around(
        self, name: str, operation: Callable[..., Any], recorded: Callable[..., Any], log: list[Record]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._doing == "record":
                y = recorded(*args, **kwargs)
                self.records.append(log.pop())
                self.layers.append(self._layer(name, args, kwargs))
                return y
            if not self._doing:
                return operation(*args, **kwargs)
            self._marks.append(self.clock.mark())
            y = operation(*args, **kwargs)
            self._marks.append(self.clock.mark())
            return y

        return call

    def _layer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        for value in (*args, *kwargs.values()):
            if id(value) in self._names:
                return self._names[id(value)]
        if name == "attention" and self.layers:  # between its two projections
            return self.layers[-1].rpartition(".")[0]
        return ""


class WholeModel:
    """Calls ``call`` and is ``model`` in everything else."""

    def __init__(self, model: Callable[..., Any], call: Callable[..., Any]):
        self._model, self._call = model, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def priced(model: Callable[..., Any], log: list[Record]) -> Callable[..., Any]:
    """``model``, whose calls go to ``log``: FLOPs as torch counts them; bytes of weights, feature maps and output."""
    held = getattr(model, "parameters", None)
    weights = list(held()) if callable(held) else []

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Of attention's implementations, the one whose products torch counts on every device.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            result = model(x, *args, **kwargs)
        y = result[0] if isinstance(result, (tuple, list)) else getattr(result, "sample", result)
        maps = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() == 4]  # the x_0 of self-conditioning
        read = sum(t.numel() * t.element_size() for t in (x, *maps, *weights))
        cost = Cost(counter.get_total_flops(), read, y.numel() * y.element_size(), 0)
        dtype = weights[0].dtype if weights else x.dtype
        log.append(Record("model", (("x", tuple(x.shape)), ("out", tuple(y.shape))), dtype, type(model).__name__, cost))
        return result

    return call


def layer_names(model: UNet) -> dict[int, str]:
    """id of each weight, as the set has packed it, -> the layer's name in the state dict."""
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        for key in ("weight", "step_weight"):
            weight = module.__dict__.get(key, module._parameters.get(key))
            if weight is not None:
                names[id(weight)] = name
        packed = module.__dict__.get("packed")  # of attention: q, k and v as one, and the projection
        if packed is not None:
            names[id(packed[0])], names[id(packed[2])] = f"{name}.to_qkv", f"{name}.to_out"
    return names
