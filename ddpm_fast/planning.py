"""What a sampling step will cost, before anything runs: every launch from shapes, against a GPU's roofs.

The network is walked on the ``meta`` device and priced by kernels/cost.py. Times are predictions and lower
bounds: the larger of FLOPs and bytes over a datasheet's rates, launch by launch. No kernel reaches a roof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from . import ops as ops_module
from .arguments import dtype_called
from .config import UNetConfig
from .engine.prepared import prepare
from .engine.time_rows import ClassRows, TableRows
from .gpus import Gpu, gpu
from .inspection import model_cost
from .kernels import reference
from .kernels.cost import CHANNEL_PAD, Cost, total
from .ops import Ops
from .ops.records import Record
from .schedule import Schedule
from .stages import stage
from .step_table import StepTable, step_table
from .unet import TimeRows, UNet

CONVOLUTIONS = ("conv", "upsample_conv", "conv_step")
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Line:
    """Equal launches of one operation, shape and kind; the cost is of one of them."""

    count: int
    operation: str
    input: str
    output: str
    detail: str
    dtype: torch.dtype
    cost: Cost

    def seconds(self, on: Gpu) -> float:
        """Of one launch, at the roofs."""
        return self.cost.seconds(on.flops_per_s(self.dtype.itemsize), on.bytes_per_s)

    def bound(self, on: Gpu) -> str:
        compute = self.cost.flops / on.flops_per_s(self.dtype.itemsize)
        return "compute" if compute > self.cost.bytes / on.bytes_per_s else "memory"


@dataclass(frozen=True)
class Totals:
    """Of one step."""

    launches: int
    flops: int
    bytes: int
    seconds: float  # at the roofs, launch by launch
    convolution_share: float  # of the time; attention's 1x1 products count, they are the same kernel


@dataclass(frozen=True)
class Plan:
    """A step of one network and batch on one GPU, predicted."""

    config: UNetConfig
    batch: int
    dtype: torch.dtype
    gpu: Gpu
    steps: int
    records: tuple[Record, ...]  # every launch, in order
    fused: Totals
    eager: Totals  # what diffusers' UNet2DModel and a plain loop move op by op, at least
    memory: dict[str, int]  # bytes: weights, activations, tables
    notes: tuple[str, ...] = ()

    @property
    def lines(self) -> list[Line]:
        return group(self.records)

    @property
    def images_per_s(self) -> float:
        """At most: nothing but the steps' launches, each at its roof."""
        return self.batch / (self.fused.seconds * self.steps)


@stage("planning a step")
def plan(
    config: UNetConfig,
    schedule: Schedule,
    batch: int = 256,
    on: str | Gpu = "h100",
    dtype: torch.dtype | str = torch.bfloat16,
    steps: int | None = None,  # of the chain; None: all of them
) -> Plan:
    """The plan of one step of ``config``'s network with the fused operations. ValueError for what does not fit."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1; got {batch}")
    dtype = dtype_called(dtype)
    if not isinstance(config, UNetConfig):
        raise ValueError(
            "plan prices the launches of our own U-Net; a network of another code base runs on torch's operations: "
            "ddpm-fast profile times it"
        )
    if config.image_size is None:
        raise ValueError("the model does not state its image size; give it as sample_size")
    target = gpu(on) if isinstance(on, str) else on
    table = step_table(schedule, steps)
    memory, parts, again, note = _memory(config, table, batch, dtype)
    step = config, table, batch, dtype
    fused, eager = records(*step, parts=parts, again=again), records(*step, form="plain")
    notes = [note] if note else []
    notes += [f"{count} x {why}, so on torch's operations" for why, count in _fallbacks(config, table, dtype).items()]
    if parts or again:
        more = total([r.cost for r in fused]).launches - total([r.cost for r in records(*step)]).launches
        notes.append(f"to save memory, {_savings(batch, parts, again)} ({more} launches more)")
    if sum(memory.values()) > target.memory_bytes:
        notes.append(f"needs more memory than a {target.name} has")
    return Plan(
        config,
        batch,
        dtype,
        target,
        len(table),
        tuple(fused),
        totals(fused, target),
        totals(eager, target),
        memory,
        tuple(notes),
    )


def _savings(batch: int, parts: Mapping[int, int], again: bool) -> str:
    """What the arena's plan changes in the order of launches, in words."""
    ways = ["conv_in runs a second time, for its last use"] if again else []
    if parts:
        of = "the batch" if batch > 1 else "the rows"
        which = ", ".join(f"norm_act {number + 1} in {p}" for number, p in parts.items())
        ways.append(f"with what reads it, in parts of {of}: {which}")
    return "; ".join(ways)


def records(
    config: UNetConfig,
    table: StepTable,
    batch: int,
    dtype: torch.dtype,
    form: str = "fused",  # or "plain"
    parts: Mapping[int, int] | None = None,  # norm_act number -> parts that it runs in, with what reads it
    again: bool = False,  # the first convolution runs twice
) -> list[Record]:
    """Every launch of one step: the time rows, the network, the sampler step.

    Fused: as `StepProgram.step` makes them of a prepared copy. Plain: of the network as it is, op by op.
    """
    if form == "plain":
        return _walk(_ghost(config, dtype), table, batch, form)
    stand_in = _stand_in()
    if again:
        stand_in = replace(stand_in, lay_by=lambda x, make: make)
    return _walk(prepare(_ghost(config, dtype), dtype, "meta", stand_in), table, batch, form, parts)


def _ghost(config: UNetConfig, dtype: torch.dtype) -> UNet:
    with torch.device("meta"):
        return UNet(config).eval().to(dtype)


def _stand_in() -> Ops:
    """Reference operations that take and refuse what the fused ones do: pricing needs no Triton."""
    from .ops.triton_set import falls_back

    return replace(ops_module.reference(), conv_step=lambda x, weight, bias, x_t, *_, **__: x_t, falls_back=falls_back)


@torch.inference_mode()
def _walk(model: UNet, table: StepTable, n: int, form: str, parts: Mapping[int, int] | None = None) -> list[Record]:
    config = model.config
    assert config.image_size is not None
    ops, log = ops_module.recording(model.ops or ops_module.reference(), form, parts)
    channels, size = config.in_channels, config.image_size
    with torch.device("meta"):
        x, counter = torch.empty(n, channels, *size), torch.empty(2, dtype=torch.int32)
        low = torch.empty(n, max(channels, CHANNEL_PAD), *size, dtype=model.dtype)
        ids, seed = torch.empty(n, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        rows = torch.empty(len(table), reference.TABLE_WIDTH)
    times = table.times().to("meta")
    if form == "plain":  # one projection an image and block, priced where it is added
        width = sum(block.time_emb_proj.out_features for block in model.residual_blocks())
        time = TimeRows(table=torch.empty(n, width, device="meta"), t=times[:1])
    elif model.class_embedding is None:
        time = TableRows(model, times, counter).now(ops)
    else:
        time = ClassRows(model, times, counter, n).now(ops)
        log.append(_time_record(model, n))
    h = model.features(low[:, :channels], time, ops)
    step = {"variance": table.variance, "low": low}
    conv = model.conv_out
    if form == "fused" and _ends_in_the_step(config, table):
        assert ops.conv_step is not None
        ops.conv_step(h, conv.weight, conv.bias, x, rows, counter, seed, ids, **step)
    else:
        out = ops.conv(h, conv.weight, conv.bias)
        ops.sampler_step(x, out, rows, counter, seed, ids, thresholding=table.thresholding, **step)
    return log


def _ends_in_the_step(config: UNetConfig, table: StepTable) -> bool:
    """Whether the engine runs conv_out and the sampler step as one launch."""
    return (
        config.out_channels in (config.in_channels, 2 * config.in_channels)
        and config.ends_in_conv_out
        and table.thresholding is None
    )


def _time_record(model: UNet, n: int) -> Record:
    """A class-conditional step's own time rows, beside their projection: two look-ups, addition, activation, split."""
    width = model.config.time_width
    rows = sum(block.time_emb_proj.out_features for block in model.residual_blocks())
    read = _FLOAT * (2 * width + width + 2 * n * width + n * rows)
    written = _FLOAT * (width + 2 * n * width + n * rows)
    shape = (n, width, 1, 1)
    cost = Cost(0, read, written, 5)
    return Record("time_rows", (("x", shape), ("out", (n, rows, 1, 1))), torch.float32, "5 launches", cost)


def _memory(
    config: UNetConfig, table: StepTable, batch: int, dtype: torch.dtype
) -> tuple[dict[str, int], Mapping[int, int], bool, str]:
    """Bytes that the engine holds, which normalisations its arena runs in parts, whether conv_in runs again; a note."""
    from .engine import StepProgram

    assert config.image_size is not None
    try:
        fused = ops_module.triton()
    except RuntimeError:
        cost = model_cost(_ghost(config, dtype), *config.image_size, batch_size=batch)
        memory = {"weights": cost["parameters"] * dtype.itemsize, "activations": cost["activation_bytes"], "tables": 0}
        return memory, {}, False, "Triton is not installed: memory is that of torch's own operations"
    prepared = prepare(_ghost(config, dtype), dtype, "meta", fused)
    program = StepProgram(prepared, table, batch, (config.in_channels, *config.image_size))
    use = program.memory
    memory = {"weights": use.weights, "activations": use.activations, "tables": use.tables}
    if program.plan is None:
        return memory, {}, False, ""
    return memory, program.plan.parts, program.plan.again, ""


def _fallbacks(config: UNetConfig, table: StepTable, dtype: torch.dtype) -> dict[str, int]:
    """Why calls run on torch's operations, and how many do."""
    stand_in = _stand_in()
    reasons: dict[str, int] = {}

    def noting(operation: str, arguments: Any) -> str | None:
        why = stand_in.falls_back(operation, arguments)
        if why:
            reasons[why] = reasons.get(why, 0) + 1
        return why

    prepared = prepare(_ghost(config, dtype), dtype, "meta", replace(stand_in, falls_back=noting))
    _walk(prepared, table, 1, "fused")
    return reasons


def group(log: Sequence[Record]) -> list[Line]:
    """Equal launches joined, in the order of their first appearance."""
    counts: dict[Line, int] = {}
    for r in log:
        line = _line(r)
        counts[line] = counts.get(line, 0) + 1
    return [replace(line, count=n) for line, n in counts.items()]


def _line(r: Record) -> Line:
    inputs = " ".join(f"{'' if name == 'x' else name + ' '}{_size(shape)}" for name, shape in r.shapes[:-1])
    return Line(1, r.operation, inputs, _size(r.out), r.detail, r.dtype, r.cost)


def _size(shape: Sequence[int]) -> str:
    _, c, h, w = shape
    return f"{c}x{h}x{w}"


def totals(log: Sequence[Record], on: Gpu) -> Totals:
    """The sum of launches, each at its own roof."""
    seconds = [_line(r).seconds(on) for r in log]
    whole = total([r.cost for r in log])
    convolution = sum(s for s, r in zip(seconds, log) if r.operation in CONVOLUTIONS)
    return Totals(whole.launches, whole.flops, whole.bytes, sum(seconds), convolution / sum(seconds))


HEADER = ("n", "operation", "in (C x H x W)", "out", "with", "GFLOP", "MB", "us", "roof", "n x us", "share")


def rows(lines: Sequence[Line], on: Gpu, whole: float) -> list[tuple[str, ...]]:
    """The cells of the table under HEADER; GFLOP, MB and us are of one launch. ``whole``: seconds of the step."""
    table: list[tuple[str, ...]] = []
    for line in lines:
        c, seconds = line.cost, line.seconds(on)
        what = (str(line.count), line.operation, line.input, line.output, line.detail)
        price = (f"{c.flops / 1e9:.1f}", f"{c.bytes / 1e6:.1f}", f"{seconds * 1e6:.1f}", line.bound(on))
        together = line.count * seconds
        table.append((*what, *price, f"{together * 1e6:.1f}", f"{100 * together / whole:.1f}%"))
    return table


def aligned(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table)


def plan_text(p: Plan, title: str, every: bool = False) -> str:
    """The plan for a person. every: each launch in order, not grouped."""
    f, e = p.fused, p.eager
    dtype, mib = str(p.dtype).removeprefix("torch."), {k: v / 2**20 for k, v in p.memory.items()}
    lines = [_line(r) for r in p.records] if every else p.lines
    text = [
        f"{title}, batch {p.batch}, {dtype}, {p.steps} steps, on one {p.gpu.name}",
        f"predicted from shapes and the roofs of the {p.gpu.source}; nothing ran, and no kernel reaches a roof",
        "",
        aligned(
            [
                ("a step", "launches", "GB", "GFLOP", "ms at the roofs"),
                ("fused", str(f.launches), f"{f.bytes / 1e9:.2f}", f"{f.flops / 1e9:.1f}", f"{f.seconds * 1e3:.3f}"),
                ("eager", str(e.launches), f"{e.bytes / 1e9:.2f}", f"{e.flops / 1e9:.1f}", f"{e.seconds * 1e3:.3f}"),
            ]
        ),
        f"fused moves {100 * f.bytes / e.bytes:.1f}% of the bytes and does {100 * (1 - f.flops / e.flops):.1f}% fewer "
        "FLOPs; eager is diffusers' network op by op, at least",
        f"images/s      at most {p.images_per_s:.2f}; one batch takes at least {f.seconds * p.steps:.2f} s",
        f"memory        {sum(mib.values()):.0f} MiB of {p.gpu.memory_bytes / 2**20:.0f}: weights {mib['weights']:.0f}, "
        f"activations {mib['activations']:.0f}, tables {mib['tables']:.0f}",
        *(f"note          {note}" for note in p.notes),
        "",
        aligned([HEADER, *rows(lines, p.gpu, f.seconds)]),
    ]
    return "\n".join(text)


def plan_facts(p: Plan, title: str, every: bool = False) -> dict[str, Any]:
    """The plan, JSON-ready."""
    lines = [_line(r) for r in p.records] if every else p.lines
    return {
        "model": title,
        "prediction": True,
        "batch": p.batch,
        "dtype": str(p.dtype).removeprefix("torch."),
        "steps": p.steps,
        "gpu": asdict(p.gpu),
        "fused": asdict(p.fused),
        "eager": asdict(p.eager),
        "bytes_share": p.fused.bytes / p.eager.bytes,
        "flops_saved": 1 - p.fused.flops / p.eager.flops,
        "images_per_s_at_most": p.images_per_s,
        "memory_bytes": p.memory,
        "notes": list(p.notes),
        "launches": [
            {
                "count": line.count,
                "operation": line.operation,
                "in": line.input,
                "out": line.output,
                "detail": line.detail,
                **asdict(line.cost),
                "seconds": line.seconds(p.gpu),
                "bound": line.bound(p.gpu),
            }
            for line in lines
        ],
    }
