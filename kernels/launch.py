"""How a kernel is launched, as data: pure functions of shape, dtype and architecture, each with its reason.

Nothing is tuned at run time. Whatever sets the order of a reduction (tile sizes along it, warps, parts)
follows from shape and dtype and never from the batch size, so a sample is bitwise the same in any batch.

This module is also the one place that meets Triton, so that every kernel file imports where it is missing:
take ``tl``, ``triton``, ``jit`` and ``constexpr`` from here, call ``require`` before a launch, and launch by ``start``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None  # type: ignore[assignment]

_only_compiling: ContextVar[bool] = ContextVar("only compiling", default=False)
# Above this many parts, merging statistics in every program of `norm_act` would cost more than its own tile.
MAX_PARTS = 64
# a * b + c is one instruction and rounds once. This decides bits and Triton's default for it is about to change, so
# every launch states it.
FUSED_MULTIPLY_ADD = True


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


@jit
def after_previous():
    """Wait for the launch before this one to end, then let the one behind it be set up: a kernel's first instructions.

    Each of our kernels begins so where PDL is set, in every program, before it touches memory. A launch that is set up
    early then finds all before it done, and not just the last: that one waited before it let anyone be set up.
    """
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which multiplies bfloat16 as bit patterns."""
    return triton is not None and not isinstance(after_previous, triton.JITFunction)


def start(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, pdl: bool = False, **options: Any
) -> None:
    """``kernel[grid](...)`` on ``device``, with what holds for every launch (`FUSED_MULTIPLY_ADD`).

    Args:
        device: that of the tensors; Triton alone would take whichever device is current.
        pdl: a programmatic dependent launch, where the device has them (sm_90 and newer). The kernel has to call
            `after_previous` under its constexpr PDL.
    """
    options["enable_fp_fusion"] = FUSED_MULTIPLY_ADD
    if pdl and isinstance(kernel, triton.JITFunction) and torch.cuda.get_device_capability(device) >= (9, 0):
        options |= {"PDL": True, "launch_pdl": True}
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if _only_compiling.get():
            kernel.warmup(*arguments, grid=grid, **options)
        else:
            kernel[grid](*arguments, **options)


def compile_ahead(
    run: Callable[[], object],
    jobs: int | None = None,  # kernels at a time; None: one a core
) -> None:
    """Compile what ``run`` launches by `start`, launching none of it: many kernels at a time, where they would wait
    for one another if each were compiled at its first launch. In the interpreter ``run`` is not called.
    """
    if triton is None or interpreted():
        return
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool, triton.AsyncCompileMode(pool):
        token = _only_compiling.set(True)
        try:
            run()
        finally:
            _only_compiling.reset(token)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def strides(t: Tensor, name: str) -> tuple[int, int, int]:
    """(image, channel, pixel) strides of t [N, C, H, W], whose pixels must be evenly spaced: row after row."""
    _, c, h, w = t.shape
    s_n, s_c, s_h, s_w = t.stride()
    if (c - 1) * s_c + (h - 1) * s_h + (w - 1) * s_w >= 2**31:
        raise ValueError(
            f"the fused kernels count the values of one image in 32 bits; got {name} {tuple(t.shape)} with strides "
            f"{tuple(t.stride())}; use smaller images, or reference"
        )
    if h > 1 and w > 1 and s_h != w * s_w:
        raise ValueError(
            f"the fused kernels need evenly spaced pixels (stride H == W * stride W); got {name} {tuple(t.shape)} with "
            f"strides {tuple(t.stride())}; make it contiguous, or contiguous(memory_format=torch.channels_last)"
        )
    return s_n, s_c, s_w if w > 1 else s_h


def step_launch(
    channels: int,
    low_channels: int,  # 0 without a low-precision copy
    pixels: int,  # H * W
) -> Launch:
    """CP channels x BLOCK_P pixels a program; the low-precision tile is widened from CP to LOW_CP channels."""
    if channels <= 16 and low_channels <= 64:
        cp = next_power_of_2(channels)
        low_cp = max(cp, next_power_of_2(low_channels))
        why = "all channels in one tile, noise drawn for the real ones only"
    else:
        cp = low_cp = 16
        why = "many channels: tiles of 16 cover the padding too"
    block_p = max(4, min(1024 // cp, next_power_of_2(pixels)))
    return Launch(
        num_warps=4 if cp * block_p >= 512 else 1,
        num_stages=1,
        meta={"CP": cp, "LOW_CP": low_cp, "BLOCK_P": block_p, "ALIGNED": pixels % 4 == 0},
        reason=f"{why}; 1024 values a program give each of 128 threads 8: two Philox blocks, 16 bytes of bf16",
    )


def norm_tile_launch(
    channels: int,
    groups: int,
    pixels: int,  # H * W
    itemsize: int,
) -> Launch | None:
    """Whole groups in one tile of at most 8192 values; None where even one group is larger."""
    cg = channels // groups
    cgp, block_p = next_power_of_2(cg), next_power_of_2(pixels)
    if cgp * block_p > 8192:
        return None
    wanted = max(1, 64 // (cg * itemsize))  # neighbouring groups up to 64 bytes, two memory sectors
    ng = min(next_power_of_2(wanted), next_power_of_2(groups), max(1, 4096 // (cgp * block_p)))
    return Launch(
        num_warps=8 if ng * cgp * block_p > 4096 else 4 if ng * cgp * block_p > 512 else 1,
        num_stages=1,
        meta={"CGP": cgp, "NG": ng, "BLOCK_P": block_p},
        reason="the tile holds whole groups, so x is read once; at most 32 values a thread, no spills",
    )


def norm_apply_launch(channels: int, groups: int, pixels: int, itemsize: int, parts: int) -> Launch:
    """Channel blocks that divide C where they can, and enough pixels to pay for merging ``parts`` parts."""
    cg = channels // groups
    divisors = [b for b in (128, 64, 32) if channels % b == 0]
    block_c = divisors[0] if divisors else min(64, next_power_of_2(channels))
    starts = range(0, channels, block_c)
    touched = max((min(c + block_c, channels) - 1) // cg - c // cg + 1 for c in starts)
    ng, cgp = next_power_of_2(touched), next_power_of_2(cg)
    block_p = min(next_power_of_2(pixels), max(1, 4096 // block_c))
    run = min(next_power_of_2(pixels), max(128, next_power_of_2(24 * parts // itemsize)))
    return Launch(
        num_warps=4 if block_p * block_c > 512 else 1,
        num_stages=2,
        meta={
            "CGP": cgp,
            "NG": ng,
            "PB": max(1, min(next_power_of_2(parts), 2048 // (ng * cgp))),
            "TILES": max(1, run // block_p),
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
        },
        reason="4096 values a tile, 32 a thread in 16-byte vectors; a program reads at least twice as many bytes of "
        "x as of statistics",
    )


def stats_launch(channels: int, pixels: int) -> Launch:
    """Parts of at least 64 pixels, at most MAX_PARTS of them."""
    run = max(64, next_power_of_2(cdiv(pixels, MAX_PARTS)))
    block_p = min(64, next_power_of_2(pixels))
    return Launch(
        num_warps=4,
        num_stages=2,
        meta={
            "PARTS": cdiv(pixels, run),
            "TILES": max(1, min(run, next_power_of_2(pixels)) // block_p),
            "BLOCK_P": block_p,
            "BLOCK_C": min(64, next_power_of_2(channels)),
        },
        reason="64 x 64 values a tile, 128 bytes of a pixel's channels; parts by H * W alone, so bitwise the same "
        "in any batch",
    )
