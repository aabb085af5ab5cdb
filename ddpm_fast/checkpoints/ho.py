"""Ho et al.'s U-Net in PyTorch: pytorch_diffusion's ``.ckpt`` and ddim's ``ckpt.pth``, run by our U-Net.

The network is that of google/ddpm-* under other names. Its image size and schedule are in no file: they come from
the release with this architecture, from a named preset, or from overrides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..config import EXTENSIONS, UNetConfig
from ..schedule import Schedule
from ..unet import UNet
from . import infer
from .family import Checkpoint, Found, check_names, check_storage, fit
from .files import CheckpointError, first_line, listing
from .layout import CONFIG

_LINEAR = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
_LSUN256: dict[str, Any] = {
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "attention": (4,),  # levels with attention
    "sample_size": 256,
    "variance_type": "fixed_small",
}
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {
        "block_out_channels": (128, 256, 256, 256),
        "attention": (1,),
        "sample_size": 32,
        "variance_type": "fixed_large",
    },
    "lsun_bedroom": _LSUN256,
    "lsun_cat": _LSUN256,
    "lsun_church": _LSUN256,
    "celebahq": _LSUN256,
    "celeba64": {
        "block_out_channels": (128, 256, 256, 256, 512),
        "attention": (2,),
        "sample_size": 64,
        "variance_type": "fixed_large",
    },
}
_UNET_FIELDS = frozenset(f.name for f in fields(UNetConfig)) - set(EXTENSIONS)
_SCHEDULE_FIELDS = frozenset(f.name for f in fields(Schedule))
# What the two code bases call these settings.
_ALIASES = {
    "image_size": "sample_size",
    "resolution": "sample_size",
    "var_type": "variance_type",
    "model_var_type": "variance_type",
    "num_diffusion_timesteps": "num_train_timesteps",
    "num_timesteps": "num_train_timesteps",
    "clip_denoised": "clip_sample",
}
_VALUES = {
    "variance_type": {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"},
    "beta_schedule": {"quad": "scaled_linear"},
}
_NAMES = (  # theirs -> diffusers', in this order
    (r"temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"norm_out\.", "conv_norm_out."),
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
    (r"(down|up)\.(\d+)\.block\.", r"\1_blocks.\2.resnets."),
    (r"(down|up)\.(\d+)\.attn\.", r"\1_blocks.\2.attentions."),
    (r"(down|up)\.(\d+)\.(downsample|upsample)\.", r"\1_blocks.\2.\3rs.0."),
)
_IN_BLOCKS = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_IN_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def load(found: Found) -> Checkpoint:
    """The model and schedule of a state dict in Ho et al.'s names. CheckpointError, one line."""
    check_names(found.overrides, (*_UNET_FIELDS, *_SCHEDULE_FIELDS, *_ALIASES), "override of a Ho et al. checkpoint")
    notes = list(found.notes)
    if found.config is not None:
        notes.append(f"the {CONFIG} beside the file is not used: these are Ho et al.'s names")
    check_storage(found, found.tensors)
    tensors = to_ours(found.tensors, found)
    if tensors.pop("logvar", None) is not None:
        notes.append("logvar, which ddim's 'bayesian' models have and sampling does not read, is left out")
    try:
        inferred = infer.config_from_shapes(tensors)
    except CheckpointError as error:
        what = str(error).replace("the state dict is not a whole UNet2DModel", "is not a whole U-Net of Ho et al.")
        raise CheckpointError(f"{found.weights} {what}") from None
    first, level = tensors["conv_in.weight"].shape[0], inferred["block_out_channels"][0]
    if first != level:
        raise CheckpointError(
            f"{found.weights}: its first level has {level} channels, its first convolution {first}; a first multiple "
            "other than 1 is not supported"
        )
    values, schedule = _settings(found, inferred, notes)
    try:
        config = UNetConfig.from_dict(values)
        with torch.device("meta"):  # no memory and no random numbers for what the file is about to give
            model = UNet(config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found.weights} cannot be built as its shapes say: {first_line(error)}") from None
    notes += fit(model, found, tensors)
    if config.sample_size is None:
        notes.append("could not be known: image_size; give it as an override, or image_shape to the sampler")
    if schedule.variance_type.startswith("fixed_small"):
        notes.append("ddim's 'ddpm_noisy' sampler draws with beta_t whatever var_type: override var_type=fixedlarge")
    notes.append("pytorch_diffusion cuts images to uint8 where ours round: to_uint8(x, truncate=True) does as it does")
    notes.append("ddim's 'generalized' sampler does not clip x0: override clip_sample=false for method='ddim' as there")
    return Checkpoint(model, schedule, found.source, "Ho et al.", notes, found.labels)


def named_list(content: list[Any]) -> dict[str, Any] | None:
    """ddim's list [model, optimizer, epoch, step, ema] as a dict of its parts; None for any other list."""
    parts = dict(zip(("model", "optimizer", "epoch", "step", "ema"), content))
    model = parts.get("model")
    named = isinstance(model, dict) and any("temb.dense." in str(name) for name in model)
    return parts if named and len(content) <= 5 else None


def to_ours(tensors: Mapping[str, Tensor], found: Found) -> dict[str, Tensor]:
    """The state dict under diffusers' names; 1x1 convolutions of the attention as matrices.

    up.i counts by resolution from the finest, up_blocks.i in the order of execution.
    """
    levels = 1 + max((int(m[1]) for m in (re.match(r"down\.(\d{1,3})\.", name) for name in tensors) if m), default=0)
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in _NAMES:
            new, changed = re.subn("^" + pattern, replacement, new)
            if changed:
                break
        new = re.sub(r"^up_blocks\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", new)
        table = _IN_ATTENTION if ".attentions." in new else _IN_BLOCKS
        parts = new.split(".")
        if len(parts) > 1 and parts[-2] in table and (".attentions." in new or ".resnets." in new):
            new = ".".join([*parts[:-2], table[parts[-2]], parts[-1]])
        if ".attentions." in new and new.endswith("weight"):
            while tensor.ndim > 2 and tensor.shape[-1] == 1:
                tensor = tensor.squeeze(-1)
        state[new] = tensor
    if any(".conv_shortcut." in name and name.startswith(("down.", "up.", "mid.")) for name in tensors):
        raise CheckpointError(
            f"{found.weights} has 3x3 shortcuts (conv_shortcut), which our U-Net has not, nor any release"
        )
    if levels > 1 and "down_blocks.0.downsamplers.0.conv.weight" not in state:
        raise CheckpointError(f"{found.weights} resamples without convolutions (resamp_with_conv false): not supported")
    return state


def _settings(found: Found, inferred: dict[str, Any], notes: list[str]) -> tuple[dict[str, Any], Schedule]:
    """UNetConfig's fields and the schedule; notes say where each comes from."""
    overrides = _overrides(found.overrides)
    notes.append("inferred from the shapes: " + _text({k: v for k, v in inferred.items() if v is not None}))
    fixed = infer.PRESETS["google"]
    notes.append("the same in every model of this code: " + _text(fixed))
    preset, origin = _preset(found, inferred, overrides)
    schedule = {**_LINEAR, **({"variance_type": preset["variance_type"]} if preset else {})}
    size = {"sample_size": preset["sample_size"]} if preset else {}
    notes.append(f"assumed {origin}: {_text({**size, **schedule})}")
    if preset is PRESETS["celeba64"] and "variance_type" not in overrides:
        notes.append(
            "assumed, not known, of celeba64: variance_type='fixed_large', which ddim's 'ddpm_noisy' sampler draws "
            "with whatever var_type its settings name"
        )
    if found.overrides:
        notes.append("overridden: " + _text(found.overrides))
    for name in inferred:
        if name in overrides and _plain(overrides[name]) != _plain(inferred[name]):
            raise CheckpointError(
                f"override {name}={overrides[name]!r} does not fit {found.weights}, which has {inferred[name]!r}"
            )
    values = {**fixed, **size, **inferred, **{k: v for k, v in overrides.items() if k in _UNET_FIELDS}}
    values.pop("num_train_timesteps", None)  # the schedule's: only a learned embedding has rows of its own
    try:
        return values, Schedule(**{**schedule, **{k: v for k, v in overrides.items() if k in _SCHEDULE_FIELDS}})
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"the schedule of {found.source} is not usable: {first_line(error)}") from None


def _overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in given.items():
        field = _ALIASES.get(name, name)
        if field in result:
            raise CheckpointError(f"override {name} is given twice, under two names")
        result[field] = _VALUES.get(field, {}).get(value, value) if isinstance(value, str) else value
    return result


def _preset(
    found: Found, inferred: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, str]:
    """The preset, named or told by the architecture, and how it was chosen."""
    releases = [name for name, values in PRESETS.items() if _fingerprint(values) == _fingerprint(inferred)]
    if found.preset is not None:
        name = found.preset.removeprefix("ema_")
        check_names([name], PRESETS, "preset for a Ho et al. checkpoint")
        if releases and name not in releases:
            raise CheckpointError(
                f"preset={found.preset!r} is of another architecture: {found.weights} has that of "
                f"{listing(releases, 4)}"
            )
        return PRESETS[name], f"by preset {found.preset!r}"
    if releases:
        return PRESETS[releases[0]], f"because the architecture is that of {listing(releases, 4)}"
    if "variance_type" not in overrides:
        raise CheckpointError(
            f"{found.weights} has Ho et al.'s U-Net, but of no released architecture, and its weights do not tell the "
            "variance: give overrides var_type (fixedlarge or fixedsmall) and image_size (--set NAME=VALUE), or name a "
            f"preset: {', '.join(PRESETS)}"
        )
    return None, "as by the code's defaults"


def _fingerprint(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Widths, levels with attention, blocks a level, channels."""
    attention = values.get("attention")
    if attention is None:
        attention = [i for i, kind in enumerate(values["down_block_types"]) if kind.startswith("Attn")]
    layers = values.get("layers_per_block", 2), values.get("in_channels", 3), values.get("out_channels", 3)
    return tuple(values["block_out_channels"]), tuple(attention), *layers


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={list(v) if isinstance(v, tuple) else v!r}" for name, v in values.items())
