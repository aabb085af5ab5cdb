"""Where a sampling step's time goes: each operation's time beside the least that this device's roofs allow.

    found = profile(model, schedule, batch_size=4, dtype=torch.bfloat16)
    print(profile_text(found))                  # text.py; pages, JSON and traces: report/

An operation's FLOPs and bytes are those of kernels/cost.py in its "fused" form, whatever set computes it: what no
implementation can avoid. So its roof is the same for every set, and one that moves more shows it in its time. A set
may come above a roof: where data stays in a cache, or where Winograd's products are fewer than those counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..benchmarking.environment import environment
from ..kernels.cost import total
from ..ops.records import Record
from ..planning import Line, group
from ..roofline import Roofs, roofs
from ..sampler import Sampler
from ..schedule import Schedule
from ..stages import stage
from ..unet import UNet
from .nvml import Series, Watch
from .probe import Clock, Probe, Step, clock_for
from .run import Run, measure, watched_run, with_ops

STEPS = 20
WATCH_S = 4.0  # NVML's averages are over up to a second
BUSY = 0.9  # a sum of medians below this share of the median of sums is worth a note


@dataclass(frozen=True)
class Call:
    """One call of a step. ``seconds``: the median over steps."""

    record: Record
    layer: str
    seconds: float
    roof_s: float  # the least time at the roofs
    bound: str  # by which: "compute" or "memory"


@dataclass(frozen=True)
class Row:
    """Equal calls of a step, all together: one operation, shape and kind."""

    line: Line
    layers: tuple[str, ...]
    seconds: float
    roof_s: float
    bound: str
    share: float  # of the step

    @property
    def calls(self) -> int:
        return self.line.count

    @property
    def flops(self) -> int:
        return self.line.count * self.line.cost.flops

    @property
    def bytes(self) -> int:
        return self.line.count * self.line.cost.bytes

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0

    @property
    def roof_share(self) -> float:
        """1 at the roof."""
        return self.roof_s / self.seconds if self.seconds else 0.0

    @property
    def gap_s(self) -> float:
        """Time above the roof; negative where the operation is above it."""
        return self.seconds - self.roof_s


@dataclass(frozen=True)
class Kind:
    """All calls of an operation, of any shape."""

    operation: str
    calls: int
    seconds: float
    roof_s: float
    share: float


@dataclass(frozen=True)
class Profile:
    """What `profile` measured. Seconds are of one step unless they say otherwise."""

    title: str
    batch: int
    dtype: torch.dtype
    ops: str
    chain: int  # steps of a whole trajectory
    steps: tuple[Step, ...]  # timed, call by call
    calls: tuple[Call, ...]
    rows: tuple[Row, ...]  # largest gap first
    gaps_s: tuple[float, float, float]  # in no operation: before the first, between them, after the last
    plain_s: float  # a step without instruments
    run: Run | None  # the sampler at work, on a GPU
    roofs: Mapping[str, Roofs]  # by dtype
    environment: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def other_s(self) -> float:
        """In no operation: Python, time rows, noise from the host; on a GPU, what it waits between launches."""
        return sum(self.gaps_s)

    @property
    def step_s(self) -> float:
        """The sum of all rows and `other_s`, each a median of its own: what shares are of."""
        return sum(c.seconds for c in self.calls) + self.other_s

    @property
    def timed_s(self) -> float:
        """A step while it was timed call by call."""
        return statistics.median(step.seconds for step in self.steps)

    @property
    def instrumented_ratio(self) -> float:
        """The timed step over the plain one: what looking cost."""
        return self.timed_s / self.plain_s

    @property
    def roof_s(self) -> float:
        """A step with each call at its roof and nothing between them."""
        return sum(c.roof_s for c in self.calls)

    @property
    def work_s(self) -> float:
        """A step as the sampler is used."""
        return self.plain_s if self.run is None else self.run.seconds / self.run.steps

    @property
    def images_per_s(self) -> float:
        """Over a whole trajectory, extrapolated from the timed steps."""
        return self.batch / (self.work_s * self.chain)

    @property
    def busy(self) -> str | None:
        """What a reader of the step's time must know where the parts do not add up to it."""
        if self.step_s >= BUSY * self.timed_s:
            return None
        return (
            f"the medians of a step's parts sum to {self.step_s / self.timed_s:.0%} of the median step: other work had "
            "this device at times, and the parts are nearer to what they take alone"
        )

    @property
    def gpus(self) -> tuple[Series, ...]:
        return () if self.run is None else self.run.gpus

    def joules_per_image(self, gpu: Series) -> float | None:
        """Energy of a whole trajectory over its images, extrapolated from the watched steps."""
        if gpu.energy_j is None or self.run is None or gpu.lost is not None:
            return None
        return gpu.energy_j / self.run.steps * self.chain / self.batch

    def kinds(self) -> list[Kind]:
        """By operation, longest first."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.line.operation, []).append(row)
        kinds = [
            Kind(
                operation,
                sum(r.calls for r in rows),
                sum(r.seconds for r in rows),
                sum(r.roof_s for r in rows),
                sum(r.share for r in rows),
            )
            for operation, rows in found.items()
        ]
        return sorted(kinds, key=lambda k: -k.seconds)


def profile(
    model: UNet | Callable[..., Any],  # one that is not a UNet is timed as a whole, as one operation
    schedule: Schedule,
    *,
    batch_size: int = 4,
    steps: int | None = None,  # timed, of the whole chain; None: STEPS, or all where there are fewer
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str | None = None,
    ops: Any = "auto",  # as `Sampler` takes it
    graph: str = "auto",  # of the run that a GPU is watched in; operations are timed eagerly
    seconds: float = WATCH_S,  # of that run, at least
    image_shape: tuple[int, int, int] | None = None,  # (C, H, W), where the model does not state it
    title: str = "",
    command: Sequence[str] | None = None,
    find_roofs: Callable[[torch.device, torch.dtype], Roofs] = roofs,
    clock: Clock | None = None,
) -> Profile:
    """Run the sampler for some steps and time every operation. ValueError for what does not fit together."""
    sampler = Sampler(
        model, schedule, batch_size, dtype=dtype, device=device, ops=ops, graph=graph, image_shape=image_shape
    )
    chain, where, dtype = len(sampler.table), sampler.device, sampler.dtype
    steps = min(STEPS, chain) if steps is None else steps
    if not 1 <= steps <= chain:
        raise ValueError(f"steps must be in 1..{chain}, the steps of the chain; got {steps}")
    labels = _labels(model, batch_size)
    with stage(f"timing {steps} step{'s' * (steps != 1)} of {batch_size} image{'s' * (batch_size != 1)}"):
        probe, plain = measure(with_ops(sampler, sampler.ops), steps, clock or clock_for(where), labels)
    needed = {dtype} | {r.dtype for r in probe.records if r.cost.flops}
    found = {_name(d): find_roofs(where, d) for d in needed}
    calls = _calls(probe, found, _name(dtype))
    run = None
    if where.type == "cuda":
        with stage(f"watching the GPU at work for {seconds:g} s"):
            run = watched_run(sampler, graph, seconds, labels, Watch([where]), lambda: torch.cuda.synchronize(where))
    before, between, after = (statistics.median(gap) for gap in zip(*(step.gaps for step in probe.steps)))
    p = Profile(
        title=title,
        batch=batch_size,
        dtype=dtype,
        ops=sampler.ops.name,
        chain=chain,
        steps=tuple(probe.steps),
        calls=tuple(calls),
        rows=tuple(_rows(calls, sum(c.seconds for c in calls) + before + between + after)),
        gaps_s=(before, between, after),
        plain_s=statistics.median(plain),
        run=run,
        roofs=found,
        environment=environment(where, command),
    )
    return replace(p, notes=tuple(_notes(p)))


def _labels(model: Any, n: int) -> torch.Tensor | int | None:
    """Any: time does not depend on the class."""
    if not isinstance(model, UNet) or model.class_embedding is None:
        return None
    return torch.zeros(n, model.config.time_width) if model.config.class_embed_type == "identity" else 0


def _calls(probe: Probe, found: Mapping[str, Roofs], network: str) -> list[Call]:
    times = zip(*(step.calls for step in probe.steps))
    medians = [statistics.median(end - begin for begin, end in each) for each in times]
    calls = []
    for record, layer, seconds in zip(probe.records, probe.layers, medians):
        at = found.get(_name(record.dtype), found[network])
        # A whole model is priced as what a U-Net mostly is.
        compute = record.cost.flops / at.flops_per_s("conv" if record.operation == "model" else record.operation)
        memory = record.cost.bytes / at.copy_bytes_per_s
        bound = "compute" if compute > memory else "memory"
        calls.append(Call(record, layer, seconds, max(compute, memory), bound))
    return calls


def _rows(calls: Sequence[Call], step_s: float) -> list[Row]:
    """Equal calls joined, largest gap first."""
    lines = group([call.record for call in calls])
    equal: dict[Line, list[Call]] = {}
    for call in calls:
        equal.setdefault(group([call.record])[0], []).append(call)
    rows = []
    for line, members in zip(lines, equal.values()):
        seconds = sum(c.seconds for c in members)
        layers = tuple(c.layer for c in members if c.layer)
        roof_s = sum(c.roof_s for c in members)
        rows.append(Row(line, layers, seconds, roof_s, members[0].bound, seconds / step_s))
    return sorted(rows, key=lambda r: -r.gap_s)


def _notes(p: Profile) -> list[str]:
    notes = []
    whole = next((c.record.detail for c in p.calls if c.record.operation == "model"), None)
    if whole is not None:
        notes.append(
            f"{whole} is a network of another code base, on torch's own operations: it is timed and priced as one call"
        )
    above = sum(c.seconds < c.roof_s for c in p.calls)
    if above:
        notes.append(
            f"{above} of {len(p.calls)} calls are above a roof: their data stayed in a cache, which is faster than "
            "memory, or they do fewer products than are counted"
        )
    return notes


def limits(p: Profile) -> list[str]:
    """What holds a step back, one sentence each, the largest loss first."""
    found: list[tuple[float, str]] = []
    for kind in p.kinds():
        lost = max(0.0, kind.seconds - kind.roof_s)
        found.append(
            (
                lost,
                f"{kind.operation} takes {kind.share:.0%} of the step, at {kind.roof_s / kind.seconds:.0%} of its roof",
            )
        )
    before, between, after = p.gaps_s
    parts = f"{before / p.step_s:.0%} before the first, {between / p.step_s:.0%} between, {after / p.step_s:.0%} after"
    found.append((p.other_s, f"no operation runs for {p.other_s / p.step_s:.0%} of the step ({parts})"))
    found.sort(key=lambda f: -f[0])
    lost_s = sum(lost for lost, _ in found) or 1.0
    return [f"{text}: {lost / lost_s:.0%} of what is lost" for lost, text in found]


def step_cost(p: Profile) -> tuple[int, int]:
    """FLOPs and bytes of a step."""
    whole = total([c.record.cost for c in p.calls])
    return whole.flops, whole.bytes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
