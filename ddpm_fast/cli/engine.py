"""The commands around the engine: `verify` and `plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Preset, Settings, Source, assignments, chosen_device, chosen_dtype
from .sources import described

Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def verify(
    source: Source = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: of the network.")] = "float32",
    ops: Annotated[str, typer.Option(help="auto, reference, cpu, winograd or triton: what is tested.")] = "auto",
    device: Device = None,
    n: Annotated[int, typer.Option("-n", help="Images drawn together.")] = 4,
    seed: Annotated[int, typer.Option(help="Of their noise.")] = 0,
    label: Annotated[int | None, typer.Option(help="Class of a class-conditional model.")] = None,
    steps: Annotated[int, typer.Option(help="Of the chain that is run.")] = 20,
    probes: Annotated[int, typer.Option(help="Steps of it that are looked at one by one.")] = 8,
    full: Annotated[bool, typer.Option("--full", help="All steps of the model's chain, each looked at.")] = False,
    as_json: Json = False,
    preset: Preset = None,
    settings: Settings = None,
) -> None:
    """Hold the operations and dtype to a float64 reference. Exit code 1 where an error is too large."""
    from ..checkpoints import load
    from ..verification import report_text, verify

    where = chosen_device(device)
    report = verify(
        load(source, preset, assignments(settings)),
        dtype=chosen_dtype(dtype),
        ops=ops,
        device=where,
        n=n,
        seed=seed,
        label=label,
        steps=None if full else steps,
        probes=None if full else probes,
    )
    print(json.dumps(report.facts(), indent=2) if as_json else report_text(report))
    if not report.ok:
        raise SystemExit(1)


def plan(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A folder, a weights file, a Hugging Face id, a config.json, or one of cifar10, lsun256, tiny. "
            "Default: the bundled model."
        ),
    ] = None,
    preset_model: Annotated[str | None, typer.Option(help="As SOURCE: cifar10, lsun256 or tiny.")] = None,
    batch: Annotated[int, typer.Option(help="Images drawn together.")] = 256,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, l4, rtx4090 or rtx5090.")] = "h100",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32: of the network.")] = "bfloat16",
    steps: Annotated[int | None, typer.Option(help="Respaced chain of this many steps. Default: all.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every launch in order, not grouped.")] = False,
    as_json: Json = False,
    preset: Preset = None,
    settings: Settings = None,
) -> None:
    """Predict a step's time and memory on a GPU; nothing runs.

    From shapes: each launch's FLOPs, bytes and time at that GPU's roofs."""
    from ..planning import plan, plan_facts, plan_text
    from ..presets import PRESETS

    if preset_model is None and source in PRESETS and not Path(str(source)).exists():
        source, preset_model = None, source
    title, config, schedule = described(source, preset_model, preset, assignments(settings))
    planned = plan(config, schedule, batch, gpu, chosen_dtype(dtype), steps)
    if as_json:
        print(json.dumps(plan_facts(planned, title, every), indent=2))
    else:
        print(plan_text(planned, title, every))
