"""``ddpm-fast sample``: a few images as pictures, or any number of them as a store that workers share."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    Device,
    Dtype,
    Ops,
    Settings,
    Source,
    WeightsPreset,
    assignments,
    chosen_device,
    chosen_dtype,
    class_number,
)

if TYPE_CHECKING:
    import torch

    from ..checkpoints import Checkpoint
    from ..distributed import World
    from ..sampler import Sampler
    from ..store import SampleStore

MOST_PICTURES = 1000  # a folder of more images than that is a store, unless it is to be PNGs


@dataclass(frozen=True)
class Drawing:
    """What is drawn, in the words of the command line."""

    source: str | None
    preset: str | None
    settings: dict[str, Any]
    n: int
    seed: int
    first_id: int
    label: int | str | None  # a class's number or name, as text until `class_number` has read it, or "all"
    truncate: bool
    batch_size: int | str
    options: dict[str, Any]  # of `Sampler`: what was asked for and no more, so that its own defaults hold

    def checkpoint(self) -> Checkpoint:
        from ..checkpoints import load

        return load(self.source, self.preset, self.settings)

    def sampler(self, checkpoint: Checkpoint, device: torch.device) -> Sampler:
        from ..sampler import Sampler

        return Sampler(checkpoint.model, checkpoint.schedule, self.batch_size, device=device, **self.options)

    def as_begun(self, store: SampleStore) -> Drawing:
        """With what a set was begun with, where the choice was left to the machine."""
        begun, changes = store.manifest["sampler"], dict[str, Any]()
        if self.batch_size == "auto":
            changes["batch_size"] = begun["batch_size"]
        if self.options["ops"] == "auto":
            changes["options"] = {**self.options, "ops": begun["ops"]}
        return replace(self, **changes)


def sample(
    source: Source = None,
    n: Annotated[int, typer.Option("-n", help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the noise. Image k of a seed is always the same image.")] = 0,
    steps: Annotated[
        str | None,
        typer.Option(help='Number of steps in the chain, or OpenAI\'s "10,15,20" or "ddim50". Default: all.'),
    ] = None,
    method: Annotated[str | None, typer.Option(help="ddpm or ddim. Default: the checkpoint's own.")] = None,
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
    weights_preset: WeightsPreset = None,
    settings: Settings = None,
) -> None:
    """Draw images. Without arguments: 16 from the bundled model into samples.png.

    A folder of shards survives a kill: give the same command again to continue. Several workers can fill one folder:
    start them with torchrun --nproc-per-node=8 -m ddpm_fast sample ..., or start the same command several times, on
    any machines that share the folder. ddpm-fast export turns such a folder into an .npz, PNGs or a .tar.
    """
    from ..distributed import of_environment, own_device
    from ..engine.call import check_numbers

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
        _fill(drawing, out, shard_size, verify, own_device(chosen_device(device), workers))
    else:
        _pictures(drawing, out, film, chosen_device(device))


def _is_store(out: Path, n: int, store: bool | None, shard_size: int | None, verify: bool, workers: World) -> bool:
    """Whether the folder is one of shards; ValueError where the words contradict each other."""
    from ..store import MANIFEST

    a_file = out.suffix.lower() in (".png", ".npz")
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
    begun = (out / MANIFEST).exists()
    if store is False and begun:
        raise ValueError(f"{out} holds a set of shards: name another folder, or ddpm-fast export {out} FOLDER for PNGs")
    return not a_file and store is not False and bool(asked or begun or n > MOST_PICTURES)


def _fill(drawing: Drawing, out: Path, shard_size: int | None, verify: bool, device: torch.device) -> None:
    """The set in ``out``, by this worker and all others."""
    from ..distributed import OtherProcessFailed, join
    from ..store.workers import fill

    whole = False
    try:
        with join(device) as world:
            # The first one begins the set, and says what is wrong with it; the others find it, and say nothing.
            own = world.together(lambda: _begin(drawing, out, shard_size, device) if world.first else None)
            world.together(lambda: None if own is None else _report(*own, verify))
            sampler, store, _ = world.together(lambda: own or _join(drawing, out, shard_size, device))
            fill(store, sampler, world, progress=world.first)
            whole = True
            if world.first:
                images, shards = drawing.n, len(store)
                parts = f"{shards} shard{'s' * (shards != 1)}"
                print(f"{images} image{'s' * (images != 1)} in {out}: {parts}, all finished")
    except OtherProcessFailed:
        raise SystemExit(2) from None  # the other one says why
    except RuntimeError:
        if not whole:  # else another worker died after its last shard, and nothing is lost by that
            raise


def _begin(
    drawing: Drawing, out: Path, shard_size: int | None, device: torch.device
) -> tuple[Sampler, SampleStore, list[str]]:
    """The sampler and the set, begun or continued; and what about the machine has changed since it was begun."""
    from ..store import MANIFEST, SampleStore
    from ..store import manifest as store_manifest

    checkpoint = drawing.checkpoint()
    drawing = replace(drawing, label=class_number(drawing.label, checkpoint))
    if (out / MANIFEST).exists():
        begun = SampleStore.open(out)
        if begun.manifest["device"] == device.type:  # else `begin` says that it is another
            _use_threads(begun)
            drawing = drawing.as_begun(begun)
    sampler = drawing.sampler(checkpoint, device)
    _check_labels(drawing.label, sampler)
    _say_which(drawing, sampler)
    manifest = store_manifest.describe(
        checkpoint,
        sampler,
        n=drawing.n,
        seed=drawing.seed,
        first_id=drawing.first_id,
        label=drawing.label,
        shard_size=shard_size or store_manifest.shard_size(drawing.n, sampler.batch_size),
        truncate=drawing.truncate,
        chain={name: drawing.options.get(name) for name in ("method", "steps", "eta")},
    )
    automatic = {
        "threads": True,
        "shard_size": shard_size is None,
        "sampler.batch_size": drawing.batch_size == "auto",
        "sampler.ops": drawing.options["ops"] == "auto",
    }
    store, changed = SampleStore.begin(out, manifest, [name for name, left in automatic.items() if left])
    other = _use_threads(store) or sampler.ops.name != store.manifest["sampler"]["ops"]  # begun by another, just now
    if other or drawing.batch_size == "auto":  # so that whoever goes on with it draws in the same way
        sampler = drawing.as_begun(store).sampler(checkpoint, device)
    return sampler, store, changed


def _say_which(drawing: Drawing, sampler: Sampler) -> None:
    if drawing.options["ops"] == "auto":
        print(f"ddpm-fast: {sampler.ops.name} operations: {sampler.ops_reason}", file=sys.stderr)


def _join(
    drawing: Drawing, out: Path, shard_size: int | None, device: torch.device
) -> tuple[Sampler, SampleStore, list[str]]:
    """As `_begin`, of a set that the first worker has begun. StoreError where this machine does not see it."""
    from ..store import SampleStore, StoreError

    try:
        SampleStore.open(out)
    except StoreError as error:
        raise StoreError(f"{out} must be one folder that all machines share; {error}") from None
    return _begin(drawing, out, shard_size, device)


def _use_threads(store: SampleStore) -> bool:
    """Compute with as many threads as the set was begun with; whether that is another number."""
    import torch

    threads = store.manifest.get("threads")
    if threads is None or threads == torch.get_num_threads():
        return False
    torch.set_num_threads(threads)
    return True


def _report(sampler: Sampler, store: SampleStore, changed: list[str], verify: bool) -> None:
    """Say what is not as it was when the set was begun, and put damaged shards back to be drawn."""
    if changed:
        warnings.warn(
            f"since {store.folder} was begun this changed: {'; '.join(changed)}; images of before and after may "
            "differ in their last bit",
            stacklevel=2,
        )
    damaged = store.check(every=verify)
    if damaged:
        text = ", ".join(map(str, damaged[:10])) + ", ..." * (len(damaged) > 10)
        print(f"ddpm-fast: damaged shards of {store.folder} are drawn again: {text}", file=sys.stderr)


def _check_labels(label: int | str | None, sampler: Sampler) -> None:
    """The sampler's own complaint about a label, before a set of them is begun."""
    if label == "all" and sampler.num_classes is None:
        raise ValueError("--label all needs a model with classes; this one has none, so it takes no labels")
    sampler.checked_labels(0 if label == "all" else label, 1)  # type: ignore[arg-type]


def _pictures(drawing: Drawing, out: Path, film: Path | None, device: torch.device) -> None:
    """A few images in one file or a folder of PNGs, all in memory."""
    import numpy as np

    from .. import images
    from ..sampler import to_uint8
    from ..store.manifest import classes_of, label_of

    if film is not None and film.suffix.lower() not in (".png", ".gif"):
        raise ValueError(f"--film must end in .png or .gif; got {film}")
    if film is not None and film.resolve() == out.resolve():
        raise ValueError(f"--film and --out must be two files; got {film} for both")
    for path in (out, film):
        if path is not None:  # now, not when the images are drawn
            images.make_folder(path.parent if path.suffix else path)
    checkpoint = drawing.checkpoint()
    sampler = drawing.sampler(checkpoint, device)
    if film is not None or out.suffix.lower() != ".npz":
        images.check_channels(sampler.image_shape[0])
    n, first_id, label = drawing.n, drawing.first_id, class_number(drawing.label, checkpoint)
    _check_labels(label, sampler)
    _say_which(drawing, sampler)
    classes = classes_of(sampler) or 1
    labels = None if label is None else [label_of(label, i, classes) for i in range(first_id, first_id + n)]
    reel = images.Film(len(sampler.table), to_uint8) if film is not None else None
    callback = None if reel is None else reel.callback
    drawn = sampler.sample(n, drawing.seed, labels, first_id, progress=True, callback=callback)
    pixels = to_uint8(drawn, drawing.truncate).cpu().numpy()
    if out.suffix.lower() == ".npz":
        images.save_npz(out, pixels, None if labels is None else np.array(labels))
    elif out.suffix.lower() == ".png":
        images.save_picture(out, images.grid(pixels))
    else:
        images.save_folder(out, pixels, range(first_id, first_id + n))
    if reel is not None and film is not None:
        reel.save(film)
    print(f"{n} image{'s' * (n != 1)} in {out}" + (f", the denoising in {film}" if film is not None else ""))


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
