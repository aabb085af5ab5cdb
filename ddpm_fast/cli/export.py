"""``ddpm-fast export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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

    n = export(SampleStore.open(folder), out, progress=True)
    print(f"{n} image{'s' * (n != 1)} of {folder} in {out}")
