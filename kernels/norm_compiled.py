"""GroupNorm, time embedding and activation on a CPU, compiled on the user's machine: two passes and no copies.

One pass measures each channel, one reads [x, skip] where they lie, normalises, activates and rounds. Without a
compiler norm_cpu.py does the same by torch's operations, which takes three to six passes.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from .cpu_source import NORMALISATION, VECTORS
from .native import ELEMENTS, at, functions

RAW, AFFINE, AFFINE_SILU = range(3)  # what is done to an element that is read, in the source
ACTS = {"silu": AFFINE_SILU, "swish": AFFINE_SILU, "none": AFFINE}

ENTRY = r"""
extern "C" void norm_act(T* y, const T* x, const T* skip, const T* residual, int act, int64_t n, int64_t h, int64_t w,
                         int64_t c1, int64_t c2, int64_t groups, double eps, const float* weight, const float* bias,
                         const float* bias_row, int64_t bias_stride, const float* scale_shift, int64_t shift_stride,
                         int64_t rows, int threads) {
    const int64_t c = c1 + c2, parts = n * ((h + rows - 1) / rows);
    const std::unique_ptr<float[]> stats(new float[parts * 2 * c]), table(new float[2 * n * c]);
    float *beside = stats.get() + parts * 2 * c1, *scale = table.get(), *shift = scale + n * c;
    statistics(stats.get(), x, n, h, w, c1, rows, threads);
    if (c2) statistics(beside, skip, n, h, w, c2, rows, threads);
    affine(scale, shift, {stats.get(), c1, rows}, {beside, c2, rows}, n, h, w, groups, eps, weight, bias, bias_row,
           bias_stride, scale_shift, shift_stride, threads);
    norm_apply_act(y, {x, skip, scale, shift, n, h, w, c1, c2}, act, residual, threads);
}
"""
SOURCE = "\n".join((VECTORS, NORMALISATION, ENTRY))

_P, _J = c_void_p, c_int64
_SIGNATURES: dict[str, list[type]] = {
    "norm_act": [_P, _P, _P, _P, c_int, *[_J] * 6, c_double, _P, _P, _P, _J, _P, _J, _J, c_int],
}


def suits(x: Tensor, channels: int, groups: int, act: str) -> bool:
    """Whether `CompiledNorm` computes this."""
    return x.device.type == "cpu" and x.dtype in ELEMENTS and act in ACTS and channels % groups == 0


class CompiledNorm:
    """`reference.norm_act` for the element type that a library of `SOURCE` was compiled for."""

    def __init__(self, library: ctypes.CDLL):
        self._norm_act = functions(library, _SIGNATURES)["norm_act"]

    def __call__(
        self,
        x: Tensor,  # [N, C1, H, W], channels_last
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        eps: float,
        *,
        skip: Tensor | None = None,  # [N, C2, H, W], channels_last
        act: str = "silu",
        bias_row: Tensor | None = None,
        scale_shift: Tensor | None = None,
        row: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # [N, C, H, W], channels_last, in x's dtype
        n, c1, h, w = x.shape
        c2 = 0 if skip is None else skip.shape[1]
        y = torch.empty((n, c1 + c2, h, w), dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
        maps = [None if t is None else t.to(x.dtype).contiguous(memory_format=torch.channels_last)
                for t in (x, skip, residual)]  # fmt: skip
        vectors = vector(weight), vector(bias)
        before, after = table_rows(bias_row, row, n), table_rows(scale_shift, row, n)
        self._norm_act(
            at(y), *map(at, maps), ACTS[act], n, h, w, c1, c2, groups, eps, *map(at, vectors),
            at(before), stride(before), at(after), stride(after), rows_of_run(h, w),
            torch.get_num_threads(),
        )  # fmt: skip
        return y


def rows_of_run(height: int, width: int) -> int:
    """Rows of an image whose moments are summed at once: float32 sums of many more pixels would round."""
    return max(1, min(height, 64 // width))


def vector(x: Tensor | None) -> Tensor | None:
    """float32 and contiguous: x itself where it is so."""
    return None if x is None else x.float().contiguous()


def table_rows(table: Tensor | None, row: Tensor | None, n: int) -> Tensor | None:
    """[R, C] -> float32 [1 or N, C]: the row that is read, or one for each of n images."""
    if table is None:
        return None
    if row is None and len(table) not in (1, n):
        raise ValueError(f"a table without a row to read needs one row, or one an image; got {len(table)} for {n}")
    return vector(table if row is None else table[int(row[0])][None])


def stride(table: Tensor | None) -> int:
    """From one image's row to the next one's: 0 where all have the same."""
    return 0 if table is None or len(table) == 1 else table.shape[1]
