"""``ddpm-fast train``: a new run from a preset, the data and overrides; or a run that goes on by its own record."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..stages import stage
from .interruption import says_what_is_kept
from .options import Device, Settings, assignments, chosen_device

if TYPE_CHECKING:
    from ..config import UNetConfig
    from ..data import ImageData
    from ..presets import TrainConfig
    from ..schedule import Schedule

PRESET = "tiny"
# Words that people use for settings of other names.
MEANT = {
    "batch": "batch_size",
    "bs": "batch_size",
    "learning_rate": "lr",
    "epochs": "steps",
    "iterations": "steps",
    "max_steps": "steps",
    "train_steps": "steps",
    "timesteps": "num_train_timesteps",
    "diffusion_steps": "num_train_timesteps",
    "noise_schedule": "beta_schedule",
    "save_every": "checkpoint_every",
    "ema": "ema_decay",
    "amp": "precision",
    "fp16": "precision",
    "bf16": "precision",
    "mixed_precision": "precision",
    "channels": "in_channels",
    "hidden_dims": "block_out_channels",
    "widths": "block_out_channels",
}
# Words for what options decide.
OPTIONS = {
    "image_size": "--image-size",
    "resolution": "--image-size",
    "size": "--image-size",
    "sample_size": "--image-size",
    "out": "--out",
    "output": "--out",
    "device": "--device",
    "preset": "--preset",
    "unconditional": "--unconditional",
    "strict": "--strict",
}


def train(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="Images: a folder, an .npz, .npy or .tar(.gz, .xz), or avatars:STYLE. Default: the run's own, or the "
            "preset's.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run. A run that is in it goes on.")] = Path("runs/ddpm"),
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Settings to begin with: tiny, cifar10 or lsun256. Default: {PRESET}."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Scale and crop the images to this many pixels. Default: the preset's size.")
    ] = None,
    label_dropout: Annotated[
        float | None, typer.Option(help="Share of the labels that are dropped, for classifier-free guidance.")
    ] = None,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Ignore the labels of the images.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an unreadable image; do not skip it.")] = False,
    device: Device = None,
    settings: Settings = None,
) -> None:
    """Train a model (Algorithm 1).

    --set takes every field of TrainConfig, UNetConfig and Schedule: --set steps=20000 --set lr=1e-4.

    To continue a run after a kill, name its folder: ddpm-fast train --out RUN. All settings are recorded there.
    """
    asked = Asked(data, out, preset, image_size, label_dropout, unconditional, strict, assignments(settings))
    run(asked, device)


@dataclass(frozen=True)
class Asked:
    """What the command line says; None, False or {} where it says nothing."""

    data: str | None
    out: Path
    preset: str | None
    image_size: int | None
    label_dropout: float | None
    unconditional: bool
    strict: bool
    overrides: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What `training.train` takes."""

    images: ImageData
    model: UNetConfig
    schedule: Schedule
    config: TrainConfig
    preset: str | None


def run(asked: Asked, device_name: str | None) -> None:
    """Train to the end, or until a signal: then exit code 130. ValueError for settings that do not exist or fit.

    Under torchrun rank 0 speaks for all, or the process that failed: the others end with its exit code, silently.
    """
    from .. import distributed, training
    from ..training.state import check_out, read_record

    where = distributed.own_device(chosen_device(device_name), distributed.of_environment())
    try:
        with distributed.join(where) as world:
            record = world.on_first(lambda: read_record(asked.out))
            world.on_first(lambda: check_out(asked.out, "--out", make=False))  # before the data is read
            prepared = world.together(lambda: prepare(asked, record))
            with says_what_is_kept(lambda: _kept(asked.out, device_name, world.size), world.first):
                result = training.train(
                    prepared.images,
                    asked.out,
                    prepared.model,
                    prepared.schedule,
                    prepared.config,
                    where,
                    say=lambda line: print(f"ddpm-fast: {line}", file=sys.stderr),
                    record={"preset": prepared.preset},
                )
    except distributed.OtherProcessFailed:
        raise SystemExit(2) from None
    if world.first and result.finished:
        draw = sample_command(asked.out, prepared.model)
        print(f"trained {result.step:,} steps; the model is in {asked.out}: {draw}")
    elif world.first:
        again = resume_command(asked.out, device_name, world.size)
        print(f"ddpm-fast: stopped at step {result.step:,}, which is saved; to go on: {again}", file=sys.stderr)
    if not result.finished:
        raise SystemExit(130)


def _kept(out: Path, device: str | None, processes: int) -> str:
    """After a signal that left no time to save a state: the last one, and how to go on from it."""
    from ..training.state import state_paths

    paths = state_paths(out / "state")
    step = (
        f"the state of step {int(paths[-1].stem.removeprefix('step_')):,} is kept" if paths else "no state is saved yet"
    )
    return f"{step}; to go on: {resume_command(out, device, processes)}"


def sample_command(out: Path, model: UNetConfig) -> str:
    """The command that draws from the run in ``out``."""
    return shlex.join(["ddpm-fast", "sample", str(out), *(["--label", "all"] if model.num_class_embeds else [])])


def resume_command(out: Path, device: str | None, processes: int) -> str:
    """The command that goes on with the run in ``out``."""
    start = ["ddpm-fast"]
    if processes > 1:
        here = os.environ.get("LOCAL_WORLD_SIZE", str(processes))
        start = ["torchrun", f"--nproc-per-node={here}", "-m", "ddpm_fast"]
    return shlex.join([*start, "train", "--out", str(out), *(["--device", device] if device else [])])


def prepare(asked: Asked, record: Mapping[str, Any] | None) -> Run:
    """The run that is asked for, or the one that ``record`` is of, with what is asked for on top.

    A record counts where a state lies beside it, and also where no DATA is named; else the run is begun anew.
    """
    from ..training.step import check_fit

    chosen = _chosen(asked, record)
    check_fit(chosen.images, chosen.model, chosen.schedule, chosen.config)
    return chosen


def _chosen(asked: Asked, record: Mapping[str, Any] | None) -> Run:
    if record is not None and (record["begun"] or asked.data is None):
        recorded = record.get("preset")
        if asked.preset in (None, recorded):
            return _by_record(asked, record)
        if record["begun"] and recorded is not None:
            raise ValueError(
                f"the run in {asked.out} was begun with --preset {recorded}, and goes on with it; got --preset "
                f"{asked.preset}: train into another folder by --out"
            )
    return _anew(asked)


def _anew(asked: Asked) -> Run:
    from ..config import UNetConfig
    from ..presets import TrainConfig
    from ..presets import preset as preset_by_name
    from ..schedule import Schedule
    from ..training.state import state_paths

    if asked == Asked(None, asked.out, None, None, None, False, False, {}) and state_paths(asked.out / "state"):
        raise ValueError(
            f"{asked.out} has states of a run, but no train_config.json with its settings: give DATA and all options "
            "that the run was begun with"
        )
    name = asked.preset or PRESET
    preset = preset_by_name(name)
    parts = split_overrides(asked.overrides)
    config = replace(preset.train, label_dropout=asked.label_dropout or preset.train.label_dropout)
    config = replace(config, **parts[TrainConfig])
    source = asked.data or preset.data
    if not source:
        raise ValueError(f"preset {name} brings no images of its own: name a folder, an .npz or a .tar of them")
    size = preset.image_size if asked.image_size is None else asked.image_size
    images = _read(source, size, parts[UNetConfig].get("in_channels", 3), asked.strict, asked.unconditional)
    if config.label_dropout and not images.num_classes:
        raise ValueError("label dropout needs labelled images: put each class in a folder of its own")
    model = UNetConfig(**preset.model_for(images, config.label_dropout, **parts[UNetConfig]))
    return Run(images, model, Schedule(**{**preset.schedule, **parts[Schedule]}), config, name)


def _by_record(asked: Asked, record: Mapping[str, Any]) -> Run:
    """By the settings in the run's folder. What is asked for besides may differ only where a run may change."""
    from ..config import UNetConfig
    from ..presets import ADJUSTABLE, TrainConfig
    from ..schedule import Schedule
    from ..training.state import check_same_run, plain

    parts = split_overrides(asked.overrides)
    known = {f.name for f in fields(TrainConfig)}
    config = TrainConfig(**{k: v for k, v in record["train"].items() if k in known})
    if asked.label_dropout is not None:
        config = replace(config, label_dropout=asked.label_dropout)
    config = replace(config, **parts[TrainConfig])
    size = {} if asked.image_size is None else {"sample_size": asked.image_size}
    model = UNetConfig.from_dict({**record["model"], **size, **parts[UNetConfig]})
    schedule = Schedule.from_dict({**record["schedule"], **parts[Schedule]})
    if record["begun"]:  # before the images are read, which may take long
        ignored = ADJUSTABLE | ({"steps"} if config.lr_schedule == "constant" else set())
        now = {"train": config.to_dict(), "model": model.to_dict(), "schedule": schedule.to_dict()}
        check_same_run({name: record[name] for name in now}, plain(now), frozenset(ignored))
        if asked.unconditional and model.num_class_embeds is not None:
            raise ValueError(f"the run in {asked.out} was begun with labels; --unconditional needs another --out")
    images = _recorded_images(asked, record, model)
    classes = images.num_classes + (config.label_dropout > 0) if images.num_classes else None
    if not record["begun"] and "num_class_embeds" not in parts[UNetConfig]:
        model = replace(model, num_class_embeds=classes)
    return Run(images, model, schedule, config, record.get("preset"))


def _recorded_images(asked: Asked, record: Mapping[str, Any], model: UNetConfig) -> ImageData:
    """The run's images, from where they were, or from where DATA says that they are now."""
    source = asked.data or record.get("source")
    if not source:
        raise ValueError(
            f"the run in {asked.out} was begun with images that no file holds: continue it from Python, or give DATA"
        )
    if asked.data is None and not source.startswith("avatars:") and not Path(source).exists():
        raise ValueError(
            f"the images of the run in {asked.out} are no longer at {source}: say where they are: "
            f"ddpm-fast train DATA --out {shlex.quote(str(asked.out))}"
        )
    sides = model.image_size
    square = sides is not None and sides[0] == sides[1]
    without = asked.unconditional or (record["begun"] and model.num_class_embeds is None)
    return _read(source, sides[0] if sides and square else None, model.in_channels, asked.strict, without)


def _read(source: str, size: int | None, channels: int, strict: bool, unconditional: bool) -> ImageData:
    from ..data import load_data

    with stage(f"reading {source}"):
        images = load_data(source, size, channels=channels, strict=strict)
    return replace(images, labels=None, label_names=None) if unconditional else images


def split_overrides(overrides: Mapping[str, Any]) -> dict[type, dict[str, Any]]:
    """Each name to the class that has it; of names in two (num_train_timesteps), to both."""
    from ..config import UNetConfig
    from ..presets import TrainConfig
    from ..schedule import Schedule

    owners: tuple[type, ...] = (TrainConfig, UNetConfig, Schedule)
    names = {owner: {f.name for f in fields(owner)} for owner in owners}
    known = sorted(set.union(*names.values()))
    parts: dict[type, dict[str, Any]] = {owner: {} for owner in owners}
    for name, value in overrides.items():
        if name not in known:
            raise ValueError(_unknown(name, value, known))
        for owner in owners:
            if name in names[owner]:
                parts[owner][name] = value
    return parts


def _unknown(name: str, value: Any, known: list[str]) -> str:
    """What to say of a setting that does not exist: the option or the setting that is probably meant."""
    text = f"no setting is called {name!r}"
    word = name.lower().replace("-", "_")
    if word in OPTIONS:
        flag = OPTIONS[word] in ("--unconditional", "--strict")
        return f"{text}; that is an option: {OPTIONS[word]}" + ("" if flag else f" {value}")
    near = [MEANT[word]] if word in MEANT else [word] if word in known else get_close_matches(word, known, n=3)
    return text + (f"; did you mean {', '.join(near)}?" if near else "")
