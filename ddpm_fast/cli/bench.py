"""The commands that measure: `bench`, providers side by side, and `roofs`, what this device can do."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..benchmarking.names import PROVIDERS
from .interruption import says_what_is_kept
from .options import (
    DTYPES,
    Device,
    Json,
    Network,
    Settings,
    Threads,
    Weights,
    WeightsPreset,
    assignments,
    chosen_device,
)
from .sources import measured
from .words import Fits

if TYPE_CHECKING:
    import torch

SEVERAL: dict[str, Fits] = {  # options whose values may follow each other, and what a value looks like
    "--batch-size": str.isdigit,
    "--dtype": lambda word: all(part in DTYPES for part in word.split(",")),
    "--providers": lambda word: all(part in PROVIDERS for part in word.split(",")),
}
Dtypes = Annotated[
    str | None,
    typer.Option(metavar="NAME...", help="Precisions. Default: float32 and bfloat16; on a GPU also float16."),
]


def bench(
    source: Network = None,
    batch_size: Annotated[str, typer.Option(metavar="N...", help="Batch sizes, in images.")] = "1,4,16",
    providers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME...",
            help="What is compared: cpu, winograd, reference, triton (or triton-none, -step, -chunk, -loop), "
            "diffusers, diffusers-channels-last, diffusers-compile, openvino, onnxruntime, guided. Default: those "
            "that suit the device.",
        ),
    ] = None,
    dtype: Dtypes = None,
    steps: Annotated[int, typer.Option(help="Number of steps in the chain that is timed.")] = 20,
    full: Annotated[bool, typer.Option("--full", help="Time all steps of the model's chain.")] = False,
    baseline: Annotated[
        str, typer.Option(metavar="'NAME DTYPE'", help="Whose speed counts as 1.")
    ] = "diffusers float32",
    rounds: Annotated[int, typer.Option(help="Time each provider at least this often.")] = 3,
    budget: Annotated[
        float, typer.Option(help="Seconds for everything. What does not fit is named and not measured.")
    ] = 1800.0,
    clock: Annotated[
        str,
        typer.Option(help="wall, or cpu: CPU time of a provider's process, for a machine that does other work too."),
    ] = "wall",
    startup: Annotated[
        bool, typer.Option("--startup/--no-startup", help="Also measure the first step and memory, in new processes.")
    ] = True,
    threads: Threads = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Save all results in this .json file.")] = None,
    as_json: Json = False,
    weights: Weights = None,
    weights_preset: WeightsPreset = None,
    settings: Settings = None,
) -> None:
    """Time whole trajectories, side by side with other software.

    Results are compared with float64 first: a wrong provider gets no speed, and the exit code is 1 if it is ours.
    Providers take turns; on a CPU each has its own process, and only one of them runs at a time."""
    from .. import roofline
    from ..benchmarking import providers as known
    from ..benchmarking import run as benchmark
    from ..benchmarking import text
    from ..whole_files import check_file, whole_file

    began, where = time.monotonic(), chosen_device(device)
    batches = [_whole(part, "--batch-size") for part in batch_size.split(",")]
    dtypes = (dtype or ",".join(_dtypes(where))).split(",")
    unknown = [d for d in dtypes if d not in DTYPES]
    if unknown:
        raise ValueError(f"--dtype must be of {', '.join(DTYPES)}; got {unknown[0]!r}")
    if clock not in ("wall", "cpu") or (clock == "cpu" and where.type != "cpu"):
        raise ValueError(f"--clock must be wall, or on a CPU cpu; got {clock!r} on {where.type}")
    if steps < 1 or rounds < 1 or not budget > 0:
        raise ValueError(f"--steps and --rounds must be at least 1, --budget above 0; got {steps}, {rounds}, {budget}")
    chosen = known.chosen(providers.split(",") if providers else known.default_names(where))
    if out is not None:
        if out.suffix.lower() != ".json":
            raise ValueError(f"--out must be a .json file; got {out}")
        check_file(out, "--out")
    _use(threads)
    checkpoint = measured(source, weights_preset, assignments(settings), weights)
    benchmark.fitting(checkpoint)  # before the roofs, which take seconds
    roofs = [roofline.roofs(where, known.DTYPES[d]) for d in dtypes if known.DTYPES[d] in _multiplied(where)]
    show = partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    show(roofline.roofs_text(roofs) + "\n")
    done: list[int] = []

    def keep(found: dict[str, Any]) -> None:
        """Show and save a batch size as it ends."""
        if not done:
            show(text.heading(found))
        done.append(text.batches(found)[-1])
        show("\n" + text.batch_text(found, done[-1]))
        if out is not None:
            with whole_file(out) as file:
                file.write((json.dumps(found, indent=1) + "\n").encode())

    with says_what_is_kept(lambda: _kept(batches, done, out)):
        found = benchmark.run(
            checkpoint,
            chosen,
            benchmark.Settings(
                batches=batches,
                dtypes=list(dict.fromkeys(dtypes)),
                steps=None if full else steps,
                device=where,
                baseline=baseline,
                rounds=(rounds, max(rounds, 20)),
                budget_s=budget - (time.monotonic() - began),
                clock=clock,
                startups=startup,
            ),
            roofs,
            say=lambda line: print(f"ddpm-fast: {line}", file=sys.stderr),
            keep=keep,
        )
    show("\n".join(["", *text.notes(found)]))
    if as_json:
        print(json.dumps(found, indent=2))
    if out is not None:
        show(f"\nwritten to {out}")
    if any(row["ours"] for row in benchmark.wrong(found)):
        raise SystemExit(1)


def _kept(batches: list[int], done: list[int], out: Path | None) -> str:
    if not done:
        return "no batch size is finished, so nothing is kept"
    left = " ".join(str(n) for n in batches if n not in done)
    where = "above" if out is None else f"in {out}"
    finished = f"batch size{'s' * (len(done) > 1)} {', '.join(map(str, done))} of {', '.join(map(str, batches))}"
    return f"{finished} {'are' if len(done) > 1 else 'is'} {where}; --batch-size {left} measures what is left" + (
        "" if out is None else ", with another --out"
    )


def roofs(
    dtype: Dtypes = None,
    threads: Threads = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again; the higher of the old and new rates is kept.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure this device's peak rates.

    Copies, matrix products and convolutions are timed. plan and profile compare with such rates."""
    from .. import roofline
    from ..benchmarking import providers as known

    where = chosen_device(device)
    names = dtype.split(",") if dtype else list(_dtypes(where))
    unknown = [d for d in names if d not in DTYPES]
    if unknown:
        raise ValueError(f"--dtype must be of {', '.join(DTYPES)}; got {unknown[0]!r}")
    _use(threads)
    found = [roofline.roofs(where, known.DTYPES[d], refresh) for d in names]
    print(json.dumps([r.facts() for r in found], indent=2) if as_json else roofline.roofs_text(found))


def _whole(text: str, option: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{option} must be whole numbers of at least 1; got {text!r}")
    return int(text)


def _use(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"--threads must be at least 1; got {threads}")
    import torch

    torch.set_num_threads(threads)


def _dtypes(device: torch.device) -> tuple[str, ...]:
    return ("float32", "bfloat16", "float16") if device.type == "cuda" else ("float32", "bfloat16")


def _multiplied(device: torch.device) -> tuple[torch.dtype, ...]:
    """dtypes with a roof of their own; float16 on a CPU has no provider that would be held to it."""
    import torch

    return tuple(getattr(torch, name) for name in _dtypes(device))
