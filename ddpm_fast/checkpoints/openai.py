"""OpenAI's improved- and guided-diffusion ``.pt`` files, run by our U-Net.

Shapes tell the architecture. Heads, the order of qkv's rows, image size and the whole schedule they do not: those
come from the release that has this architecture, from a named preset, or from overrides in the code bases' flags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from ..config import UNetConfig
from ..schedule import SECTIONS, Schedule
from ..unet import UNet
from .family import Checkpoint, Found, check_names, check_storage, fit
from .files import CheckpointError, first_line
from .layout import CONFIG
from .openai_layout import Heads, Structure, config_of, structure_of, to_ours
from .openai_presets import DEFAULT_MULTS, DEFAULTS, RELEASES, releases_of, structure_from

MAX_TIMESTEPS = 1_000_000

_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "num_heads": int,
    "num_head_channels": int,
    "num_heads_upsample": int,
    "use_new_attention_order": bool,
    "image_size": int,
    "diffusion_steps": int,
    "noise_schedule": str,
    "rescale_timesteps": bool,
    "sigma_small": bool,
    "predict_xstart": bool,
    "timestep_respacing": (str, int),
    "clip_denoised": bool,
}
_ARCHITECTURE: dict[str, type | tuple[type, ...]] = {  # in the file for all to see: checked, not needed
    "num_channels": int,
    "num_res_blocks": int,
    "channel_mult": (str, list, tuple),
    "attention_resolutions": (str, int, list, tuple),
    "learn_sigma": bool,
    "class_cond": bool,
    "resblock_updown": bool,
    "use_scale_shift_norm": bool,
}
_TRAINING = ("dropout", "use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas")  # no matter in sampling
_NEEDED = ("diffusion_steps", "noise_schedule", "rescale_timesteps")
_ASSUMED = {
    "num_head_channels": -1,
    "use_new_attention_order": False,
    "sigma_small": False,
    "predict_xstart": False,
    "timestep_respacing": "",
    "clip_denoised": True,
}
PRESETS = (*RELEASES, *DEFAULTS)


def load(found: Found) -> Checkpoint:
    """The model and schedule of a state dict in OpenAI's names. CheckpointError, one line."""
    check_names(found.overrides, (*_SETTINGS, *_ARCHITECTURE, *_TRAINING), "override of an OpenAI checkpoint")
    structure = structure_of(found.tensors, found.weights)
    check_storage(found, found.tensors)  # before anything is copied
    notes = list(found.notes)
    if found.config is not None:
        notes.append(f"the {CONFIG} beside the file is not used: these are OpenAI's names")
    notes.append("inferred from the shapes: " + _text(flags_of(structure)))
    flags = settings(found, structure, notes)
    _check_flags(found, structure, flags)
    heads = _heads(found, structure, flags)
    try:
        config = UNetConfig.from_dict(config_of(structure, heads, flags.get("image_size")))
        with torch.device("meta"):  # no memory and no random numbers for what the file is about to give
            model = UNet(config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found.weights} cannot be built as its shapes say: {first_line(error)}") from None
    notes += fit(model, found, to_ours(found.tensors, structure, heads, flags["use_new_attention_order"]))
    notes.append("OpenAI's scripts cut images to uint8 where ours round: to_uint8(x, truncate=True) does as they do")
    return Checkpoint(model, _schedule(found, structure, flags), found.source, "OpenAI", notes, found.labels)


def settings(found: Found, structure: Structure, notes: list[str]) -> dict[str, Any]:
    """The flags that the shapes do not tell: of the release, the preset, the overrides. Says in notes which."""
    base = _base(found, structure, notes)
    given = {name: value for name, value in found.overrides.items() if name in _SETTINGS}
    for name, value in found.overrides.items():
        _check_type(name, value)
    if "num_heads" in given and "num_head_channels" not in given and "num_head_channels" in base:
        base["num_head_channels"] = -1  # it would win over the number that is asked for
    known = {**base, **given}
    needed = [name for name in _NEEDED if name not in known]
    if "num_heads" not in known and known.get("num_head_channels", -1) == -1:
        needed.insert(0, "num_heads (or num_head_channels)")
    if needed:
        raise CheckpointError(
            f"{found.weights} is an OpenAI checkpoint of no released architecture ({_text(flags_of(structure))}), and "
            f"its weights do not tell {', '.join(needed)}: give them as overrides (--set NAME=VALUE), with "
            f"image_size, and use_new_attention_order if it was trained with it; or name a preset: "
            f"{', '.join(DEFAULTS)}, or a released file{_if_consistency(found, structure)}"
        )
    assumed = {name: value for name, value in _ASSUMED.items() if name not in known}
    if structure.learn_sigma:  # the network tells its variance
        assumed.pop("sigma_small", None)
    if assumed:
        notes.append("assumed, as by the code bases' defaults: " + _text(assumed))
    if "image_size" not in known:
        size = _size_by_mults(structure) if found.preset in DEFAULTS else None
        if size is None:
            notes.append("could not be known: image_size; give it as an override, or image_shape to the sampler")
        else:
            known["image_size"] = size
            notes.append(f"assumed from channel_mult, by the code bases' rule: image_size={size}")
    if found.overrides:
        notes.append("overridden: " + _text(found.overrides))
    ignored = [name for name in found.overrides if name in _TRAINING]
    if ignored:
        notes.append(f"of no effect on sampling: {', '.join(ignored)}")
    return {**_ASSUMED, **known}


def _if_consistency(found: Found, structure: Structure) -> str:
    """A warning where a file looks like one of OpenAI's consistency_models, which have guided-diffusion's layout."""
    named = re.match(r"(cd|ct|edm)[_-]\w*(imagenet64|bedroom256|cat256)", found.weights.name)
    alike = not structure.learn_sigma and structure.resblock_updown and structure.scale_shift
    if not named and not alike:
        return ""
    return (
        ". A consistency model (or EDM) of OpenAI's consistency_models has this very layout, and is no DDPM: draw from "
        "one of those with its own code"
    )


def _base(found: Found, structure: Structure, notes: list[str]) -> dict[str, Any]:
    """The settings of the preset, or of the release with this architecture, or none."""
    releases = releases_of(structure)
    if found.preset is None:
        if not releases:
            return {}
        values = {k: v for k, v in RELEASES[releases[0]].items() if k in _SETTINGS}
        notes.append(
            f"assumed, because the architecture is that of {' and '.join(releases)}: {_text(values)}; "
            "for weights trained otherwise, override them"
        )
        return values
    preset = found.preset.removesuffix(".pt")
    check_names([preset], PRESETS, "preset for an OpenAI checkpoint")
    chosen = DEFAULTS.get(preset) or RELEASES[preset]
    if preset in RELEASES and structure_from(chosen) != structure:
        if releases:
            raise CheckpointError(
                f"preset={preset!r} is of another architecture: {found.weights} has that of {' and '.join(releases)}"
            )
        notes.append(f"the architecture is not that of {preset}; its settings are used all the same")
    values = {k: v for k, v in chosen.items() if k in _SETTINGS}
    notes.append(f"assumed by preset {preset!r}: {_text(values)}")
    return values


def _size_by_mults(structure: Structure) -> int | None:
    return next((size for size, mults in DEFAULT_MULTS.items() if mults == structure.channel_mult), None)


def _check_type(name: str, value: object) -> None:
    kinds = (_SETTINGS | _ARCHITECTURE).get(name)
    if kinds is None:
        return
    wanted = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join(
            {int: "a whole number", bool: "true or false", str: "text"}.get(k, k.__name__) for k in wanted
        )
        raise CheckpointError(f"override {name} must be {names}; got {value!r}")


def flags_of(structure: Structure, image_size: int | None = None) -> dict[str, Any]:
    """The architecture in the code bases' flags; attention by resolution where the image size is known."""
    factors = [2**level for level, has in enumerate(structure.attention) if has]
    where = ",".join(str(image_size // f) if image_size else f"size/{f}" for f in factors)
    return {
        "num_channels": structure.channels,
        "num_res_blocks": structure.blocks,
        "channel_mult": ",".join(map(str, structure.channel_mult)),
        "attention_resolutions": where,
        "learn_sigma": structure.learn_sigma,
        "class_cond": structure.classes is not None,
        "resblock_updown": structure.resblock_updown,
        "use_scale_shift_norm": structure.scale_shift,
    }


def _check_flags(found: Found, structure: Structure, flags: Mapping[str, Any]) -> None:
    """That architecture flags, where given, say what the weights say."""
    true = flags_of(structure, flags.get("image_size"))
    for name, value in found.overrides.items():
        if name not in _ARCHITECTURE:
            continue
        given, actual = value, true[name]
        if name in ("channel_mult", "attention_resolutions"):
            if name == "attention_resolutions" and flags.get("image_size") is None:
                continue  # a resolution is a share of the image
            if value == "":
                continue  # the code bases' default: by image size
            given, actual = _numbers(name, value), _numbers(name, actual)
            if name == "attention_resolutions":
                given, actual = sorted(given), sorted(actual)
        if given != actual:
            raise CheckpointError(f"override {name}={value!r} does not fit {found.weights}, which has {true[name]!r}")


def _numbers(name: str, value: Any) -> list[float]:
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    try:
        return [float(part) for part in parts if part != ""]
    except (TypeError, ValueError):
        raise CheckpointError(f"override {name} must be numbers with commas between; got {value!r}") from None


def _heads(found: Found, structure: Structure, flags: Mapping[str, Any]) -> Heads:
    name = "num_heads" if flags["num_head_channels"] == -1 else "num_head_channels"
    number: int = flags[name]
    odd = [c for c in structure.attended if number < 1 or c % number]
    if odd:
        raise CheckpointError(
            f"{name}={number} does not divide the {odd[0]} channels of an attention in {found.weights}"
        )
    if name == "num_head_channels":
        return (number,)
    if flags.get("num_heads_upsample", -1) not in (-1, number):
        raise CheckpointError(
            f"num_heads_upsample={flags['num_heads_upsample']} other than num_heads={number} is not supported"
        )
    return number


def _schedule(found: Found, structure: Structure, flags: Mapping[str, Any]) -> Schedule:
    steps, name = flags["diffusion_steps"], flags["noise_schedule"]
    if not 1 <= steps <= MAX_TIMESTEPS:
        raise CheckpointError(f"diffusion_steps must be in 1..{MAX_TIMESTEPS:,}; got {steps}")
    if name not in ("linear", "cosine"):
        raise CheckpointError(f"noise_schedule must be linear or cosine; got {name!r}")
    values: dict[str, Any] = {
        "num_train_timesteps": steps,
        "beta_schedule": "linear" if name == "linear" else "squaredcos_cap_v2",
        "variance_type": "fixed_small" if flags["sigma_small"] else "fixed_large",
        "prediction_type": "sample" if flags["predict_xstart"] else "epsilon",
        "clip_sample": flags["clip_denoised"],
        "timestep_spacing": SECTIONS,
        "timestep_respacing": str(flags["timestep_respacing"]),
        "use_clipped_model_output": True,
    }
    if structure.learn_sigma:
        values["variance_type"] = "learned_range"
    if name == "linear":
        scale = 1000 / steps
        values |= {"beta_start": scale * 0.0001, "beta_end": scale * 0.02}
    if flags["rescale_timesteps"]:
        values["time_scale"] = 1000 / steps
    try:
        return Schedule(**values)
    except ValueError as error:
        raise CheckpointError(f"the schedule of {found.source} is not usable: {first_line(error)}") from None


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" if value != "" else f"{name}=''" for name, value in values.items())
