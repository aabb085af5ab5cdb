"""Checkpoints: `load` recognises the family of a folder, a file or a hub id; `save` writes the diffusers layout.

A family is one module with a `Family` value: how its tensor names are told, and how they become a `Checkpoint`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..stages import stage
from . import diffusers, ho, lucidrains, lucidrains_layout, openai, score_sde
from .containers import Contents, choose, flatten, is_optimizer, networks, note_left_out, without_strays
from .conversion import TARGETS, write
from .diffusers import save
from .family import Checkpoint, Family, Found
from .files import CheckpointError, first_line, listing, read_weights
from .foreign import FOREIGN
from .layout import Layout, locate
from .sources import opened

__all__ = ["TARGETS", "Checkpoint", "CheckpointError", "convert", "identify", "load", "save"]

_UNNAMED = (
    "{path} holds averaged weights as a list of {count} tensors in the order of parameters(), without names (as the "
    "state of diffusers' EMAModel or of Score-SDE does), and no network whose names they could take; save the model's "
    "state dict beside them in one file, as in {{'model': model.state_dict(), 'ema': ema.state_dict()}}; averages of a "
    "UNet2DModel by EMAModel may have its config.json beside the file instead"
)

BUNDLED = Path(__file__).resolve().parent.parent / "assets" / "pixel-art"


def _starts(beginning: str, *whole: str) -> Callable[[frozenset[str]], bool]:
    """Whether a network has these tensors and one whose name begins so."""
    return lambda names: names.issuperset(whole) and any(name.startswith(beginning) for name in names)


# In this order; the first that fits.
FAMILIES: tuple[Family, ...] = (
    *FOREIGN,
    diffusers.FAMILY,
    Family("OpenAI", _starts("input_blocks.", "time_embed.0.weight"), openai.load),
    Family("Ho et al.", lambda names: "temb.dense.0.weight" in names, ho.load),
    Family(
        "lucidrains",
        lambda names: "init_conv.weight" in names,
        lucidrains.load,
        reads=lucidrains_layout.DIFFUSION_BUFFERS,
    ),
    Family("Score-SDE", _starts("all_modules."), score_sde.load, reads=frozenset({score_sde.SIGMAS})),
)


def load(
    source: str | os.PathLike[str] | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    weights: str | None = None,
) -> Checkpoint:
    """The model and schedule of a checkpoint.

    source: None for the bundled model; a folder in the diffusers layout, a weights file, a DDUF file, or a place on the
        Hugging Face hub: "google/ddpm-cifar10-32", with "/folder" and "@revision" at will, or its address.
    preset: settings for weights without a configuration: "google" or "diffusers-default"; a file released by OpenAI
        ("256x256_diffusion") or its code's defaults ("guided-diffusion"); a model of Ho et al. ("cifar10"); the
        version of lucidrains' denoising-diffusion-pytorch that trained it ("1.7.1"); a config file of Score-SDE's
        ("vp/cifar10_ddpmpp_continuous").
    overrides: settings that win over all else, in the family's own words: fields of UNetConfig or Schedule; for an
        OpenAI checkpoint the flags of its scripts (num_heads, diffusion_steps, noise_schedule, ...), for a lucidrains
        one the arguments of Unet and GaussianDiffusion (objective, image_size, ...), for a Score-SDE one the fields
        of its config files (continuous, predictor, beta_max, ...).
    weights: which of several networks in the source ("model", "ema", "unet", ...). By default the averaged one, and a
        note says which there are.

    The model is in eval mode, float32, on the CPU; the checkpoint's notes say what was inferred or assumed.
    Raises CheckpointError, a ValueError of one line.
    """
    what = "the bundled model" if source is None else os.fspath(source)
    source = BUNDLED if source is None else source
    name = os.fspath(source)
    with stage(f"loading {what}"), opened(source) as path:
        try:
            layout = locate(path, weights)
            content = read_weights(layout.weights)
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {first_line(error)}") from None
        found, family = identify(content, layout, name, preset, overrides)
        assert family.load is not None
        checkpoint = family.load(found)  # with copies of the file's tensors
    if checkpoint.labels:
        checkpoint.model.label_names = tuple(checkpoint.labels)
    return checkpoint


def convert(
    source: str | os.PathLike[str] | Checkpoint | None,
    out: str | os.PathLike[str],
    to: str = "diffusers",
    dtype: torch.dtype | str | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    weights: str | None = None,
) -> list[str]:
    """Writes a checkpoint, as `load` takes it or loaded already, in another format.

    to: "diffusers", whose folder ``out`` gives the same outputs there; or "openai", a ``.pt`` file for improved- and
    guided-diffusion, for models that fit their code. dtype: of the stored weights; None keeps float32.

    Returns notes: the checkpoint's, and what the other format says otherwise or not at all. Raises CheckpointError
    for what it cannot express.
    """
    checkpoint = source if isinstance(source, Checkpoint) else load(source, preset, overrides, weights=weights)
    return [*checkpoint.notes, *write(checkpoint, out, to, dtype)]


def identify(
    content: Any,
    layout: Layout,
    source: str,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Found, Family]:
    """The network to load from what a weights file holds, and its family.

    Raises CheckpointError that says what the file is, where it is something else.
    """
    path, notes = layout.weights, list(layout.notes)
    contents = contents_of(content, path)
    if isinstance(content, list) and len(content) < 5 and ho.named_list(content) is not None:
        notes.append("ddim's list has no averaged weights (ema); the model's own are used, which sample worse")
    present = networks(contents, FAMILIES)
    averages = next(iter(contents.ordered.values()), [])
    if present:
        chosen = choose(contents, present, layout.choice, path, notes)
        tensors, prefix, family = without_strays(chosen, notes), chosen.prefix, chosen.family
        note_left_out(contents, chosen, present, notes)
    elif averages:
        if layout.config is None:
            raise CheckpointError(_UNNAMED.format(path=path, count=len(averages)))
        tensors, prefix, family = diffusers.named_by_config(averages, layout.config, path), "", diffusers.FAMILY
        notes.append("the file holds averaged weights without names; they are named by the config.json beside it")
    elif layout.config is not None:  # a U-Net by its config: its loader says which tensors are missing
        tensors, prefix, family = contents.tensors, "", diffusers.FAMILY
    else:
        names = listing(sorted(contents.tensors))
        raise CheckpointError(
            f"{path} is no checkpoint of a known family; its {len(contents.tensors)} tensors are {names}"
        )
    found = Found(
        source=source,
        weights=path,
        tensors=tensors,
        config=layout.config,
        scheduler=layout.scheduler,
        labels=layout.labels,
        preset=preset,
        overrides=dict(overrides or {}),
        notes=notes,
        recorded=lucidrains.recorded(content),
        prefix=prefix,
        beside=contents.tensors,
    )
    return found, family


def contents_of(content: Any, path: Path) -> Contents:
    """The tensors in what a weights file holds. Raises CheckpointError for what is no model's file at all."""
    if isinstance(content, list):
        content = ho.named_list(content) or content
    if not isinstance(content, (dict, list, tuple)):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    if is_optimizer(content):
        raise CheckpointError(f"{path} is an optimizer's state, not a model; take the model's file beside it")
    if isinstance(content, dict) and {"format", "step", "settings"} <= set(content):
        raise CheckpointError(f"{path} is the state of a training run; load the run's folder, which holds its model")
    contents = flatten(content, path)
    if not contents.tensors and not any(contents.ordered.values()):
        what = f"it has {listing(contents.others)}" if contents.others else "it has no tensors"
        raise CheckpointError(f"{path} is no state dict: {what}")
    return contents
