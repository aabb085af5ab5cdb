"""The layout of diffusers' DDPMPipeline: UNet2DModel and DDPMScheduler, read and written."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UNetConfig
from ..schedule import Schedule
from ..unet import UNet
from ..whole_files import write_atomically
from . import infer
from .express import for_diffusers
from .family import Checkpoint, Family, Found, check_names, fit, stored_dtype
from .files import CheckpointError, first_line, safetensors_bytes
from .layout import CONFIG, LABELS, MODEL_INDEX, PIPELINE, SCHEDULER, UNETS, WEIGHTS, check_class
from .lucidrains_unet import LucidrainsUnet
from .schedulers import DDIM, DDPM_STEPS, schedule_fields

FORMAT_VERSION = "0.42.1"  # the diffusers whose files these are; any from 0.17 on reads them

MAX_TIMESTEPS = 1_000_000  # its tables are held in memory

_UNET_FIELDS = frozenset(f.name for f in fields(UNetConfig))
_SCHEDULE_FIELDS = frozenset(f.name for f in fields(Schedule))
# What EMAModel.save_pretrained adds to the model's config.
_EMA_FIELDS = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)
# Names of attention projections before diffusers 0.17.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = re.compile(r"(.*\battentions\.\d+\.)(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)\.(weight|bias)")


def _detect(names: frozenset[str]) -> bool:
    return "time_embedding.linear_1.weight" in names and any(name.startswith("down_blocks.") for name in names)


def _load(found: Found) -> Checkpoint:
    check_names(found.overrides, _UNET_FIELDS | _SCHEDULE_FIELDS, "override")
    if found.preset is not None:
        check_names([found.preset], infer.PRESETS, "preset")
    check_class(found.config, found.weights.parent / CONFIG)
    tensors = current_names(found.tensors, found.weights)
    notes = list(found.notes)
    config = _unet_config(found, tensors, notes)
    model = _build(config, found.weights)
    notes += fit(model, found, tensors)
    schedule = _schedule(found, config, notes)
    if found.overrides:
        notes.append("overridden: " + _settings(found.overrides))
    if found.labels and len(found.labels) > (config.num_class_embeds or 0):
        raise CheckpointError(f"{LABELS} has {len(found.labels)} names for {config.num_class_embeds or 0} classes")
    return Checkpoint(model, schedule, found.source, "diffusers", notes, found.labels)


FAMILY = Family("diffusers", _detect, _load)


def named_by_config(averages: Sequence[Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The state dict of diffusers' EMAModel under the names of the UNet2DModel that a config.json describes.

    averages: its shadow_params, one for each of the model's parameters() in that order. Raises CheckpointError where
    their number or a shape is not the model's.
    """
    found = Found(str(path), path, {str(i): t for i, t in enumerate(averages)}, config=dict(config))
    model = _build(_unet_config(found, found.tensors, []), path)
    names = sorted(dict(model.named_parameters()), key=_place_in_diffusers)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = next((n for n, t in zip(names, averages) if tuple(t.shape) != shapes[n]), None)
    if len(names) != len(averages) or wrong is not None:
        what = f"{wrong} is not of shape {list(shapes[wrong])}" if wrong else f"the U-Net has {len(names)} parameters"
        raise CheckpointError(
            f"{path} holds {len(averages)} averaged tensors in the order of parameters(), and by the {CONFIG} beside "
            f"it {what}; put the right {CONFIG} there, or save the model's state dict in the same file"
        )
    return dict(zip(names, averages))


def _place_in_diffusers(name: str) -> tuple[int, int, bool]:
    """Sorts our parameters' names (stably) into the order of UNet2DModel.parameters(), which is that of assignment."""
    parts = name.split(".")
    order = ("down_blocks", "up_blocks", "mid_block", "conv_norm_out", "conv_out")
    place = order.index(parts[0]) + 1 if parts[0] in order else 0
    return place, int(parts[1]) if parts[0] in order[:2] else 0, "attentions" not in parts


def _build(config: UNetConfig, path: Path) -> UNet:
    try:
        with torch.device("meta"):  # no memory and no random numbers for what the file is about to give
            return UNet(config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:  # sizes beyond any tensor
        raise CheckpointError(f"the configuration of {path} cannot be built: {first_line(error)}") from None


def current_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state dict under today's names: old attention projections (blocks may mix both) and ``time_proj.W``.

    Projections that were 1x1 convolutions lose their trailing axes of length 1.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _ATTENTION.fullmatch(name)
        if match:
            name = f"{match[1]}{_OLD_ATTENTION.get(match[2], match[2])}.{match[3]}"
            least = 2 if match[3] == "weight" else 1
            while tensor.layout == torch.strided and tensor.ndim > least and tensor.shape[-1] == 1:
                tensor = tensor.squeeze(-1)
        elif name == "time_proj.W":
            name = "time_proj.weight"
        if name in renamed:
            raise CheckpointError(f"{path} has {name} twice, under its old and its new name")
        renamed[name] = tensor
    return renamed


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={list(v) if isinstance(v, tuple) else v!r}" for name, v in values.items())


def _unet_config(found: Found, tensors: Mapping[str, Tensor], notes: list[str]) -> UNetConfig:
    if found.config is not None:
        if found.preset is not None and found.scheduler is not None:
            raise CheckpointError(
                f"preset={found.preset!r} is for weights without a configuration, but {found.weights.parent} has one; "
                "use overrides to change single fields"
            )
        values = {k: v for k, v in found.config.items() if k not in _EMA_FIELDS}
        for kind in ("down_block_types", "up_block_types"):  # before 0.3 they were UNetRes...
            if isinstance(values.get(kind), list):
                values[kind] = [t.removeprefix("UNetRes") if isinstance(t, str) else t for t in values[kind]]
    elif found.preset is not None:
        inferred = infer.config_from_shapes(tensors)
        assumed = infer.preset_config(found.preset, inferred, tensors)
        notes.append("inferred from the shapes: " + _settings(inferred))
        notes.append(f"assumed by preset {found.preset!r}: {_settings(assumed)}")
        values = {**assumed, **inferred}
    else:
        raise CheckpointError(
            f"{found.weights} has no {CONFIG} beside it, and its weights do not tell everything (padding, heads, "
            f"eps, ...); put the file there, or name a preset: {', '.join(infer.PRESETS)}"
        )
    # num_train_timesteps overrides the schedule's: the U-Net's is the number of rows it has learned
    values |= {k: v for k, v in found.overrides.items() if k in _UNET_FIELDS - {"num_train_timesteps"}}
    _check_size(values, found)
    try:
        return UNetConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration of {found.weights} is not usable: {error}") from None


def _check_size(values: Mapping[str, Any], found: Found) -> None:
    """That a config does not ask for far more modules than the file has tensors: building them would never end."""
    layers, widths = values.get("layers_per_block"), values.get("block_out_channels")
    sizes = [layers if isinstance(layers, int) else 1, len(widths) if isinstance(widths, (list, tuple)) else 1]
    if prod(sizes) > max(len(found.tensors), 64):
        raise CheckpointError(
            f"{found.weights} has {len(found.tensors)} tensors, too few for the {sizes[1]} levels of {sizes[0]} "
            "layers that its configuration names"
        )


def _schedule(found: Found, config: UNetConfig, notes: list[str]) -> Schedule:
    if found.scheduler is not None:
        values = schedule_fields(found.scheduler, notes, found.scheduler.get(PIPELINE))
        if found.overrides.get("method", values.get("method")) != values.get("method"):
            values.pop("num_inference_steps", None)  # the other method's
    else:
        values = infer.preset_schedule(found.preset, config.block_out_channels) if found.preset else {}
        if config.out_channels == 2 * config.in_channels:
            values["variance_type"] = "learned_range"
        origin = f"by preset {found.preset!r}" if found.preset else "as DDPMScheduler's defaults"
        assumed = {**Schedule().to_dict(), **values}
        chief = {k: assumed[k] for k in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")}
        chief |= {k: assumed[k] for k in ("variance_type", "prediction_type", "clip_sample")}
        notes.append(f"there is no {SCHEDULER}; the schedule is assumed {origin}: {_settings(chief)}")
    values |= {k: v for k, v in found.overrides.items() if k in _SCHEDULE_FIELDS}
    try:
        schedule = Schedule.from_dict(values)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"the schedule of {found.source} is not usable: {error}") from None

    if schedule.num_train_timesteps > MAX_TIMESTEPS:
        raise CheckpointError(
            f"the schedule of {found.source} has {schedule.num_train_timesteps:,} timesteps; at most "
            f"{MAX_TIMESTEPS:,} are supported"
        )
    return schedule


# --- saving ---


def save(
    folder: str | os.PathLike[str],
    model: UNet,
    schedule: Schedule,
    *,
    dtype: torch.dtype | str | None = None,
    label_names: Sequence[str] | None = None,
) -> None:
    """Writes a folder that ``load`` here and ``diffusers.DDPMPipeline.from_pretrained`` read.

    dtype: of the stored weights, e.g. torch.float16 or "float16"; None keeps the model's. label_names: of the classes,
    kept in labels.json, which diffusers ignores; one name fewer than classes means that the last class stands for none.
    A new folder appears whole or not at all. In an existing one each file of the layout is replaced atomically,
    weights first, other weights in its unet/ go, and all other files stay.

    Raises CheckpointError where the model cannot be expressed so, or its weights are not finite in that dtype.
    """
    folder = Path(folder)
    contents = _contents(model, schedule, dtype, label_names)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; save needs a folder")
    if (folder / UNETS[0]).exists():
        raise CheckpointError(f"{folder} has a folder {UNETS[0]}, which would be read in place of what is saved")
    try:
        if folder.exists():
            _write(folder, contents)
            if label_names is None:
                (folder / LABELS).unlink(missing_ok=True)
        else:
            _write_new(folder, contents)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def _contents(
    model: UNet, schedule: Schedule, dtype: torch.dtype | str | None, label_names: Sequence[str] | None
) -> dict[str, bytes]:
    """The files of the layout, in the order in which they are to be replaced."""
    if isinstance(model, LucidrainsUnet):
        raise CheckpointError("diffusers has no such network as lucidrains' U-Net, so it cannot be saved in its layout")
    if not isinstance(model, UNet) or not isinstance(schedule, Schedule):
        raise CheckpointError(
            f"save needs a UNet and a Schedule; got {type(model).__name__} and {type(schedule).__name__}"
            " (of a wrapped model, pass the UNet itself)"
        )
    model, schedule, changes = for_diffusers(model, schedule)
    for change in changes:
        warnings.warn(change, stacklevel=3)
    dtype = stored_dtype(dtype)
    classes = model.config.num_class_embeds or 0
    if label_names is not None and not (all(isinstance(n, str) for n in label_names) and len(label_names) <= classes):
        raise CheckpointError(f"label_names must be at most {classes} strings, one a class; got {label_names!r}")
    if model.config.sample_size is None:
        warnings.warn("sample_size is None: diffusers' pipeline will load this model, but not run it", stacklevel=3)
    scheduler, pipeline, values = _scheduler_file(schedule)
    origin = {"_diffusers_version": FORMAT_VERSION}
    index = {
        "_class_name": pipeline,
        **origin,
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DModel"],
    }
    contents = {
        f"unet/{WEIGHTS}.safetensors": safetensors_bytes(_stored(model, dtype)),
        f"unet/{CONFIG}": _json({"_class_name": "UNet2DModel", **origin, **model.config.to_dict()}),
        f"scheduler/{SCHEDULER}": _json({"_class_name": scheduler, **origin, **values}),
    }
    if label_names is not None:
        contents[LABELS] = _json({"labels": list(label_names)})
    return contents | {MODEL_INDEX: _json(index)}


def _scheduler_file(schedule: Schedule) -> tuple[str, str, dict[str, Any]]:
    """(scheduler class, pipeline class, fields) that say this schedule in diffusers."""
    values = {k: v for k, v in schedule.to_dict().items() if k not in ("method", "num_inference_steps")}
    if schedule.method == "ddpm":
        values.pop("set_alpha_to_one", None)
        if schedule.variance_type == "fixed_large_log":
            values["variance_type"] = "fixed_large"  # the same here; upstream gives NaN under the other name
        return "DDPMScheduler", "DDPMPipeline", values
    values.pop("variance_type")
    whole = schedule.num_inference_steps in (None, min(DDPM_STEPS, schedule.num_train_timesteps))
    return DDIM[0], "DDPMPipeline" if whole else "DDIMPipeline", values


def _stored(model: UNet, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Contiguous NCHW copies on the CPU, finite, under the names that the config implies."""
    state = model.state_dict()
    with torch.device("meta"):
        expected = {name: t.shape for name, t in UNet(model.config).state_dict().items()}
    if {name: t.shape for name, t in state.items()} != expected:
        raise CheckpointError("this model is not the one that its config describes, so diffusers could not rebuild it")
    stored = {}
    for name, tensor in state.items():
        value = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{name} has NaN or infinite values in {value.dtype}; such weights are not saved")
        stored[name] = value
    return stored


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda stream, content=content: stream.write(content) and None)  # type: ignore[misc]
        if name.startswith("unet/" + WEIGHTS):  # an old index would be read in place of the new file
            for stale in path.parent.glob(f"{WEIGHTS}*"):
                if stale != path and stale.is_file():
                    stale.unlink()


def _write_new(folder: Path, contents: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, contents)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
