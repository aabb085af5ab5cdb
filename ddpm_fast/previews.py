"""A grid of samples as one picture: what a training run shows of itself."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .train_state import write_atomically

SMALLEST_TILE = 64  # pixels; smaller images are enlarged by a whole factor up to about this


def image_grid(
    x: Tensor,  # [n, C, H, W] in [-1, 1], C 1 or 3
) -> NDArray[np.uint8]:  # [rows * H, columns * W, C], each image enlarged
    """Images side by side in a nearly square grid, row by row; empty tiles are white."""
    pixels = ((x.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    n, height, width, channels = pixels.shape
    factor = max(1, SMALLEST_TILE // max(height, width))
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    tiles = np.full((rows * columns, height, width, channels), 255, np.uint8)
    tiles[:n] = pixels
    tiles = tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    return (
        tiles.reshape(rows, columns, *tiles.shape[1:])
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * tiles.shape[1], columns * tiles.shape[2], channels)
    )


def save_grid(path: Path, x: Tensor) -> None:
    """Writes ``image_grid(x)`` as a PNG, atomically."""
    grid = image_grid(x)
    image = Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda stream: stream.write(buffer.getvalue()))
