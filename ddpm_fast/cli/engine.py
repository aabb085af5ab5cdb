"""The commands around the engine: `verify` and `plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Device,
    Dtype,
    Json,
    Label,
    Network,
    Ops,
    Settings,
    Source,
    Weights,
    WeightsPreset,
    assignments,
    chosen_device,
    chosen_dtype,
    class_number,
)
from .sources import described, loaded


def verify(
    source: Source = None,
    dtype: Dtype = "float32",
    ops: Ops = "auto",
    device: Device = None,
    n: Annotated[int, typer.Option("-n", help="Number of images, drawn in one batch.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of their noise.")] = 0,
    label: Label = None,
    steps: Annotated[int, typer.Option(help="Number of steps in the chain.")] = 20,
    probes: Annotated[int, typer.Option(help="How many of the steps are compared one by one.")] = 8,
    full: Annotated[bool, typer.Option("--full", help="Run all steps of the model's chain and compare each.")] = False,
    as_json: Json = False,
    weights: Weights = None,
    weights_preset: WeightsPreset = None,
    settings: Settings = None,
) -> None:
    """Compare the operations and dtype with float64. Exit code 1 if an error is too large."""
    from ..verification import report_text, verify

    where = chosen_device(device)
    if label == "all":
        raise ValueError("--label must be one class here, by number or name; got 'all'")
    checkpoint = loaded(source, weights_preset, assignments(settings), weights)
    report = verify(
        checkpoint,
        dtype=chosen_dtype(dtype),
        ops=ops,
        device=where,
        n=n,
        seed=seed,
        label=class_number(label, checkpoint),  # type: ignore[arg-type]
        steps=None if full else steps,
        probes=None if full else probes,
        progress=True,
    )
    print(json.dumps(report.facts(), indent=2) if as_json else report_text(report))
    if not report.ok:
        raise SystemExit(1)


def plan(
    source: Network = None,
    batch_size: Annotated[int, typer.Option(help="Images in one batch.")] = 256,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, l4, rtx4090 or rtx5090.")] = "h100",
    dtype: Dtype = "bfloat16",
    steps: Annotated[int | None, typer.Option(help="Number of steps in the chain. Default: all.")] = None,
    every: Annotated[bool, typer.Option("--all", help="List every launch in order; do not group equal ones.")] = False,
    as_json: Json = False,
    preset_model: Annotated[str | None, typer.Option(hidden=True)] = None,  # formerly the way to name a preset
    weights: Weights = None,
    weights_preset: WeightsPreset = None,
    settings: Settings = None,
) -> None:
    """Predict a step's time and memory on a GPU, without running it.

    The prediction follows from shapes: FLOPs and bytes of each launch, and its time at that GPU's peak rates."""
    from ..planning import plan, plan_facts, plan_text
    from ..presets import PRESETS

    if preset_model is None and source in PRESETS and not Path(str(source)).exists():
        source, preset_model = None, source
    title, config, schedule = described(source, preset_model, weights_preset, assignments(settings), weights)
    planned = plan(config, schedule, batch_size, gpu, chosen_dtype(dtype), steps)
    if as_json:
        print(json.dumps(plan_facts(planned, title, every), indent=2))
    else:
        print(plan_text(planned, title, every))
