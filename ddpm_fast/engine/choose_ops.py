"""Which set of operations serves a sampler: that which was named, or by the device and the length of the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from .. import ops as ops_module
from ..ops import Ops, compiled, winograd_set
from ..stages import stage
from ..unet import Attention, UNet

NAMES = ("auto", "reference", "cpu", "winograd", "triton")
# Work of a thread, in FLOPs of direct convolutions, from which compiling the transforms pays. That takes about 2 s more
# than `cpu` needs; with AVX-512 a thread does 5e10 to 1e11 FLOP/s by `cpu`, of whose time winograd saves an eighth with
# the bundled model's narrow layers, two fifths with wide ones.
# Whether the transforms are cached is not asked: a set of images is resumed by the operations that began it.
LONG_RUN = 1e12


@stage("choosing the operations")
def choose_ops(
    ops: str | Ops,
    device: torch.device,
    model: object = None,
    dtype: torch.dtype = torch.float32,
    image_shape: tuple[int, int, int] = (0, 0, 0),  # (C, H, W)
    batch_size: int | None = None,  # None: that which `batching.choose` would take
    steps: int = 1,
) -> tuple[Ops, str]:
    """The set called ``ops``, or an `Ops` value as it is; and, for "auto", why.

    "auto": the fused kernels on a GPU where Triton works; on a CPU `winograd` for a `UNet` where one batch is long
    enough and its transforms compile, else `cpu`; elsewhere `reference`. Where a better set exists and fails, a warning
    says so once.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: where a named set cannot run.
    """
    if isinstance(ops, Ops):
        return ops, "given"
    reason = "named"
    if ops == "auto" and device.type == "cpu":
        flops = steps * flops_of_a_batch(model, image_shape, batch_size) if isinstance(model, UNet) else 0.0
        ops, reason = for_cpu(flops, torch.get_num_threads(), dtype, why_not_winograd)
    elif ops == "auto":
        obstacle = why_not_triton(device) if device.type == "cuda" else None
        ops = "triton" if device.type == "cuda" and obstacle is None else "reference"
        reason = f"the device is {device.type}" + (f", but {obstacle}" if obstacle else "")
    if ops not in NAMES:
        raise ValueError(f"ops must be one of {', '.join(NAMES)}, or an Ops value; got {ops!r}")
    chosen: Ops = getattr(ops_module, ops)()
    return chosen, reason


def for_cpu(
    flops: float, threads: int, dtype: torch.dtype, why_not: Callable[[torch.dtype], str | None]
) -> tuple[str, str]:
    """(set, reason) for a run of ``flops``. ``why_not``: why `winograd` cannot run here, or None."""
    work = f"{flops / threads / 1e12:.2g} TFLOP per thread"
    if flops < LONG_RUN * threads:
        return "cpu", f"a batch is only {work}; winograd, which compiles first, pays off from {LONG_RUN / 1e12:g} TFLOP"
    if (obstacle := why_not(dtype)) is not None:
        return "cpu", f"a batch is {work}, long enough for winograd, but {obstacle}"
    return "winograd", f"a batch is {work}; compiling pays off from {LONG_RUN / 1e12:g} TFLOP"


def flops_of_a_batch(model: UNet, image_shape: tuple[int, int, int], batch_size: int | None) -> float:
    """FLOPs of one step."""
    flops = flops_of_an_image(model, *image_shape[1:])
    if batch_size is None:
        from .batching import fast_batch

        batch_size = fast_batch(flops, sum(p.numel() for p in model.parameters()))
    return float(batch_size * flops)


def flops_of_an_image(model: UNet, height: int, width: int) -> int:
    """FLOPs of the convolutions and of attention, from names and shapes of the weights.

    `inspection.model_cost` counts all of a model by running it over the meta device, which takes seconds to import.
    """
    levels, flops = model.config.levels, 0
    for name, module in model.named_modules():
        parts = [*name.split("."), "", ""]
        level = 0
        if parts[0] in ("down_blocks", "up_blocks") and parts[1]:
            down = parts[0] == "down_blocks"
            level = int(parts[1]) if down else levels - 1 - int(parts[1])
            if "samplers" in parts[2]:  # computed at the size that comes of it
                level += 1 if down else -1
        elif parts[0] == "mid_block":
            level = levels - 1
        pixels = (height >> level) * (width >> level)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "time_emb" not in name and "embedding" not in parts[0]:
            flops += 2 * module.weight.numel() * pixels
        elif isinstance(module, Attention):
            flops += 4 * module.to_v.out_features * pixels**2
    return flops


def why_not_winograd(dtype: torch.dtype) -> str | None:
    """Why `winograd` cannot run here, or None. Its transforms are compiled to know, if they are not cached."""
    if not winograd_set.computes(dtype):
        return f"it does not compute in {str(dtype).removeprefix('torch.')} on this processor"
    return _why_not_compiled(dtype, compiled.surroundings())


@cache  # a failure takes as long as a success, and a process keeps to what it began with
def _why_not_compiled(dtype: torch.dtype, surroundings: tuple[str | None, ...]) -> str | None:
    try:
        compiled.compiler()
        winograd_set.kernels(dtype)
    except compiled.NoCompilerError as error:
        return error.reason
    except compiled.BuildError as error:
        compiled.warn_once(f'ops="auto" takes "cpu" in place of "winograd", since {error.reason}')
        return error.reason
    return None


@cache
def why_not_triton(device: torch.device) -> str | None:
    """Why the fused kernels cannot run on this GPU, or None. The smallest of them is compiled and run to know: Triton
    needs a C compiler, Python's headers, a folder for its cache and a GPU that it knows."""
    from ..kernels import launch

    if launch.triton is None:
        return "Triton is not installed"
    try:
        x = torch.empty(1, 1, 4, 4, device=device)
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        initial_noise = ops_module.triton().initial_noise
        assert initial_noise is not None
        initial_noise(x, seed, seed.clone(), None)
        x.sum().item()  # waits for it
    except torch.OutOfMemoryError:  # says nothing of Triton
        return None
    except Exception as error:  # compilers, headers, files, drivers: each fails in its own way
        reason = f"Triton does not work here ({_first_line(error)})"
        compiled.warn_once(f'ops="auto" takes "reference" in place of "triton", which is many times slower: {reason}')
        return reason
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def expect_device(ops: Ops, device: torch.device) -> None:
    """Raises the kernels' own complaint about a device that they cannot run on."""
    if ops.name == "triton":
        from ..kernels import conv_kernel, launch

        launch.require(conv_kernel.conv_kernel, torch.empty(0, device=device))
