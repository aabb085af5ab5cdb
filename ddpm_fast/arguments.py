"""What callers pass, checked: whatever is wrong is a ValueError of one line, before anything is computed."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def whole_number(name: str, value: object) -> int:
    """``value`` as an int: numpy's integers too, and tensors of one element. True is no number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a whole number; got {value!r}") from None


def check_seed(seed: int) -> None:
    """Raise ValueError unless torch takes the seed. A negative one is the one 2**64 above it."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2**63, 2**64), as for torch.manual_seed; got {seed}")


def number(name: str, value: object, positive: bool = False) -> float:
    """``value`` as a finite float. ValueError, naming the argument, for what is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value!r}")
    if positive and value <= 0:
        raise ValueError(f"{name} must be above 0; got {value!r}")
    return float(value)


def shape_of_images(value: Any) -> tuple[int, int, int]:
    """(C, H, W), each 1 or more."""
    try:
        c, h, w = (operator.index(size) for size in value)
    except (TypeError, ValueError):
        c = h = w = 0
    if min(c, h, w) < 1:
        raise ValueError(f"image_shape must be (C, H, W), three positive integers; got {value!r}")
    return c, h, w


def check_noise(noise: object, automatic: bool = False) -> None:
    """ValueError unless it is a name, a torch.Generator, or a list of them; for an ``automatic`` batch size, unless it
    does not depend on the batch."""
    if isinstance(noise, str):
        right = noise in ("philox", "torch")
    else:
        each = noise if isinstance(noise, (list, tuple)) else [noise]
        right = bool(each) and all(isinstance(g, torch.Generator) for g in each)
    if not right:
        raise ValueError(f"noise must be 'philox', 'torch', a torch.Generator or a list of one an image; got {noise!r}")
    if automatic and (noise == "torch" or isinstance(noise, torch.Generator)):
        raise ValueError(
            "batch_size='auto' needs noise that does not depend on the batch; got one torch generator for all "
            "images; use noise='philox', a list of one generator an image, or a number"
        )


def whole_labels(labels: Any, device: torch.device) -> Tensor:  # [] or [n] int64 on the device
    """Class numbers: one, or one an image. ValueError for other shapes and for what are no whole numbers."""
    given = labels_tensor(labels, device)
    check_labels(given)
    return given.to(torch.int64)


def labels_tensor(labels: Any, device: torch.device) -> Tensor:
    """Labels as a tensor. ValueError for what are no numbers."""
    try:
        return torch.as_tensor(labels, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"labels must be whole numbers; got {str(labels)[:80]!r}") from None


def check_labels(labels: Tensor) -> None:
    """ValueError unless these are class numbers, one or [n]; says what to do with a column and with one-hot rows."""
    if labels.ndim > 1:
        shape = list(labels.shape)
        what = f"labels must be class numbers of shape [n], one an image; got shape {shape}"
        if shape[1:] == [1] * (labels.ndim - 1):
            raise ValueError(f"{what}: pass labels.reshape(-1)")
        if labels.ndim == 2 and bool(((labels == 0) | (labels == 1)).all() & (labels.sum(1) == 1).all()):
            raise ValueError(f"{what}, one-hot rows: pass labels.argmax(1)")
        raise ValueError(what)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(f"labels must be whole numbers; got {kind} numbers: pass labels.long() if they are classes")


def check_class_features(labels: Tensor, width: int) -> None:
    """ValueError unless these are embeddings [n, width], as class_embed_type="identity" takes them."""
    if labels.ndim != 2 or labels.shape[1] != width:
        raise ValueError(
            f"this model takes class embeddings for labels, of shape [n, {width}] (class_embed_type is 'identity'); "
            f"got shape {list(labels.shape)}"
        )


def check_device(device: torch.device) -> torch.device:
    """It. ValueError for a GPU where torch sees none."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r} cannot be had: torch sees no CUDA GPU here; see ddpm-fast doctor")
    return device


def dtype_called(value: object, allowed: Iterable[torch.dtype] = DTYPES.values()) -> torch.dtype:
    """One of the ``allowed`` dtypes, by default those that networks compute in; given as such or by name ("bfloat16").

    Raises ValueError for any other.
    """
    known = {dtype_name(dtype): dtype for dtype in allowed}
    found = known.get(value) if isinstance(value, str) else value
    if isinstance(found, torch.dtype) and found in known.values():
        return found
    got = value if isinstance(value, torch.dtype) else repr(value)
    raise ValueError(f"dtype must be one of {', '.join(known)}; got {got}")


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def batch_size_of(value: object) -> int | str:
    """A number of images, 1 or more, or "auto"."""
    if isinstance(value, str) and value == "auto":
        return value
    try:
        size = whole_number("batch_size", value)
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size must be a positive integer or 'auto'; got {value!r}")
    return size
