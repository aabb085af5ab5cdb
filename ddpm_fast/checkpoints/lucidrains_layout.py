"""lucidrains' state dicts: which of their tensors are the U-Net, its names by version, and what its shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .files import CheckpointError, listing
from .lucidrains_versions import FIRST, FLAT, LAST, MEMORY, RMS_BLOCKS, UNSHUFFLED, Version

Shapes = Mapping[str, tuple[int, ...]]
_FIRST_TENSOR = "init_conv.weight"
_BUFFERS = ("betas", "alphas_cumprod", "loss_weight")  # all that is told; the others follow from them
DIFFUSION_BUFFERS = frozenset(
    (
        *_BUFFERS,
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "p2_loss_weight",
    )
)


class Parts(NamedTuple):
    """A file's tensors by what they are, names without prefixes."""

    network: dict[str, Tensor]  # under the names of 2.x
    buffers: dict[str, Tensor]  # of GaussianDiffusion: betas, and of _BUFFERS what it has
    nested: bool  # names of before 1.8.0
    wrapped: bool  # by a diffusion class, so that missing buffers say which


def split(network: Mapping[str, Tensor], prefix: str, beside: Mapping[str, Tensor], path: Path) -> Parts:
    """The parts of a file: of a Trainer's, an EMA, a GaussianDiffusion or a U-Net alone.

    network: the U-Net's tensors; prefix: what their names begin with in the file, whose tensors are ``beside``.

    Raises CheckpointError for networks of the same package that are no DDPM of images.
    """
    _refuse(network, prefix, path)
    nested = any(".fn." in name for name in network)
    wrapper = re.sub(r"(^|.*\.)(model|denoise_fn)\.$", r"\1", prefix)
    wrapped = wrapper != prefix
    # An average of equal values drifts; the model's own are the ones that were computed.
    places = ("model.", wrapper) if prefix.startswith("ema.") else (wrapper,)
    place = next((p for p in places if wrapped and f"{p}betas" in beside), None)
    buffers = {}
    if place is not None:
        buffers = {name: beside[place + name] for name in _BUFFERS if place + name in beside}
        odd = [name for name, t in buffers.items() if t.ndim != 1]
        if odd:
            raise CheckpointError(f"{path} is a lucidrains checkpoint, but its {odd[0]} is no list of numbers")
    return Parts({_current(name): t for name, t in network.items()}, buffers, nested, wrapped)


def _current(name: str) -> str:
    """Of Residual(PreNorm(attention)) before 1.8.0: fn.norm is the norm, fn.fn the attention."""
    return name.replace(".fn.norm.", ".norm.").replace(".fn.fn.", ".")


def _refuse(network: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    """CheckpointError for what is of lucidrains, and no image DDPM that is known."""
    what = None
    dims = network[_FIRST_TENSOR].ndim
    if dims != 4:
        kind = {3: "a 1-D (sequence)", 5: "a 3-D (video)"}.get(dims, "an unknown")
        what = f"of {kind} network; only images are supported"
    elif any(name.startswith(("classes_emb.", "null_classes_emb", "classes_mlp.")) for name in network):
        what = "of a class-conditional network (classifier_free_guidance.py), which is not supported"
    elif re.search(r"(^|\.)net\.$", prefix) and "time_mlp.0.weights" in network:
        what = (
            "of an ElucidatedDiffusion, whose noise levels are continuous; it is no DDPM and is not supported: draw "
            "from it with that class"
        )
    elif _out_channels(network) == 2 * network[_FIRST_TENSOR].shape[1] + 2:
        what = (
            "of a WeightedObjectiveGaussianDiffusion, whose network predicts noise, x0 and their weights at once; that "
            "is not supported: draw from it with that class"
        )
    elif any(re.search(r"\.block\.0\.|\.ds_conv\.", name) for name in network):
        what = f"of a version before {FIRST}, whose network is another; it is not supported"
    if what is not None:
        raise CheckpointError(f"{path} is a lucidrains checkpoint {what}")


def _out_channels(network: Mapping[str, Tensor]) -> int:
    last = network.get("final_conv.weight")
    return 0 if last is None or last.ndim < 1 else last.shape[0]


def versions(shapes: Shapes, nested: bool) -> tuple[Version, Version]:
    """The first version with this layout, and the first after it without."""
    if nested and not any(name.startswith("downs.1.") for name in shapes):
        return FIRST, FLAT  # one level: nothing resamples
    if nested:
        return (UNSHUFFLED, FLAT) if "downs.0.3.1.weight" in shapes else (FIRST, UNSHUFFLED)
    if "mid_attn.mem_kv" not in shapes:
        return FLAT, MEMORY
    return (MEMORY, RMS_BLOCKS) if "mid_block1.block1.norm.weight" in shapes else (RMS_BLOCKS, LAST)


def inferred(shapes: Shapes, path: Path) -> dict[str, Any]:
    """The fields of LucidrainsConfig that the shapes of a network (names of 2.x) determine.

    Heads are left out where no memory tells them. Raises CheckpointError where the network is not whole.
    """
    try:
        return _fields(shapes)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        known = listing(sorted(shapes), 3)
        raise CheckpointError(
            f"{path} is a lucidrains checkpoint, but not of a whole U-Net of {FIRST} or later: "
            f"{type(error).__name__} at {error}; it has {known}"
        ) from None


def _fields(shapes: Shapes) -> dict[str, Any]:
    levels = _count(shapes, "downs")
    if _count(shapes, "ups") != levels:
        raise ValueError("as many ups as downs")
    inputs, init_dim = shapes["init_conv.weight"][1], shapes["init_conv.weight"][0]
    out_dim = shapes["final_conv.weight"][0]
    self_condition = inputs == 2 * out_dim
    channels = out_dim if self_condition else inputs
    if out_dim not in (channels, 2 * channels):
        raise ValueError(f"{inputs} channels in and {out_dim} out, which GaussianDiffusion does not take")
    dim = shapes["time_mlp.3.weight"][0] // 4
    if dim < 4:
        raise ValueError(f"dim={dim}")
    downs = [shapes[f"downs.{i}.0.block1.proj.weight"][0] for i in range(levels)]
    attentions = [f"downs.{i}.2" for i in range(levels)] + ["mid_attn"]
    frequencies = shapes.get("time_mlp.0.weights")
    fields: dict[str, Any] = {
        "dim": dim,
        "init_dim": init_dim,
        "widths": (*downs[1:], shapes["mid_block1.block1.proj.weight"][0]),
        "channels": channels,
        "out_dim": out_dim,
        "self_condition": self_condition,
        "full_attn": tuple(f"{name}.to_out.weight" in shapes for name in attentions[:-1]),
        "learned_sinusoidal_dim": None if frequencies is None else 2 * frequencies[0],
        "block_norm": "group" if "mid_block1.block1.norm.weight" in shapes else "rms",
        "downsample": "conv" if shapes.get("downs.0.3.weight", (3,))[-1] == 4 else "unshuffle",
        "num_mem_kv": 0,
    }
    if "mid_attn.mem_kv" in shapes:
        memory = [_memory(shapes, name) for name in attentions]
        fields["num_mem_kv"] = memory[-1][2]
        fields["attn_heads"] = tuple(m[0] for m in memory[:-1])
        fields["attn_dim_head"] = tuple(m[1] for m in memory[:-1])
    else:  # heads times their channels, for `heads_of`
        fields["inner"] = tuple(shapes[f"{name}.to_qkv.weight"][0] // 3 for name in attentions[:-1])
    return fields


def _count(shapes: Shapes, part: str) -> int:
    found = {int(m[1]) for m in (re.match(rf"{part}\.(\d{{1,2}})\.", name) for name in shapes) if m}
    if found != set(range(len(found))) or not found:
        raise ValueError(f"{part} without gaps")
    return len(found)


def _memory(shapes: Shapes, name: str) -> tuple[int, int, int]:
    """(heads, channels of a head, memory entries)."""
    _, heads, a, b = shapes[f"{name}.mem_kv"]
    return (heads, b, a) if f"{name}.to_out.weight" in shapes else (heads, a, b)
