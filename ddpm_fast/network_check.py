"""Does a pipeline's U-Net compute what its configuration and weights say?

Both networks, the pipeline's and the `UNet` that was read from it, run on one small batch at two timesteps. That shows
whatever changes every forward pass, by whatever means: padding, normalisation, attention, a module put in the place
of another. Code of others that could act at some steps alone is refused without a trial: hooks, methods replaced on a
module, classes whose methods are neither torch's nor diffusers', attention processors.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints.files import listing
from .code_origin import is_from, is_stock, named, overridden, replaced, written_in
from .engine.prepared import prepare
from .house_rule import FLOOR, error
from .ops import Ops, reference
from .pipelines import config_of
from .unet import TimeRows, UNet

IMAGES = 2  # more than one: some attention processors mix the images of a batch
SIDE = 16  # pixels, or what leaves 2 at the lowest level: attention over one pixel would show nothing
# The pipeline's error against float64 may be so many times ours in the same dtype. Measured over 40 random
# architectures in float32, bfloat16 and float16: 3.2 at most. Circular padding: 50 and more in bfloat16, 500,000 in
# float32.
TIMES_OURS = 8.0
# Hooks of accelerate and diffusers that change where weights lie, or their dtype while they are idle.
PLACING = (
    "AlignDevicesHook",
    "CpuOffload",
    "GroupOffloadingHook",
    "LayerExecutionTrackerHook",
    "LayerwiseCastingHook",
    "LazyPrefetchGroupOffloadingHook",
)
_RUN = ("__call__", "_call_impl", "forward")
_PLAIN = (str, int, float, tuple, type(None))


def check_network(outer: Any, unet: Any, model: UNet, timesteps: int) -> None:
    """Compare a pipeline's network with ours.

    Takes two forward passes of each, and two of ours in float64, over two images of 16 pixels or a little more. Torch's
    random state stays as it was.

    Args:
        outer: the network as the pipeline has it, with its wrappers.
        unet: the UNet2DModel inside.
        model: ours, over the same weights.
        timesteps: of the training.

    Raises:
        ValueError: the outputs differ by more than rounding, or other code runs within the network, or it does not run.
    """
    if foreign := list(_foreign(outer)):
        raise ValueError(
            f"the pipeline's network runs code that accelerate would leave out: {listing(foreign)}; remove it first, "
            "or draw by the pipeline itself"
        )
    dropout = [m.p for m in unet.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p]
    if dropout:
        raise ValueError(
            f"the network is in training mode with dropout {max(dropout):g}, so the pipeline draws with dropout; call "
            "pipeline.unet.eval() first"
        )
    multiple = 2 ** (model.config.levels - 1)
    least = max(SIDE, 2 * multiple)
    own = model.config.image_size or (least, least)
    small = tuple(min(n, least) for n in own)
    try:
        excess = _excess(unet, model, timesteps, small)
    except _Fails:
        try:
            excess = _excess(unet, model, timesteps, own)
        except _Fails as fault:
            raise ValueError(f"the pipeline's own network does not run: {fault}") from fault.__cause__
    if excess is not None:
        unlike = listing(_unlike(unet))
        raise ValueError(
            "the pipeline's network computes something else than a UNet2DModel of its configuration and weights: "
            f"{excess}{'; ' + unlike if unlike else ''}; undo the change, or draw by the pipeline itself"
        )


class _Fails(Exception):
    """The pipeline's network raised an exception."""


@torch.no_grad()
def _excess(unet: Any, model: UNet, timesteps: int, size: tuple[int, ...]) -> str | None:
    """By how much the outputs differ, or None where that is rounding."""
    device, dtype = model.device, unet.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, model.config.in_channels, *size, generator=generator, device="cpu", dtype=torch.float32)
    model.check_input(x)
    x = x.to(device, dtype)
    wide = device if device.type in ("cpu", "cuda") else torch.device("cpu")  # others have no float64
    same, exact = prepare(model, dtype, device, _SHARING), prepare(model, torch.float64, wide, _SHARING)
    for t in sorted({timesteps - 1, timesteps // 3}, reverse=True):
        with ExitStack() as stack:
            for context in _undisturbed(device):
                stack.enter_context(context)
            theirs = _theirs(unet, x, t)
            ours, truth = _ours(same, x, t), _ours(exact, x.to(wide, torch.float64), t)
        if theirs.shape != truth.shape:
            return f"its output is {tuple(theirs.shape)}, and should be {tuple(truth.shape)}"
        if not truth.isfinite().all() or not (theirs.isfinite().all() or dtype == torch.float64):
            continue  # beyond a float of this size, or weights with NaN: the pipeline's images show nothing either
        found, rounding = error(theirs, truth), error(ours, truth)
        if not (
            found.largest <= TIMES_OURS * rounding.largest + FLOOR and found.rms <= TIMES_OURS * rounding.rms + FLOOR
        ):
            return (
                f"at timestep {t} its output differs by {found.largest:.2g} of its scale, where rounding gives "
                f"{rounding.largest:.1g}"
            )
    return None


def _theirs(unet: Any, x: Tensor, t: int) -> Tensor:
    try:
        y = unet(x, torch.tensor(t, device="cpu")).sample  # as the pipelines call it
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # whatever it is, the pipeline's own call would end with it
        text = (str(fault).splitlines() or [""])[0]
        raise _Fails(f"{type(fault).__name__}: {text}") from fault
    return y.detach()


def _ours(prepared: UNet, x: Tensor, t: int) -> Tensor:
    fractions = x.dtype == torch.float64 and prepared.config.time_embedding_type != "learned"  # rows have whole numbers
    times = torch.full((len(x),), t, device=x.device, dtype=torch.float64 if fractions else torch.int64)
    return prepared.run(x, TimeRows(prepared.embed(times), t=times))


# Weights stay where they are until `conv` casts them: the float64 network costs no second copy of all of them.
_SHARING: Ops = replace(
    reference(),
    pack_conv=lambda weight, *, dtype, channels=None: weight,
    pack_upsample_conv=lambda weight, *, dtype: weight,
)


def _undisturbed(device: torch.device) -> Iterator[AbstractContextManager[Any]]:
    """Without the caller's autocast, without compiling, and with torch's random state put back."""
    yield torch.autocast(device.type, enabled=False)
    cuda = device.type == "cuda"
    yield torch.random.fork_rng([device] if cuda else [])
    compiler = getattr(torch, "_dynamo", None)  # imported by whatever compiles
    yield torch.compiler.set_stance("force_eager") if compiler is not None else nullcontext()


# --- code of others ---


def _foreign(outer: Any) -> Iterator[str]:
    """Name the code that is neither torch's nor diffusers': hooks, methods and attention processors."""
    for kind, before in (("pre-hook", "pre_"), ("hook", "")):
        for hook in getattr(nn.modules.module, f"_global_forward_{before}hooks", {}).values():
            if not written_in(("torch",), hook):  # torch's own ones count and trace, and change nothing
                yield f"a forward {kind} on all modules ({named(hook)})"
    for name, module in outer.named_modules():
        where = f" on {name}" if name else ""
        for kind, hooks in (("pre-hook", module._forward_pre_hooks), ("hook", module._forward_hooks)):
            for hook in hooks.values():
                yield f"a forward {kind}{where} ({named(hook)})"
        yield from (f"{method}{where}" for method in _methods(module))
        if "forward" in vars(module) and not _is_own(module):
            forward: Any = vars(module)["forward"]
            by_hook = isinstance(forward, functools.partial) and is_from("accelerate", forward.func)
            by = type(vars(module).get("_hf_hook")).__name__ if by_hook else named(forward)
            yield f"{name + '.' if name else ''}forward, replaced by {by}"
        processor = vars(module).get("processor")
        if processor is not None and not is_stock(("diffusers",), type(processor), "__call__"):
            yield f"an attention processor{where} ({named(processor)})"


def _methods(module: Any) -> Iterator[str]:
    """Methods of a module that are neither torch's nor diffusers', its ``forward`` apart where the module has one."""
    kind, own = type(module), ("torch", "diffusers")
    others = list(overridden(own, kind))
    yield from others
    if not others:
        yield from (f"{kind.__name__}.{name}, replaced" for name in _RUN if not is_stock(own, kind, name))
    for name, value in replaced((*own, "accelerate"), module):
        if name not in ("forward", "_compiled_call_impl"):
            yield f"{name}, replaced by {named(value)},"
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:
        inner = getattr(compiled, "_torchdynamo_orig_callable", compiled)
        if getattr(inner, "__self__", None) is not module or not written_in(("torch",), inner):
            yield f"_compiled_call_impl, replaced by {named(compiled)},"


def _is_own(module: Any) -> bool:
    """Whether an instance's ``forward`` is that of its class, compiled or with hooks that only place its weights."""
    if type(module).__name__ == "OptimizedModule":  # torch.compile's, which sets one
        return True
    forward: Any = vars(module)["forward"]
    while True:
        if isinstance(forward, functools.partial) and is_from("accelerate", forward.func):
            if not _places(vars(module).get("_hf_hook")):
                return False
            forward = vars(module).get("_old_forward")
        elif isinstance(forward, functools.partial) and is_from("diffusers", forward.func):
            registry = vars(module).get("_diffusers_hook")
            if not all(map(_places, getattr(registry, "hooks", {"": None}).values())):
                return False
            forward = getattr(forward, "__wrapped__", None)
        elif hasattr(forward, "_torchdynamo_orig_callable"):
            forward = forward._torchdynamo_orig_callable
        else:
            break
    return (
        inspect.ismethod(forward)
        and forward.__self__ is module
        and forward.__func__ is getattr(type(module), "forward", None)
    )


def _places(hook: Any) -> bool:
    if type(hook).__name__ == "SequentialHook" and is_from("accelerate", type(hook)):
        return all(map(_places, hook.hooks))
    return type(hook).__name__ in PLACING and (is_from("accelerate", type(hook)) or is_from("diffusers", type(hook)))


def _unlike(unet: Any) -> list[str]:
    """Where its modules' attributes are others than those of a new network of its configuration."""
    kind: Any = next(c for c in type(unet).__mro__ if c.__name__ == "UNet2DModel")
    try:
        with torch.device("meta"):
            plain = dict(kind.from_config(config_of(unet)).named_modules())
    except Exception:  # only for the message
        return []
    found = []
    for name, module in unet.named_modules():
        other = plain.get(name)
        if type(module) is not type(other):
            found.append(f"{name or 'it'} is a {type(module).__name__}, not a {type(other).__name__}")
            continue
        for key in sorted(vars(module).keys() | vars(other).keys()):
            if key.startswith("_") or key == "training":
                continue
            mine, new = vars(module).get(key), vars(other).get(key)
            where = f"{name}.{key}" if name else key
            if isinstance(mine, _PLAIN) and isinstance(new, _PLAIN):
                if mine != new:
                    found.append(f"{where} is {mine!r}, not {new!r}")
            elif type(mine) is not type(new):
                found.append(f"{where} is a {type(mine).__name__}, not a {type(new).__name__}")
    return found
