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

from ddpm_fast.config import UNetConfig
from ddpm_fast.gpus import GPUS
from ddpm_fast.ops.records import Record
from ddpm_fast.planning import HEADER, aligned, group, records, rows, totals
from ddpm_fast.presets import PRESETS
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table

H100 = GPUS["h100"]
H100_FLOPS_PER_S, H100_BYTES_PER_S = H100.half_flops_per_s, H100.bytes_per_s

MODELS = {  # preset, batch, heading
    "cifar10": ("cifar10", 256, "google/ddpm-cifar10-32"),
    "256": ("lsun256", 16, "google/ddpm-*-256"),
}


def record_step(preset: str, batch: int, form: str = "fused", dtype: torch.dtype = torch.bfloat16) -> list[Record]:
    """The launches of one step of a preset's network, none of them cut into parts of the batch."""
    p = PRESETS[preset]
    config = UNetConfig(**p.model, sample_size=p.image_size)
    return records(config, step_table(Schedule(**p.schedule)), batch, dtype, form)


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
    """Totals of a step at the H100's roofs."""
    t = totals(records, H100)
    return Summary(
        launches=t.launches,
        gflop=t.flops / 1e9,
        megabytes=t.bytes / 1e6,
        time_ms=t.seconds * 1e3,
        convolution_share=t.convolution_share,
        images_per_s=batch / (t.seconds * steps),
        steps=steps,
    )


def render(table: Sequence[Sequence[str]], markdown: bool) -> str:
    """Aligned text, or a Markdown table."""
    full = [HEADER, *table]
    if not markdown:
        return aligned(full)
    body = ["| " + " | ".join(row) + " |" for row in full]
    return "\n".join([body[0], "|---" * len(HEADER) + "|", *body[1:]])


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
    return "\n".join([*lines, "", render(rows(group(fused), H100, 1e-3 * s.time_ms), markdown)])


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
