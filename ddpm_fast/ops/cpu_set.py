"""The operations of a CPU: channels_last maps and weights arranged for oneDNN, ready in a second or two.

A feature map is a plain channels_last tensor. float32 is exact up to rounding; bfloat16 and float16 compute in
their dtype where oneDNN has kernels for it on this processor, else in float32 over weights of that dtype. Where there
is a C++ compiler, normalisation is compiled once, at its first use; without, torch's operations do it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..kernels import host_memory, norm_compiled, norm_cpu, onednn, reference, upsample_difference
from ..kernels.native import ELEMENTS
from ..kernels.norm_compiled import CompiledNorm
from ..stages import stage
from . import compiled
from .sets import Ops


def build(keep_memory: bool = True, compiled: bool = True) -> Ops:
    """The set; on any processor, with or without oneDNN. Its options are those of `ops.cpu`."""
    if keep_memory:
        host_memory.keep_freed_memory()
    return Ops(
        name="cpu",
        norm_act=_norm_act if compiled else partial(_norm_act, compiled=False),
        conv=_conv,
        upsample_conv=_upsample_conv,
        upsample=lambda x: channels_last(reference.upsample(x)),
        downsample=lambda x: channels_last(reference.downsample(x)),
        attention=attention,
        sampler_step=reference.sampler_step,
        enter=enter,
        pack_conv=pack_conv,
        pack_upsample_conv=pack_upsample_conv,
        normalises=partial(normalises_by, compiled=compiled),
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


def attention(qkv: Tensor, heads: int) -> Tensor:  # [N, 3C, H, W] -> [N, C, H, W]
    """`reference.attention`: over channels_last, q, k and v are views."""
    return channels_last(reference.attention(qkv, heads))


def _norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    *,
    act: str = "silu",
    skip: Tensor | None = None,
    stats: Any = None,
    skip_stats: Any = None,
    out: Tensor | None = None,
    compiled: bool = True,
    **kwargs: Any,
) -> Tensor:
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    norm = compiled_norm(x.dtype) if compiled and norm_compiled.suits(x, channels, groups, act) else None
    y = (norm or norm_cpu.norm_act)(x, weight, bias, groups, eps, act=act, skip=skip, **kwargs)
    return y if out is None else out.copy_(y)


@cache
def compiled_norm(dtype: torch.dtype) -> CompiledNorm | None:
    """The normalisation compiled for a dtype, now or from the cache; None where it cannot be.

    Warns, where there is a compiler and it fails: without it torch's operations are a few percent slower.
    """
    try:
        return build_norm(dtype)
    except compiled.NoCompilerError:
        return None
    except compiled.BuildError as error:
        compiled.warn_once(f"normalisation runs on torch's operations, a few percent slower, since {error.reason}")
        return None


def build_norm(dtype: torch.dtype) -> CompiledNorm:
    """The normalisation compiled for a dtype, now or from the cache. BuildError, with its cause, where it cannot be."""
    with stage("compiling the norm of cpu"):
        return CompiledNorm(compiled.library("norm", norm_compiled.SOURCE, {"ELEMENT": ELEMENTS[dtype]}))


def normalises_by(dtype: torch.dtype, compiled: bool = True) -> str:
    """ "compiled", or "torch": the two round differently."""
    return "compiled" if compiled and dtype in ELEMENTS and compiled_norm(dtype) is not None else "torch"


def _conv(*args: Any, with_stats: bool = False, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    y = onednn.conv(*args, **kwargs)
    return y if out is None else out.copy_(y)


def _upsample_conv(*args: Any, with_stats: bool = False, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    y = upsample_difference.upsample_conv(*args, **kwargs)
    return y if out is None else out.copy_(y)
