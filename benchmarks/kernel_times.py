"""Every kernel of one sampling step as the GPU timed it, beside what the plan says that it must move and multiply.

CUPTI's times of kernels, by torch's profiler: without launches and gaps, which at a batch of 1 are longer than most
kernels. `by_launch` lays the kernels of a step over the plan's records, in the order of both.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddpm_fast.ops.records import Record
from ddpm_fast.planning import Line, group
from ddpm_fast.roofline import Roofs

REPEATS = 5
NO_KERNELS = ("Memcpy", "Memset", "Context Sync", "Stream ", "Event ", "Activity Buffer")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step; the median over repeats."""

    name: str
    us: float
    gap_us: float  # since the kernel before it ended, launched by the host


def kernels(step: Callable[[], object], repeats: int = REPEATS) -> list[Kernel]:
    """What ``step`` runs on the GPU, in order. RuntimeError where its repeats do not run the same kernels."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    return of_events(seen.events(), repeats)


def of_events(events: Sequence[Any], repeats: int) -> list[Kernel]:
    """The profiler's events of ``repeats`` equal steps, as the kernels of one."""
    on_gpu = [e for e in events if str(e.device_type).endswith("CUDA") and not e.name.startswith(NO_KERNELS)]
    on_gpu.sort(key=lambda e: e.time_range.start)
    count, rest = divmod(len(on_gpu), repeats)
    steps = [on_gpu[i * count : (i + 1) * count] for i in range(repeats)]
    if rest or any([e.name for e in step] != [e.name for e in steps[0]] for step in steps):
        raise RuntimeError(f"{repeats} equal steps ran {len(on_gpu)} kernels, which are not the same in each")
    found = []
    for i, same in enumerate(zip(*steps)):
        us = statistics.median(e.time_range.end - e.time_range.start for e in same)
        before = [step[i - 1].time_range.end for step in steps] if i else [e.time_range.start for e in same]
        gap = statistics.median(e.time_range.start - end for e, end in zip(same, before))
        found.append(Kernel(same[0].name, float(us), float(gap)))
    return found


def our_names() -> set[str]:
    """Of the kernels in kernels/ that are loaded."""
    loaded = [m for name, m in list(sys.modules.items()) if name.startswith("ddpm_fast.kernels.")]
    return {value.__name__ for m in loaded for value in vars(m).values() if hasattr(value, "arg_names")}


@dataclass(frozen=True)
class Launch:
    """One record of the plan and the kernels that computed it."""

    record: Record
    kernels: tuple[Kernel, ...]

    @property
    def us(self) -> float:
        return sum(k.us for k in self.kernels)


def by_launch(
    records: Sequence[Record], found: Sequence[Kernel], ours: set[str]
) -> tuple[list[Launch], list[Kernel]] | None:
    """Each record with its kernels, and the kernels of none. None where the two do not fit together.

    A record takes as many of our kernels as it says it launches. Attention that torch computes takes all of torch's
    kernels up to our next one. What falls back to torch elsewhere fits nothing.
    """
    left, launches, others = list(found), [], []
    for record in records:
        foreign = next((i for i, k in enumerate(left) if k.name in ours), len(left))
        before, left = left[:foreign], left[foreign:]
        if record.operation == "attention" and before:
            launches.append(Launch(record, tuple(before)))
            continue
        others += before
        taken, left = left[: record.cost.launches], left[record.cost.launches :]
        if len(taken) < record.cost.launches or any(k.name not in ours for k in taken):
            return None
        launches.append(Launch(record, tuple(taken)))
    if any(k.name in ours for k in left):
        return None
    return launches, others + left


def facts(launches: Sequence[Launch], roofs: Roofs) -> list[dict[str, Any]]:
    """Equal launches joined, the largest gap to its roof first. JSON-ready; times are of all of them in a step."""
    lines: dict[Line, list[Launch]] = {}
    for launch in launches:
        lines.setdefault(group([launch.record])[0], []).append(launch)
    rows = []
    for line, same in lines.items():
        cost, us = line.cost, sum(launch.us for launch in same)
        roof_us = 1e6 * len(same) * roofs.seconds(line.operation, cost.flops, cost.bytes)
        compute = cost.flops / roofs.flops_per_s(line.operation) > cost.bytes / roofs.copy_bytes_per_s
        rows.append(
            {
                "count": len(same),
                "operation": line.operation,
                "in": line.input,
                "out": line.output,
                "detail": line.detail,
                "kernels": [k.name for k in same[0].kernels],
                "us": us,
                "roof_us": roof_us,
                "bound": "compute" if compute else "memory",
                "roof_share": roof_us / us if us else 0.0,
                "gap_us": us - roof_us,
                "flops": len(same) * cost.flops,
                "bytes": len(same) * cost.bytes,
            }
        )
    return sorted(rows, key=lambda row: -row["gap_us"])
