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
from typing import Any, Protocol

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: more than any vector load or descriptor asks
LEAST_PIXELS = 4096  # of a third part and more; below, a convolution leaves a large GPU idle
MANY_PIXELS = 1 << 17  # of a part; from here on it takes long enough for its launches to be free
MOST_LAUNCHES = 4  # more, for parts smaller than that
MOST_PARTS = 8  # the memory of one part is little by then
ENOUGH = 0.8  # of the arena without parts; no launch is spent on saving more
WORTH = 0.98  # a split must bring the arena below this share of what it was


class Memory(Protocol):
    """Who gives a set of operations the memory of its results."""

    dry: bool  # shapes alone: nothing is launched

    def map(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A feature map [N, C, H, W] in channels_last memory, not initialised."""

    def floats(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Contiguous float32: statistics, workspaces."""

    def parts(self, shape: tuple[int, ...]) -> int:
        """In how many parts the next norm_act, with a result of ``shape``, is to be made and read; see parts.py."""

    def again(self, made: Tensor) -> bool:
        """Whether ``made`` is to be forgotten between its first uses and its last, and made anew for that."""

    def replaced(self, old: Tensor, new: Tensor) -> None:
        """Note that ``new`` was written part by part, each after that part of ``old`` had been read for the last time.

        So ``new`` may lie where ``old`` does, if nobody holds ``old`` when the next request comes.
        """

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

    def again(self, made: Tensor) -> bool:
        return False

    def replaced(self, old: Tensor, new: Tensor) -> None:
        pass

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
    successor: Request | None = None  # takes its place when it dies

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
    again: bool = False  # what can be made anew for its last use is not kept until then

    @property
    def largest(self) -> int:
        """The most bytes alive at one moment: what no arrangement could be smaller than."""
        return max((_alive(self.requests, i) for i in range(len(self.requests))), default=0)


def plan(
    run: Callable[[Memory], object],  # the network, on a set that asks the given memory
    most_launches: int = MOST_LAUNCHES,
) -> Plan:
    """Places for all results of ``run``.

    Where the normalised map that a convolution reads makes the peak, the two run in parts, if that saves memory. Where
    parts do not bring the arena down to ENOUGH, what can be made anew for its last use is not kept until then: one
    launch, and its traffic. Neither changes a bit. Launches that are felt are at most ``most_launches`` more in all.
    """
    whole = _dry_run(run, {})
    enough = int(ENOUGH * whole.size)
    best = _in_parts(run, whole, enough, most_launches)
    if best.size > enough and most_launches > 0:
        again = _in_parts(run, _dry_run(run, {}, again=True), enough, most_launches - 1)
        if again.size < WORTH * best.size:
            best = again
    return best


def _in_parts(run: Callable[[Memory], object], start: Plan, enough: int, most_launches: int) -> Plan:
    best = now = start
    # Several places may be as high as the peak, so that it falls only when all of them are split.
    while (split := _at_the_peak(now, 0 if best.size <= enough else most_launches)) is not None:
        now = _dry_run(run, {**now.parts, **split}, start.again)
        if now.size < WORTH * best.size:
            best = now
    return best


def _dry_run(run: Callable[[Memory], object], parts: Mapping[int, int], again: bool = False) -> Plan:
    planner = _Planner(parts, again)
    result = run(planner)
    del result
    assert all(r.death > r.birth for r in planner.requests), "something keeps a result of the dry run"
    planner.succeed()
    size = place(planner.requests)
    return Plan(tuple(planner.requests), size, planner.most_outside, tuple(planner.norms), parts, again)


def _at_the_peak(found: Plan, most_launches: int) -> dict[int, int] | None:
    """The largest norm_act result alive at the peak that can be split: its number, and in how many parts."""
    if not found.requests:
        return None
    left = most_launches - sum(_launches(found.requests[found.norms[k]], parts) for k, parts in found.parts.items())
    peak = max(range(len(found.requests)), key=lambda i: _alive(found.requests, i))
    choices = []
    for number, index in enumerate(found.norms):
        request = found.requests[index]
        if number in found.parts or not request.birth <= peak < request.death:
            continue
        n, _, h, w = request.shape
        pixels = n * h * w
        several = min(max(3, pixels // MANY_PIXELS), max(2, pixels // LEAST_PIXELS))
        most = min(MOST_PARTS, several, max(2, n))  # a single image is cut into rows
        paid = [parts for parts in range(2, most + 1) if _launches(request, parts) <= max(0, left)]
        if paid:
            choices.append((request.size, number, paid[-1]))
    return dict([max(choices)[1:]]) if choices else None


def _launches(whole: Request, parts: int) -> int:
    """More launches that are felt, of a norm_act and its convolution in parts. ``whole``: a map of that batch."""
    n, _, h, w = whole.shape
    return 0 if n * h * w // parts >= MANY_PIXELS else 2 * (parts - 1)


def _alive(requests: tuple[Request, ...], moment: int) -> int:
    return sum(r.size for r in requests if r.birth <= moment < r.death)


def place(requests: list[Request]) -> int:
    """Give each request its offset, in the smallest gap that fits; returns the arena's bytes.

    Of several orders to place them in, none always the best, the one with the smallest arena.
    """
    followers = {id(r.successor) for r in requests}
    places = [_Place(r) for r in requests if id(r) not in followers]
    orders: list[Callable[[_Place], Any]] = [
        lambda p: (-p.size, p.birth),
        lambda p: (-p.size, -(p.death - p.birth), p.birth),
        lambda p: (-(p.death - p.birth), -p.size, p.birth),
        lambda p: (-p.size * (p.death - p.birth), p.birth),
        lambda p: (p.birth, -p.size),
    ]
    found = min((_arranged(sorted(places, key=order)) for order in orders), key=lambda pair: pair[0])
    for p, offset in found[1]:
        for r in p.requests:
            r.offset = offset
    return found[0]


class _Place:
    """A request and those that succeed it."""

    def __init__(self, first: Request):
        self.requests = [first]
        while (successor := self.requests[-1].successor) is not None:
            self.requests.append(successor)
        self.size, self.birth, self.death = first.size, first.birth, self.requests[-1].death


def _arranged(places: list[_Place]) -> tuple[int, list[tuple[_Place, int]]]:
    """(bytes, each place with its offset), placed in the given order."""
    placed: list[tuple[_Place, int]] = []
    total = 0
    for p in places:
        beside = sorted((start, start + o.size) for o, start in placed if o.birth < p.death and p.birth < o.death)
        best, end = None, 0
        for start, stop in beside:
            if start - end >= p.size and (best is None or start - end < best[0]):
                best = (start - end, end)
            end = max(end, stop)
        offset = end if best is None else best[1]
        total = max(total, offset + p.size)
        placed.append((p, offset))
    return total, placed


class _Planner:
    """Hands out tensors without memory and notes when each is made and gone."""

    dry = True

    def __init__(self, parts: Mapping[int, int], again: bool):
        self._parts, self._again = parts, again
        self.requests: list[Request] = []
        self.norms: list[int] = []
        self.most_outside = self._outside = 0
        self._living: dict[int, Request] = {}  # by the identity of the storage
        self._replaced: list[tuple[Request, Request, int]] = []  # old, new, and the next request's number then

    def map(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        t = torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
        return self._note(t, is_map=True)

    def floats(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return self._note(torch.empty(shape, dtype=torch.float32, device="meta"), is_map=False)

    def parts(self, shape: tuple[int, ...]) -> int:
        parts = self._parts.get(len(self.norms), 1)
        self.norms.append(len(self.requests))
        return parts

    def again(self, made: Tensor) -> bool:
        return self._again

    def replaced(self, old: Tensor, new: Tensor) -> None:
        pair = [self._living.get(t.untyped_storage()._cdata) for t in (old, new)]
        if pair[0] is not None and pair[1] is not None and pair[0].size == pair[1].size:
            self._replaced.append((pair[0], pair[1], len(self.requests)))

    def succeed(self) -> None:
        """After the run: those that took an older one's place, where nobody held that one any more."""
        for old, new, moment in self._replaced:
            if old.death == moment and old.successor is None:
                old.successor, new.birth = new, moment

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
        identity = t.untyped_storage()._cdata
        self._living[identity] = request
        weakref.finalize(t.untyped_storage(), self._end, request, identity)
        return t

    def _end(self, request: Request, identity: int) -> None:
        request.death = len(self.requests)
        del self._living[identity]


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

    def again(self, made: Tensor) -> bool:
        return self.plan.again

    def replaced(self, old: Tensor, new: Tensor) -> None:
        pass

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
