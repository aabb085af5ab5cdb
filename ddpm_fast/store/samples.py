"""A set of samples on the disk, in shards: what a killed run leaves is whole, and another run goes on from it.

    FOLDER/manifest.json             what the set is a function of (manifest.py)
    FOLDER/images/000000.npy         uint8 [count, H, W, C], in order of ids
    FOLDER/labels/000000.npy         int64 [count], where the model has classes
    FOLDER/checksums/000000.sha256   of both, as `sha256sum -c` reads them in FOLDER; with it the shard is finished
    FOLDER/unfinished/               claims and temporary files (claims.py); gone when the set is whole

What is checked when: at every start the presence and size of each finished shard, and the checksum of those that
changed since they were finished (of copies too, once); every checksum by ``check(every=True)``; and that of each
shard that is read, so of all when a set is exported.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..whole_files import make_folder, whole_file, write_once
from .manifest import FORMAT, check_manifest, differences, environment_differences, is_known_format

MANIFEST, IMAGES, LABELS, CHECKSUMS, UNFINISHED = "manifest.json", "images", "labels", "checksums", "unfinished"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}


class StoreError(RuntimeError):
    """A set cannot be begun, continued or read; one line that says why and what to do."""


class OtherSet(StoreError):
    """The folder holds a set that was begun with other options.

    Attributes:
        names: the fields that differ, dotted.
        begun: the manifest of the set that is there.
    """

    def __init__(self, folder: Path, differences: Sequence[str], begun: Mapping[str, Any], what: str = "a set"):
        self.names, self.begun = [line.partition(":")[0] for line in differences], begun
        super().__init__(
            f"{folder} holds {what} that was begun with other options: {'; '.join(differences)}. "
            "Set them back, or name another folder"
        )


class SampleStore:
    """The set in a folder. Made by `open`, to read it, or `begin`, to draw it."""

    MARK = MANIFEST

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        check_manifest(manifest)
        self.folder, self.manifest = folder, dict(manifest)
        self.count: int = manifest["n"]
        self.first_id: int = manifest["first_id"]
        self.shard_size: int = manifest["shard_size"]
        self.image_shape: tuple[int, ...] = tuple(manifest["image_shape"])  # (H, W, C)
        self.labelled: bool = manifest["labels"] is not None
        self._known: set[int] = set()  # shards seen finished

    @classmethod
    def open(cls, folder: str | Path) -> SampleStore:
        """The store in a folder. StoreError where there is none, or one of another format."""
        folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise StoreError(f"{folder} holds no sample store: there is no {MANIFEST} in it")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(manifest, dict) and not is_known_format(manifest.get("format", FORMAT)):
                raise StoreError(f"{path} has format {manifest['format']!r}; this version reads {FORMAT}")
            return cls(folder, manifest)
        except (ValueError, RecursionError) as error:
            raise StoreError(
                f"{path} is damaged, or no sample store's: {str(error) or type(error).__name__}; put the file back as "
                "it was, or name another folder"
            ) from None

    @classmethod
    def begin(
        cls,
        folder: str | Path,
        manifest: Mapping[str, Any],
        left_open: Collection[str] = (),  # dotted names of what a continued set decides
    ) -> tuple[SampleStore, list[str]]:
        """Begin or continue the set of ``manifest`` in a folder. Several processes may do so at once.

        Args:
            folder: where the set is, or is to be.
            manifest: what the set is a function of (`manifest.describe`).
            left_open: dotted names of fields that a set which was begun decides.

        Returns:
            The store, and what about the machine has changed since it was begun.

        Raises:
            OtherSet: the folder holds a set that was begun with other options; they are named.
            StoreError: the folder holds something else, or cannot be written to.
            ValueError: the manifest makes no sense.
        """
        store = cls(Path(folder), manifest)
        with store.disk():
            if not (store.folder / MANIFEST).exists():
                store._create()
            found = cls.open(folder)
            wrong = [d for d in differences(found.manifest, manifest) if d.partition(":")[0] not in left_open]
            if wrong:
                raise OtherSet(Path(folder), wrong, found.manifest)
            if not found.whole():
                for name in (IMAGES, CHECKSUMS, UNFINISHED, *((LABELS,) if found.labelled else ())):
                    make_folder(found.folder / name)
        return found, environment_differences(found.manifest, manifest)

    def __len__(self) -> int:
        """How many shards the whole set has."""
        return -(-self.count // self.shard_size)

    def ids(self, shard: int) -> range:
        """The sample ids of a shard."""
        start = shard * self.shard_size
        return range(self.first_id + start, self.first_id + min(start + self.shard_size, self.count))

    def finished(self) -> set[int]:
        """The shards that are finished, by one listing; none where the folder is not there."""
        try:
            with self.disk():
                names = os.listdir(self.folder / CHECKSUMS)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return set()
            raise
        stems = (name[:-7] for name in names if name.endswith(".sha256"))
        self._known = {int(stem) for stem in stems if stem.isdecimal() and int(stem) < len(self)}
        return self._known

    def whole(self) -> bool:
        return len(self.finished()) == len(self)

    def has(self, shard: int) -> bool:
        """Whether a shard is finished."""
        return self._path(CHECKSUMS, shard).exists()

    def images_in(self, shards: set[int]) -> int:
        """How many images these shards have together."""
        last = len(self) - 1
        return len(shards) * self.shard_size - (self.shard_size - len(self.ids(last)) if last in shards else 0)

    def check(self, every: bool = False) -> list[int]:
        """Finished shards that are damaged; they count as unfinished from now on. every: hash each of them, and not
        only those that changed since they were finished."""
        damaged = []
        with self.disk():
            for shard in sorted(self.finished()):
                if not self._sound(shard, every):
                    self._path(CHECKSUMS, shard).unlink(missing_ok=True)
                    damaged.append(shard)
        return damaged

    def write(
        self,
        shard: int,
        images: np.ndarray,  # [count, H, W, C] uint8
        labels: np.ndarray | None,  # [count] int64
        temporary: Path,
    ) -> None:
        """Store a shard. When this returns it is on the disk; until then it is not there. StoreError if it cannot be.

        temporary: a name in the folder "unfinished" that no one else uses.
        """
        count = len(self.ids(shard))
        assert images.dtype == np.uint8 and images.shape == (count, *self.image_shape), images.shape
        assert (labels is not None) == self.labelled
        with self.disk():
            lines = []
            if labels is not None:
                lines.append(self._put(LABELS, shard, labels.astype(np.int64), temporary))
            lines.append(self._put(IMAGES, shard, images, temporary))
            with whole_file(self._path(CHECKSUMS, shard), temporary) as file:
                file.write("".join(lines).encode())
        self._known.add(shard)

    def load(self, shard: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Images [count, H, W, C] uint8 and labels [count] int64 of a shard, their checksums compared."""
        arrays = []
        known = self._recorded(shard)
        for kind in self._kinds():
            path = self._path(kind, shard)
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                content = b""
            if hashlib.sha256(content).hexdigest() != known.get(kind):
                wrong = f"damaged ({path})" if known else "not drawn yet"
                raise StoreError(
                    f"shard {shard} of {self.folder} is {wrong}; the ddpm-fast sample command that began the set, "
                    "with --verify, draws what is missing or damaged"
                )
            try:
                array = np.load(io.BytesIO(content), allow_pickle=False)
            except (ValueError, EOFError, OSError):
                array = np.empty(0)
            shape, dtype = self._form(kind, shard)
            if array.shape != shape or array.dtype != dtype:
                raise StoreError(
                    f"{path} does not fit {self.folder / MANIFEST}, by which it is {dtype} {list(shape)}; got "
                    f"{array.dtype} {list(array.shape)}; put the manifest back as it was"
                )
            arrays.append(array)
        return arrays[0], arrays[1] if self.labelled else None

    def shards(self) -> Iterator[np.ndarray]:
        """The images of a whole set, shard by shard; StoreError at one that is damaged or not drawn yet."""
        for shard in range(len(self)):
            yield self.load(shard)[0]

    def finish(self) -> None:
        """Drop what is only needed while shards are drawn, if all of them are."""
        if self.whole():
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)

    def disk(self) -> AbstractContextManager[None]:
        """A failure of the disk as one line: what happened, what is kept, and how to go on."""
        return disk(self.folder, MANIFEST, lambda: f"{len(self._known)} of {len(self)} shards are finished and kept")

    def remove(self) -> None:
        """Remove the set. A kill meanwhile leaves a set with fewer shards."""
        for name in (CHECKSUMS, IMAGES, LABELS, UNFINISHED):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _create(self) -> None:
        """Write the manifest, unless another process was first."""
        folder = self.folder
        make_folder(folder)
        strangers = sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != MANIFEST)
        if strangers and not (folder / MANIFEST).exists():
            raise StoreError(
                f"{folder} holds other things ({strangers[0]}, ...) and no {MANIFEST}; name a new or an empty folder"
            )
        write_once(folder / MANIFEST, (json.dumps(self.manifest, indent=2) + "\n").encode())

    def _kinds(self) -> tuple[str, ...]:
        return (IMAGES, LABELS) if self.labelled else (IMAGES,)

    def _form(self, kind: str, shard: int) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of a shard's array."""
        count = len(self.ids(shard))
        return ((count, *self.image_shape), np.dtype(np.uint8)) if kind == IMAGES else ((count,), np.dtype(np.int64))

    def _path(self, kind: str, shard: int) -> Path:
        return self.folder / kind / f"{shard:06d}{'.sha256' if kind == CHECKSUMS else '.npy'}"

    def _put(self, kind: str, shard: int, array: np.ndarray, temporary: Path) -> str:
        """Write one array; the line of its checksum."""
        path, digest = self._path(kind, shard), hashlib.sha256()
        with whole_file(path, temporary) as file:
            for part in (npy_header(array.shape, array.dtype), np.ascontiguousarray(array).data):
                digest.update(part)
                file.write(part)
        return f"{digest.hexdigest()}  {kind}/{path.name}\n"

    def _recorded(self, shard: int) -> dict[str, str]:
        """{"images": hex, "labels": hex}; {} where the shard is not finished."""
        try:
            lines = self._path(CHECKSUMS, shard).read_text(encoding="ascii", errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        pairs = (line.split("  ", 1) for line in lines if "  " in line)
        return {name.partition("/")[0]: value for value, name in pairs}

    def _sound(self, shard: int, every: bool) -> bool:
        try:
            record, changed = self._path(CHECKSUMS, shard).stat(), False
            if not record.st_size:  # after a power failure a name may be there without its content
                return False
            for kind in self._kinds():
                status, (shape, dtype) = self._path(kind, shard).stat(), self._form(kind, shard)
                size = len(npy_header(shape, dtype)) + int(np.prod(shape)) * dtype.itemsize
                if status.st_size != size:
                    return False
                changed |= status.st_mtime_ns > record.st_mtime_ns
            if every or changed:
                known = self._recorded(shard)
                for kind in self._kinds():
                    if _digest(self._path(kind, shard)) != known.get(kind):
                        return False
        except FileNotFoundError:
            return False
        if changed:
            with suppress(OSError):
                os.utime(self._path(CHECKSUMS, shard))  # compared: not again at the next start
        return True


@contextmanager
def disk(place: Path, mark: str, kept: Callable[[], str]) -> Iterator[None]:
    """A failure of the disk as a StoreError of one line: what happened, what is kept, and how to go on.

    place: the folder that is used. mark: a file that it holds as long as it is there.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # one of ours, which says what to do
            raise
        if error.errno in _FULL:
            what = f"no space is left for {place}; make room"
        elif error.errno in _FORBIDDEN:
            what = f"{place} cannot be written to ({error.strerror})"
        elif not os.path.exists(place / mark):
            what = f"{place} is gone or does not answer ({error.strerror}); is its disk mounted?"
        else:
            what = f"{place} cannot be used: {error}"
        raise StoreError(f"{what}; {kept()}; the same command goes on from there") from error


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """What an .npy file begins with."""
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
