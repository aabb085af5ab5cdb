"""The commands that measure: `bench`, providers side by side, and `roofs`, what this device can do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..benchmarking.names import PROVIDERS
from .options import DTYPES, Device, Preset, Settings, assignments, chosen_device
from .sources import Network, measured

if TYPE_CHECKING:
    import torch

Words = list[str]


TAKE_SEVERAL: dict[str, Callable[[str], bool]] = {  # whose values may follow each other, and what a value looks like
    "--batch": str.isdigit,
    "--dtype": lambda word: all(part in DTYPES for part in word.split(",")),
    "--providers": lambda word: all(part in PROVIDERS for part in word.split(",")),
}


def joined(words: Words, several: dict[str, Callable[[str], bool]]) -> Words:
    """["--batch", "1", "4", "x"] -> ["--batch", "1,4", "x"]: values after an option, up to a word that is none."""
    result: Words = []
    fits: Callable[[str], bool] | None = None  # of the option whose values are being read
    first = False
    for word in words:
        if first:  # an option's own value, whatever it looks like
            result.append(word)
            first = False
            fits = None if word.startswith("-") else fits
        elif fits is not None and fits(word):
            result[-1] += "," + word
        else:
            name, equals, _ = word.partition("=")
            fits = several.get(name)
            first = fits is not None and not equals
            result.append(word)
    return result


class SeveralValues(TyperCommand):
    """A command whose options in `TAKE_SEVERAL` take one value or more."""

    def parse_args(self, ctx: Any, args: Words) -> Words:
        return super().parse_args(ctx, joined(args, TAKE_SEVERAL))


def bench(
    source: Network = None,
    batch: Annotated[str, typer.Option(metavar="N...", help="Images drawn together.")] = "1,4,16",
    providers: Annotated[
        str | None,
        typer.Option(
            metavar="NAME...",
            help="Who draws: cpu, winograd, reference, triton (or triton-none, -step, -chunk, -loop), diffusers, "
            "diffusers-channels-last, diffusers-compile, openvino, onnxruntime, guided. Default: by the device.",
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME...", help="Default: float32 and bfloat16; on a GPU float16 too.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of the chain, for each timing.")] = 20,
    full: Annotated[bool, typer.Option("--full", help="All steps of the model's chain.")] = False,
    baseline: Annotated[
        str, typer.Option(metavar="'NAME DTYPE'", help="What the ratios are to.")
    ] = "diffusers float32",
    rounds: Annotated[int, typer.Option(help="Timings of each, at least.")] = 3,
    budget: Annotated[float, typer.Option(help="Seconds for the rounds of one batch size.")] = 120.0,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: of a provider's process, for ratios on a machine that others use.")
    ] = "wall",
    startup: Annotated[
        bool, typer.Option("--startup/--no-startup", help="First step and memory, in processes of their own.")
    ] = True,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. Default: as torch has it.")] = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="A .json file for all that was found.")] = None,
    preset: Preset = None,
    settings: Settings = None,
) -> None:
    """Time whole trajectories of several providers in turns.

    Right first, then fast: exit code 1 if ours is wrong. On a CPU each provider has a process of its own, and all
    but one wait."""
    from .. import roofline
    from ..benchmarking import providers as known
    from ..benchmarking import run as benchmark
    from ..benchmarking.text import report_text
    from ..whole_files import whole_file

    where = chosen_device(device)
    batches = [_whole(part, "--batch") for part in batch.split(",")]
    dtypes = (dtype or ",".join(_dtypes(where))).split(",")
    unknown = [d for d in dtypes if d not in DTYPES]
    if unknown:
        raise ValueError(f"--dtype must be of {', '.join(DTYPES)}; got {unknown[0]!r}")
    if clock not in ("wall", "cpu") or (clock == "cpu" and where.type != "cpu"):
        raise ValueError(f"--clock must be wall, or on a CPU cpu; got {clock!r} on {where.type}")
    if steps < 1 or rounds < 1 or budget < 0:
        raise ValueError(
            f"--steps and --rounds must be at least 1, --budget not negative; got {steps}, {rounds}, {budget}"
        )
    chosen = known.chosen(providers.split(",") if providers else known.default_names(where))
    if out is not None and out.suffix.lower() != ".json":
        raise ValueError(f"--out must be a .json file; got {out}")
    _use(threads)
    checkpoint = measured(source, preset, assignments(settings))
    benchmark.fitting(checkpoint)  # before the roofs, which take seconds
    roofs = [roofline.roofs(where, known.DTYPES[d]) for d in dtypes if known.DTYPES[d] in _multiplied(where)]
    print(roofline.roofs_text(roofs) + "\n")
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
            budget_s=budget,
            clock=clock,
            startups=startup,
        ),
        roofs,
        say=lambda line: print(f"ddpm-fast: {line}", file=sys.stderr),
    )
    print(report_text(found))
    if out is not None:
        with whole_file(out) as file:
            file.write((json.dumps(found, indent=1) + "\n").encode())
        print(f"\nwritten to {out}")
    if any(row["ours"] for row in benchmark.wrong(found)):
        raise SystemExit(1)


def roofs(
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Default: float32 and bfloat16; on a GPU float16 too.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. Default: as torch has it.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again; the higher counts.")] = False,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Measure this device's peaks: copy, matrix product, convolution."""
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
