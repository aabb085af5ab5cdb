"""Inputs, poisoned outputs and float64 noise for the tests, and `check_op` around an operation and its definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_fast.house_rule import FLOOR, allowed, check, error
from ddpm_fast.kernels import reference
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule


def excess(got: Tensor, forward: Callable[..., Tensor], *inputs: Any) -> float:
    """How many times the house rule's allowance ``got`` is off, at worst: it is right up to 1.

    ``forward`` is the definition: run in float64 it is the truth, and in float32 it shows what that dtype costs.
    A bound between two float32 networks would hold on some processors and not on others, which sum in other orders.
    """
    truth = forward(*map(double, inputs))
    ours, torchs = error(got, truth), error(forward(*inputs), truth)
    return max(ours.largest / allowed(torchs.largest), ours.rms / allowed(torchs.rms))


# How many times the one measured shake two chains may be apart: both round, and the largest element of one draw of
# random signs may be half of another's.
SHAKES = 4


def shake(out: Tensor, generator: torch.Generator) -> Tensor:
    """``out`` with every value moved up or down by `FLOOR`: what other orders of its float32 sums may give."""
    signs = torch.randint(0, 2, out.shape, generator=generator).to(out.dtype) * 2 - 1
    return out + FLOOR * signs * out.abs().clamp_min(out.square().mean().sqrt())


@contextmanager
def shaken(network: nn.Module) -> Iterator[None]:
    """Inside the block each output of ``network`` is shaken, with random signs of its own."""
    generator = torch.Generator().manual_seed(0)

    def move(module: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return shake(out, generator)
        if isinstance(out, tuple):
            return shake(out[0], generator), *out[1:]
        return type(out)(sample=shake(out.sample, generator))

    handle = network.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def rounding(network: nn.Module, draw: Callable[[], Any], drawn: Any) -> float:
    """How far a chain of ``network`` in float32 may be from ``drawn`` on another processor, at the worst element.

    A chain multiplies the rounding of each step by all later steps, by a factor that is the chain's own. It is
    measured: ``draw``, which gave ``drawn``, runs once more with every output of the network shaken.
    """
    with shaken(network):
        again = draw()
    return SHAKES * float(np.abs(np.asarray(again, float) - np.asarray(drawn, float)).max())


def same_chain(ours: Any, theirs: Any, network: nn.Module, draw: Callable[[], Any], tables: float = 0.0) -> bool:
    """Whether two chains of a network in float32 agree as far as rounding lets them on any processor.

    Args:
        ours, theirs: what they ended in.
        network: the one that ``theirs`` runs; its outputs are shaken if the chains differ by more than ``tables``.
        draw: draws ``theirs`` again.
        tables: what they may differ by for a reason other than rounding: diffusers' tables are float32.
    """
    a, b = np.asarray(ours, float), np.asarray(theirs, float)
    off = float(np.abs(a - b).max()) if a.shape == b.shape else np.inf
    return off <= tables or off <= tables + rounding(network, draw, theirs)


def states(model: Any, schedule: Schedule, **options: Any) -> Tensor:
    """x_T and x after every 50 steps of one image of seed 3, [K, 1, C, H, W]."""
    seen: list[Tensor] = []
    sampler = Sampler(model, schedule, batch_size=1, **options)
    sampler.sample(1, seed=3, interval=50, callback=lambda step, x: seen.append(x.clone()))
    return torch.stack(seen)


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
    """Floating-point tensors in float64, those in tuples and dictionaries too; all else as it is."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, dict):
        return {key: double(value) for key, value in x.items()}
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
