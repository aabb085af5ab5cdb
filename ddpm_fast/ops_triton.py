"""The fused operations: the kernels behind the signatures of `Ops`, and who carries the statistics.

A feature map is a `FeatureMap`: channels_last pixels, and the statistics that the convolution which made it
left for the next normalisation. What no kernel covers runs on the reference operation, call by call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import reference
from .kernels.cost import CHANNEL_PAD
from .kernels.reference import Shortcut
from .ops import Ops
from .recording import weight_shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SIGNATURES = {
    name: inspect.signature(getattr(reference, name)) for name in ("norm_act", "conv", "upsample_conv", "sampler_step")
}


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Pixels, and what their producer measured of them."""

    data: Tensor  # [N, C, H, W], channels_last
    stats: Tensor | None = None  # float32 [N, P, 3, C]: count, mean, centred sum of squares of each part

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype


def build() -> Ops:
    """The set; RuntimeError where Triton is not installed."""
    from .kernels import conv as conv_kernels
    from .kernels import conv_step, launch, norm_act, sampler_step

    if launch.triton is None:
        raise RuntimeError(
            'the fused operations need Triton, which is not installed; install triton, or use ops="reference" or "cpu"'
        )
    return Ops(
        name="triton",
        norm_act=_norm_act(norm_act.norm_act),
        conv=_convolution("conv", conv_kernels.conv, reference.conv),
        upsample_conv=_convolution("upsample_conv", conv_kernels.upsample_conv, reference.upsample_conv),
        upsample=lambda x: FeatureMap(reference.upsample(x.data)),
        downsample=lambda x: FeatureMap(reference.downsample(x.data)),
        attention=lambda qkv, heads: FeatureMap(reference.attention(qkv.data, heads)),
        sampler_step=_sampler_step(sampler_step.sampler_step),
        enter=enter,
        leave=leave,
        conv_step=lambda x, *args, **kwargs: conv_step.conv_step(x.data, *args, **kwargs),
        falls_back=falls_back,
    )


def enter(x: Tensor) -> FeatureMap:
    """[N, C, H, W] in any memory format -> a feature map without statistics.

    Channels are padded with zeros to CHANNEL_PAD, without which conv_in could not read 16 bytes at once. The
    low-precision copy that the sampler step leaves is so already, and is taken as it is.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise _no_gradients()
    missing = CHANNEL_PAD - x.shape[1]
    if missing > 0 and x.dtype in DTYPES:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    return FeatureMap(_channels_last(x))


def leave(x: FeatureMap) -> Tensor:
    return x.data


def falls_back(operation: str, arguments: Mapping[str, Any]) -> str | None:
    """Why no kernel covers this call, or None. ``arguments`` by the names of kernels/reference.py."""
    image = arguments["out"] if operation == "sampler_step" else arguments.get("x")
    if image is not None and image.dtype not in DTYPES:
        return f"no kernel computes in {image.dtype}"
    if operation == "sampler_step" and arguments["thresholding"] is not None:
        return "dynamic thresholding sorts whole images, for which there is no kernel"
    if operation == "norm_act" and arguments["act"] not in ("silu", "swish", "none"):
        return f"norm_act has no kernel with {arguments['act']}"
    if operation == "conv" and weight_shape(arguments["weight"])[2] not in (1, 3):
        return "conv has kernels for 3x3 and 1x1 only"
    return None


def _bind(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _SIGNATURES[operation].bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _norm_act(kernel: Callable[..., Tensor]) -> Callable[..., FeatureMap]:
    def norm_act(*args: Any, **kwargs: Any) -> FeatureMap:
        a = _bind("norm_act", args, kwargs)
        x, skip, residual = a.pop("x"), a.pop("skip"), a.pop("residual")
        a["stats"], a["skip_stats"] = x.stats, None if skip is None else skip.stats
        a |= {"x": x.data, "skip": _pixels(skip), "residual": _pixels(residual)}
        run = reference.norm_act if falls_back("norm_act", a) else kernel
        return FeatureMap(_channels_last(run(**a)))

    return norm_act


def _convolution(operation: str, kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., FeatureMap]:
    def convolution(*args: Any, **kwargs: Any) -> FeatureMap:
        a = _bind(operation, args, kwargs)
        if torch.is_grad_enabled() and getattr(a["weight"], "requires_grad", False):
            raise _no_gradients()
        for name in ("x", "skip", "residual"):
            if name in a:
                a[name] = _pixels(a[name])
        if a["shortcut"] is not None:
            s = a["shortcut"]
            a["shortcut"] = Shortcut(s.x.data, _pixels(s.skip), s.weight, s.bias)
        if a["time"] is not None:
            a["time"] = a["time"].contiguous()
        if not falls_back(operation, a):
            y = kernel(**a)
            return FeatureMap(*y) if a["with_stats"] else FeatureMap(y)
        a["with_stats"] = False  # the next normalisation makes its own
        return FeatureMap(_channels_last(plain(**a)))

    return convolution


def _sampler_step(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def sampler_step(*args: Any, **kwargs: Any) -> Tensor:
        a = _bind("sampler_step", args, kwargs)
        if falls_back("sampler_step", a):
            return reference.sampler_step(**a)
        del a["thresholding"]
        return kernel(**a)

    return sampler_step


def _pixels(x: FeatureMap | None) -> Tensor | None:
    return None if x is None else x.data


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _no_gradients() -> RuntimeError:
    return RuntimeError(
        'ops="triton" is for inference and has no gradients; got a tensor that requires them; '
        'run under torch.no_grad(), or train with ops="reference"'
    )
