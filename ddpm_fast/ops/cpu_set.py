"""The operations of a CPU: channels_last maps, weights arranged for oneDNN, nothing compiled, ready at once.

A feature map is a plain channels_last tensor. float32 is exact up to rounding; bfloat16 and float16 compute in
their dtype where oneDNN has kernels for it on this processor, else in float32 over weights of that dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import host_memory, norm_cpu, onednn, reference, upsample_difference
from .sets import Ops


def build(keep_memory: bool = True) -> Ops:
    """The set; on any processor, with or without oneDNN. ``keep_memory``: see `ops.cpu`."""
    if keep_memory:
        host_memory.keep_freed_memory()
    return Ops(
        name="cpu",
        norm_act=_norm_act,
        conv=_conv,
        upsample_conv=_upsample_conv,
        upsample=lambda x: channels_last(reference.upsample(x)),
        downsample=lambda x: channels_last(reference.downsample(x)),
        attention=attention,
        sampler_step=reference.sampler_step,
        enter=enter,
        pack_conv=pack_conv,
        pack_upsample_conv=pack_upsample_conv,
        falls_back=falls_back,
    )


def enter(x: Tensor) -> Tensor:
    """[N, C, H, W] in any memory format, on the CPU -> the same in channels_last."""
    if x.device.type not in ("cpu", "meta"):
        raise ValueError(
            f'ops="cpu" needs tensors on the CPU; got one on {x.device}; use "reference" or "triton" there'
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            'ops="cpu" is for inference and has no gradients; got a tensor that requires them; run under '
            'torch.no_grad(), or train with ops="reference"'
        )
    return channels_last(x)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def falls_back(operation: str, arguments: Mapping[str, Any]) -> str | None:
    """Why a call runs on the reference operation, or None."""
    image = arguments["out"] if operation == "sampler_step" else arguments.get("x")
    if image is not None and image.dtype not in onednn.DTYPES:
        return f"nothing is packed in {image.dtype}"
    if operation == "conv" and isinstance(arguments["weight"], Tensor):
        return "the weights are not packed; prepare the model"
    return None


def pack_conv(weight: Tensor, *, dtype: torch.dtype, channels: tuple[int, ...] | None = None) -> Any:
    if dtype not in onednn.DTYPES:
        return weight.to(dtype, copy=True)
    return onednn.pack_conv(weight, dtype=dtype, channels=channels)


def pack_upsample_conv(weight: Tensor, *, dtype: torch.dtype) -> Any:
    if dtype not in onednn.DTYPES:
        return weight.to(dtype, copy=True)
    return upsample_difference.pack_upsample_conv(weight, dtype=dtype)


def attention(qkv: Tensor, heads: int) -> Tensor:
    """`reference.attention`: over channels_last, q, k and v are views."""
    return channels_last(reference.attention(qkv, heads))


def _norm_act(
    *args: Any, stats: Any = None, skip_stats: Any = None, out: Tensor | None = None, **kwargs: Any
) -> Tensor:
    y = norm_cpu.norm_act(*args, **kwargs)
    return y if out is None else out.copy_(y)


def _conv(*args: Any, with_stats: bool = False, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    y = onednn.conv(*args, **kwargs)
    return y if out is None else out.copy_(y)


def _upsample_conv(*args: Any, with_stats: bool = False, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    y = upsample_difference.upsample_conv(*args, **kwargs)
    return y if out is None else out.copy_(y)
