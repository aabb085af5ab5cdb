"""Pictures of a folder or a tar archive, decoded to uint8; the unreadable ones are named, never fatal later."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TAR_SUFFIXES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".txz", ".tar.bz2")
MODES = {1: "L", 3: "RGB"}
# A folder whose decoded pixels exceed this is decoded batch by batch instead of once.
LARGEST_IN_MEMORY_BYTES = 2 << 30
# No picture is this large; a sparse or highly compressed member of an archive may claim to be.
LARGEST_MEMBER_BYTES = 256 << 20
DECODING_THREADS = 8


class DataError(ValueError):
    """The images cannot be used; the message says which and what to do."""


class Pixels(Protocol):
    """Images by index: what an array is, and what a folder larger than memory imitates."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # [n, H, W, C]

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Pictures:
    """What was found: the images, each with its name in the folder or archive, "/" between its parts."""

    images: Pixels  # [n, H, W, C] uint8
    names: tuple[str, ...]  # [n]
    skipped: tuple[str, ...]  # the unreadable ones
    sizes: frozenset[tuple[int, int]] = frozenset()  # (width, height) that there were, before any scaling


def decode_image(
    content: bytes | Path,
    image_size: int | None,  # pixels a side; None: as it is
    channels: int,  # 1 or 3
    sizes: set[tuple[int, int]] | None = None,  # gets the image's (width, height) before any scaling
) -> NDArray[np.uint8]:  # [H, W, C]
    """One image, upright (EXIF) and on white where it is transparent. Raises whatever Pillow does."""
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        image.load()
        upright = ImageOps.exif_transpose(image) or image
    if upright.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; store them as 8 bits")
    if upright.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips some of these at 255
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
    elif upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        canvas = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(canvas, upright.convert("RGBA"))
    plain = upright.convert(MODES[channels])
    if sizes is not None:
        sizes.add(plain.size)
    if image_size is not None:
        plain = fit_square(plain, image_size)
    return np.asarray(plain).reshape(plain.height, plain.width, channels)


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Scaled so that the shorter side is ``size`` pixels, then centre-cropped to a square."""
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class _Reader:
    """Decodes images one by one, and keeps the names of those that are unreadable."""

    def __init__(self, source: Path, image_size: int | None, channels: int, strict: bool):
        self.source, self.image_size, self.channels, self.strict = source, image_size, channels, strict
        self.images: list[NDArray[np.uint8]] = []
        self.names: list[str] = []
        self.skipped: list[str] = []
        self.sizes: set[tuple[int, int]] = set()

    def decode(self, content: bytes | Path) -> NDArray[np.uint8] | Exception:
        try:
            return decode_image(content, self.image_size, self.channels, self.sizes)
        # On damaged files Pillow's decoders raise nearly anything: struct.error, EOFError, zlib.error, TypeError.
        except Exception as error:
            return error

    def add(self, name: str, image: NDArray[np.uint8] | Exception) -> None:
        if isinstance(image, Exception):
            self.skip(name, image)
            return
        if self.images and image.shape != self.images[0].shape:
            first = self.images[0]
            raise DataError(
                f"all images must have one size; {self.names[0]} is {first.shape[1]}x{first.shape[0]} and "
                f"{name} is {image.shape[1]}x{image.shape[0]}. Give image_size to scale and crop them"
            )
        self.images.append(image)
        self.names.append(name)

    def skip(self, name: str, error: Exception) -> None:
        if self.strict:
            raise DataError(f"cannot read the image {name}: {error}") from error
        self.skipped.append(name)

    def finish(self, images: Pixels | None = None) -> Pictures:
        """Everything read; ``images`` in place of what ``add`` gathered."""
        if self.skipped:
            shown = ", ".join(self.skipped[:5]) + (" ..." if len(self.skipped) > 5 else "")
            warnings.warn(f"skipped {len(self.skipped)} unreadable images of {self.source}: {shown}", stacklevel=4)
        if not self.names:
            raise DataError(f"{self.source} holds no readable image ({len(self.skipped)} unreadable)")
        pixels = np.stack(self.images) if images is None else images
        return Pictures(pixels, tuple(self.names), tuple(self.skipped), frozenset(self.sizes))


def _is_image(name: str) -> bool:
    """By suffix. Hidden files and folders are editors' and systems' leftovers, never training data."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") and part != ".." for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _none_found(source: Path) -> DataError:
    return DataError(f"{source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")


def read_folder(folder: Path, image_size: int | None, channels: int, strict: bool) -> Pictures:
    """Every image in and below ``folder``, sorted by name. A large folder stays on the disk: ``LazyFolder``."""
    names = sorted(
        name for path in folder.rglob("*") if _is_image(name := path.relative_to(folder).as_posix()) and path.is_file()
    )
    if not names:
        raise _none_found(folder)
    reader = _Reader(folder, image_size, channels, strict)
    if _decoded_bytes(folder, names, image_size, channels) > LARGEST_IN_MEMORY_BYTES:
        return _read_lazily(folder, names, reader)
    for name in names:
        reader.add(name, reader.decode(folder / name))
    return reader.finish()


def read_tar(path: Path, image_size: int | None, channels: int, strict: bool) -> Pictures:
    """Every image of an archive, sorted by name.

    Members are read into memory and nothing is written, so names like ../../x in the archive cannot do harm;
    links and devices are passed over.
    """
    reader = _Reader(path, image_size, channels, strict)
    try:
        for name, content in sorted(_tar_images(path, reader)):
            reader.add(name, reader.decode(content))
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        reason = str(error).splitlines() or [type(error).__name__]  # further lines: what each compression says
        raise DataError(f"{path} is not a readable tar archive: {reason[0]}") from error
    if not reader.names and not reader.skipped:
        raise _none_found(path)
    return reader.finish()


def _tar_images(path: Path, reader: _Reader) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            if not member.isfile() or not _is_image(member.name):
                continue
            if member.size > LARGEST_MEMBER_BYTES:
                reader.skip(member.name, ValueError(f"{member.size} bytes are more than {LARGEST_MEMBER_BYTES}"))
                continue
            stream = archive.extractfile(member)
            assert stream is not None  # it is a regular file
            yield PurePosixPath(member.name).as_posix(), stream.read()


class LazyFolder:
    """Images of a folder, decoded when a batch asks for them."""

    def __init__(self, folder: Path, names: tuple[str, ...], image_size: int, channels: int):
        self.folder, self.names, self.image_size, self.channels = folder, names, image_size, channels
        self.shape = (len(names), image_size, image_size, channels)
        self._pool = ThreadPoolExecutor(DECODING_THREADS)

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack(list(self._pool.map(self._decode, index.tolist())))

    def _decode(self, index: int) -> NDArray[np.uint8]:
        path = self.folder / self.names[index]
        try:
            return decode_image(path, self.image_size, self.channels)
        except Exception as error:  # it was readable when the folder was loaded
            raise DataError(f"the image {path} has changed since training began and cannot be read: {error}") from error

    def fingerprint(self) -> bytes:
        """Of names and file sizes: reading every pixel again would take as long as an epoch."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}:{(self.folder / name).stat().st_size}\n".encode())
        return digest.digest()


def _read_lazily(folder: Path, names: list[str], reader: _Reader) -> Pictures:
    """Decodes every image once to see that it can be: a damaged one must not end an epoch halfway."""
    if reader.image_size is None:
        raise DataError(f"{folder} decodes to more than 2 GiB; give image_size, so that it can be read piece by piece")

    def problem(name: str) -> Exception | None:
        image = reader.decode(folder / name)
        return image if isinstance(image, Exception) else None

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        for name, error in zip(names, pool.map(problem, names)):
            if error is None:
                reader.names.append(name)
            else:
                reader.skip(name, error)
    return reader.finish(LazyFolder(folder, tuple(reader.names), reader.image_size, reader.channels))


def _decoded_bytes(folder: Path, names: list[str], image_size: int | None, channels: int) -> int:
    """Of all images together; from the first readable one's size if none is given."""
    if image_size is not None:
        return len(names) * image_size * image_size * channels
    for name in names:
        try:
            with Image.open(folder / name) as image:
                return len(names) * image.width * image.height * channels
        except Exception:  # named later, when it is decoded
            continue
    return 0
