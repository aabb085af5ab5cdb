"""What ``ddpm-fast sample`` draws, and the set that it belongs to, begun or continued."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .options import class_number
from .sources import loaded

if TYPE_CHECKING:
    import torch

    from ..checkpoints import Checkpoint
    from ..sampler import Sampler
    from ..store import SampleStore
    from ..store.pictures import PictureFolder

Place = TypeVar("Place", "SampleStore", "PictureFolder")


@dataclass(frozen=True)
class Drawing:
    """What is drawn, in the words of the command line."""

    source: str | None
    weights: str | None
    preset: str | None
    settings: dict[str, Any]
    n: int
    seed: int
    first_id: int
    label: int | str | None  # a class's number or name, as text until `class_number` has read it, or "all"
    truncate: bool
    batch_size: int | str
    options: dict[str, Any]  # of `Sampler`: what was asked for and no more, so that its own defaults hold

    @property
    def ids(self) -> range:
        return range(self.first_id, self.first_id + self.n)

    def first(self, n: int) -> Drawing:
        """The first ``n`` images of it."""
        return replace(self, n=min(n, self.n))

    def labels(self, sampler: Sampler) -> list[int] | None:
        """The class of each image; ``label`` must be a number by now."""
        from ..store.manifest import classes_of, label_of

        classes = classes_of(sampler) or 1
        return None if self.label is None else [label_of(self.label, i, classes) for i in self.ids]

    def checkpoint(self) -> Checkpoint:
        checkpoint: Checkpoint = loaded(self.source, self.preset, self.settings, self.weights)
        return checkpoint

    def sampler(self, checkpoint: Checkpoint, device: torch.device) -> Sampler:
        from ..sampler import Sampler

        return Sampler(checkpoint.model, checkpoint.schedule, self.batch_size, device=device, **self.options)

    def as_begun(self, manifest: dict[str, Any]) -> Drawing:
        """With what a set was begun with, where the choice was left to the machine."""
        begun, changes = manifest["sampler"], dict[str, Any]()
        if self.batch_size == "auto":
            changes["batch_size"] = begun["batch_size"]
        if self.options["ops"] in ("auto", begun["ops"]):
            changes["options"] = {**self.options, "ops": _ops_of(begun, self.options["dtype"])}
        return replace(self, **changes)


def _ops_of(begun: dict[str, Any], dtype: torch.dtype) -> Any:
    """The operations of a set that was begun, as `Sampler` takes them. BuildError where they cannot be had here."""
    from .. import ops
    from ..ops.cpu_set import build_norm

    if begun["ops"] == "cpu" and begun.get("normalisation") == "torch":  # there nothing could be compiled
        return ops.cpu(compiled=False)
    if begun["ops"] == "cpu" and begun.get("normalisation") == "compiled":
        build_norm(dtype)
    return begun["ops"]


def prepared(drawing: Drawing, device: torch.device, as_picture: bool) -> tuple[Drawing, Checkpoint, Sampler]:
    """The drawing with its class as a number, and what draws it. ValueError for what does not fit together."""
    from ..images import check_channels

    checkpoint = drawing.checkpoint()
    sampler = drawing.sampler(checkpoint, device)
    if as_picture:
        check_channels(sampler.image_shape[0])
    drawing = replace(drawing, label=class_number(drawing.label, checkpoint))
    _check_labels(drawing.label, sampler)
    return drawing, checkpoint, sampler


def begin(
    kind: type[Place],
    folder: Path,
    drawing: Drawing,
    device: torch.device,
    shard_size: int | None = None,
    as_picture: bool = False,
) -> tuple[Drawing, Sampler, Place, list[str]]:
    """Begin or continue a set of shards or of PNGs in a folder.

    Args:
        kind: `SampleStore` or `PictureFolder`.
        folder: where it is, or is to be.
        drawing: what is asked for.
        device: on which it is drawn.
        shard_size: images a shard; None: whole batches.
        as_picture: whether the images become a picture, which not every number of channels can.

    Returns:
        The drawing, its class a number; the sampler; the set; and what about the machine has changed since it was
        begun.
    """
    from ..store import manifest as store_manifest

    asked, begun = drawing, None
    if (folder / kind.MARK).exists():
        begun = kind.open(folder).manifest
    with _or_not_at_all(folder, begun, asked):
        if begun is not None and begun["device"] == device.type:  # else `begin` says that it is another
            _use_threads(begun)
            drawing = drawing.as_begun(begun)
        drawing, checkpoint, sampler = prepared(drawing, device, as_picture)
    say_which(drawing, sampler)
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
        "sampler.batch_size": asked.batch_size == "auto",
        "sampler.ops": asked.options["ops"] == "auto",
    }
    place, changed = kind.begin(folder, manifest, [name for name, left in automatic.items() if left])
    begun = place.manifest
    other = _use_threads(begun) or sampler.ops.name != begun["sampler"]["ops"]  # begun by another, just now
    if other or asked.batch_size == "auto":  # so that whoever goes on with it draws in the same way
        with _or_not_at_all(folder, begun, asked):
            sampler = drawing.as_begun(begun).sampler(checkpoint, device)
    return drawing, sampler, place, changed


@contextmanager
def _or_not_at_all(folder: Path, begun: dict[str, Any] | None, asked: Drawing) -> Iterator[None]:
    """StoreError where this machine cannot have the operations of the set: by others, its bytes would be others."""
    from ..ops.compiled import BuildError
    from ..store import StoreError

    try:
        yield
    except BuildError as error:
        if begun is None or asked.options["ops"] not in ("auto", begun["sampler"]["ops"]):
            raise
        raise StoreError(
            f"{folder} was begun with {begun['sampler']['ops']} operations, which this machine cannot have: "
            f"{error.reason}; {error.advice}, go on where they can be had, or begin another set"
        ) from None


def warn_of_changes(place: SampleStore | PictureFolder, changed: Iterable[str]) -> None:
    """Say what about the machine is not as it was when the set was begun."""
    if changed:
        warnings.warn(
            f"since {place.folder} was begun this changed: {'; '.join(changed)}; images of before and after may "
            "differ in their last bit",
            stacklevel=2,
        )


def say_which(drawing: Drawing, sampler: Sampler) -> None:
    """Name the operations, where the choice was left to the machine."""
    if drawing.options["ops"] == "auto":
        print(f"ddpm-fast: {sampler.ops.name} operations: {sampler.ops_reason}", file=sys.stderr)


def _check_labels(label: int | str | None, sampler: Sampler) -> None:
    """The sampler's own complaint about a label, before a set of them is begun."""
    if label == "all" and sampler.num_classes is None:
        raise ValueError("--label all needs a model with classes; this one has none, so it takes no labels")
    sampler.checked_labels(0 if label == "all" else label, 1)  # type: ignore[arg-type]


def _use_threads(manifest: dict[str, Any]) -> bool:
    """Compute with as many threads as the set was begun with; whether that is another number."""
    import torch

    threads = manifest.get("threads")
    if threads is None or threads == torch.get_num_threads():
        return False
    torch.set_num_threads(threads)
    return True
