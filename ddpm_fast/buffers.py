"""Where a network's intermediate results lie: one arena, planned by a dry run and then served call by call.

A set of operations asks a `Memory` for each result. `Fresh` asks torch. `plan` runs the network once over
shapes alone and writes down when each result is made and when the last reference to it is gone; `Arena`
serves the same requests, in the same order, from fixed places in one allocation.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: more than any vector load or descriptor asks
MOST_PARTS = 3  # two launches more each
LEAST_PIXELS = 4096  # of a part; below, its convolution leaves a large GPU idle
WORTH = 0.98  # a split must bring the arena below this share of what it was


class Memory(Protocol):
    """Who gives a set of operations the memory of its results."""

    dry: bool  # shapes alone: nothing is launched

    def map(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A feature map [N, C, H, W] in channels_last memory, not initialised."""

    def floats(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Contiguous float32: statistics, workspaces."""

    def parts(self, shape: tuple[int, ...]) -> int:
        """In how many parts of the batch the next norm_act, with a result of ``shape``, is to be made and read."""

    def outside(self, result: Tensor) -> None:
        """Note a result that torch allocated itself."""


class Fresh:
    """Every result a new tensor."""

    dry = False

    def map(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)

    def floats(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def parts(self, shape: tuple[int, ...]) -> int:
        return 1

    def outside(self, result: Tensor) -> None:
        pass


@dataclass
class Request:
    """One result: what it is, and between which requests it lives."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_map: bool  # channels_last, or contiguous
    birth: int
    death: int = 0  # the first request after the last reference to it was gone
    offset: int = 0  # bytes into the arena

    @property
    def size(self) -> int:
        """Bytes, rounded up to the alignment."""
        size = math.prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Plan:
    """Requests with their places, in the order of the calls."""

    requests: tuple[Request, ...]
    size: int  # bytes of the arena
    outside: int  # the most bytes that torch's own results held at one moment
    norms: tuple[int, ...] = ()  # norm_act number -> its request
    parts: Mapping[int, int] = field(default_factory=dict)  # norm_act number -> parts, where more than one

    @property
    def largest(self) -> int:
        """The most bytes alive at one moment: what no arrangement could be smaller than."""
        return max((_alive(self.requests, i) for i in range(len(self.requests))), default=0)


def plan(
    run: Callable[[Memory], object],  # the network, on a set that asks the given memory
    most_parts: int = MOST_PARTS,
    least_pixels: int = LEAST_PIXELS,
) -> Plan:
    """Places for all results of ``run``.

    Where the normalised concatenation that a convolution reads makes the peak, the two run in up to
    ``most_parts`` parts of the batch, of ``least_pixels`` at least, if that saves memory: a sample's bits do
    not depend on the images beside it.
    """
    best = _dry_run(run, {})
    tried: set[int] = set()
    while True:
        found = _at_the_peak(best, tried, most_parts, least_pixels)
        if found is None:
            return best
        norm, parts = found
        tried.add(norm)
        other = _dry_run(run, {**best.parts, norm: parts})
        if other.size < WORTH * best.size:
            best = other


def _dry_run(run: Callable[[Memory], object], parts: Mapping[int, int]) -> Plan:
    planner = _Planner(parts)
    result = run(planner)
    del result
    assert all(r.death > r.birth for r in planner.requests), "something keeps a result of the dry run"
    size = place(planner.requests)
    return Plan(tuple(planner.requests), size, planner.most_outside, tuple(planner.norms), parts)


def _at_the_peak(found: Plan, tried: set[int], most: int, least_pixels: int) -> tuple[int, int] | None:
    """The largest norm_act result alive at the peak that can be split, as (its number, parts)."""
    if not found.requests:
        return None
    peak = max(range(len(found.requests)), key=lambda i: _alive(found.requests, i))
    choices = []
    for number, index in enumerate(found.norms):
        if number in tried or number in found.parts:
            continue
        request = found.requests[index]
        n, _, h, w = request.shape
        parts = min(most, n, n * h * w // least_pixels)
        if parts > 1 and request.birth <= peak < request.death:
            choices.append((request.size, number, parts))
    return max(choices)[1:] if choices else None


def _alive(requests: tuple[Request, ...], moment: int) -> int:
    return sum(r.size for r in requests if r.birth <= moment < r.death)


def place(requests: list[Request]) -> int:
    """Give each request its offset, largest first, in the smallest gap that fits; returns the arena's bytes."""
    placed: list[Request] = []
    total = 0
    for r in sorted(requests, key=lambda r: (-r.size, r.birth)):
        others = sorted((o for o in placed if o.birth < r.death and r.birth < o.death), key=lambda o: o.offset)
        best, end = None, 0
        for o in others:
            gap = o.offset - end
            if gap >= r.size and (best is None or gap < best[0]):
                best = (gap, end)
            end = max(end, o.offset + o.size)
        r.offset = end if best is None else best[1]
        total = max(total, r.offset + r.size)
        placed.append(r)
    return total


class _Planner:
    """Hands out tensors without memory and notes when each is made and gone."""

    dry = True

    def __init__(self, parts: Mapping[int, int]):
        self._parts = parts
        self.requests: list[Request] = []
        self.norms: list[int] = []
        self.most_outside = self._outside = 0

    def map(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        t = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
        return self._note(t, is_map=True)

    def floats(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return self._note(torch.empty(shape, dtype=torch.float32, device="meta"), is_map=False)

    def parts(self, shape: tuple[int, ...]) -> int:
        parts = self._parts.get(len(self.norms), 1)
        self.norms.append(len(self.requests))
        return parts

    def outside(self, result: Tensor) -> None:
        size = result.untyped_storage().nbytes()
        self._outside += size
        self.most_outside = max(self.most_outside, self._outside)
        weakref.finalize(result.untyped_storage(), self._left, size)

    def _left(self, size: int) -> None:
        self._outside -= size

    def _note(self, t: Tensor, is_map: bool) -> Tensor:
        request = Request(tuple(t.shape), t.dtype, is_map, birth=len(self.requests))
        self.requests.append(request)
        # The storage, not the tensor: a view may outlive the tensor that it was taken of.
        weakref.finalize(t.untyped_storage(), self._end, request)
        return t

    def _end(self, request: Request) -> None:
        request.death = len(self.requests)


class Arena:
    """One allocation that serves a plan's requests; call `start` before each run."""

    dry = False

    def __init__(self, plan: Plan, device: torch.device):
        self.plan = plan
        self.storage = torch.empty(plan.size, dtype=torch.uint8, device=device)
        self._views = [self._view(r) for r in plan.requests]
        self._next = self._norm = 0

    def _view(self, r: Request) -> Tensor:
        flat = self.storage[r.offset : r.offset + math.prod(r.shape) * r.dtype.itemsize].view(r.dtype)
        if not r.is_map:
            return flat.view(r.shape)
        n, c, h, w = r.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)

    def start(self) -> None:
        self._next = self._norm = 0

    def map(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._serve(shape, dtype)

    def floats(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return self._serve(shape, torch.float32)

    def parts(self, shape: tuple[int, ...]) -> int:
        self._norm += 1
        return self.plan.parts.get(self._norm - 1, 1)

    def outside(self, result: Tensor) -> None:
        pass

    def _serve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._next >= len(self._views):
            raise RuntimeError(f"the plan has {len(self._views)} results and another was asked for; call start()")
        view = self._views[self._next]
        if view.shape != shape or view.dtype != dtype:
            raise RuntimeError(
                f"result {self._next} was planned as {view.dtype} {list(view.shape)}; asked for was {dtype} "
                f"{list(shape)}; plan again after a change of the network"
            )
        self._next += 1
        return view
