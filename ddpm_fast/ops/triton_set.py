"""The fused operations: the kernels behind the signatures of `Ops`, and who carries the statistics.

A feature map is a `FeatureMap`: channels_last pixels, and the statistics that the convolution which made it
left for the next normalisation. What no kernel covers runs on the reference operation, call by call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reference
from ..kernels.cost import CHANNEL_PAD
from ..kernels.reference import Shortcut
from .buffers import Fresh, Memory
from .parts import Part, cut
from .records import weight_shape
from .sets import Ops

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


@dataclass(frozen=True, eq=False)
class Postponed:
    """A norm_act that the convolution which reads it runs in parts: its result never lies whole."""

    arguments: Mapping[str, Any]  # of norm_act
    shape: torch.Size
    parts: int
    run: Callable[[Mapping[str, Any], Tensor], Tensor]
    memory: Memory
    stats: None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.arguments["x"].dtype

    @property
    def data(self) -> Tensor:
        """The whole result after all, for whoever cannot take it in parts."""
        return self.run(self.arguments, self.memory.map(self.shape, self.dtype, self.arguments["x"].device))


def build(memory: Memory | None = None, pdl: bool = False) -> Ops:
    """The set, with its results where ``memory`` says; RuntimeError where Triton is not installed.

    pdl: every kernel as a programmatic dependent launch, where the device has them; see `sets.triton`.
    """
    from ..kernels import attention, conv_step, launch, norm_act, sampler_step
    from ..kernels import conv as conv_kernels

    if launch.triton is None:
        raise RuntimeError(
            'the fused operations need Triton, which is not installed; install triton, or use ops="reference" or "cpu"'
        )
    memory = memory or Fresh()

    def started(host: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(host, pdl=pdl)

    return Ops(
        name="triton",
        norm_act=_norm_act(started(norm_act.norm_act), memory),
        conv=_convolution("conv", started(conv_kernels.conv), reference.conv, memory),
        upsample_conv=_convolution(
            "upsample_conv", started(conv_kernels.upsample_conv), reference.upsample_conv, memory
        ),
        upsample=lambda x: _upsample(x, memory),
        downsample=lambda x: _downsample(x, memory),
        attention=_attention(started(attention.attention), memory),
        sampler_step=_sampler_step(started(sampler_step.sampler_step)),
        fir_upsample=lambda x: _outside(reference.fir_upsample(x.data), memory),
        fir_downsample=lambda x: _outside(reference.fir_downsample(x.data), memory),
        enter=enter,
        leave=leave,
        conv_step=lambda x, *args, **kwargs: conv_step.conv_step(x.data, *args, pdl=pdl, **kwargs),
        lay_by=lambda x, make: make if memory.again(x.data) else x,
        pack_conv=_pack(conv_kernels.pack_conv),
        pack_upsample_conv=_pack(conv_kernels.pack_upsample_conv),
        pack_step_conv=_pack(conv_step.pack_step_conv),
        input_channels=lambda channels, dtype: max(channels, CHANNEL_PAD) if dtype in DTYPES else channels,
        initial_noise=started(sampler_step.initial_noise),
        compile_ahead=launch.compile_ahead,
        placed=lambda memory: build(memory, pdl),
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
    image = arguments.get({"sampler_step": "out", "attention": "qkv"}.get(operation, "x"))
    if image is not None and image.dtype not in DTYPES:
        return f"no kernel computes in {image.dtype}"
    if operation == "sampler_step" and arguments["thresholding"] is not None:
        return "dynamic thresholding sorts whole images, for which there is no kernel"
    if operation in ("fir_upsample", "fir_downsample"):
        return "FIR resampling has no kernel"
    if operation == "norm_act" and arguments["act"] not in ("silu", "swish", "none"):
        return f"norm_act has no kernel with {arguments['act']}"
    return None


def _bind(operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _SIGNATURES[operation].bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _pack(pack: Callable[..., Any]) -> Callable[..., Any]:
    def packed(weight: Tensor, *args: Any, dtype: torch.dtype, **kwargs: Any) -> Any:
        return pack(weight, *args, dtype=dtype, **kwargs) if dtype in DTYPES else weight.to(dtype, copy=True)

    return packed


def _norm_act(kernel: Callable[..., Tensor], memory: Memory) -> Callable[..., FeatureMap | Postponed]:
    def run(a: Mapping[str, Any], out: Tensor) -> Tensor:
        plain = falls_back("norm_act", a)
        size = 0 if plain else _workspace(a)
        workspace = memory.floats((size,), out.device) if size else None
        if memory.dry:
            return out
        return reference.norm_act(**a, out=out) if plain else kernel(**a, out=out, workspace=workspace)

    def norm_act(*args: Any, **kwargs: Any) -> FeatureMap | Postponed:
        a = _bind("norm_act", args, kwargs)
        del a["out"]
        x, skip, residual = a.pop("x"), a.pop("skip"), a.pop("residual")
        a["stats"], a["skip_stats"] = x.stats, None if skip is None else skip.stats
        a |= {"x": x.data, "skip": _pixels(skip), "residual": _pixels(residual)}
        n, channels, h, w = x.shape
        shape = torch.Size((n, channels + (0 if skip is None else skip.shape[1]), h, w))
        parts = memory.parts(shape)
        if parts > 1 and (n > 1 or _measured(a)):
            return Postponed(a, shape, parts, run, memory)
        return FeatureMap(run(a, memory.map(shape, x.dtype, x.data.device)))

    return norm_act


def _measured(a: Mapping[str, Any]) -> bool:
    """Whether the statistics of all inputs are there, so that an image can be normalised row by row."""
    there = a["stats"] is not None and (a["skip"] is None or a["skip_stats"] is not None)
    return there and not falls_back("norm_act", a)


def _workspace(a: Mapping[str, Any]) -> int:
    """float32 elements that the kernel needs beside its result."""
    from ..kernels import launch, norm_act

    x, skip, stats, skip_stats = (a[name] for name in ("x", "skip", "stats", "skip_stats"))
    if stats is None and skip_stats is None:
        channels = x.shape[1] + (0 if skip is None else skip.shape[1])
        if launch.norm_tile_launch(channels, a["groups"], x.shape[2] * x.shape[3], x.element_size()) is not None:
            return 0
    return norm_act.workspace_size(x, skip, stats, skip_stats)


def _convolution(
    operation: str, kernel: Callable[..., Any], plain: Callable[..., Any], memory: Memory
) -> Callable[..., FeatureMap]:
    def run(a: Mapping[str, Any], stats: Tensor | None) -> None:
        if memory.dry:
            return
        if falls_back(operation, a):
            plain(**{**a, "with_stats": False})  # the next normalisation makes its own
        else:
            kernel(**a, stats_out=stats)

    def convolution(*args: Any, **kwargs: Any) -> FeatureMap:
        a = _bind(operation, args, kwargs)
        if torch.is_grad_enabled() and getattr(a["weight"], "requires_grad", False):
            raise _no_gradients()
        x = a.pop("x")
        for name in ("skip", "residual"):
            if name in a:
                a[name] = _pixels(a[name])
        if a["shortcut"] is not None:
            s = a["shortcut"]
            a["shortcut"] = Shortcut(s.x.data, _pixels(s.skip), s.weight, s.bias)
        if a["time"] is not None:
            a["time"] = a["time"].contiguous()
        shape, stats_shape = _result(operation, x, a)
        y = a["out"] = memory.map(shape, x.dtype, _device(x))
        stats = None
        if a["with_stats"] and not falls_back(operation, {**a, "x": x}):
            stats = memory.floats(stats_shape, y.device)
        if isinstance(x, Postponed) and (cuts := cut(operation, x.shape, weight_shape(a["weight"])[2], a, x.parts)):
            _in_parts(run, x, a, stats, cuts, memory)
        else:
            run({**a, "x": x.data}, stats)
        return FeatureMap(y, stats)

    return convolution


def _in_parts(
    run: Callable[[Mapping[str, Any], Tensor | None], None],
    x: Postponed,
    a: Mapping[str, Any],
    stats: Tensor | None,
    cuts: Sequence[Part],
    memory: Memory,
) -> None:
    """Normalise and convolve one part after the other, through one buffer."""
    n, channels, h, w = x.shape
    images = max(p.images.stop - p.images.start for p in cuts)
    rows = max(len(range(h)[p.read]) for p in cuts)
    buffer = memory.map((images, channels, rows, w), x.dtype, _device(x))
    for p in cuts:
        part = buffer[: p.images.stop - p.images.start, :, : len(range(h)[p.read])]
        part = x.run(p.of_norm(x.arguments, n), part)
        run({**p.of_conv(a, n), "x": part}, None if stats is None else p.of_stats(stats, a["out"].shape[2]))
    # Rows are read once more by the run below them.
    apart = n > 1 and x.arguments["skip"] is None
    if apart and _image_bytes(x.arguments["x"]) == _image_bytes(a["out"]):
        memory.replaced(x.arguments["x"], a["out"])


def _image_bytes(x: Tensor) -> int:
    return x[0].numel() * x.element_size()


def _result(operation: str, x: FeatureMap | Postponed, a: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a convolution's result and of its statistics."""
    from ..kernels.conv_plan import ConvShape

    n, channels, h, w = x.shape
    k, _, size = weight_shape(a["weight"])
    upsample = operation == "upsample_conv"
    padding = reference.sides(a.get("padding"), size)
    shape = ConvShape(n, h, w, (channels,), k, size, a.get("stride", 1), padding, upsample, with_stats=a["with_stats"])
    return (n, k, *shape.output), (n, shape.parts, 3, k)


def _upsample(x: FeatureMap, memory: Memory) -> FeatureMap:
    n, c, h, w = x.shape
    y = memory.map((n, c, 2 * h, 2 * w), x.dtype, x.data.device)
    if not memory.dry:
        torch.ops.aten.upsample_nearest2d.out(x.data, [2 * h, 2 * w], None, None, out=y)
    return FeatureMap(y)


def _downsample(x: FeatureMap, memory: Memory) -> FeatureMap:
    n, c, h, w = x.shape
    y = memory.map((n, c, h // 2, w // 2), x.dtype, x.data.device)
    if not memory.dry:
        torch.ops.aten.avg_pool2d.out(x.data, [2, 2], [2, 2], out=y)
    return FeatureMap(y)


def _attention(kernel: Callable[..., Tensor], memory: Memory) -> Callable[[FeatureMap, int], FeatureMap]:
    def attention(qkv: FeatureMap, heads: int) -> FeatureMap:
        if falls_back("attention", {"qkv": qkv}):
            return _outside(reference.attention(qkv.data, heads), memory)
        n, width, h, w = qkv.shape
        y = memory.map((n, width // 3, h, w), qkv.dtype, qkv.data.device)
        return FeatureMap(y if memory.dry else kernel(qkv.data, heads, out=y))

    return attention


def _outside(result: Tensor, memory: Memory) -> FeatureMap:
    """What torch's own operation made, in memory of torch's own."""
    y = _channels_last(result)
    memory.outside(y)
    return FeatureMap(y)


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


def _device(x: FeatureMap | Postponed) -> torch.device:
    return x.arguments["x"].device if isinstance(x, Postponed) else x.data.device


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _no_gradients() -> RuntimeError:
    return RuntimeError(
        'ops="triton" is for inference and has no gradients; got a tensor that requires them; '
        'run under torch.no_grad(), or train with ops="reference"'
    )
