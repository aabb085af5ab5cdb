"""Fingerprints of a diffusers network and scheduler: equal as long as neither has been changed since.

They hold the objects that they speak of, so that no other object can come to lie at the same address.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
# What a scheduler's set_timesteps writes: a pipeline calls it before it draws.
_PER_CALL = ("timesteps", "num_inference_steps", "custom_timesteps")
# Methods by which a scheduler draws.
DRAWING = ("set_timesteps", "step", "previous_timestep", "_get_variance", "_threshold_sample")


class _Same:
    """An object, equal to itself alone."""

    __slots__ = ("thing",)

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _mark(value: Any) -> object:
    """Plain values by themselves, containers by what they hold, all else by identity."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        items = [(key, _mark(item)) for key, item in value.items()]
        return items, _mark(getattr(value, "__dict__", None))  # diffusers reads a FrozenDict's attributes
    if isinstance(value, (list, tuple)):
        return [_mark(item) for item in value]
    return _Same(value)


def of_network(outer: Any, unet: Any) -> object:
    """A fingerprint of a pipeline's network, in two parts.

    - Of each weight its address, dtype, version and the sum of its bits: a change through ``.data``, as diffusers'
      EMAModel makes it, leaves the version as it was.
    - Of each module its class, the class's ``forward`` and ``__call__``, and its attributes: hooks, replaced methods,
      padding modes. What lies inside other objects, such as an attention processor's own attributes, is not seen.

    Args:
        outer: the network as the pipeline has it, with the wrappers of torch.compile or DataParallel.
        unet: the UNet2DModel inside.
    """
    weights = list(unet.state_dict(keep_vars=True).values())
    if any(w.is_meta for w in weights):
        raise ValueError("the pipeline's weights must be in memory; some are on meta: load it without offloading")
    marks = [(w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights]
    with torch.no_grad():
        sums = [w.view(_BITS[w.element_size()]).sum() for w in weights]
        bits = torch.stack([s.to(weights[0].device) for s in sums]).tolist()
    hooks = [_mark(getattr(nn.modules.module, f"_global_forward_{kind}hooks", None)) for kind in ("", "pre_")]
    modules = [
        (_Same(type(m)), _Same(type(m).forward), _Same(type(m).__call__), _mark(vars(m))) for m in outer.modules()
    ]
    return marks, bits, hooks, modules


def of_scheduler(scheduler: Any) -> object:
    """A fingerprint of a scheduler: its class, its attributes, and the methods of its class by which it draws.

    The values of ``alphas_cumprod`` are not in it.
    """
    attributes = {k: v for k, v in vars(scheduler).items() if k not in _PER_CALL}
    single = {k: v.item() for k, v in attributes.items() if isinstance(v, torch.Tensor) and v.numel() == 1}
    methods = [_Same(getattr(type(scheduler), name, None)) for name in DRAWING]
    return _Same(scheduler), _Same(type(scheduler)), _mark({**attributes, **single}), methods
