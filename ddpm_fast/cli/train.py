"""From the ``train`` command's words to a run: a preset, the data, and overrides by field name."""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..config import UNetConfig
from ..data import ImageData, load_data
from ..presets import TrainConfig
from ..presets import preset as preset_by_name
from ..schedule import Schedule
from ..training import train
from ..whole_files import make_folder


def run(
    data: str,
    out: Path,
    preset_name: str,
    image_size: int | None,  # None: the preset's
    label_dropout: float,
    unconditional: bool,
    strict: bool,
    device: torch.device,
    overrides: dict[str, Any],
) -> bool:
    """Train to the end, or until a signal: then False. ValueError for settings that do not exist or fit.

    Under torchrun rank 0 speaks for all, or the process that failed: the others end with its exit code, silently.
    """
    where = distributed.own_device(device, distributed.of_environment())
    try:
        with distributed.join(where) as world:
            prepared = world.together(
                lambda: _prepare(data, preset_name, image_size, label_dropout, unconditional, strict, overrides)
            )
            world.together(lambda: make_folder(out))
            result = train(prepared[0], out, *prepared[1:], where)
    except distributed.OtherProcessFailed:
        raise SystemExit(2) from None
    if not world.first:
        raise SystemExit(0 if result.finished else 130)
    if result.finished:
        print(f"trained {result.step:,} steps; the model is in {out}: ddpm-fast sample {out}")
    return result.finished


def _prepare(
    data: str,
    preset_name: str,
    image_size: int | None,
    label_dropout: float,
    unconditional: bool,
    strict: bool,
    overrides: dict[str, Any],
) -> tuple[ImageData, UNetConfig, Schedule, TrainConfig]:
    preset = preset_by_name(preset_name)
    parts = split_overrides(overrides)
    config = replace(preset.train, label_dropout=label_dropout or preset.train.label_dropout)
    config = replace(config, **parts[TrainConfig])
    source = data or preset.data
    if not source:
        raise ValueError(f"preset {preset_name} brings no images of its own: name a folder, an .npz or a .tar of them")
    channels = parts[UNetConfig].get("in_channels", 3)
    size = preset.image_size if image_size is None else image_size
    images = load_data(source, size, channels=channels, strict=strict)
    if unconditional:
        images = replace(images, labels=None, label_names=None)
    if config.label_dropout and not images.num_classes:
        raise ValueError("label dropout needs labelled images: put each class in a folder of its own")
    model = UNetConfig(**preset.model_for(images, config.label_dropout, **parts[UNetConfig]))
    return images, model, Schedule(**{**preset.schedule, **parts[Schedule]}), config


def split_overrides(overrides: dict[str, Any]) -> dict[type, dict[str, Any]]:
    """Each name to the class that has it; of names in two (num_train_timesteps), to both."""
    owners: tuple[type, ...] = (TrainConfig, UNetConfig, Schedule)
    names = {owner: {f.name for f in fields(owner)} for owner in owners}
    known = sorted(set.union(*names.values()))
    parts: dict[type, dict[str, Any]] = {owner: {} for owner in owners}
    for name, value in overrides.items():
        if name not in known:
            near = get_close_matches(name, known, n=3)
            raise ValueError(f"no setting is called {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
        for owner in owners:
            if name in names[owner]:
                parts[owner][name] = value
    return parts
