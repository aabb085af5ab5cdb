"""Training images: folders, archives, arrays and drawn avatars, as uint8 in memory.

``load_data`` reads every supported source into an ``ImageData``. A batch is asked for by index, so that the
training loop alone decides which images a step sees.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..classes import classes_text
from .avatars import DEFAULT_COUNT, render_avatars
from .image_files import MODES, TAR_SUFFIXES, DataError, LazyFolder, Pixels, fit_square, read_folder, read_tar

__all__ = ["DataError", "ImageData", "load_data"]

IMAGE_KEYS = ("arr_0", "x", "images")
LABEL_KEYS = ("arr_1", "y", "labels")
MOST_CLASSES = 1_000_000  # more are ids or hashes, not classes


@dataclass(frozen=True)
class ImageData:
    """Images with optional class labels."""

    images: Pixels  # [n, H, W, C] uint8
    labels: NDArray[np.int64] | None = None  # [n], 0 .. num_classes - 1
    label_names: tuple[str, ...] | None = None
    source: str = ""
    skipped: tuple[str, ...] = field(default=())  # names of the images that could not be read
    sizes: frozenset[tuple[int, int]] = frozenset()  # (width, height) of the images before scaling, where that is known

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

    def describe(self) -> str:
        """What was read, in a line: how many images, their sizes, what was done to them, and the classes."""
        channels, height, width = self.image_shape
        sizes = sorted(self.sizes or {(width, height)}, key=lambda size: (size[0] * size[1], size))
        original = " to ".join(f"{w}x{h}" for w, h in dict.fromkeys((sizes[0], sizes[-1])))
        text = f"{len(self):,} image{'s' * (len(self) != 1)} {original}"
        text += f" from {self.source}" if self.source else ""
        if set(sizes) != {(width, height)}:
            square = all(w == h for w, h in sizes)
            text += f", {'scaled' if square else 'scaled and cropped'} to {width}x{height}"
        text += f", {'RGB' if channels == 3 else 'grey'}, "
        text += classes_text(self.num_classes, self.label_names) if self.num_classes else "no classes"
        return text + (f"; {len(self.skipped):,} unreadable skipped" if self.skipped else "")

    def digest(self) -> str:
        """A fingerprint of images and labels: a resumed training must see the same ones."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        if isinstance(self.images, LazyFolder):
            digest.update(self.images.fingerprint())
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
    if path.suffix.lower() in (".npz", ".npy") and path.is_file():
        return _load_array(path, image_size, channels)
    if path.is_dir():
        pictures = read_folder(path, image_size, channels, strict)
    elif path.name.lower().endswith(TAR_SUFFIXES):
        pictures = read_tar(path, image_size, channels, strict)
    else:
        raise _unknown(path)
    labels, label_names = _labels_of(pictures.names)
    return ImageData(pictures.images, labels, label_names, str(path), pictures.skipped, pictures.sizes)


def _labels_of(names: Sequence[str]) -> tuple[NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Class labels from the folder each image lies in, sorted by name; none if they all lie in one."""
    folders = [str(PurePosixPath(name).parent) for name in names]
    classes = sorted(set(folders))
    if len(classes) < 2:
        return None, None
    number = {folder: label for label, folder in enumerate(classes)}
    return np.array([number[folder] for folder in folders], np.int64), tuple(classes)


def _unknown(path: Path) -> DataError:
    return DataError(f"{path} is no training data that can be read: give a folder, .npz, .npy, .tar or avatars:STYLE")


def _load_avatars(text: str, image_size: int | None, channels: int) -> ImageData:
    style, _, count = text.removeprefix("avatars:").partition(":")
    if count and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise DataError(f"avatars data is written avatars:STYLE[:N] with N a positive number; got {text!r}")
    number = int(count) if count else DEFAULT_COUNT
    return ImageData(render_avatars(style, number, image_size, channels), source=f"avatars:{style}:{number}")


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
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable {path.suffix} file: {error}") from error
    pixels = _as_nhwc(path, images, channels)
    sizes = frozenset({(pixels.shape[2], pixels.shape[1])})
    if image_size is not None and pixels.shape[1:3] != (image_size, image_size):
        mode = MODES[channels]
        fitted = (fit_square(Image.fromarray(p.squeeze(-1) if mode == "L" else p), image_size) for p in pixels)
        pixels = np.stack([np.asarray(p).reshape(image_size, image_size, channels) for p in fitted])
    return ImageData(pixels, *_array_labels(path, labels, len(pixels)), str(path), sizes=sizes)


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
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: labels must be {count} integers, one an image; got {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= MOST_CLASSES:
        raise DataError(
            f"{path}: labels must be in 0 .. {MOST_CLASSES - 1}; got {labels.min()} .. {labels.max()}. Number them anew"
        )
    return labels.astype(np.int64), tuple(str(label) for label in range(int(labels.max()) + 1))
