"""What functions compiled from our C++ are given: addresses of tensors, and the threads that torch itself uses."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ELEMENTS = {torch.float32: "float", torch.bfloat16: "bf16"}  # the sources' names of dtypes


def functions(library: ctypes.CDLL, signatures: Mapping[str, list[type]]) -> dict[str, Callable[..., Any]]:
    """The library's functions with their types declared; its loops run on torch's threads from now on."""
    found = {}
    for name, types in {"use_threads": [c_void_p], **signatures}.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
        found[name] = function
    found["use_threads"](_parallel())
    return found


def at(x: Tensor | None) -> int | None:
    """The address of a tensor's first element, or of nothing."""
    return None if x is None else x.data_ptr()


@cache
def _parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP that torch itself uses, or None."""
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
            return ctypes.cast(library.GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
