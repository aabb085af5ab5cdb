"""``ddpm-fast export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .interruption import says_what_is_kept


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of shards, drawn by ddpm-fast sample.")],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="An .npz (arr_0, and labels as arr_1), a .tar (webdataset), or a folder for PNGs."
        ),
    ],
) -> None:
    """Write a folder of shards as .npz, .tar or PNGs.

    The shards' checksums are verified on the way."""
    from ..store import SampleStore
    from ..store.export import export
    from ..store.pictures import IDENTITY, PictureFolder

    def kept() -> str:
        if (out / IDENTITY).exists():
            there = len(PictureFolder.open(out).finished())
            return (
                f"{there} image{'s' * (there != 1)} {'are' if there != 1 else 'is'} in {out}; the same command goes on"
            )
        return f"{out} is not written; {folder} is as it was, and the same command begins again"

    with says_what_is_kept(kept):
        n = export(SampleStore.open(folder), out, progress=True)
    print(f"{n} image{'s' * (n != 1)} of {folder} in {out}")
