"""Several processes as one: who I am among those that torchrun started, and how they agree.

``World()`` is a process alone: it agrees with itself at once. Messages between hosts (settings, errors, votes) go over
gloo whatever carries the gradients, so that none of them waits for a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .meeting import fresh_store

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # how long one process may be busy alone (drawing samples, say) while others wait


class OtherProcessFailed(RuntimeError):
    """Another process raised an error, there; this one only stops with it."""


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int = 0  # of all processes
    size: int = 1
    local_rank: int = 0  # of those on this machine
    group: Any = None  # for messages between hosts; None where a process is alone

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes, reports and shows progress."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's contiguous part of ``count`` things; parts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.group is not None:
            dist.barrier(self.group)

    def gather(self, value: T) -> list[T]:
        """Every process's (small, picklable) value, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process."""
        if self.group is None:
            return flag
        vote = torch.tensor([int(flag)], dtype=torch.int32)
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self.group)
        return bool(vote)

    def sum(self, value: float) -> float:
        """The sum over all processes, in float64."""
        if self.group is None:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return float(total)

    def share(self, value: T) -> T:
        """Rank 0's value on every process: plain values, dicts and lists, with CPU tensors sent one by one."""
        if self.group is None:
            return value
        tensors: list[Tensor] = []
        note: list[Any] = [_without_tensors(value, tensors) if self.first else None]
        source = dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(note, source, group=self.group)
        if not self.first:
            filled = _with_tensors(note[0], tensors)
        for tensor in tensors:
            dist.broadcast(tensor, source, group=self.group)
        return value if self.first else filled

    def together(self, work: Callable[[], T]) -> T:
        """``work`` on every process. If it fails anywhere, the lowest rank that failed raises its own error and
        every other one OtherProcessFailed: one complaint, and nobody waits for the dead."""
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        messages = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed and error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise OtherProcessFailed(f"process {failed[0]} of {self.size} failed: {messages[failed[0]]}") from error
        return result  # type: ignore[return-value]

    def on_first(self, work: Callable[[], T]) -> T:
        """``work`` on rank 0 alone; its result, or OtherProcessFailed, everywhere else."""
        result: Any = self.together(lambda: work() if self.first else None)
        return self.share(result)


def of_environment(environment: Mapping[str, str] | None = None) -> World:
    """What torchrun says in the environment; alone without it. Opens no connection."""
    names = os.environ if environment is None else environment
    if "RANK" not in names or "WORLD_SIZE" not in names:
        return World()
    rank = int(names["RANK"])
    return World(rank, int(names["WORLD_SIZE"]), int(names.get("LOCAL_RANK", rank)))


def own_device(device: torch.device, world: World) -> torch.device:
    """``device`` for this process: "cuda" without a number is the GPU of its local rank.

    Raises ValueError if there are fewer GPUs than processes on this machine.
    """
    if device.type != "cuda" or device.index is not None or world.size == 1:
        return device
    count = torch.cuda.device_count()
    if count == 1:  # each process is shown its own
        return torch.device("cuda", 0)
    if world.local_rank >= count:
        raise ValueError(
            f"each process needs a GPU of its own; torch sees {count} here and this is local process "
            f"{world.local_rank}; start torchrun with --nproc-per-node={count}, or --device cpu"
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def join(device: torch.device | str = "cpu") -> Iterator[World]:
    """The world of this process, connected: of a process group that exists already, or one by torchrun's
    environment, which is left at the end; alone without either. nccl carries CUDA tensors, gloo those of a CPU."""
    if not dist.is_available():
        yield World()
        return
    here = of_environment()
    own = not dist.is_initialized()
    if own and here.size == 1:
        yield here
        return
    device = torch.device(device)
    if own:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, size = fresh_store(PATIENCE)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    group = None
    try:
        if dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
        world = World(dist.get_rank(), dist.get_world_size(), here.local_rank, group)
        yield world
        world.barrier()  # torchrun ends the others when one ends badly: not while rank 0 still writes
    finally:
        if own:
            dist.destroy_process_group()
        elif group is not None:
            dist.destroy_process_group(group)


@dataclass(frozen=True)
class _Sent:
    """Stands for a tensor in what is pickled."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _without_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return _Sent(tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _without_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_tensors(item, tensors) for item in value]
    return value


def _with_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` with empty tensors in their places, which are listed in the order they were sent."""
    if isinstance(value, _Sent):
        tensors.append(torch.empty(value.shape, dtype=value.dtype))
        return tensors[-1]
    if isinstance(value, dict):
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value
