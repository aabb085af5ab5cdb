"""A profile as a file: JSON, a trace for Perfetto or chrome://tracing, and one page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..images import whole_file
from ..profiling import Call, Profile, Row, limits, step_cost
from ..profiling.nvml import FIELDS, Series
from ..profiling.text import gpu_note

FORMAT = 1  # of the JSON; another number where a name or a meaning changes

COUNTERS = {  # a series' field -> its name and unit in a trace
    "sm_percent": ("SM utilisation", "%"),
    "memory_percent": ("memory utilisation", "%"),
    "sm_mhz": ("SM clock", "MHz"),
    "memory_mhz": ("memory clock", "MHz"),
    "power_w": ("power", "W"),
    "temperature_c": ("temperature", "C"),
    "memory_bytes": ("memory used", "bytes"),
}


def facts(p: Profile) -> dict[str, Any]:
    """Everything that was measured, JSON-ready. Times are seconds, of one step where nothing else is said."""
    flops, moved = step_cost(p)
    before, between, after = p.gaps_s
    return {
        "format": FORMAT,
        "title": p.title,
        "batch": p.batch,
        "dtype": str(p.dtype).removeprefix("torch."),
        "ops": p.ops,
        "chain_steps": p.chain,
        "timed_steps": len(p.steps),
        "step": {
            "plain_s": p.plain_s,
            "instrumented_s": p.timed_s,
            "instrumented_ratio": p.instrumented_ratio,
            "at_work_s": p.work_s,
            "roof_s": p.roof_s,
            "roof_share": p.roof_s / p.work_s,
            "flops": flops,
            "bytes": moved,
            "sum_s": p.step_s,
            "other_s": p.other_s,
            "before_first_s": before,
            "between_s": between,
            "after_last_s": after,
        },
        "images_per_s": p.images_per_s,
        "extrapolated": True,
        "limits": limits(p),
        "rows": [row_facts(row) for row in p.rows],
        "kinds": [asdict(kind) for kind in p.kinds()],
        "calls": [_call_facts(call) for call in p.calls],
        "roofs": {dtype: r.facts() for dtype, r in p.roofs.items()},
        "run": None if p.run is None else {"graph": p.run.graph, "steps": p.run.steps, "seconds": p.run.seconds},
        "gpus": [gpu_facts(p, gpu) for gpu in p.gpus],
        "gpu_note": None if p.gpus else gpu_note(p),
        "environment": dict(p.environment),
        "notes": [*([] if p.busy is None else [p.busy]), *p.notes],
    }


def row_facts(row: Row) -> dict[str, Any]:
    line = row.line
    return {
        "operation": line.operation,
        "in": line.input,
        "out": line.output,
        "detail": line.detail,
        "dtype": str(line.dtype).removeprefix("torch."),
        "layers": list(row.layers),
        "calls": row.calls,
        "seconds": row.seconds,
        "share": row.share,
        "flops": row.flops,
        "bytes": row.bytes,
        "flops_per_s": row.flops_per_s,
        "bytes_per_s": row.bytes_per_s,
        "bound": row.bound,
        "roof_s": row.roof_s,
        "roof_share": row.roof_share,
        "gap_s": row.gap_s,
    }


def _call_facts(call: Call) -> dict[str, Any]:
    r = call.record
    cost = {"flops": r.cost.flops, "bytes": r.cost.bytes, "roof_s": call.roof_s, "bound": call.bound}
    return {"operation": r.operation, "layer": call.layer, "detail": r.detail, "seconds": call.seconds, **cost}


def gpu_facts(p: Profile, gpu: Series) -> dict[str, Any]:
    return {
        "device": gpu.device,
        "name": gpu.name,
        "uuid": gpu.uuid,
        "mig": gpu.mig,
        "seconds": gpu.seconds,
        "mean": {name: gpu.mean(name) for name in FIELDS if name != "throttle"},
        "maximum": {name: gpu.maximum(name) for name in FIELDS if name != "throttle"},
        "energy_j": gpu.energy_j,
        "energy_source": gpu.energy_source,
        "joules_per_image": p.joules_per_image(gpu),
        "idle_gaps_s": [list(gap) for gap in gpu.idle_gaps()],
        "throttled": gpu.throttled(),
        "missing": dict(gpu.missing),
        "lost": gpu.lost,
        "notes": list(gpu.notes),
        "samples": [asdict(sample) for sample in gpu.samples],
    }


def trace(p: Profile) -> dict[str, Any]:
    """The timed steps in the trace-event format, operations within steps, and NVML's series as counters.

    Microseconds from the first event. What ran between the timed steps, such as those without instruments, is not
    in it.
    """
    starts = [step.began for step in p.steps] + ([] if p.run is None else [p.run.began])
    zero = min(starts)
    events: list[dict[str, Any]] = [
        _name("process_name", 1, 0, "ddpm-fast profile"),
        _name("thread_name", 1, 1, "timed steps"),
    ]
    for i, step in enumerate(p.steps):
        at = (step.began - zero) * 1e6
        events.append(_complete(f"step {i + 1}", "step", 1, at, step.seconds, {}))
        for call, (begin, end) in zip(p.calls, step.calls):
            r = call.record
            args: dict[str, Any] = {"layer": call.layer, "detail": r.detail, "out": list(r.out), "dtype": str(r.dtype)}
            args |= {"flops": r.cost.flops, "bytes": r.cost.bytes, "roof_us": call.roof_s * 1e6, "bound": call.bound}
            events.append(_complete(r.operation, "operation", 1, at + begin * 1e6, end - begin, args))
    if p.run is not None:
        at = (p.run.began - zero) * 1e6
        events.append(_name("thread_name", 1, 2, "the sampler at work"))
        about = {"steps": p.run.steps, "graph": p.run.graph}
        events.append(_complete("sampling", "run", 2, at, p.run.seconds, about))
        for number, gpu in enumerate(p.run.gpus):
            pid = 2 + number
            events.append(_name("process_name", pid, 0, f"{gpu.device} {gpu.name} (NVML)"))
            for name, (title, unit) in COUNTERS.items():
                for t, value in gpu.values(name):
                    events.append(
                        {"ph": "C", "pid": pid, "tid": 0, "ts": at + t * 1e6, "name": title, "args": {unit: value}}
                    )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": _flat(p.environment)}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "name": kind, "args": {"name": name}}


def _complete(
    name: str, category: str, tid: int, at_us: float, seconds: float, args: Mapping[str, Any]
) -> dict[str, Any]:
    event: dict[str, Any] = {
        "ph": "X",
        "pid": 1,
        "tid": tid,
        "ts": at_us,
        "dur": seconds * 1e6,
        "name": name,
        "cat": category,
    }
    return {**event, "args": dict(args)}


def _flat(environment: Mapping[str, Any]) -> dict[str, str]:
    """Viewers show text only."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in environment.items()}


def write_json(path: str | Path, p: Profile) -> None:
    _write(path, json.dumps(facts(p), indent=1) + "\n")


def write_trace(path: str | Path, p: Profile) -> None:
    _write(path, json.dumps(trace(p)))


def write_html(path: str | Path, p: Profile) -> None:
    from .page import page

    _write(path, page(p))


def _write(path: str | Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())
