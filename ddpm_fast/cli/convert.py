"""``ddpm-fast convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Preset, Settings, assignments, chosen_dtype


def convert(
    source: Annotated[str, typer.Argument(help="A folder, a weights file or a Hugging Face id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; with --to openai, the .pt file.")],
    to: Annotated[str, typer.Option(help="diffusers, or openai for models that came from there.")] = "diffusers",
    dtype: Annotated[str | None, typer.Option(help="Of the stored weights: float32, float16 or bfloat16.")] = None,
    preset: Preset = None,
    settings: Settings = None,
) -> None:
    """Write a checkpoint of any family in the diffusers layout (safetensors), or back in OpenAI's."""
    from .. import checkpoints

    if to not in checkpoints.TARGETS:
        raise ValueError(f"--to must be {' or '.join(checkpoints.TARGETS)}; got {to}")
    stored = None if dtype is None else chosen_dtype(dtype)
    checkpoint = checkpoints.load(source, preset, assignments(settings))
    for note in checkpoints.convert(checkpoint, out, to, stored):
        print(f"- {note}")
    print(f"{source} ({checkpoint.family}) as {to} in {out}")
