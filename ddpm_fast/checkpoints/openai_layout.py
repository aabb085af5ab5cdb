"""The U-Net of improved- and guided-diffusion: its structure from the shapes, its names in ours and back.

A level of theirs is a block of diffusers': residual blocks, each with attention or not, then the resampler; on the
way up the resampler follows the attention of the last block. `pieces` walks both in their order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .files import CheckpointError

Heads = int | tuple[int]  # so many heads at every width; (d,): heads of d channels
GROUPS = 32

_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# An element of input_blocks.n or output_blocks.n is told by the first of these that it has.
_MARKS = {"in_layers": "res", "qkv": "attention", "op": "down", "conv": "up", "weight": "conv"}


@dataclass(frozen=True)
class Structure:
    """What the shapes tell, and all that the names follow from. The fingerprint of a release."""

    channels: int  # num_channels
    blocks: int  # num_res_blocks
    widths: tuple[int, ...]  # of each level: channel_mult times channels
    attention: tuple[bool, ...]  # at each level
    resblock_updown: bool
    scale_shift: bool
    in_channels: int
    out_channels: int
    classes: int | None

    @property
    def channel_mult(self) -> tuple[float, ...]:
        mults = (width / self.channels for width in self.widths)
        return tuple(int(m) if m == int(m) else m for m in mults)

    @property
    def attended(self) -> list[int]:
        """The widths at which there is attention: always the deepest, in the middle."""
        return sorted({w for w, has in zip(self.widths, self.attention) if has} | {self.widths[-1]})

    @property
    def learn_sigma(self) -> bool:
        return self.out_channels == 2 * self.in_channels


def structure_of(tensors: Mapping[str, Tensor], where: object) -> Structure:
    """The structure of a state dict. CheckpointError, which begins with where, for what is no such U-Net."""
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if not any(name.startswith("output_blocks.") for name in shapes):
        raise CheckpointError(f"{where} is a guided-diffusion classifier (no output_blocks), not a model that denoises")
    down, up = _kinds(shapes, "input", where), _kinds(shapes, "output", where)
    last_of_level = [n for n, kinds in enumerate(up) if len(kinds) > 1 and kinds[-1] in ("up", "res")]
    levels = len(last_of_level) + 1
    blocks = last_of_level[0] if last_of_level else len(up) - 1
    firsts = [1 + level * (blocks + 1) for level in range(levels)]
    try:
        structure = Structure(
            channels=shapes["time_embed.0.weight"][1],
            blocks=blocks,
            widths=tuple(shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in firsts),
            attention=tuple("attention" in down[n] for n in firsts),
            resblock_updown=bool(last_of_level) and up[last_of_level[0]][-1] == "res",
            scale_shift=_scale_shift(shapes),
            in_channels=shapes["input_blocks.0.0.weight"][1],
            out_channels=shapes["out.2.weight"][0],
            classes=shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        )
    except KeyError as error:
        raise CheckpointError(f"{where} is not a whole OpenAI U-Net: it has no {error}") from None
    except IndexError:
        raise CheckpointError(
            f"{where} is not a whole OpenAI U-Net: blocks are missing, or weights have too few axes"
        ) from None
    _check_layout(structure, down, up, where)
    _check_channels(structure, shapes, where)
    return structure


def _kinds(shapes: Mapping[str, tuple[int, ...]], way: str, where: object) -> list[list[str]]:
    """What each block of a side is made of, e.g. [["conv"], ["res"], ["res", "attention"], ...]."""
    found: dict[int, dict[int, str]] = {}
    for name in shapes:
        match = re.fullmatch(rf"{way}_blocks\.(\d{{1,4}})\.(\d)\.(\w+)(\..*)?", name)
        if match and match[3] in _MARKS:
            found.setdefault(int(match[1]), {}).setdefault(int(match[2]), _MARKS[match[3]])
    kinds = []
    for n in range(len(found)):
        elements = found.get(n, {})
        if sorted(elements) != list(range(len(elements))) or not elements:
            raise CheckpointError(f"{where} is not a whole OpenAI U-Net: {way}_blocks.{n} lacks parts or weights")
        kinds.append([elements[i] for i in range(len(elements))])
    return kinds


def _scale_shift(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    block = "input_blocks.1.0"
    return shapes[f"{block}.emb_layers.1.weight"][0] == 2 * shapes[f"{block}.out_layers.3.weight"][0]


def _check_layout(s: Structure, down: list[list[str]], up: list[list[str]], where: object) -> None:
    """That every block is what the structure says: then attention is by level, and resampling of one kind."""
    expected_down, expected_up = [["conv"]], []
    for level, has in enumerate(s.attention):
        block = ["res", "attention"] if has else ["res"]
        expected_down += [block] * s.blocks
        if level + 1 < len(s.widths):
            expected_down.append(["res"] if s.resblock_updown else ["down"])
    for level, has in reversed(list(enumerate(s.attention))):
        block = ["res", "attention"] if has else ["res"]
        expected_up += [block] * s.blocks
        expected_up.append(block + ([] if level == 0 else ["res"] if s.resblock_updown else ["up"]))
    for way, expected, given in (("input", expected_down, down), ("output", expected_up, up)):
        if len(expected) != len(given):
            raise CheckpointError(
                f"{where} has {len(given)} {way}_blocks, but {len(s.widths)} levels of {s.blocks} residual blocks "
                f"make {len(expected)}; it is not an OpenAI U-Net as the released code builds it"
            )
        for n, (wanted, kinds) in enumerate(zip(expected, given)):
            if wanted != kinds:
                raise CheckpointError(
                    f"{where}: {way}_blocks.{n} is made of {'+'.join(kinds)}, where its level needs "
                    f"{'+'.join(wanted)}; attention must be by level and resampling of one kind"
                )


def _check_channels(s: Structure, shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    if s.in_channels == 6 or s.out_channels not in (s.in_channels, 2 * s.in_channels):
        raise CheckpointError(
            f"{where} takes {s.in_channels} channels and gives {s.out_channels}: a super-resolution model "
            "(upsampler), which needs a low-resolution image; only models that draw from noise are supported"
        )
    if shapes["input_blocks.0.0.weight"][0] != s.widths[0]:
        raise CheckpointError(
            f"{where}: its first convolution has {shapes['input_blocks.0.0.weight'][0]} channels, its first level "
            f"{s.widths[0]}; a first multiple other than 1 is supported as guided-diffusion builds it only"
        )


# --- names ---


def pieces(s: Structure) -> Iterator[tuple[str, str, str]]:
    """(kind, their prefix, our prefix) of every module with weights, in the order of their state dict."""
    yield "plain", "time_embed.0", "time_embedding.linear_1"
    yield "plain", "time_embed.2", "time_embedding.linear_2"
    if s.classes is not None:
        yield "plain", "label_emb", "class_embedding"
    yield "plain", "input_blocks.0.0", "conv_in"
    levels, n = len(s.widths), 1
    for level in range(levels):
        ours = f"down_blocks.{level}"
        for j in range(s.blocks):
            yield from _stage(s, level, f"input_blocks.{n}", ours, j)
            n += 1
        if level + 1 < levels:
            yield _resampler(s, f"input_blocks.{n}.0", "op", f"{ours}.downsamplers.0")
            n += 1
    yield "res", "middle_block.0", "mid_block.resnets.0"
    yield "attention", "middle_block.1", "mid_block.attentions.0"
    yield "res", "middle_block.2", "mid_block.resnets.1"
    n = 0
    for i, level in enumerate(reversed(range(levels))):
        ours = f"up_blocks.{i}"
        for j in range(s.blocks + 1):
            yield from _stage(s, level, f"output_blocks.{n}", ours, j)
            if j == s.blocks and level:
                place = 2 if s.attention[level] else 1
                yield _resampler(s, f"output_blocks.{n}.{place}", "conv", f"{ours}.upsamplers.0")
            n += 1
    yield "plain", "out.0", "conv_norm_out"
    yield "plain", "out.2", "conv_out"


def _stage(s: Structure, level: int, theirs: str, ours: str, j: int) -> Iterator[tuple[str, str, str]]:
    yield "res", f"{theirs}.0", f"{ours}.resnets.{j}"
    if s.attention[level]:
        yield "attention", f"{theirs}.1", f"{ours}.attentions.{j}"


def _resampler(s: Structure, theirs: str, conv: str, ours: str) -> tuple[str, str, str]:
    return ("res", theirs, ours) if s.resblock_updown else ("plain", f"{theirs}.{conv}", f"{ours}.conv")


def _same(kind: str, theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    """(their name, our name) of a piece's tensors that are the same in both; not all need be there."""
    parts = {"plain": {"": ""}, "res": _RES, "attention": {"norm": "group_norm"}}[kind]
    for a, b in parts.items():
        for leaf in ("weight", "bias"):
            yield ".".join(filter(None, (theirs, a, leaf))), ".".join(filter(None, (ours, b, leaf)))


def to_ours(tensors: Mapping[str, Tensor], s: Structure, heads: Heads, new_order: bool) -> dict[str, Tensor]:
    """The state dict under our names, q, k and v apart. What has no place there keeps its name."""
    rest = dict(tensors)
    state: dict[str, Tensor] = {}
    for piece in pieces(s):
        kind, theirs, ours = piece
        state |= {our_name: rest.pop(name) for name, our_name in _same(*piece) if name in rest}
        for leaf in ("weight", "bias") if kind == "attention" else ():
            if f"{theirs}.qkv.{leaf}" in rest:
                rows = _rows(rest.pop(f"{theirs}.qkv.{leaf}"), leaf)
                for name, part in zip("qkv", split_qkv(rows, heads, new_order)):
                    state[f"{ours}.to_{name}.{leaf}"] = part
            if f"{theirs}.proj_out.{leaf}" in rest:
                state[f"{ours}.to_out.0.{leaf}"] = _rows(rest.pop(f"{theirs}.proj_out.{leaf}"), leaf)
    return state | rest


def _rows(tensor: Tensor, leaf: str) -> Tensor:
    """A 1-D convolution [K, C, 1] as a matrix."""
    return tensor.squeeze(-1) if leaf == "weight" and tensor.ndim == 3 and tensor.shape[-1] == 1 else tensor


def head_count(channels: int, heads: Heads) -> int:
    return heads if isinstance(heads, int) else channels // heads[0]


def split_qkv(
    rows: Tensor,  # [3C, ...]
    heads: Heads,
    new_order: bool,  # all q rows, all k, all v; else each head's q, k and v together
) -> tuple[Tensor, Tensor, Tensor]:  # [C, ...] each, head by head
    if new_order or rows.shape[0] % 3:
        q, k, v = (rows.chunk(3) + (rows[:0],) * 3)[:3]
        return q, k, v
    channels = rows.shape[0] // 3
    n = head_count(channels, heads)
    if n < 1 or channels % n:
        raise CheckpointError(f"an attention over {channels} channels has no {n} heads; give num_heads as trained with")
    by_head = rows.reshape(n, 3, channels // n, *rows.shape[1:])
    q, k, v = (by_head[:, i].reshape(channels, *rows.shape[1:]) for i in range(3))
    return q, k, v


def join_qkv(q: Tensor, k: Tensor, v: Tensor, n: int, new_order: bool) -> Tensor:
    """The inverse of `split_qkv`, for n heads."""
    if new_order:
        return torch.cat((q, k, v))
    by_head = [t.reshape(n, t.shape[0] // n, *t.shape[1:]) for t in (q, k, v)]
    return torch.stack(by_head, dim=1).reshape(3 * q.shape[0], *q.shape[1:])


def to_theirs(state: Mapping[str, Tensor], s: Structure, heads: Heads, new_order: bool) -> dict[str, Tensor]:
    """Our state dict under their names and in their order. CheckpointError where a tensor has no place."""
    rest = dict(state)
    result: dict[str, Tensor] = {}
    for piece in pieces(s):
        kind, theirs, ours = piece
        result |= {name: rest.pop(our_name) for name, our_name in _same(*piece) if our_name in rest}
        if kind == "attention":
            for leaf in ("weight", "bias"):
                q, k, v = (rest.pop(f"{ours}.to_{name}.{leaf}") for name in "qkv")
                joined = join_qkv(q, k, v, head_count(q.shape[0], heads), new_order)
                result[f"{theirs}.qkv.{leaf}"] = joined.unsqueeze(-1) if leaf == "weight" else joined
            result[f"{theirs}.proj_out.weight"] = rest.pop(f"{ours}.to_out.0.weight").unsqueeze(-1)
            result[f"{theirs}.proj_out.bias"] = rest.pop(f"{ours}.to_out.0.bias")
    if rest:
        raise CheckpointError(f"{min(rest)} has no place in OpenAI's U-Net")
    return result


# --- configuration ---


def config_of(s: Structure, heads: Heads, image_size: int | None) -> dict[str, Any]:
    """UNetConfig's fields for the structure."""
    odd_time = s.channels != s.widths[0]
    plain = "Resnet{0}sampleBlock2D" if s.resblock_updown else "{0}Block2D"
    kinds = ["Attn{0}Block2D" if has else plain for has in s.attention]
    values: dict[str, Any] = {
        "sample_size": image_size,
        "in_channels": s.in_channels,
        "out_channels": s.out_channels,
        "time_embedding_dim": 4 * s.channels if odd_time else None,
        "time_proj_channels": s.channels if odd_time else None,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        "block_out_channels": s.widths,
        "layers_per_block": s.blocks,
        "downsample_padding": 1,
        "norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "num_class_embeds": s.classes,
    }
    if s.resblock_updown:
        values |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    if s.scale_shift:  # then diffusers normalises before the middle attention only where this is given
        values |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": GROUPS}
    return values | _heads_config(s, heads)


def _heads_config(s: Structure, heads: Heads) -> dict[str, Any]:
    if isinstance(heads, tuple):
        return {"attention_head_dim": heads[0]}
    if heads == 1:
        return {"attention_head_dim": None}
    if len(s.attended) == 1:
        return {"attention_head_dim": s.attended[0] // heads}
    return {"attention_head_dim": None, "num_attention_heads": heads}
