"""Training images: folders, archives, arrays and drawn avatars, as uint8 in memory.

``load_data`` reads every supported source into an ``ImageData``. A batch is asked for by index, so that the
training loop alone decides which images a step sees.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
TAR_SUFFIXES = (".tar", ".tar.xz", ".tar.gz", ".tgz", ".txz", ".tar.bz2")
# A folder whose decoded pixels exceed this is decoded batch by batch instead of once.
LARGEST_IN_MEMORY_BYTES = 2 << 30
MODES = {1: "L", 3: "RGB"}


class DataError(ValueError):
    """The images cannot be used; the message says which and what to do."""


class Pixels(Protocol):
    """What ``ImageData`` needs of its images: a shape, and batches by index."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # [n, H, W, C]

    def __getitem__(self, index: NDArray[np.int64], /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class ImageData:
    """Images with optional class labels."""

    images: Pixels  # [n, H, W, C] uint8
    labels: NDArray[np.int64] | None = None  # [n], 0 .. num_classes - 1
    label_names: tuple[str, ...] | None = None
    source: str = ""
    skipped: tuple[str, ...] = field(default=())  # names of the images that could not be read

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return 0 if self.label_names is None else len(self.label_names)

    def batch(
        self,
        index: NDArray[np.int64],  # [N]
    ) -> NDArray[np.uint8]:  # [N, C, H, W]
        """The images at ``index``, channels first."""
        return np.ascontiguousarray(self.images[index].transpose(0, 3, 1, 2))

    def digest(self) -> str:
        """A fingerprint of images and labels: a resumed training must see the same ones."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        if isinstance(self.images, LazyFolder):
            for path in self.images.paths:
                digest.update(f"{path.name}:{path.stat().st_size}".encode())
        else:
            digest.update(np.ascontiguousarray(self.images))  # type: ignore[arg-type]
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()[:32]


def load_data(
    source: str | Path,
    image_size: int | None = None,  # pixels a side; None: as they come, which must be all alike
    channels: int = 3,  # 3: RGB, 1: grey
    strict: bool = False,  # refuse unreadable images instead of skipping them
) -> ImageData:
    """Reads training images.

    ``source`` is a folder of images (sub-folders are classes), a ``.npz`` or ``.npy`` of uint8
    ([n, H, W, C], [n, H, W] or [n, C, H, W]), a tar archive of images (folders are classes), or
    ``avatars:STYLE[:N]``.

    Raises ``DataError`` (a ValueError) for what cannot be used, FileNotFoundError for no such path,
    RuntimeError if an optional package is missing.
    """
    if channels not in MODES:
        raise DataError(f"channels must be 1 (grey) or 3 (RGB); got {channels}")
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size must be a positive number of pixels; got {image_size}")
    text = str(source)
    if text.startswith("avatars:"):
        return _load_avatars(text, image_size, channels)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no training data at {path}: give a folder, .npz, .npy, .tar or avatars:STYLE")
    if path.is_dir():
        return _load_folder(path, image_size, channels, strict)
    if path.suffix in (".npz", ".npy"):
        return _load_array(path, image_size, channels)
    if path.name.lower().endswith(TAR_SUFFIXES):
        return _load_tar(path, image_size, channels, strict)
    raise DataError(f"{path} is no training data that can be read: give a folder, .npz, .npy, .tar or avatars:STYLE")


def _load_avatars(text: str, image_size: int | None, channels: int) -> ImageData:
    from .avatars import DEFAULT_COUNT, render_avatars

    style, _, count = text.removeprefix("avatars:").partition(":")
    if count and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise DataError(f"avatars data is written avatars:STYLE[:N] with N a positive number; got {text!r}")
    number = int(count) if count else DEFAULT_COUNT
    return ImageData(render_avatars(style, number, image_size, channels), source=f"avatars:{style}:{number}")


# Folders and archives


def decode_image(
    content: bytes | Path,
    image_size: int | None,
    channels: int,
) -> NDArray[np.uint8]:  # [H, W, C]
    """One image, upright and on white where it is transparent; OSError or ValueError if it is not readable."""
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        image.load()
        upright = _upright(image)
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            canvas = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(canvas, upright.convert("RGBA"))
        plain = upright.convert(MODES[channels])
        if image_size is not None:
            plain = _fit(plain, image_size)
        return np.asarray(plain).reshape(plain.height, plain.width, channels)


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image) or image


def _fit(image: Image.Image, size: int) -> Image.Image:
    """Scaled so that the shorter side is ``size``, then centre-cropped to a square."""
    if image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


_UNREADABLE = (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)


class _Collector:
    """Gathers decoded images, and names those that are unreadable or of another size."""

    def __init__(self, source: str, image_size: int | None, channels: int, strict: bool):
        self.source, self.image_size, self.channels, self.strict = source, image_size, channels, strict
        self.images: list[NDArray[np.uint8]] = []
        self.names: list[str] = []
        self.skipped: list[str] = []

    def add(self, name: str, content: bytes | Path) -> None:
        try:
            image = decode_image(content, self.image_size, self.channels)
        except _UNREADABLE as error:
            self.skip(name, error)
            return
        if self.images and image.shape != self.images[0].shape:
            first = self.images[0]
            raise DataError(
                f"all images must have one size; {self.names[0]} is {first.shape[1]}x{first.shape[0]} and "
                f"{name} is {image.shape[1]}x{image.shape[0]}. Give image_size to scale and crop them"
            )
        self.images.append(image)
        self.names.append(name)

    def skip(self, name: str, error: BaseException) -> None:
        if self.strict:
            raise DataError(f"cannot read the image {name}: {error}") from error
        self.skipped.append(name)

    def finish(self) -> ImageData:
        if self.skipped:
            shown = ", ".join(self.skipped[:5]) + (" ..." if len(self.skipped) > 5 else "")
            warnings.warn(f"skipped {len(self.skipped)} unreadable images of {self.source}: {shown}", stacklevel=4)
        if not self.images:
            raise DataError(f"{self.source} holds no readable image ({len(self.skipped)} unreadable)")
        labels, label_names = _labels_of(self.names)
        return ImageData(np.stack(self.images), labels, label_names, self.source, tuple(self.skipped))


def _labels_of(names: list[str]) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Class labels from the folder each image lies in; none if they all lie in one."""
    folders = [str(Path(name).parent) for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2:
        return None, None
    number = {folder: label for label, folder in enumerate(classes)}
    return np.array([number[folder] for folder in folders], np.int64), tuple(classes)


def _is_image(name: str) -> bool:
    path = Path(name)
    # Dot files are macOS resource forks and editors' leftovers, never pictures.
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _load_folder(folder: Path, image_size: int | None, channels: int, strict: bool) -> ImageData:
    paths = sorted(path for path in folder.rglob("*") if _is_image(path.name) and path.is_file())
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    collector = _Collector(str(folder), image_size, channels, strict)
    if _decoded_bytes(paths, image_size, channels) > LARGEST_IN_MEMORY_BYTES:
        return _lazy_folder(folder, paths, collector)
    for path in paths:
        collector.add(str(path.relative_to(folder)), path)
    return collector.finish()


def _load_tar(path: Path, image_size: int | None, channels: int, strict: bool) -> ImageData:
    """Reads members into memory one by one; nothing is written, so names in the archive cannot do harm."""
    collector = _Collector(str(path), image_size, channels, strict)
    try:
        for name, content in sorted(_tar_images(path)):
            collector.add(name, content)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{path} is not a readable tar archive: {error}") from error
    if not collector.images and not collector.skipped:
        raise DataError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return collector.finish()


def _tar_images(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            if member.isfile() and _is_image(member.name):
                stream = archive.extractfile(member)
                if stream is not None:
                    yield member.name, stream.read()


# Folders larger than memory


class LazyFolder:
    """Images of a folder, decoded when a batch asks for them."""

    def __init__(self, paths: list[Path], image_size: int, channels: int):
        self.paths, self.image_size, self.channels = paths, image_size, channels
        self.shape = (len(paths), image_size, image_size, channels)
        self._pool = ThreadPoolExecutor(8)

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack(list(self._pool.map(self._decode, index.tolist())))

    def _decode(self, index: int) -> NDArray[np.uint8]:
        try:
            return decode_image(self.paths[index], self.image_size, self.channels)
        except _UNREADABLE as error:
            raise DataError(f"cannot read the image {self.paths[index]}: {error}") from error


def _decoded_bytes(paths: list[Path], image_size: int | None, channels: int) -> int:
    """Estimated from the first readable image if no size is given."""
    if image_size is not None:
        return len(paths) * image_size * image_size * channels
    for path in paths:
        try:
            with Image.open(path) as image:
                return len(paths) * image.width * image.height * channels
        except _UNREADABLE:
            continue
    return 0


def _lazy_folder(folder: Path, paths: list[Path], collector: _Collector) -> ImageData:
    if collector.image_size is None:
        raise DataError(f"{folder} decodes to more than 2 GiB; give image_size, so that it can be read piece by piece")
    good = []
    for path in paths:
        try:
            with Image.open(path) as image:
                image.verify()
            good.append(path)
        except _UNREADABLE as error:
            collector.skip(str(path.relative_to(folder)), error)
    if collector.skipped:
        warnings.warn(f"skipped {len(collector.skipped)} unreadable images of {folder}", stacklevel=4)
    if not good:
        raise DataError(f"{folder} holds no readable image ({len(collector.skipped)} unreadable)")
    labels, label_names = _labels_of([str(path.relative_to(folder)) for path in good])
    images = LazyFolder(good, collector.image_size, collector.channels)
    return ImageData(images, labels, label_names, str(folder), tuple(collector.skipped))


# Arrays

IMAGE_KEYS = ("arr_0", "x", "images")
LABEL_KEYS = ("arr_1", "y", "labels")


def _load_array(path: Path, image_size: int | None, channels: int) -> ImageData:
    labels = None
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                images = loaded[_first_key(path, loaded.files, IMAGE_KEYS)]
                label_key = next((key for key in LABEL_KEYS if key in loaded.files), None)
                labels = None if label_key is None else loaded[label_key]
        else:
            images = loaded
    except DataError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a readable {path.suffix} file: {error}") from error
    pixels = _as_nhwc(path, images, channels)
    if image_size is not None and pixels.shape[1:3] != (image_size, image_size):
        mode = MODES[channels]
        fitted = (_fit(Image.fromarray(p.squeeze(-1) if mode == "L" else p), image_size) for p in pixels)
        pixels = np.stack([np.asarray(p).reshape(image_size, image_size, channels) for p in fitted])
    return ImageData(pixels, *_array_labels(path, labels, len(pixels)), str(path))


def _first_key(path: Path, found: Iterable[str], wanted: tuple[str, ...]) -> str:
    names = list(found)
    for key in wanted:
        if key in names:
            return key
    raise DataError(f"{path} must hold its images under one of {', '.join(wanted)}; found {', '.join(names) or 'none'}")


def _as_nhwc(path: Path, images: NDArray, channels: int) -> NDArray[np.uint8]:
    if images.dtype != np.uint8:
        raise DataError(f"{path} must hold uint8 images (0 .. 255); got {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    elif images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise DataError(f"{path} must be [n, H, W, C], [n, H, W] or [n, C, H, W] with C 1 or 3; got {images.shape}")
    if not len(images):
        raise DataError(f"{path} holds no images: its shape is {images.shape}")
    if images.shape[-1] == channels:
        return np.ascontiguousarray(images)
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    return np.stack([np.asarray(Image.fromarray(rgb).convert("L"))[..., None] for rgb in images])


def _array_labels(
    path: Path, labels: NDArray | None, count: int
) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    if labels is None:
        return None, None
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise DataError(
            f"{path}: labels must be {count} whole numbers >= 0, one an image; got {labels.dtype} {labels.shape}"
        )
    return labels.astype(np.int64), tuple(str(label) for label in range(int(labels.max()) + 1))
