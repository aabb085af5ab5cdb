"""Who computes the U-Net: sets of the dozen operations that the network is written in.

An `Ops` value is handed to `UNet.run`; no module asks the environment which one it should be. Feature maps
are opaque to the network: an operation takes what its own set returned (plain tensors for `reference`), so a
set may carry more than the pixels along, such as the statistics that the next normalisation needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import reference as _reference
from .buffers import Memory
from .records import Record, recording

__all__ = ["Feature", "Ops", "Record", "cpu", "recording", "reference", "triton", "winograd"]

Feature = Any  # a feature map as its Ops set represents it; for `reference` a Tensor [N, C, H, W]


@dataclass(frozen=True)
class Ops:
    """One set of operations. Signatures and meaning: the functions of that name in kernels/reference.py.

    `conv` and `upsample_conv` take ``with_stats=True`` as a hint that a normalisation follows; they return
    the feature map alone and keep the statistics with it where the set uses them.
    """

    name: str
    norm_act: Callable[..., Feature]
    conv: Callable[..., Feature]
    upsample_conv: Callable[..., Feature]
    upsample: Callable[[Feature], Feature]
    downsample: Callable[[Feature], Feature]
    attention: Callable[[Feature, int], Feature]
    sampler_step: Callable[..., Tensor]
    fir_upsample: Callable[[Feature], Feature] = _reference.fir_upsample
    fir_downsample: Callable[[Feature], Feature] = _reference.fir_downsample
    enter: Callable[[Tensor], Feature] = lambda x: x  # a tensor into the set's own form
    leave: Callable[[Feature], Tensor] = lambda x: x  # and back, for what has no operation here
    # A map that is wanted again much later, and what makes it anew: which of the two to keep until then.
    lay_by: Callable[[Feature, Callable[[], Feature]], Feature | Callable[[], Feature]] = lambda x, make: x
    # conv_out and sampler_step in one launch, where the set has it: kernels/conv_step.py. The engine asks.
    conv_step: Callable[..., Tensor] | None = None
    # Weights as `conv` (and a Shortcut), `upsample_conv` and `conv_step` read them best, made once from
    # [K, C, k, k] in ``dtype``. ``channels``: of x and of the skip, or of x padded as `input_channels` says.
    pack_conv: Callable[..., Any] = lambda weight, *, dtype, channels=None: _plain_weight(weight, dtype)
    pack_upsample_conv: Callable[..., Any] = lambda weight, *, dtype: _plain_weight(weight, dtype)
    pack_step_conv: Callable[..., Any] | None = None  # (weight, image channels, *, dtype)
    # Channels of the copy of x_t [N, C, H, W] in a dtype that the first convolution reads best; zeros above C.
    input_channels: Callable[[int, torch.dtype], int] = lambda channels, dtype: channels
    # x_T drawn by the set's own kernel, (x, seed, ids, low); with it, `sampler_step` draws best itself too.
    initial_noise: Callable[..., Tensor] | None = None
    # Compiles what a call would launch, and launches nothing, where a set's kernels are compiled for their arguments.
    compile_ahead: Callable[[Callable[[], object]], None] | None = None
    # The set with its results where a `Memory` says, for sets that can.
    placed: Callable[[Memory], Ops] | None = None
    # How it normalises in a dtype, where that rounds one way or another: "compiled" or "torch".
    normalises: Callable[[torch.dtype], str | None] = lambda dtype: None
    # Why a call (operation, its arguments by name) runs on the reference operation instead; None: it does not.
    falls_back: Callable[[str, Mapping[str, Any]], str | None] = lambda operation, arguments: None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """One of the sets below is pickled by its name, since functions made inside another one cannot be."""
        recipe = self.__dict__.get("_recipe")  # no field, so that `dataclasses.replace` does not take it along
        return object.__reduce_ex__(self, protocol) if recipe is None else (_made, recipe)

    def __deepcopy__(self, memo: object) -> Ops:
        return self


def _named(ops: Ops, **options: Any) -> Ops:
    """The set as what the function of its name makes with these options."""
    object.__setattr__(ops, "_recipe", (ops.name, options))
    return ops


def _made(name: str, options: Mapping[str, Any]) -> Ops:
    makers: dict[str, Callable[..., Ops]] = {"reference": reference, "cpu": cpu, "triton": triton, "winograd": winograd}
    return makers[name](**options)


def _plain_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype, memory_format=torch.channels_last, copy=True)


def _conv(*args: Any, with_stats: bool = False, **kwargs: Any) -> Feature:
    return _reference.conv(*args, **kwargs)


def _upsample_conv(*args: Any, with_stats: bool = False, **kwargs: Any) -> Feature:
    return _reference.upsample_conv(*args, **kwargs)


_REFERENCE = _named(
    Ops(
        name="reference",
        norm_act=_reference.norm_act,
        conv=_conv,
        upsample_conv=_upsample_conv,
        upsample=_reference.upsample,
        downsample=_reference.downsample,
        attention=_reference.attention,
        sampler_step=_reference.sampler_step,
    )
)


def reference() -> Ops:
    """Plain PyTorch: differentiable, any device and dtype, the definition of right."""
    return _REFERENCE


def cpu(keep_memory: bool = True, compiled: bool = True) -> Ops:
    """A processor's own, for inference: channels_last maps, weights arranged for oneDNN, ready in a second or two.

    Works on tensors on the CPU in float32, bfloat16 or float16, with oneDNN or without; float64 and weights that no
    `pack_conv` has packed run on the reference operations. Gradients do not flow. An image's bits depend on the
    batch it is in, by rounding.

    keep_memory: have glibc keep freed memory of any size for this whole process, whose peak then stays its own
    until it ends. Without it, maps above 32 MB (256-pixel models) are faulted in anew at each use.
    compiled: normalise by functions compiled for this processor, where they can be; else by torch's operations.
    """
    from . import cpu_set

    return _named(cpu_set.build(keep_memory, compiled), keep_memory=keep_memory, compiled=compiled)


def triton(pdl: bool = False) -> Ops:
    """The fused kernels, for inference: channels_last feature maps that carry their statistics along.

    Needs CUDA tensors (or Triton's interpreter, TRITON_INTERPRET=1) in bfloat16, float16 or float32. A call that
    no kernel covers runs on the reference operation, and ``falls_back`` says why. Gradients do not flow.

    pdl: programmatic dependent launch (sm_90 and newer; no effect elsewhere). A kernel is set up while the one before
    it still runs, and waits for its end before it touches memory: the same bits. Predicted, and not yet measured: about
    a microsecond saved a launch, so with 121 launches 0.1 ms of a step, felt at batch 1 and hardly at 256.

    Raises RuntimeError where Triton is not installed; the first operation raises it where no kernel can run.
    """
    from . import triton_set

    return _named(triton_set.build(pdl=pdl), pdl=pdl)


def winograd(keep_memory: bool = True) -> Ops:
    """`cpu` for long runs: Winograd convolutions whose transforms are compiled once for this processor, in seconds.

    float32 and bfloat16; what has no such form runs as in `cpu`. Gradients do not flow. The compiled transforms
    are kept in the user's cache folder. keep_memory: as for `cpu`. Raises RuntimeError where there is no C++ compiler.
    """
    from . import winograd_set

    return _named(winograd_set.build(keep_memory), keep_memory=keep_memory)
