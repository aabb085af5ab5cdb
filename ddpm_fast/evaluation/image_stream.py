"""Images read batch by batch, so that fifty thousand of them need no more memory than one batch."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data import IMAGE_KEYS, load_data
from ..data.image_files import DataError

Batch = NDArray[np.uint8]  # [N, H, W, C]


@dataclass(frozen=True)
class ImageStream:
    """``count`` images of one source; `batches` reads it from the start each time."""

    count: int
    source: str
    fingerprint: str  # changes when the source does: of names, sizes and times, no pixel is read for it
    batches: Callable[[int], Iterator[Batch]]  # (images a batch) -> them, in order
    facts: dict[str, Any] | None = None  # a sample store's manifest


def open_stream(source: str | Path, image_size: int | None = None) -> ImageStream:
    """A sample store, an .npz (``arr_0``), an .npy, a folder or tar of pictures, or avatars:STYLE.

    Arrays are uint8 [n, H, W, C] or [n, H, W]. image_size: scale and crop to that many pixels a side, as training
    does; None leaves them as they come. Raises DataError (a ValueError) for what cannot be read,
    FileNotFoundError for no such path.
    """
    path = Path(source)
    if str(source).startswith("avatars:"):
        return _whole(str(source), f"{source} {image_size}", image_size)
    if not path.exists():
        raise FileNotFoundError(f"no images at {path}: give a sample store, .npz, .npy, a folder of pictures or a .tar")
    if path.is_dir() and (path / "manifest.json").is_file():
        return _store(path)
    arrays = {".npy": _npy, ".npz": _npz}.get(path.suffix.lower()) if path.is_file() else None
    if arrays is not None:
        stream, shape = arrays(path)
        if image_size in (None, shape[1]) and (image_size is None or shape[1] == shape[2]):
            return stream
    return _whole(str(source), f"{_stamp(path)} {image_size}", image_size)


def _store(folder: Path) -> ImageStream:
    from ..store import SampleStore

    store = SampleStore.open(folder)

    return ImageStream(
        store.count, str(folder), _stamp(folder), lambda size: rebatched(store.shards(), size), store.manifest
    )


def rebatched(parts: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same images, ``size`` at a time whatever the parts they come in."""
    held: list[Batch] = []
    missing = size
    for part in parts:
        first = 0
        while len(part) - first >= missing:
            held.append(part[first : first + missing])
            yield np.concatenate(held)
            first += missing
            held, missing = [], size
        if first < len(part):
            held.append(part[first:])
            missing -= len(part) - first
    if held:
        yield np.concatenate(held)


def _npy(path: Path) -> tuple[ImageStream, tuple[int, ...]]:
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a readable .npy file: {error}") from error
    shape = _checked(path, images.shape, images.dtype)

    def batches(size: int) -> Iterator[Batch]:
        for first in range(0, shape[0], size):
            yield np.array(images[first : first + size]).reshape(-1, *shape[1:])

    return ImageStream(shape[0], str(path), _stamp(path), batches), shape


def _npz(path: Path) -> tuple[ImageStream, tuple[int, ...]]:
    """The archive's member is decompressed as it is read; np.load would take it whole."""
    with _opened(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        key = next((key for key in IMAGE_KEYS if key in names), None)
        if key is None:
            raise DataError(f"{path} must hold its images under one of {', '.join(IMAGE_KEYS)}; found {names}")
        with archive.open(f"{key}.npy") as member:
            shape = _header(path, member)

    def batches(size: int) -> Iterator[Batch]:
        with _opened(path) as archive, archive.open(f"{key}.npy") as member:
            _header(path, member)
            bytes_each = int(np.prod(shape[1:]))
            for first in range(0, shape[0], size):
                wanted = min(size, shape[0] - first) * bytes_each
                try:
                    content = member.read(wanted)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise DataError(f"{path} is damaged: {error}") from error
                if len(content) != wanted:
                    raise DataError(f"{path} ends within its images: {len(content)} bytes of {wanted}")
                pixels = np.frombuffer(bytearray(content), np.uint8)  # writable, as torch wants it
                yield pixels.reshape(-1, *shape[1:])

    return ImageStream(shape[0], str(path), _stamp(path), batches), shape


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not a readable .npz file: {error}") from error


def _header(path: Path, member: Any) -> tuple[int, ...]:
    try:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(member)
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} holds no array that can be read: {error}") from error
    if fortran:
        raise DataError(f"{path} must hold its images in C order; got Fortran order: np.ascontiguousarray mends it")
    return _checked(path, shape, dtype)


def _checked(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    """The shape as [n, H, W, C]."""
    if dtype != np.uint8:
        raise DataError(f"{path} must hold uint8 images (0 .. 255); got {dtype}")
    if len(shape) == 3:
        shape = (*shape, 1)
    if len(shape) != 4 or shape[-1] not in (1, 3) or not all(shape):
        raise DataError(f"{path} must be [n, H, W, C] or [n, H, W] with C 1 or 3 and n > 0; got {list(shape)}")
    return shape


def _whole(source: str, stamp: str, image_size: int | None) -> ImageStream:
    """Through the reader of training data, which keeps on the disk what is larger than 2 GiB decoded."""
    data = load_data(source, image_size)

    def batches(size: int) -> Iterator[Batch]:
        for first in range(0, len(data), size):
            index = np.arange(first, min(first + size, len(data)))
            yield data.images[index]

    return ImageStream(len(data), source, stamp, batches)


def _stamp(path: Path) -> str:
    """Of the names, sizes and times below ``path``."""
    digest = hashlib.sha256(str(path.resolve()).encode())
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        status = file.stat()
        digest.update(f"{file.relative_to(path)}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
