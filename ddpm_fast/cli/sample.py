"""``ddpm-fast sample``: images as a picture, an .npz, PNGs, or any number of them as a store that workers share."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import outputs
from .drawing import Drawing
from .options import (
    Device,
    Dtype,
    Ops,
    Settings,
    Source,
    Weights,
    WeightsPreset,
    assignments,
    chosen_device,
    chosen_dtype,
)

if TYPE_CHECKING:
    from ..distributed import World

FILES = (".png", ".npz")
MOST_PICTURES = 1000  # a folder of more images than that is a store, unless it is to be PNGs


def sample(
    source: Source = None,
    n: Annotated[int, typer.Option("-n", help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the noise. Image k of a seed is always the same image.")] = 0,
    steps: Annotated[
        str | None,
        typer.Option(help='Number of steps in the chain, or OpenAI\'s "10,15,20" or "ddim50". Default: all.'),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="ddpm, ddim or a predictor of Score-SDE. Default: the checkpoint's own.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Noise of DDIM, from 0 (none) to 1 (as much as DDPM).")] = None,
    batch_size: Annotated[
        str, typer.Option(metavar="N|auto", help="Images computed together; auto: as many as fit and run fast.")
    ] = "64",
    label: Annotated[
        str | None,
        typer.Option(
            metavar="K|NAME|all",
            help="Class of the images, by number or name, for a model with classes; all: every class in turn.",
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance. Default: no guidance.")
    ] = None,
    first_id: Annotated[int, typer.Option(help="Number of the first image of the seed.")] = 0,
    device: Device = None,
    dtype: Dtype = "float32",
    ops: Ops = "auto",
    graph: Annotated[
        str, typer.Option(help="Work that a CUDA graph holds: none, step, chunk or loop; auto chooses.")
    ] = "auto",
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Round pixels down, as OpenAI's and Ho et al.'s scripts do.")
    ] = False,
    out: Annotated[
        Path,
        typer.Option(help="A .png (one grid), an .npz (arr_0: uint8 NHWC), or a folder of PNGs or shards."),
    ] = Path("samples.png"),
    store: Annotated[
        bool | None,
        typer.Option(
            "--store/--pngs",
            help="Write a folder as shards (.npy), which workers can share and continue, or as PNGs. "
            f"Default: shards for more than {MOST_PICTURES} images, with --shard-size, under torchrun, and to "
            "continue a set of shards.",
        ),
    ] = None,
    shard_size: Annotated[int | None, typer.Option(help="Images in a shard. Default: whole batches.")] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="To continue a set: compare all its checksums and redraw damaged shards."),
    ] = False,
    film: Annotated[
        Path | None, typer.Option(help="Save the denoising too: a .png (one row an image) or a .gif.")
    ] = None,
    weights: Weights = None,
    weights_preset: WeightsPreset = None,
    settings: Settings = None,
) -> None:
    """Draw images. Without arguments: 16 from the bundled model into samples.png.

    Images are on the disk as their batch ends: after a kill, give the same command again to continue. Several workers
    can fill one folder of shards: start them with torchrun --nproc-per-node=8 -m ddpm_fast sample ..., or start the
    same command several times, on any machines that share the folder. ddpm-fast export turns such a folder into an
    .npz, PNGs or a .tar.
    """
    from ..distributed import of_environment, own_device
    from ..engine.call import check_numbers
    from ..whole_files import check_file

    if n < 1:
        raise ValueError(f"-n must be at least 1; got {n}")
    precision = chosen_dtype(dtype)
    if not 0 <= seed < 2**64:
        raise ValueError(f"--seed must be in 0 .. 2**64 - 1; got {seed}")
    if first_id < 0:
        raise ValueError(f"--first-id must be 0 or more, as files are named by it; got {first_id}")
    check_numbers(n, first_id, seed)
    batch = _number_or("--batch-size", batch_size, "auto")
    drawing = Drawing(
        source,
        weights,
        weights_preset,
        assignments(settings),
        n,
        seed,
        first_id,
        label,
        truncate,
        batch if batch == "auto" else min(batch, n),
        _given(
            steps=int(steps) if steps is not None and steps.isdecimal() else steps,
            method=method,
            eta=eta,
            guidance_scale=guidance_scale,
        )
        | {"dtype": precision, "ops": ops, "graph": graph},
    )
    workers = of_environment()
    if _is_store(out, n, store, shard_size, verify, workers):
        if film is not None:
            raise ValueError(f"--film goes with a .png, an .npz or PNGs; {out} is to be a set of shards")
        if shard_size is not None and shard_size < 1:
            raise ValueError(f"--shard-size must be at least 1; got {shard_size}")
        outputs.fill_shards(drawing, out, shard_size, verify, own_device(chosen_device(device), workers))
        return
    if film is not None:
        if film.suffix.lower() not in (".png", ".gif"):
            raise ValueError(f"--film must end in .png or .gif; got {film}")
        if film.resolve() == out.resolve():
            raise ValueError(f"--film and --out must be two files; got {film} for both")
        if out.suffix.lower() not in FILES and film.resolve().parent == out.resolve():
            raise ValueError(f"--film must lie outside the folder of the images, {out}; got {film}")
        check_file(film, "--film")
    write = outputs.fill_file if out.suffix.lower() in FILES else outputs.fill_pngs
    write(drawing, out, film, chosen_device(device))


def _is_store(out: Path, n: int, store: bool | None, shard_size: int | None, verify: bool, workers: World) -> bool:
    """Whether the folder is one of shards; ValueError where the words contradict each other."""
    from ..store import MANIFEST
    from ..store.pictures import IDENTITY

    a_file = out.suffix.lower() in FILES
    if out.suffix and not a_file and not store and not out.is_dir():
        raise ValueError(f"--out must be a .png, an .npz or a folder; got {out}")
    asked = [
        word
        for word, said in (
            ("--store", store),
            ("--shard-size", shard_size is not None),
            ("--verify", verify),
            (f"torchrun with {workers.size} workers", workers.size > 1),
        )
        if said
    ]
    if asked and (a_file or store is False):
        raise ValueError(f"{asked[0]} needs --out to be a folder of shards; got {'--pngs' if not a_file else out}")
    begun, pngs = (out / MANIFEST).exists(), (out / IDENTITY).exists()
    if store is False and begun:
        export = shlex.join(["ddpm-fast", "export", str(out), "FOLDER"])
        raise ValueError(f"{out} holds a set of shards: name another folder, or {export} for PNGs")
    if asked and pngs:
        raise ValueError(f"{asked[0]} needs a folder of shards; {out} holds PNGs of a set: name another folder")
    return not a_file and store is not False and bool(asked or begun or (n > MOST_PICTURES and not pngs))


def _number_or(option: str, text: str | None, word: str) -> Any:
    """The whole number that ``text`` is, or ``word``; None for None."""
    if text is None or text == word:
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} must be a whole number or {word}; got {text!r}") from None


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
