"""``ddpm-fast export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    folder: Annotated[Path, typer.Argument(help="A set of shards that ddpm-fast sample drew.")],
    out: Annotated[Path, typer.Argument(help=".npz: arr_0 (and arr_1, labels); .tar: webdataset; else PNGs there.")],
) -> None:
    """Write a set of shards as one .npz, a .tar or a folder of PNGs.

    Its checksums are compared; the .tar is a webdataset's."""
    from ..store import SampleStore
    from ..store.export import export

    n = export(SampleStore.open(folder), out, progress=True)
    print(f"{n} image{'s' * (n != 1)} of {folder} in {out}")
