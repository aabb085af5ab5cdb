"""Every launch of one sampling step with its FLOPs, bytes and least time, from shapes alone.

    python -m benchmarks.launch_table                      # both models, as text
    python -m benchmarks.launch_table --model cifar10 --batch 1 --markdown

Nothing runs: the network is walked on the ``meta`` device and priced by kernels/cost.py. The times are
predictions, the larger of FLOPs and bytes over a datasheet's roofs, and no kernel reaches a roof.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from ddpm_fast import ops
from ddpm_fast.config import UNetConfig
from ddpm_fast.kernels import reference
from ddpm_fast.kernels.cost import CHANNEL_PAD, Cost, total
from ddpm_fast.presets import PRESETS
from ddpm_fast.recording import Record
from ddpm_fast.unet import TimeRows, UNet

# NVIDIA H100 SXM5: "1,979 teraFLOPS" bfloat16 is with sparsity, so half of it dense; 3.35 TB/s of HBM3.
# Source: NVIDIA H100 Tensor Core GPU datasheet, product specifications, H100 SXM.
H100_FLOPS_PER_S = 1979e12 / 2
H100_BYTES_PER_S = 3.35e12

MODELS = {  # preset, batch, heading
    "cifar10": ("cifar10", 256, "google/ddpm-cifar10-32"),
    "256": ("lsun256", 16, "google/ddpm-*-256"),
}
CONVOLUTIONS = ("conv", "upsample_conv")


@dataclass(frozen=True)
class Line:
    """Launches of one operation, shape and kind; the cost is of one of them."""

    count: int
    operation: str
    input: str
    output: str
    detail: str
    cost: Cost

    @property
    def time_us(self) -> float:
        """Of one launch, at the H100's roofs."""
        return self.cost.seconds(H100_FLOPS_PER_S, H100_BYTES_PER_S) * 1e6

    @property
    def bound(self) -> str:
        compute, traffic = self.cost.flops / H100_FLOPS_PER_S, self.cost.bytes / H100_BYTES_PER_S
        return "compute" if compute > traffic else "memory"


def record_step(preset: str, batch: int, form: str = "fused", dtype: torch.dtype = torch.bfloat16) -> list[Record]:
    """The launches of one step of a preset's network: `UNet.run` with a time table, then the sampler step."""
    p = PRESETS[preset]
    with torch.device("meta"), torch.no_grad():
        model = UNet(UNetConfig(**p.model)).eval().to(dtype)
        channels = model.config.in_channels
        x = torch.empty(batch, channels, p.image_size, p.image_size)
        width = sum(block.time_emb_proj.out_features for block in model.residual_blocks())
        row = torch.empty(1, dtype=torch.int32)
        recorded, log = ops.recording(ops.reference(), form)
        out = model.run(x.to(dtype), TimeRows(table=torch.empty(1000, width), row=row), recorded)
        recorded.sampler_step(
            x,
            out,
            torch.empty(1000, reference.TABLE_WIDTH),
            torch.empty(2, dtype=torch.int32),
            torch.empty(1, dtype=torch.int64),
            torch.empty(batch, dtype=torch.int64),
            low=torch.empty(batch, CHANNEL_PAD, *x.shape[2:], dtype=dtype),
        )
    return log


def group(records: Sequence[Record]) -> list[Line]:
    """Equal launches joined, in the order of their first appearance."""
    counts: dict[Line, int] = {}
    for r in records:
        inputs = " ".join(f"{'' if name == 'x' else name + ' '}{_size(shape)}" for name, shape in r.shapes[:-1])
        line = Line(1, r.operation, inputs, _size(r.out), r.detail, r.cost)
        counts[line] = counts.get(line, 0) + 1
    return [
        Line(n, *(getattr(k, f) for f in ("operation", "input", "output", "detail", "cost"))) for k, n in counts.items()
    ]


def _size(shape: Sequence[int]) -> str:
    _, c, h, w = shape
    return f"{c}x{h}x{w}"


@dataclass(frozen=True)
class Summary:
    launches: int
    gflop: float
    megabytes: float
    time_ms: float
    convolution_share: float  # of the time
    images_per_s: float  # with as many steps as ``steps``
    steps: int = 1000


def summarize(records: Sequence[Record], batch: int, steps: int = 1000) -> Summary:
    """Totals of a step at the H100's roofs. 1x1 products (attention's) count as convolution: the same kernel."""
    seconds = [r.cost.seconds(H100_FLOPS_PER_S, H100_BYTES_PER_S) for r in records]
    convolution = sum(s for s, r in zip(seconds, records) if r.operation in CONVOLUTIONS)
    cost = total([r.cost for r in records])
    return Summary(
        launches=cost.launches,
        gflop=cost.flops / 1e9,
        megabytes=cost.bytes / 1e6,
        time_ms=sum(seconds) * 1e3,
        convolution_share=convolution / sum(seconds),
        images_per_s=batch / (sum(seconds) * steps),
        steps=steps,
    )


def rows(lines: Sequence[Line], whole_us: float) -> list[tuple[str, ...]]:
    """The cells of the table; all but the first two times are of one launch."""
    return [
        (
            str(line.count),
            line.operation,
            line.input,
            line.output,
            line.detail,
            f"{line.cost.flops / 1e9:.1f}",
            f"{line.cost.bytes / 1e6:.1f}",
            f"{line.time_us:.1f}",
            line.bound,
            f"{line.count * line.time_us:.1f}",
            f"{100 * line.count * line.time_us / whole_us:.1f}%",
        )
        for line in lines
    ]


HEADER = ("n", "operation", "in (C x H x W)", "out", "with", "GFLOP", "MB", "us", "roof", "n x us", "share")


def render(table: Sequence[Sequence[str]], markdown: bool) -> str:
    """Aligned text, or a Markdown table."""
    full = [HEADER, *table]
    if markdown:
        body = ["| " + " | ".join(row) + " |" for row in full]
        return "\n".join([body[0], "|---" * len(HEADER) + "|", *body[1:]])
    widths = [max(len(row[i]) for row in full) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in full)


def describe(model: str, batch: int | None, markdown: bool) -> str:
    """Heading, totals, comparison with the plain form, and the table of one model."""
    preset, usual, title = MODELS[model]
    n = batch or usual
    fused, plain = record_step(preset, n), record_step(preset, n, "plain")
    s, p = summarize(fused, n), summarize(plain, n)
    lines = [
        f"### {title}, bfloat16, batch {n}" if markdown else f"{title}, bfloat16, batch {n}",
        "",
        "| | launches | GFLOP | MB | ms at the roofs | images/s, 1000 steps | convolution |"
        if markdown
        else "form   launches  GFLOP     MB        ms      images/s  convolution",
    ]
    if markdown:
        lines.append("|---" * 7 + "|")
    for name, t in (("fused", s), ("plain", p)):
        cells = (
            name,
            str(t.launches),
            f"{t.gflop:.1f}",
            f"{t.megabytes:.1f}",
            f"{t.time_ms:.3f}",
            f"{t.images_per_s:.2f}",
            f"{100 * t.convolution_share:.1f}%",
        )
        lines.append(
            "| " + " | ".join(cells) + " |"
            if markdown
            else "  ".join(c.ljust(w) for c, w in zip(cells, (5, 8, 8, 8, 6, 8, 5)))
        )
    return "\n".join([*lines, "", render(rows(group(fused), 1e3 * s.time_ms), markdown)])


def as_json(model: str, batch: int | None) -> dict[str, object]:
    preset, usual, _ = MODELS[model]
    n = batch or usual
    records = record_step(preset, n)
    return {
        "model": model,
        "batch": n,
        "prediction": True,
        "roofs": {"flops_per_s": H100_FLOPS_PER_S, "bytes_per_s": H100_BYTES_PER_S, "source": "H100 SXM datasheet"},
        "summary": asdict(summarize(records, n)),
        "launches": [
            {"operation": r.operation, "shapes": dict(r.shapes), "detail": r.detail, **asdict(r.cost)} for r in records
        ],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(MODELS), action="append", help="default: all")
    parser.add_argument("--batch", type=int, help="images a step; default: the model's usual one")
    parser.add_argument("--markdown", action="store_true", help="as docs/performance.md has it")
    parser.add_argument("--json", action="store_true", help="every launch, ungrouped")
    args = parser.parse_args(argv)
    if args.batch is not None and args.batch < 1:
        parser.error(f"--batch must be at least 1; got {args.batch}")
    chosen = args.model or list(MODELS)
    if args.json:
        print(json.dumps([as_json(m, args.batch) for m in chosen], indent=1))
    else:
        print("\n\n".join(describe(m, args.batch, args.markdown) for m in chosen))


if __name__ == "__main__":
    main()
