"""Score-SDE's VP networks (Song et al. 2021; score_sde_pytorch): ``ddpm``, and the DDPM++ form of ``ncsnpp``.

Shapes tell the architecture. They do not tell the SDE, nor whether the network was trained on timesteps or on
continuous times: those come from a named preset (a config file of that code), from overrides in its words, or are
assumed, with a note. Networks of the VE and sub-VP SDEs have the same names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..config import UNetConfig
from ..schedule import METHODS, Schedule
from ..unet import UNet
from ..vp_sde import CONTINUOUS, LAST_LABEL, LAST_TIME, PREDICTORS
from .family import Checkpoint, Found, check_names, check_storage, fit
from .files import CheckpointError, first_line, listing
from .layout import CONFIG
from .score_sde_layout import SIGMAS, SUPPORTED, Structure, config_of, structure_of, to_ours

MAX_TIMESTEPS = 1_000_000

_CIFAR10 = {"ch_mult": (1, 2, 2, 2), "attention": (1,), "image_size": 32}
_LARGE = {"ch_mult": (1, 1, 2, 2, 4, 4), "attention": (4,), "image_size": 256}
_DDPM = {"name": "ddpm", "num_res_blocks": 2}
_DDPMPP = {**_CIFAR10, "name": "ncsnpp", "num_res_blocks": 4}
# The VP config files of score_sde_pytorch without FIR and progressive growing.
PRESETS: dict[str, dict[str, Any]] = {
    "vp/ddpm/cifar10": {**_CIFAR10, **_DDPM, "continuous": False},
    "vp/ddpm/cifar10_continuous": {**_CIFAR10, **_DDPM, "continuous": True},
    "vp/ddpm/bedroom": {**_LARGE, **_DDPM, "continuous": False},
    "vp/ddpm/church": {**_LARGE, **_DDPM, "continuous": False},
    "vp/ddpm/celebahq": {**_LARGE, **_DDPM, "continuous": False},
    "vp/cifar10_ddpmpp": {**_DDPMPP, "continuous": False},
    "vp/cifar10_ddpmpp_continuous": {**_DDPMPP, "continuous": True},
    "vp/cifar10_ddpmpp_deep_continuous": {**_DDPMPP, "num_res_blocks": 8, "continuous": True},
}
# The folders of released checkpoints whose config file has another name.
ALIASES = {
    "vp/cifar10_ddpm": "vp/ddpm/cifar10",
    "vp/cifar10_ddpm_continuous": "vp/ddpm/cifar10_continuous",
}
NF = 128  # of all presets
_DEFAULTS = {"sde": "vpsde", "num_scales": 1000, "beta_min": 0.1, "beta_max": 20.0}

_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "skip_rescale": bool,
    "image_size": int,
    "num_scales": int,
    "beta_min": (int, float),
    "beta_max": (int, float),
    "continuous": bool,
    "predictor": str,
    "method": str,
}
_ARCHITECTURE: dict[str, type | tuple[type, ...]] = {  # in the file for all to see: checked, not needed
    "nf": int,
    "ch_mult": (list, tuple),
    "num_res_blocks": int,
    "attn_resolutions": (list, tuple),
    "num_channels": int,
    "resblock_type": str,
}
# Of these one value is supported.
_ONLY: dict[str, Any] = {
    "sde": "vpsde",
    "fir": False,
    "progressive": "none",
    "progressive_input": "none",
    "embedding_type": "positional",
    "conditional": True,
    "resamp_with_conv": True,
    "nonlinearity": "swish",
    "normalization": "GroupNorm",
    "attention_type": "ddpm",
    "conv_size": 3,
    "scale_by_sigma": False,
    "centered": True,
    "corrector": "none",
    "noise_removal": True,
    "probability_flow": False,
}
_NO_MATTER = (
    "dropout", "ema_rate", "init_scale", "fir_kernel", "fourier_scale", "progressive_combine", "sigma_min", "sigma_max",
    "snr", "n_steps_each", "reduce_mean", "likelihood_weighting",
)  # fmt: skip


def load(found: Found) -> Checkpoint:
    """The model and schedule of a state dict in Score-SDE's names. CheckpointError, one line."""
    overrides = _overrides(found.overrides)
    tensors = dict(found.tensors)
    sigmas = tensors.pop(SIGMAS, None)
    structure = structure_of(tensors, found.weights)
    check_storage(found, tensors)  # before anything is copied
    notes = list(found.notes)
    if found.config is not None:
        notes.append(f"the {CONFIG} beside the file is not used: these are Score-SDE's names")
    settings = _settings(found, structure, overrides, sigmas, notes)
    try:
        values = config_of(structure, settings["name"], settings["skip_rescale"], settings.get("image_size"))
        config = UNetConfig.from_dict(values)
        with torch.device("meta"):  # no memory and no random numbers for what the file is about to give
            model = UNet(config)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found.weights} cannot be built as its shapes say: {first_line(error)}") from None
    notes += fit(model, found, to_ours(tensors, structure))
    schedule = _schedule(found, settings)
    if config.sample_size is None:
        notes.append("could not be known: image_size; give it as an override, or image_shape to the sampler")
    notes.append("Score-SDE cuts images to uint8 where ours round: to_uint8(x, truncate=True) does as it does")
    return Checkpoint(model, schedule, found.source, "Score-SDE", notes, found.labels)


def _overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides by their last word: model.beta_max and config.model.beta_max are beta_max."""
    known = (*_SETTINGS, *_ARCHITECTURE, *_ONLY, *_NO_MATTER)
    result: dict[str, Any] = {}
    for full, value in given.items():
        name = str(full).rpartition(".")[2]
        check_names([name], known, "override of a Score-SDE checkpoint")
        if name in result:
            raise CheckpointError(f"override {name} is given twice, under two names")
        value = value.lower() if isinstance(value, str) and name not in ("normalization",) else value
        wanted = (_SETTINGS | _ARCHITECTURE).get(name)
        if wanted is not None:
            kinds = wanted if isinstance(wanted, tuple) else (wanted,)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise CheckpointError(f"override {name} must be {_WORDS[kinds[0]]}; got {value!r}")
        if name in _ONLY and value != _ONLY[name]:
            raise CheckpointError(
                f"override {name}={value!r} names a variant that is not supported, only {_ONLY[name]!r}; {SUPPORTED}"
            )
        result[name] = value
    return result


_WORDS: dict[type, str] = {int: "a number", bool: "true or false", str: "text", list: "a list of numbers"}


def _settings(
    found: Found,
    structure: Structure,
    overrides: Mapping[str, Any],
    sigmas: torch.Tensor | None,
    notes: list[str],
) -> dict[str, Any]:
    """The settings of network and schedule; notes say where each comes from."""
    notes.append("inferred from the shapes: " + _text(_architecture(structure)))
    told = dict(overrides)  # what need not be assumed
    if sigmas is not None:
        steps = len(sigmas) if sigmas.ndim == 1 else 0
        if overrides.get("num_scales", steps) != steps:
            raise CheckpointError(
                f"override num_scales={overrides['num_scales']} does not fit {found.weights}, which has {steps}"
            )
        told["num_scales"] = steps
        notes.append(f"inferred from the buffer {SIGMAS}, which is not read otherwise: num_scales={steps}")
    base = {**_base(found, structure, told, notes), **told}
    settings = {**base, **overrides}
    if structure.biggan and settings["name"] == "ddpm":
        raise CheckpointError(f"override name='ddpm' does not fit {found.weights}, whose blocks are ncsnpp's (biggan)")
    if settings["name"] not in ("ddpm", "ncsnpp"):
        raise CheckpointError(f"override name={settings['name']!r} is neither ddpm nor ncsnpp; {SUPPORTED}")
    settings.setdefault("skip_rescale", settings["name"] == "ncsnpp")
    if settings["name"] == "ddpm" and settings["skip_rescale"]:
        raise CheckpointError("override skip_rescale=True is ncsnpp's; give name=ncsnpp too")
    if "predictor" not in settings:
        settings["predictor"] = "euler_maruyama" if settings["continuous"] else "ancestral_sampling"
        notes.append(f"assumed, as in the released models of this kind: {_text({'predictor': settings['predictor']})}")
    if overrides:
        notes.append("overridden: " + _text(overrides))
    _check_architecture(found, structure, settings, overrides)
    ignored = [name for name in overrides if name in _NO_MATTER]
    if ignored:
        notes.append(f"of no effect on sampling: {', '.join(ignored)}")
    if not settings["continuous"] and settings["predictor"] == "ancestral_sampling":
        notes.append(
            "ancestral sampling is DDPM with fixed_large and no clip, whose network is given "
            f"{1 - LAST_TIME:g} t + {LAST_TIME * (settings['num_scales'] - 1):g} for timestep t, as there; "
            "method='ddpm' gives it t, as it was trained"
        )
    return settings


def _base(found: Found, structure: Structure, told: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The settings by preset, or by what the released models of this kind have; ``told`` need no assumption."""
    same = [name for name, values in PRESETS.items() if _is_of(structure, values)]
    if found.preset is not None:
        chosen = {**_DEFAULTS, **_of_preset(found, structure, same, notes)}
        notes.append(f"assumed by preset {found.preset!r}: {_text(_without(chosen, told))}")
        return chosen
    continuous = {PRESETS[name]["continuous"] for name in same}
    chosen = {
        **_DEFAULTS,
        "name": "ncsnpp" if structure.biggan else "ddpm",
        "continuous": continuous.pop() if len(continuous) == 1 else structure.biggan,
    }
    chosen |= {"fir": False} if structure.biggan else {}  # FIR between residual blocks has no weights
    chosen |= {"image_size": PRESETS[same[0]]["image_size"]} if same else {}
    assumed = _without(chosen, told)
    if assumed:
        notes.append(
            f"assumed, as in {listing(same, len(same)) if same else 'the released models of this kind'}: "
            f"{_text(assumed)}; the weights do not tell these: name a preset (--weights-preset) or override them"
        )
    if "sde" in assumed:
        notes.append("with a model of the subvpsde or the vesde, which have the same names, images would be wrong")
    return chosen


def _without(values: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in told}


def _of_preset(found: Found, structure: Structure, same: list[str], notes: list[str]) -> dict[str, Any]:
    """The settings of the preset; ``same``: the presets with this architecture."""
    assert found.preset is not None
    name = found.preset.removeprefix("configs/").removesuffix("/").removesuffix(".py")
    name = ALIASES.get(name, name)
    if name.startswith(("ve/", "subvp/", "vp/cifar10_ncsnpp")):
        raise CheckpointError(f"preset={found.preset!r} is of a model that is not supported; {SUPPORTED}")
    check_names([name], PRESETS, "preset for a Score-SDE checkpoint")
    if same and name not in same:
        raise CheckpointError(
            f"preset={found.preset!r} is of another architecture: {found.weights} has that of {listing(same, 5)}"
        )
    values = {k: v for k, v in PRESETS[name].items() if k in _SETTINGS}
    if structure.biggan != (values["name"] == "ncsnpp"):
        raise CheckpointError(f"preset={found.preset!r} is of a {values['name']} network; {found.weights} is not one")
    if not same:
        notes.append(f"the architecture is not that of {name}; its settings are used all the same")
        values.pop("image_size")
    return values


def _is_of(structure: Structure, preset: Mapping[str, Any]) -> bool:
    attention = tuple(level for level, has in enumerate(structure.attention) if has)
    channels = structure.nf, structure.in_channels, structure.out_channels
    return (
        (channels, structure.ch_mult, structure.blocks, attention, structure.biggan)
        == ((NF, 3, 3), preset["ch_mult"], preset["num_res_blocks"], preset["attention"], preset["name"] == "ncsnpp")
    )  # fmt: skip


def _architecture(s: Structure, image_size: int | None = None) -> dict[str, Any]:
    """In the code's words; attention by resolution where the image size is known."""
    factors = [2**level for level, has in enumerate(s.attention) if has]
    return {
        "nf": s.nf,
        "ch_mult": list(s.ch_mult),
        "num_res_blocks": s.blocks,
        "attn_resolutions": [image_size // f if image_size else f"size/{f}" for f in factors],
        "num_channels": s.in_channels,
        "resblock_type": "biggan" if s.biggan else "ddpm",
    }


def _check_architecture(
    found: Found, structure: Structure, settings: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """CheckpointError where an architecture setting is given and the weights say otherwise."""
    true = _architecture(structure, settings.get("image_size"))
    for name in _ARCHITECTURE:
        if name not in overrides or (name == "attn_resolutions" and settings.get("image_size") is None):
            continue
        given = overrides[name]
        if sorted(given) != sorted(true[name]) if name == "attn_resolutions" else _plain(given) != true[name]:
            raise CheckpointError(f"override {name}={given!r} does not fit {found.weights}, which has {true[name]!r}")


def _schedule(found: Found, settings: Mapping[str, Any]) -> Schedule:
    total, method = settings["num_scales"], settings.get("method", "pc")
    if not 1 <= total <= MAX_TIMESTEPS:
        raise CheckpointError(f"num_scales must be in 1..{MAX_TIMESTEPS:,}; got {total}")
    if settings["predictor"] not in PREDICTORS:
        raise CheckpointError(f"predictor must be one of {', '.join(PREDICTORS)}; got {settings['predictor']!r}")
    if method not in ("pc", *METHODS):
        raise CheckpointError(f"method must be pc, or one of {', '.join(METHODS)}; got {method!r}")
    values: dict[str, Any] = {
        "num_train_timesteps": total,
        "beta_start": settings["beta_min"] / total,
        "beta_end": settings["beta_max"] / total,
        "variance_type": "fixed_large",
        "clip_sample": False,
        "method": settings["predictor"] if method == "pc" else method,
    }
    if settings["continuous"]:
        values |= {"beta_schedule": CONTINUOUS, "time_scale": LAST_LABEL / total, "time_offset": LAST_LABEL / total}
    try:
        return Schedule(**values)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(f"the schedule of {found.source} is not usable: {first_line(error)}") from None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_plain(v)!r}" for name, v in values.items())
