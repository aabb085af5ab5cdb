"""The networks ``ddpm`` and ``ncsnpp`` of score_sde_pytorch: structure from the shapes, their names in ours.

Their modules stand in one list, ``all_modules.N``, in the order in which they run. `pieces` walks that order. A level
has attention after each residual block on the way down, and after the last alone on the way up.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .files import CheckpointError

PREFIX = "all_modules."
SIGMAS = "sigmas"  # a buffer with one value a timestep, which VP models do not read
SUPPORTED = (
    "of score_sde_pytorch's networks those of the VP SDE are supported: ddpm, and DDPM++ (ncsnpp with embedding_type "
    "positional, fir false, progressive and progressive_input none); draw from this one with its own code"
)

_RES = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "conv_shortcut",
    "NIN_0": "conv_shortcut",
}
_ATTENTION = {
    "GroupNorm_0": "group_norm",
    "NIN_0": "to_q",
    "NIN_1": "to_k",
    "NIN_2": "to_v",
    "NIN_3": "to_out.0",
}


@dataclass(frozen=True)
class Structure:
    """The architecture as far as the shapes tell it; all names follow from it."""

    nf: int
    blocks: int  # num_res_blocks
    widths: tuple[int, ...]  # of each level: ch_mult times nf
    attention: tuple[bool, ...]  # at each level
    biggan: bool  # residual blocks resample; else convolutions do
    in_channels: int
    out_channels: int

    @property
    def ch_mult(self) -> tuple[float, ...]:
        return tuple(w // self.nf if w % self.nf == 0 else w / self.nf for w in self.widths)

    @property
    def levels(self) -> int:
        return len(self.widths)


def structure_of(tensors: Mapping[str, Tensor], where: object) -> Structure:
    """The structure of a state dict in their names.

    Raises CheckpointError, which begins with ``where``: for a variant that is not supported, by its name, and for
    what is not a whole network.
    """
    modules = _modules(tensors)
    kinds = {n: _kind(parts) for n, parts in modules.items()}
    _refuse_variants(modules, kinds, where)
    order = [kinds[n] for n in range(len(kinds))]
    shapes = [modules[n] for n in range(len(kinds))]
    resamplers, plain = order.count("resample"), order.count("res")
    levels = resamplers // 2 + 1
    blocks, rest = divmod(plain - 2 - levels, 2 * levels)
    if resamplers % 2 or rest or blocks < 1:
        raise CheckpointError(
            f"{where} is not a whole Score-SDE network: {plain} residual blocks and {resamplers} resamplers make no "
            "levels of one number of blocks"
        )
    try:
        structure = Structure(
            nf=shapes[0]["weight"][1],
            blocks=blocks,
            widths=_widths(order, shapes, levels),
            attention=_attended(order, levels, blocks),
            biggan=any("Conv_2.weight" in parts for parts in shapes),
            in_channels=shapes[2]["weight"][1],
            out_channels=shapes[-1]["weight"][0],
        )
    except (KeyError, IndexError):
        raise CheckpointError(
            f"{where} is not a whole Score-SDE network: weights are missing, or have too few axes"
        ) from None
    expected = [kind for kind, *_ in pieces(structure)]
    for n, (wanted, got) in enumerate(zip(expected, order)):
        if wanted != got:
            raise CheckpointError(
                f"{where} is not a Score-SDE network as its code builds them: {PREFIX}{n} is {_WORDS[got]}, where "
                f"{levels} levels of {blocks} blocks have {_WORDS[wanted]}"
            )
    if len(expected) != len(order):
        raise CheckpointError(
            f"{where} is not a Score-SDE network as its code builds them: it has {len(order)} modules, where {levels} "
            f"levels of {blocks} blocks have {len(expected)}"
        )
    if structure.widths[0] != structure.nf:
        raise CheckpointError(
            f"{where}: its first level has {structure.widths[0]} channels, nf is {structure.nf}; a first multiple "
            "other than 1 is not supported"
        )
    return structure


Shapes = dict[str, tuple[int, ...]]
_WORDS = {
    "linear": "a linear layer",
    "conv": "a convolution",
    "norm": "a norm",
    "res": "a residual block",
    "attention": "an attention",
    "resample": "a resampler",
    "unknown": "nothing known",
}


def _modules(tensors: Mapping[str, Tensor]) -> dict[int, Shapes]:
    modules: dict[int, Shapes] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"all_modules\.(\d{1,4})\.(.+)", name):
            modules.setdefault(int(match[1]), {})[match[2]] = tuple(tensor.shape)
    return modules


def _kind(parts: Shapes) -> str:
    if "W" in parts:
        return "fourier"
    if "Conv.weight" in parts:
        return "combine"
    if "Conv2d_0.weight" in parts:
        return "fir"
    if "Conv_1.weight" in parts:
        shape = parts.get("Conv_0.weight", ())
        # a 1x1 convolution around a block that keeps its width: it resamples
        return "resample" if "Conv_2.weight" in parts and len(set(shape[:2])) == 1 else "res"
    if "NIN_3.W" in parts:
        return "attention"
    if "Conv_0.weight" in parts:
        return "resample"
    return {1: "norm", 2: "linear", 4: "conv"}.get(len(parts.get("weight", ())), "unknown")


def _refuse_variants(modules: Mapping[int, Shapes], kinds: Mapping[int, str], where: object) -> None:
    names = set(kinds.values())
    by_convolution = [kind == "resample" and "Conv_1.weight" not in modules[n] for n, kind in kinds.items()]
    by_blocks = [kind == "resample" and "Conv_2.weight" in modules[n] for n, kind in kinds.items()]
    numbers = sorted(kinds)
    gap = next((n for n in range(numbers[-1]) if n not in kinds), None)
    variant = None
    if "fourier" in names:
        variant = "a Fourier embedding of the noise level (embedding_type 'fourier', as NCSN++ of the VE SDE has)"
    elif "combine" in names:
        variant = "a progressive input (progressive_input 'input_skip')"
    elif "fir" in names:
        variant = "FIR resampling (fir true) of progressive inputs or outputs"
    elif kinds.get(0) == "conv":
        variant = "no time embedding (conditional false)"
    elif any(by_convolution) and any(by_blocks):
        variant = "a progressive input or output (progressive_input or progressive 'residual')"
    elif list(kinds.values()).count("norm") > 1:
        variant = "a progressive output (progressive other than 'none')"
    elif gap is not None:
        variant = (
            f"no parameters at {PREFIX}{gap}: it resamples without convolutions (resamp_with_conv false), or has "
            "progressive inputs or outputs"
        )
    if variant:
        raise CheckpointError(f"{where} is a Score-SDE network with {variant}, which is not supported; {SUPPORTED}")


def _widths(order: list[str], shapes: list[Shapes], levels: int) -> tuple[int, ...]:
    """Channels of each level on the way down: those of its first residual block."""
    widths: list[int] = []
    starts = True
    for kind, parts in zip(order, shapes):
        if kind == "res" and starts and len(widths) < levels:
            widths.append(parts["Conv_1.weight"][0])
            starts = False
        starts = starts or kind == "resample"
    return tuple(widths)


def _attended(order: list[str], levels: int, blocks: int) -> tuple[bool, ...]:
    """Whether each level has attention, by what follows its first residual block on the way down."""
    attended, at = [], 3
    for _ in range(levels):
        has = order[at + 1 : at + 2] == ["attention"]
        attended.append(has)
        at += blocks * (1 + has) + 1
    return tuple(attended)


def pieces(s: Structure) -> Iterator[tuple[str, str]]:
    """(kind, our name) of every module, in their order."""
    yield from (("linear", "time_embedding.linear_1"), ("linear", "time_embedding.linear_2"), ("conv", "conv_in"))
    for i in range(s.levels):
        block = f"down_blocks.{i}"
        for j in range(s.blocks):
            yield "res", f"{block}.resnets.{j}"
            if s.attention[i]:
                yield "attention", f"{block}.attentions.{j}"
        if i + 1 < s.levels:
            yield "resample", f"{block}.downsamplers.0"
    yield from (("res", "mid_block.resnets.0"), ("attention", "mid_block.attentions.0"), ("res", "mid_block.resnets.1"))
    for i in range(s.levels):
        block = f"up_blocks.{i}"
        yield from (("res", f"{block}.resnets.{j}") for j in range(s.blocks + 1))
        if s.attention[s.levels - 1 - i]:
            yield "attention", f"{block}.attentions.0"
        if i + 1 < s.levels:
            yield "resample", f"{block}.upsamplers.0"
    yield from (("norm", "conv_norm_out"), ("conv", "conv_out"))


def to_ours(tensors: Mapping[str, Tensor], s: Structure) -> dict[str, Tensor]:
    """The state dict under our names. What has no place there keeps its name."""
    rest = dict(tensors)
    state: dict[str, Tensor] = {}
    for n, (kind, ours) in enumerate(pieces(s)):
        parts = {"res": _RES, "attention": _ATTENTION}.get(kind, {"": ""})
        if kind == "resample":
            parts = _RES if s.biggan else {"Conv_0": "conv"}
        for theirs, name in parts.items():
            for leaf, ours_leaf in (("weight", "weight"), ("bias", "bias"), ("W", "weight"), ("b", "bias")):
                source = ".".join(filter(None, (f"{PREFIX}{n}", theirs, leaf)))
                if source in rest:
                    tensor = rest.pop(source)
                    if leaf == "W" and tensor.ndim == 2:  # [in, out]
                        tensor = tensor.t() if kind == "attention" else tensor.t()[:, :, None, None]
                    state[".".join(filter(None, (ours, name, ours_leaf)))] = tensor
    return state | rest


def config_of(s: Structure, name: str, skip_rescale: bool, image_size: int | None) -> dict[str, Any]:
    """UNetConfig's fields for the structure; ``name`` is the network's, ddpm or ncsnpp."""
    plain = "Resnet{0}sampleBlock2D" if s.biggan else "{0}Block2D"
    kinds = ["Attn{0}Block2D" if has else plain for has in s.attention]
    resample = "resnet" if s.biggan else "conv"
    factor = math.sqrt(2) if skip_rescale else 1.0
    # ncsnpp has min(C // 4, 32) groups; where that is 32 at every width, say so in the words that diffusers has too
    groups = 32 if name == "ddpm" or min(s.widths) >= 128 else None
    return {
        "sample_size": image_size,
        "in_channels": s.in_channels,
        "out_channels": s.out_channels,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        "block_out_channels": s.widths,
        "layers_per_block": s.blocks,
        "mid_block_scale_factor": factor,
        "block_scale_factor": factor,
        "downsample_padding": 0,
        "downsample_type": resample,
        "upsample_type": resample,
        "attention_head_dim": None,
        "norm_num_groups": groups,
        "norm_eps": 1e-6,
        "up_attention": "last",
        "resnet_resample_shortcut": s.biggan,
    }
