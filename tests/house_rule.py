"""The house rule for floating point: err(ours, ref64) <= 2 * err(torch in the same dtype, ref64) + floor.

It holds for the largest error and for the RMS one. An error is scaled by max(rms(ref), |ref|), so that
values near zero are judged by the size of their tensor and large ones by their own. A result that is not finite is
infinitely wrong. A truth that is not finite, or torch's own result, is a mistake of the test: it could hold nobody to
anything, and by an infinite scale or allowance everything would pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_fast.kernels import reference

# Eight steps of float32: what two right orders of the same float32 sum may differ by.
FLOOR = 2.0**-20


class Error(NamedTuple):
    largest: float
    rms: float
    index: tuple[int, ...]  # of the largest


def error(ours: Tensor, ref64: Tensor) -> Error:
    """Scaled error of ours [...] against ref64 [...], which must be finite; infinite where ours is not."""
    ref = ref64.detach().double().cpu()
    got = ours.detach().double().cpu()
    assert bool(ref.isfinite().all()), "the truth is not finite: choose other inputs"
    largest = ref.abs().max().clamp_min(1e-30)
    rms = largest * (ref / largest).square().mean().sqrt()  # which no square overflows
    scale = ref.abs().clamp_min(rms).clamp_min(1e-30)
    e = ((got - ref).abs() / scale).nan_to_num(nan=math.inf, posinf=math.inf)
    where = int(e.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(where), e.shape))
    return Error(float(e.max()), float(e.square().mean().sqrt()), index)


def check(ours: Tensor, same_dtype_torch: Tensor, ref64: Tensor, floor: float = FLOOR, name: str = "result") -> None:
    """Assert the house rule; all three tensors have one shape, ref64 is the float64 truth.

    ``same_dtype_torch`` is what plain torch gives in the dtype of ``ours``.
    """
    assert ref64.dtype == torch.float64, f"the truth must be float64; got {ref64.dtype}"
    assert ref64.numel(), "an empty result proves nothing"
    assert ours.shape == ref64.shape == same_dtype_torch.shape, (ours.shape, same_dtype_torch.shape, ref64.shape)
    assert ours.dtype == same_dtype_torch.dtype, f"dtypes differ: {ours.dtype} and {same_dtype_torch.dtype}"
    assert bool(ref64.isfinite().all()), "the truth is not finite: choose other inputs"
    assert bool(same_dtype_torch.isfinite().all()), f"torch in {ours.dtype} is not finite: choose other inputs"
    unwritten = int(ours.isnan().sum())
    assert not unwritten, f"{name}: {unwritten} of {ours.numel()} values are NaN, first at {first_nan(ours)}"
    mine, theirs = error(ours, ref64), error(same_dtype_torch, ref64)
    for kind, a, b in (("largest", mine.largest, theirs.largest), ("RMS", mine.rms, theirs.rms)):
        if not a <= 2 * b + floor:
            i = mine.index
            raise AssertionError(
                f"{name}: {kind} error {a:.3e} exceeds 2 x {b:.3e} (torch in {ours.dtype}) + {floor:.1e}; largest "
                f"at {i} of {tuple(ours.shape)}: ours {float(ours[i]):.8g}, torch {float(same_dtype_torch[i]):.8g}, "
                f"truth {float(ref64[i]):.8g}"
            )


def first_nan(x: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in x.isnan().nonzero()[0])


def check_op(
    ours: Callable[..., Any], reference: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], **check_kwargs
) -> Any:
    """Run ours and the reference on the same arguments, hold ours to the house rule, and return its result.

    The truth is the reference on the arguments in float64; "torch in the same dtype" is it on them as they are.
    """
    got = ours(*args, **kwargs)
    same = reference(*args, **kwargs)
    truth = reference(*map(double, args), **{k: double(v) for k, v in kwargs.items()})
    check(got, same, truth, **check_kwargs)
    return got


def double(x: Any) -> Any:
    """Floating-point tensors in float64, tuples of them too; all else as it is."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, tuple):
        items = [double(i) for i in x]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
    return x


def poison(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """A buffer full of NaN: whatever a kernel leaves unwritten stays visible."""
    x = torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=memory_format)
    return x.fill_(float("nan"))


def fresh(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    seed: int,
    mean: float = 0.0,
    std: float = 1.0,
    channels_last: bool = True,
) -> Tensor:
    """Normal inputs drawn from ``seed``; four-dimensional ones in channels_last memory unless told otherwise."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(tuple(shape), generator=g) * std + mean).to(device=device, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 and channels_last else x


def normal64(
    seed: Tensor,  # int64 [1]
    ids: Tensor,  # int64 [N]
    step: int,
    shape: Sequence[int],  # (C, H, W)
) -> Tensor:  # [N, *shape] float64
    """The noise of DESIGN 7 in float64: the exact function of Philox's words, whose uniforms are float32."""
    count = math.prod(shape)
    mask = 0xFFFFFFFF
    seed, ids = seed.cpu(), ids.cpu()
    words = reference.philox_words(
        (seed & mask, seed >> 32 & mask),
        (torch.arange(-(-count // 4)), torch.tensor(step & mask), (ids & mask)[:, None], (ids >> 32 & mask)[:, None]),
    )
    z = torch.stack(box_muller64(words[0], words[1]) + box_muller64(words[2], words[3]), dim=-1)
    return z.flatten(1)[:, :count].reshape(len(ids), *shape)


def box_muller64(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals in float64 from words held in int64, with u = float32(w) * 2^-32 + 2^-33."""
    u0, u1 = ((w.float() * 2.0**-32 + 2.0**-33).double() for w in (w0, w1))
    r, a = (-2.0 * u0.log()).sqrt(), 2.0 * math.pi * u1
    return r * a.cos(), r * a.sin()
