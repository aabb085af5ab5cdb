"""A folder of PNGs that fills as batches end, and beside them what they are a function of.

    FOLDER/000007.png     image 7 of the seed; it appears whole
    FOLDER/labels.csv     the class of each image, where the model has classes
    FOLDER/set.json       the manifest of a set, without how many images there are

Two runs fill one folder if their images are of one set: an image is a function of its id, so a run may be killed and
started again, or go on with other ids. A run whose options would make other images is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.image_files import IMAGE_SUFFIXES
from ..images import check_channels, picture
from ..progress import progress_bar
from ..sampler import Sampler, to_uint8
from ..whole_files import make_folder, sync_folder, whole_file, write_once
from .claims import alive, host
from .manifest import FORMAT, check_manifest, differences, environment_differences, is_known_format, label_of
from .samples import MANIFEST, OtherSet, StoreError, disk
from .workers import Look, watched

IDENTITY, LABEL_LIST = "set.json", "labels.csv"
LEAST_DIGITS = 6  # of an id in a file's name
_COUNTS = {"n": 1, "first_id": 0, "shard_size": 1}  # which images there are, not what they are
# A library may round another way in another batch or with other threads; the image is the same one.
_LEFT_OPEN = ("sampler.batch_size", "threads")


class PictureFolder:
    """The PNGs in a folder. Made by `begin`.

    Attributes:
        folder: where they are.
        manifest: what they are a function of.
    """

    MARK = IDENTITY

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder, self.manifest = folder, dict(manifest)
        self._digits: int = manifest["digits"]
        self._temporary = folder / f".{_machine()}-{os.getpid()}.png.tmp"
        self._known: set[int] = set()

    @classmethod
    def open(cls, folder: str | Path) -> PictureFolder:
        """The PNGs that were begun in a folder. StoreError where there are none, or their set.json does not read."""
        path = Path(folder) / IDENTITY
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it is no JSON object")
            if not is_known_format(content.get("format", FORMAT)):
                raise StoreError(f"{path} has format {content['format']!r}; this version reads {FORMAT}")
            check_manifest({**content, **_COUNTS})
            if type(content.get("digits")) is not int or not LEAST_DIGITS <= content["digits"] < 20:
                raise ValueError(f"digits must be from {LEAST_DIGITS} to 19; got {content.get('digits')!r}")
        except FileNotFoundError:
            raise StoreError(f"{folder} holds no PNGs of a set: there is no {IDENTITY} in it") from None
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{path} does not say what the PNGs beside it are: {error}; name another folder") from None
        return cls(Path(folder), content)

    @classmethod
    def begin(
        cls, folder: str | Path, manifest: Mapping[str, Any], left_open: Collection[str] = ()
    ) -> tuple[PictureFolder, list[str]]:
        """Begin or continue a folder of PNGs. Several processes may do so at once.

        Args:
            folder: where they are to be; made if it is not there.
            manifest: of the set that the images belong to (`manifest.describe`).
            left_open: dotted names of fields that a folder which was begun decides.

        Returns:
            The folder, and what about the machine has changed since it was begun.

        Raises:
            OtherSet: PNGs of another set are there; what differs is named.
            StoreError: other pictures, or a set of shards, are there.
            ValueError: a PNG cannot hold such images.
        """
        check_manifest(manifest)
        folder = Path(folder)
        check_channels(manifest["image_shape"][2])
        make_folder(folder)
        if not (folder / IDENTITY).exists():
            _refuse_strangers(folder)
            content = json.dumps(identity(manifest), indent=2) + "\n"
            write_once(folder / IDENTITY, content.encode())
        found = cls.open(folder)
        known = {*left_open, *_LEFT_OPEN}
        wrong = [d for d in differences(found.manifest, identity(manifest)) if d.partition(":")[0] not in known]
        if wrong:
            raise OtherSet(folder, wrong, found.manifest, "PNGs of a set")
        found._tidy()
        return found, environment_differences(found.manifest, manifest)

    def finished(self) -> set[int]:
        """The ids of the images that are there."""
        with os.scandir(self.folder) as entries:
            names = [e.name for e in entries if e.name.endswith(".png") and e.stat().st_size]
        stems = (name.removesuffix(".png") for name in names)
        self._known = {int(s) for s in stems if s.isdecimal() and s.isascii() and len(s) == self._digits}
        return self._known

    def path(self, sample_id: int) -> Path:
        return self.folder / f"{sample_id:0{self._digits}d}.png"

    def label(self, sample_id: int) -> int:
        """The class of an image, where the model has classes."""
        labels = self.manifest["labels"]
        return label_of(labels["rule"], sample_id, labels["classes"])

    def write(self, ids: Sequence[int], images: Iterable[np.ndarray]) -> None:  # each [H, W, C] uint8
        """Write the images of ``ids``. Each file is whole or not there. StoreError where the disk refuses."""
        with disk(self.folder, IDENTITY, self._kept):
            try:
                for sample_id, image in zip(ids, images):
                    self._temporary.write_bytes(png(image))
                    os.replace(self._temporary, self.path(sample_id))
                    self._known.add(sample_id)
            finally:
                self._temporary.unlink(missing_ok=True)
            sync_folder(self.folder)

    def finish(self) -> None:
        """Write the list of labels, of all images that are there."""
        if self.manifest["labels"] is None:
            return
        lines = [f"{self.path(i).name},{self.label(i)}\n" for i in sorted(self.finished())]
        with disk(self.folder, IDENTITY, self._kept), whole_file(self.folder / LABEL_LIST) as file:
            file.writelines(line.encode() for line in ["file,label\n", *lines])

    def _kept(self) -> str:
        return f"{len(self._known)} images are finished and kept"

    def _tidy(self) -> None:
        """Remove what killed processes of this machine left."""
        for path in self.folder.glob(f".{_machine()}-*.png.tmp"):
            pid = path.name.partition("-")[2].removesuffix(".png.tmp")
            if pid.isdecimal() and not alive(int(pid), None):
                path.unlink(missing_ok=True)


def draw_pictures(
    folder: PictureFolder,
    sampler: Sampler,
    ids: range,
    progress: bool = False,
    look: Look | None = None,
) -> int:
    """Draw the images of ``ids`` that a folder lacks, batch by batch; they are files when their batch ends.

    Args:
        folder: of a set that ``sampler`` draws.
        sampler: draws them.
        ids: which images.
        progress: whether a bar shows.
        look: a callback of the sampler for the first batch, which is then drawn in any case.

    Returns:
        How many images were drawn.

    Raises:
        StoreError: the disk refuses a file; what is kept is said.
    """
    options, batch, drawn = folder.manifest, sampler.batch_size, 0
    there = folder.finished()
    truncate = options["sampler"]["to_uint8"] == "truncate"
    parts = [ids[start : start + batch] for start in range(0, len(ids), batch)]
    missing = [part for part in parts if not there.issuperset(part) or (look is not None and part is parts[0])]
    done = len(ids) - sum(map(len, missing))
    with progress_bar(progress, len(ids), "image", str(folder.folder), initial=done) as bar:

        def show(images: float) -> None:
            if round(images) > bar.n:
                bar.update(round(images) - bar.n)

        for part in missing:
            classes = None
            if options["labels"] is not None:
                classes = torch.tensor([folder.label(i) for i in part])
            watch = watched(sampler, done, len(part), show, look if part is parts[0] else None)
            x = sampler.sample(len(part), options["seed"], classes, part.start, **watch)
            folder.write(part, to_uint8(x, truncate).cpu().numpy())
            drawn, done = drawn + len(part), done + len(part)
    folder.finish()
    return drawn


def identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the images of a set are a function of; not which of them there are."""
    digits = max(LEAST_DIGITS, len(str(manifest["first_id"] + manifest["n"] - 1)))  # all alike, so that names sort
    return {**{name: value for name, value in manifest.items() if name not in _COUNTS}, "digits": digits}


def png(image: np.ndarray) -> bytes:  # [H, W, C] uint8
    stream = io.BytesIO()
    picture(image).save(stream, "PNG")
    return stream.getvalue()


def _refuse_strangers(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise StoreError(f"{folder} holds a set of shards ({MANIFEST}); name another folder for PNGs")
    pictures = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")
    if pictures:
        raise StoreError(
            f"{folder} holds pictures ({pictures[0]}{', ...' * (len(pictures) > 1)}) and no {IDENTITY} that says of "
            "which set; name a new or an empty folder"
        )


def _machine() -> str:
    """A name of the machine on which a process id means something."""
    return hashlib.sha256(host().encode()).hexdigest()[:12]
