"""Images out: grids, folders, .npz, films. Every file appears whole or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .whole_files import make_folder, whole_file

__all__ = [
    "Film",
    "grid",
    "make_folder",
    "picture",
    "save_folder",
    "save_npz",
    "save_picture",
    "whole_file",
]

GRID_SIDE = 512  # pixels that a grid of small images is enlarged towards, by whole factors
STRIP_SIDE = 1200  # the same for a film strip, which is wide


def picture(image: np.ndarray) -> Image.Image:
    """[H, W, C] uint8 with C of 1, 3 or 4 -> a Pillow image."""
    check_channels(image.shape[2])
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def check_channels(channels: int, instead: str = "write an .npz instead") -> None:
    """ValueError unless a picture can have so many channels."""
    if channels not in (1, 3, 4):
        raise ValueError(f"a picture needs 1, 3 or 4 channels; got {channels}; {instead}")


def grid(images: np.ndarray, columns: int | None = None, gap: int = 1, side: int = GRID_SIDE) -> np.ndarray:
    """[n, H, W, C] uint8 -> one [H', W', C] picture, row by row, white between; small images are enlarged by
    whole factors as long as neither axis passes ``side`` pixels."""
    n, height, width, channels = images.shape
    if n == 0:
        raise ValueError("a grid needs at least one image; got none")
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    factor = max(1, side // max(columns * width, rows * height))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width, gap = height * factor, width * factor, gap * max(1, factor // 4)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet


def save_picture(path: str | Path, image: np.ndarray) -> None:
    """[H, W, C] uint8 as a PNG (or what the suffix says)."""
    suffix = Path(path).suffix.lower() or ".png"
    kind = Image.registered_extensions().get(suffix)
    if kind is None:
        raise ValueError(f"{path}: {suffix} is not a picture format; use .png")
    with whole_file(path) as file:
        picture(image).save(file, kind)


def save_npz(path: str | Path, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """``arr_0`` uint8 [n, H, W, C] (and ``arr_1``, labels): what the FID tools read."""
    arrays = {"arr_0": images} if labels is None else {"arr_0": images, "arr_1": labels}
    with whole_file(path) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


class Film:
    """Keeps x_t of the first images at about ``frames`` moments from x_T to x_0; pass `callback` to a sampler.

    `save` writes a strip (.png: one row an image, time to the right) or an animation (.gif).
    """

    def __init__(self, steps: int, to_uint8: Callable[[Tensor], Tensor], images: int = 8, frames: int = 12):
        moments = torch.linspace(0, steps, min(frames, steps + 1), device="cpu").round().long().tolist()
        self._wanted, self._images, self._to_uint8 = set(moments), images, to_uint8
        self.frames: list[np.ndarray] = []  # each [images, H, W, C] uint8
        self._steps = steps

    def callback(self, step: int, x: Tensor) -> None:
        if len(self.frames) == len(self._wanted):
            return  # later batches
        if step == 0:  # a batch that starts over, in halves
            self.frames.clear()
        if step in self._wanted:
            self.frames.append(self._to_uint8(x[: self._images]).cpu().numpy())

    def save(self, path: str | Path) -> None:
        path = Path(path)
        if path.suffix.lower() == ".gif":
            pages = [picture(grid(frame)) for frame in self.frames]
            hold = [120] * (len(pages) - 1) + [2000]
            with whole_file(path) as file:
                pages[0].save(file, "GIF", save_all=True, append_images=pages[1:], duration=hold, loop=0)
            return
        strip = np.stack(self.frames, axis=1).reshape(-1, *self.frames[0].shape[1:])
        save_picture(path, grid(strip, columns=len(self.frames), side=STRIP_SIDE))


def save_folder(folder: str | Path, images: np.ndarray, ids: Sequence[int]) -> None:
    """One PNG an image, named by its sample id."""
    for image, i in zip(images, ids):
        save_picture(Path(folder) / f"{i:06d}.png", image)
