"""The commands around the engine: `verify` and `plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .options import Device, Preset, Settings, Source, assignments, chosen_device

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
        dtype=_dtype(dtype),
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
            help="A folder, a weights file, a Hugging Face id, or a config.json. Default: the bundled model."
        ),
    ] = None,
    preset_model: Annotated[
        str | None, typer.Option(help="A network without any file: cifar10, lsun256 or tiny.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images drawn together.")] = 256,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, l4, rtx4090 or rtx5090.")] = "h100",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32: of the network.")] = "bfloat16",
    steps: Annotated[int | None, typer.Option(help="Respaced chain of this many steps. Default: all.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every launch in order, not grouped.")] = False,
    as_json: Json = False,
    preset: Preset = None,
    settings: Settings = None,
) -> None:
    """Predict a step from shapes: each launch's FLOPs, bytes and time at a GPU's roofs; memory. Nothing runs."""
    from ..planning import plan, plan_facts, plan_text

    title, config, schedule = _described(source, preset_model, preset, assignments(settings))
    planned = plan(config, schedule, batch, gpu, _dtype(dtype), steps)
    if as_json:
        print(json.dumps(plan_facts(planned, title, every), indent=2))
    else:
        print(plan_text(planned, title, every))


def _dtype(name: str) -> torch.dtype:
    from ..sampler import DTYPES

    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}; got {name}")
    return DTYPES[name]


def _described(
    source: str | None, preset_model: str | None, preset: str | None, overrides: dict[str, Any]
) -> tuple[str, Any, Any]:
    """(title, UNetConfig, Schedule) of a named network, a config.json, or a checkpoint."""
    from ..checkpoints import load
    from ..config import UNetConfig
    from ..presets import preset as named
    from ..schedule import Schedule

    if preset_model is None and not (source or "").endswith(".json"):
        checkpoint = load(source, preset, overrides)
        return checkpoint.source, checkpoint.model.config, checkpoint.schedule
    if source is not None and preset_model is not None:
        raise ValueError(f"give a SOURCE or --preset-model, not both; got {source!r} and {preset_model!r}")
    if preset is not None:
        raise ValueError("--preset is for weights without a config; leave it out here")
    if preset_model is not None:
        p = named(preset_model)
        title, network, chain = preset_model, {**p.model, "sample_size": p.image_size}, dict(p.schedule)
    else:
        title, network, chain = str(source), *_files(Path(str(source)))
    fields = UNetConfig.__dataclass_fields__, Schedule.__dataclass_fields__
    unknown = sorted(k for k in overrides if not any(k in f for f in fields))
    if unknown:
        raise ValueError(f"--set: neither UNetConfig nor Schedule has {', '.join(unknown)}")
    network |= {k: v for k, v in overrides.items() if k in fields[0]}
    try:
        config = UNetConfig.from_dict(network)
        if config.out_channels == 2 * config.in_channels:  # where no file says it, as `load` assumes it
            chain = {"variance_type": "learned_range", **chain}
        return title, config, Schedule.from_dict(chain | {k: v for k, v in overrides.items() if k in fields[1]})
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"the configuration of {title} is not usable: {error}") from None


def _files(config: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A U-Net's config.json and the scheduler's beside it, or in the folder that a pipeline has for it."""
    from ..checkpoints.diffusers import schedule_fields
    from ..checkpoints.files import read_json
    from ..checkpoints.layout import SCHEDULER, check_class

    network = read_json(config)
    check_class(network, config)
    for path in (config.parent / SCHEDULER, config.parent.parent / "scheduler" / SCHEDULER):
        if path.exists():
            return network, schedule_fields(read_json(path), [])
    return network, {}
