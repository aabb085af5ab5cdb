"""The command `profile`: where a sampling step's time goes."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from .options import (
    Device,
    Dtype,
    Json,
    Network,
    Ops,
    Settings,
    Weights,
    WeightsPreset,
    assignments,
    chosen_device,
    chosen_dtype,
)
from .sources import measured
from .words import Command


class ProfileCommand(Command):
    """Where ``--json FILE`` is understood as ``--out FILE``, which it was once."""

    former: ClassVar[Mapping[str, str]] = {"--batch": "--batch-size", "--preset": "--weights-preset"}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for i, word in enumerate(args):
            name, equals, _ = word.partition("=")
            if name == "--json" and (equals or "".join(args[i + 1 : i + 2]).lower().endswith(".json")):
                args = [*args[:i], "--out" + word.removeprefix("--json"), *args[i + 1 :]]
        return super().parse_args(ctx, args)


def profile(
    source: Network = None,
    batch_size: Annotated[int, typer.Option(help="Images in one batch.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Number of steps that are timed. Default: 20, or all.")] = None,
    dtype: Dtype = "float32",
    ops: Ops = "auto",
    device: Device = None,
    graph: Annotated[
        str, typer.Option(help="CUDA graphs in the run that measures power: auto, none, step, chunk or loop.")
    ] = "auto",
    seconds: Annotated[float, typer.Option(help="Least length of that run.")] = 4.0,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure the device's peak rates again.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one self-contained HTML page.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a trace for ui.perfetto.dev or chrome://tracing.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Save all numbers in this .json file.")] = None,
    as_json: Json = False,
    weights: Weights = None,
    weights_preset: WeightsPreset = None,
    settings: Settings = None,
) -> None:
    """Time each operation of a step, beside the device's peak rates.

    The peak rates are measured here too. Operations with the most time to gain come first."""
    from .. import report, roofline
    from ..profiling import profile as measure
    from ..profiling.text import profile_text
    from ..whole_files import check_file

    precision = chosen_dtype(dtype)
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds must be above 0, and finite; got {seconds}")
    wanted = ((html, report.write_html), (out, report.write_json), (trace, report.write_trace))
    files = [path.resolve() for path, _ in wanted if path is not None]
    if len(set(files)) < len(files):
        raise ValueError(f"--html, --out and --trace must be different files; got {', '.join(map(str, files))}")
    for path, option in ((html, "--html"), (out, "--out"), (trace, "--trace")):
        if path is not None:
            check_file(path, option)
    where = chosen_device(device)
    checkpoint = measured(source, weights_preset, assignments(settings), weights)
    found = measure(
        checkpoint.model,
        checkpoint.schedule,
        batch_size=batch_size,
        steps=steps,
        dtype=precision,
        device=where,
        ops=ops,
        graph=graph,
        seconds=seconds,
        find_roofs=partial(roofline.roofs, refresh=refresh),
        title=checkpoint.source if source else f"{Path(checkpoint.source).name}, the bundled model",
        command=["ddpm-fast", *(shlex.quote(word) for word in sys.argv[1:])],
    )
    print(json.dumps(report.facts(found), indent=2) if as_json else profile_text(found))
    for path, write in wanted:
        if path is not None:
            write(path, found)
            print(f"written to {path}", file=sys.stderr if as_json else sys.stdout)
