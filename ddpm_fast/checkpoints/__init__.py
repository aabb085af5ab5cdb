"""Checkpoints: `load` recognises the family of a folder, a file or a hub id; `save` writes the diffusers layout.

A family is one module with a `Family` value: how its tensor names are told, and how they become a `Checkpoint`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import diffusers, ho, lucidrains, lucidrains_layout, openai
from .conversion import TARGETS, write
from .diffusers import save
from .family import Checkpoint, Family, Found
from .files import CheckpointError, first_line, listing, read_weights
from .layout import CONFIG, LABELS, MODEL_INDEX, SCHEDULER, UNETS, WEIGHTS, find_weights, locate

__all__ = ["TARGETS", "Checkpoint", "CheckpointError", "convert", "load", "save"]

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "pixel-art"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def _has(*parts: str) -> Any:
    return lambda names: all(any(part in name for name in names) for part in parts)


# In this order; the first that fits.
FAMILIES: tuple[Family, ...] = (
    Family(
        "conditional U-Net",
        lambda names: _has("down_blocks.")(names) and any(".attn2." in n or n.startswith("encoder_hid") for n in names),
        refusal="a U-Net guided by text or images (UNet2DConditionModel), no unconditional DDPM; run it in diffusers",
    ),
    diffusers.FAMILY,
    Family(
        "latent diffusion",
        lambda names: _has("input_blocks.")(names) and _has("transformer_blocks.")(names),
        refusal="a latent diffusion model (its U-Net has transformer blocks), no DDPM over pixels; run it in its code",
    ),
    Family(
        "OpenAI",
        lambda names: "time_embed.0.weight" in names and _has("input_blocks.")(names),
        openai.load,
    ),
    Family(
        "Ho et al.",
        lambda names: "temb.dense.0.weight" in names,
        ho.load,
    ),
    Family(
        "lucidrains",
        lambda names: any(n.endswith("init_conv.weight") for n in names),
        lucidrains.load,
    ),
    Family(
        "Karras U-Net",
        lambda names: _has("to_time_emb.")(names) and _has("downs.")(names),
        refusal="a Karras (EDM2) U-Net, of the sort in lucidrains' package; it is no DDPM's: draw from it there",
    ),
    Family(
        "EDM",
        lambda names: any(n.endswith("map_layer0.weight") for n in names),
        refusal="an EDM network, whose noise levels are continuous; it is no DDPM: draw from it with EDM's own code",
    ),
)


def load(
    source: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """The model and schedule of a checkpoint.

    source: None for the bundled model; a folder in the diffusers layout, a weights file, or a hub id
        ("google/ddpm-cifar10-32", with "@revision" at will).
    preset: settings for weights without a configuration: "google" or "diffusers-default"; a file released by OpenAI
        ("256x256_diffusion") or its code's defaults ("guided-diffusion"); a model of Ho et al. ("cifar10"); the
        version of lucidrains' denoising-diffusion-pytorch that trained it ("1.7.1").
    overrides: settings that win over all else, in the family's own words: fields of UNetConfig or Schedule; for an
        OpenAI checkpoint the flags of its scripts (num_heads, diffusion_steps, noise_schedule, ...), for a lucidrains
        one the arguments of Unet and GaussianDiffusion (objective, image_size, ...).

    The model is in eval mode, float32, on the CPU; the checkpoint's notes say what was inferred or assumed.
    Raises CheckpointError, a ValueError of one line.
    """
    source = BUNDLED if source is None else source
    name = os.fspath(source)
    try:
        layout = locate(_resolve(source))
        content = read_weights(layout.weights)
        tensors = unwrap(content, layout.weights, layout.notes)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {first_line(error)}") from None
    found = Found(
        source=name,
        weights=layout.weights,
        tensors=tensors,
        config=layout.config,
        scheduler=layout.scheduler,
        labels=layout.labels,
        preset=preset,
        overrides=dict(overrides or {}),
        notes=layout.notes,
        recorded=lucidrains.recorded(content),
    )
    family = detect(found)
    assert family.load is not None
    checkpoint = family.load(found)
    if checkpoint.labels:
        checkpoint.model.label_names = tuple(checkpoint.labels)
    return checkpoint


def convert(
    source: str | os.PathLike[str] | Checkpoint | None,
    out: str | os.PathLike[str],
    to: str = "diffusers",
    dtype: torch.dtype | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes a checkpoint, as `load` takes it or loaded already, in another format.

    to: "diffusers", whose folder ``out`` gives the same outputs there; or "openai", a ``.pt`` file for improved- and
    guided-diffusion, for models that fit their code. dtype: of the stored weights; None keeps float32.

    Returns notes: the checkpoint's, and what the other format says otherwise or not at all. Raises CheckpointError
    for what it cannot express.
    """
    checkpoint = source if isinstance(source, Checkpoint) else load(source, preset, overrides)
    return [*checkpoint.notes, *write(checkpoint, out, to, dtype)]


def detect(found: Found) -> Family:
    """The family of these weights, by their names. CheckpointError for one that cannot be loaded, or none."""
    names = frozenset(found.tensors)
    for family in FAMILIES:
        if family.detect(names):
            if family.load is None:
                raise CheckpointError(f"{found.weights} is {family.refusal}")
            return family
    if found.config is not None:  # a U-Net by its config: its loader says which tensors are missing
        return diffusers.FAMILY
    raise CheckpointError(
        f"{found.weights} is no checkpoint of a known family; its {len(names)} tensors are {listing(sorted(names))}"
    )


def unwrap(content: Any, path: Path, notes: list[str] | None = None) -> dict[str, Tensor]:
    """The state dict in what a weights file holds; prefixes that wrappers leave on every name are stripped.

    notes: gets what was chosen where the file holds more than one.
    Raises CheckpointError that says what the file is, where it is something else.
    """
    if isinstance(content, list):
        content, chosen = ho.averaged(content, path)
        if notes is not None:
            notes.append(chosen)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    if "param_groups" in content:
        raise CheckpointError(f"{path} is an optimizer's state, not a model; take the model's file beside it")
    if {"format", "step", "settings"} <= set(content):
        raise CheckpointError(f"{path} is the state of a training run; load the run's folder, which holds its model")
    if "shadow_params" in content or (isinstance(content.get("ema"), dict) and "shadow_params" in content["ema"]):
        raise CheckpointError(
            f"{path} is a Score-SDE checkpoint, whose averaged weights have no names; load it in "
            "its own code and save the model's state dict from there, if it was trained as a DDPM"
        )
    if isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    elif isinstance(content.get("model"), dict) and "ema" in content and not set(_ANCHORS) & set(content["model"]):
        content = lucidrains_layout.tensors_of(content)
    else:
        content = _only_state_dict(content, path, notes)
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    odd = [str(name) for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd or not tensors:
        raise CheckpointError(f"{path} is no state dict: it has {'no tensors' if not tensors else listing(odd)}")
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # compiled, then distributed, or the other way round
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return _without_prefix(tensors)


# The name of a tensor that a whole U-Net has, without what wrappers put before it.
_ANCHORS = ("time_embedding.linear_1.weight", "time_embed.0.weight", "temb.dense.0.weight")


def _only_state_dict(content: dict[Any, Any], path: Path, notes: list[str] | None) -> dict[Any, Any]:
    """Of what a training script saved, {"model": ..., "optimizer": ..., "epoch": ...}, the state dict."""
    inside = [
        name
        for name, value in content.items()
        if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values())
    ]
    if not inside or any(isinstance(value, Tensor) for value in content.values()):
        return content
    if len(inside) > 1:
        raise CheckpointError(
            f"{path} holds {len(inside)} state dicts ({listing([str(name) for name in inside])}); save the one to draw "
            "from in a file of its own"
        )
    if notes is not None:
        notes.append(f"of what the file holds the state dict under {inside[0]!r} is used")
    return content[inside[0]]


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net's tensors without what all their names begin with, where it was an attribute of another module."""
    for name in tensors:
        for anchor in _ANCHORS:
            prefix = name.removesuffix(anchor)
            if name.endswith("." + anchor) and all(other.startswith(prefix) for other in tensors):
                return {other.removeprefix(prefix): value for other, value in tensors.items()}
    return tensors


def _resolve(source: str | os.PathLike[str]) -> Path:
    """The local path of a source, downloaded if it is a hub id."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _download(source)
    raise CheckpointError(f"{path} does not exist, neither as a folder nor as a file")


def _download(hub_id: str) -> Path:
    """A snapshot of the small JSON files and the preferred weights alone. Code in a repository is never fetched."""
    import huggingface_hub  # here: loading a local file must not need it

    repo, _, revision = hub_id.partition("@")
    places = ("", *(f"{name}/" for name in UNETS))
    small = [MODEL_INDEX, SCHEDULER, f"scheduler/{SCHEDULER}", LABELS, *(f"{p}{CONFIG}" for p in places)]
    folder = None
    for kinds in (
        [f"{WEIGHTS}.safetensors", f"{WEIGHTS}.safetensors.index.json", f"{WEIGHTS}-*-of-*.safetensors"],
        [f"{WEIGHTS}.bin", f"{WEIGHTS}.bin.index.json", f"{WEIGHTS}-*-of-*.bin"],
        [f"{WEIGHTS}.*"],  # variants
    ):
        wanted = small + [f"{place}{kind}" for place in places for kind in kinds]
        try:
            folder = Path(huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=wanted))
        except Exception as error:
            raise CheckpointError(
                f"{hub_id} is neither a local path nor could it be had from the hub ({first_line(error)})"
            ) from None
        if any(find_weights(folder / place) for place in places):
            break
    if folder is None or not folder.is_dir():
        raise CheckpointError(f"{hub_id} has none of the files of a diffusers checkpoint")
    return folder
