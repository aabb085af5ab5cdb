"""The command `profile`: where a sampling step's time goes."""

from __future__ import annotations

import math
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Preset, Settings, assignments, chosen_device, chosen_dtype
from .sources import Network, measured


def profile(
    source: Network = None,
    batch: Annotated[int, typer.Option(help="Images drawn together.")] = 4,
    steps: Annotated[int | None, typer.Option(help="Timed, of the model's chain. Default: 20, or all.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: of the network.")] = "float32",
    ops: Annotated[str, typer.Option(help="A set of operations: auto, reference, triton, cpu or winograd.")] = "auto",
    device: Device = None,
    graph: Annotated[str, typer.Option(help="Of the run in which a GPU is watched.")] = "auto",
    seconds: Annotated[float, typer.Option(help="Of that run, at least.")] = 4.0,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure the roofs anew.")] = False,
    html: Annotated[Path | None, typer.Option(help="One self-contained page.", metavar="FILE")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="All numbers.", metavar="FILE")] = None,
    trace: Annotated[Path | None, typer.Option(help="For ui.perfetto.dev or chrome://tracing.", metavar="FILE")] = None,
    preset: Preset = None,
    settings: Settings = None,
) -> None:
    """Time every operation of a step against this device's roofs.

    The roofs are measured here; the largest gap comes first."""
    from .. import report, roofline
    from ..images import make_folder
    from ..profiling import profile as measure
    from ..profiling.text import profile_text

    precision = chosen_dtype(dtype)
    if not 0 < seconds < math.inf:
        raise ValueError(f"--seconds must be above 0, and finite; got {seconds}")
    wanted = ((html, report.write_html), (json_file, report.write_json), (trace, report.write_trace))
    files = [path.resolve() for path, _ in wanted if path is not None]
    if len(set(files)) < len(files):
        raise ValueError(f"--html, --json and --trace must be different files; got {', '.join(map(str, files))}")
    for path, _ in wanted:
        if path is not None:  # now, not when everything has been measured
            if path.is_dir():
                raise ValueError(f"{path} is a folder; give a file")
            make_folder(path.parent)
    where = chosen_device(device)
    checkpoint = measured(source, preset, assignments(settings))
    found = measure(
        checkpoint.model,
        checkpoint.schedule,
        batch_size=batch,
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
    print(profile_text(found))
    for path, write in wanted:
        if path is not None:
            write(path, found)
            print(f"written to {path}")
