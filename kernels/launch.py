"""How a kernel is launched, as data: pure functions of shape, dtype and architecture, each with its reason.

Nothing is tuned at run time. Whatever sets the order of a reduction (tile sizes along it, warps, parts)
follows from shape and dtype and never from the batch size, so a sample is bitwise the same in any batch.

This module is also the one place that meets Triton, so that every kernel file imports where it is missing:
take ``tl``, ``triton``, ``jit`` and ``constexpr`` from here, and call ``require`` before a launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


@dataclass(frozen=True)
class Launch:
    """One launch choice. ``meta`` holds the kernel's block sizes, named as its constexpr parameters."""

    num_warps: int
    num_stages: int
    meta: Mapping[str, int]
    reason: str

    def options(self) -> dict[str, int]:
        """The keyword arguments of ``kernel[grid](...)``."""
        return {**self.meta, "num_warps": self.num_warps, "num_stages": self.num_stages}


def jit(fn: Any) -> Any:
    """``triton.jit``, or the plain function where Triton is missing (`require` then stops the launch)."""
    return fn if triton is None else triton.jit(fn)


def constexpr(value: Any) -> Any:
    """``tl.constexpr(value)`` for a module-level constant that device code reads."""
    return value if tl is None else tl.constexpr(value)


def require(kernel: Any, *tensors: Tensor | None) -> None:
    """Raise unless ``kernel`` can run on ``tensors``: Triton is there, and they share a CUDA device.

    In Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported) any device will do.
    """
    if triton is None:
        raise RuntimeError(
            'the fused kernels need Triton, which is not installed; install triton, or use ops="reference" or "cpu"'
        )
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        raise ValueError(f"a kernel needs all tensors on one device; got {sorted(map(str, devices))}; move them")
    interpreted = not isinstance(kernel, triton.JITFunction)
    if not interpreted and any(d.type != "cuda" for d in devices):
        raise RuntimeError(
            f"the fused kernels need CUDA tensors; got {devices.pop()}; move them to a GPU, "
            'use ops="reference" or "cpu", or set TRITON_INTERPRET=1 before Triton is imported'
        )


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def strides(t: Tensor, name: str) -> tuple[int, int, int]:
    """(image, channel, pixel) strides of t [N, C, H, W], whose pixels must be evenly spaced: row after row."""
    _, _, h, w = t.shape
    s_n, s_c, s_h, s_w = t.stride()
    if h > 1 and w > 1 and s_h != w * s_w:
        raise ValueError(
            f"the fused kernels need evenly spaced pixels (stride H == W * stride W); got {name} {tuple(t.shape)} with "
            f"strides {tuple(t.stride())}; make it contiguous, or contiguous(memory_format=torch.channels_last)"
        )
    return s_n, s_c, s_w if w > 1 else s_h
