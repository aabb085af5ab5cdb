"""The house rule for floating point, in one place: the tests, `verify` and `bench` all judge by it.

    error(ours, float64) <= 2 * error(torch in the same dtype, float64) + FLOOR

It must hold for the largest error and for the RMS error. An error is divided by max(RMS of the truth, |truth|), so a
value near zero is judged by the size of its tensor and a large one by its own. A result that is not finite is
infinitely wrong; where torch's own is not finite, it allows nothing beyond the floor.

The rule is for single operations, networks and sampling steps, whose errors do not compound. A chain that runs freely
multiplies the error of each step by all later steps, so two right chains may differ by far more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

# Eight units of float32's last place: two correct orders of one float32 sum may differ by this much.
FLOOR = 2.0**-20


class Error(NamedTuple):
    """The error of one tensor, scaled as the house rule says."""

    largest: float
    rms: float
    psnr: float  # dB over the truth's own span, or that of images; infinite for equality


def scaled(got: Tensor, truth: Tensor) -> Tensor:
    """Each element's error, float64 and shaped like ``truth``; infinite where ``got`` is not finite.

    Raises:
        ValueError: the truth is not finite. An infinite scale would turn every error into zero.
    """
    truth = truth.detach().double()
    if not truth.isfinite().all():
        raise ValueError("the float64 truth is not finite, so nothing can be held to it")
    largest = truth.abs().max().clamp_min(1e-30)
    rms = largest * (truth / largest).square().mean().sqrt()  # no square overflows
    off = (got.detach().to(truth.device).double() - truth).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return off / truth.abs().clamp_min(rms).clamp_min(1e-30)


def error(got: Tensor, truth: Tensor, span: float | None = None) -> Error:
    """The error of ``got`` against the float64 ``truth``; infinite where ``got`` is not finite.

    Args:
        got: any dtype, on any device.
        truth: the same shape, float64.
        span: the range of values that PSNR is relative to; None takes the truth's own.

    Raises:
        ValueError: the truth is not finite.
    """
    off = scaled(got, truth)
    truth = truth.detach().double()
    span = float(truth.max() - truth.min()) if span is None else span
    mse = float((got.detach().to(truth.device).double() - truth).square().mean().nan_to_num(math.inf, math.inf))
    psnr = math.inf if mse == 0 else -math.inf if mse == math.inf or span == 0 else 10 * math.log10(span**2 / mse)
    return Error(float(off.max()), float(off.square().mean().sqrt()), psnr)


def worst(errors: Iterable[Error]) -> Error:
    """The worst of each measure over several tensors."""
    largest, rms, psnr = zip(*errors)
    return Error(max(largest), max(rms), min(psnr))


def allowed(theirs: float, floor: float = FLOOR, times: float = 2.0) -> float:
    """The most that an error may be where torch in the same dtype has ``theirs``; an infinite one allows the floor."""
    return times * theirs + floor if math.isfinite(theirs) else floor


def within(ours: Error, theirs: Error, floor: float = FLOOR) -> bool:
    """Whether ``ours`` keeps the house rule beside ``theirs``, the error of torch in the same dtype."""
    return ours.largest <= allowed(theirs.largest, floor) and ours.rms <= allowed(theirs.rms, floor)


def check(ours: Tensor, same_dtype_torch: Tensor, ref64: Tensor, floor: float = FLOOR, name: str = "result") -> None:
    """Assert that ``ours`` keeps the house rule.

    Args:
        ours: the result under test.
        same_dtype_torch: plain torch's result in the dtype of ``ours``.
        ref64: the float64 truth; all three have one shape.
        floor: the error that is allowed even where torch has none.
        name: the result's name in the message.

    Raises:
        AssertionError: the rule is broken; the message says by how much and where.
        ValueError: the arguments could prove nothing: shapes or dtypes differ, there are no values, or the truth or
            torch's result is not finite.
    """
    if ref64.dtype != torch.float64:
        raise ValueError(f"the truth must be float64; got {ref64.dtype}")
    if not ours.shape == ref64.shape == same_dtype_torch.shape:
        shapes = [tuple(t.shape) for t in (ours, same_dtype_torch, ref64)]
        raise ValueError(f"ours, torch's and the truth must have one shape; got {shapes}")
    if not ref64.numel():
        raise ValueError("an empty result proves nothing")
    if ours.dtype != same_dtype_torch.dtype:
        raise ValueError(f"ours and torch's must have one dtype; got {ours.dtype} and {same_dtype_torch.dtype}")
    if not bool(same_dtype_torch.isfinite().all()):
        raise ValueError(f"torch in {ours.dtype} is not finite: choose other inputs")
    theirs, off = error(same_dtype_torch, ref64), scaled(ours, ref64)
    nans = ours.isnan().nonzero()
    if len(nans):
        first = tuple(nans[0].tolist())
        raise AssertionError(f"{name}: {len(nans)} of {ours.numel()} values are NaN, first at {first}")
    mine = error(ours, ref64)
    if within(mine, theirs, floor):
        return
    kind = "largest" if mine.largest > allowed(theirs.largest, floor) else "RMS"
    a, b = getattr(mine, kind.lower()), getattr(theirs, kind.lower())
    i = tuple(int(k) for k in torch.unravel_index(off.argmax(), off.shape))
    raise AssertionError(
        f"{name}: {kind} error {a:.3e} exceeds 2 x {b:.3e} (torch in {ours.dtype}) + {floor:.1e}; largest "
        f"at {i} of {tuple(ours.shape)}: ours {float(ours[i]):.8g}, torch {float(same_dtype_torch[i]):.8g}, "
        f"truth {float(ref64[i]):.8g}"
    )


@contextmanager
def full_float32(wanted: bool = True) -> Iterator[None]:
    """No TF32 inside the block: on a GPU torch's float32 would otherwise be far from float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if wanted:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
