"""``ddpm-fast convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..stages import stage
from .options import Settings, Weights, WeightsPreset, assignments, chosen_dtype


def convert(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A checkpoint: a folder, a weights file or a Hugging Face id.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; with --to openai, the .pt file.")],
    to: Annotated[
        str, typer.Option(help="diffusers; or openai, for models that came from OpenAI's code.")
    ] = "diffusers",
    dtype: Annotated[
        str | None,
        typer.Option(help="Precision of the stored weights: float32, float16 or bfloat16. Default: float32."),
    ] = None,
    weights: Weights = None,
    weights_preset: WeightsPreset = None,
    settings: Settings = None,
) -> None:
    """Write a checkpoint as diffusers or OpenAI do.

    Checkpoints of every family can be written in the diffusers layout (safetensors), and OpenAI's models in their own.
    """
    from .. import checkpoints
    from ..whole_files import check_file, check_folder, check_names

    if to not in checkpoints.TARGETS:
        raise ValueError(f"--to must be {' or '.join(checkpoints.TARGETS)}; got {to}")
    if to == "openai":
        check_file(out, "OUT")
    else:
        check_folder(out, "OUT", make=False)
        check_names(out, ("model_index.json",), ("unet", "scheduler"))
    stored = None if dtype is None else chosen_dtype(dtype)
    checkpoint = checkpoints.load(source, weights_preset, assignments(settings), weights=weights)
    with stage(f"writing {out}"):
        notes = checkpoints.convert(checkpoint, out, to, stored)
    for note in notes:
        print(f"- {note}")
    print(f"{source} ({checkpoint.family}) as {to} in {out}")
