"""The networks of commands: a checkpoint, whose notes are printed, or a description where weights do not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..stages import note, stage


def loaded(source: str | None, preset: str | None, overrides: dict[str, Any] | None, weights: str | None = None) -> Any:
    """The checkpoint of a command that draws from it or judges it. Its notes go to stderr.

    The bundled model's own note, of the dtype it is stored in, is left out.
    """
    from ..checkpoints import load

    checkpoint = load(source, preset, overrides, weights=weights)
    for text in checkpoint.notes if source is not None else ():
        note(text)
    return checkpoint


def measured(source: str | None, preset: str | None, overrides: dict[str, Any], weights: str | None = None) -> Any:
    """A checkpoint, or a network with random weights from seed 0, on which a speed does not depend."""
    import torch

    from ..checkpoints import Checkpoint
    from ..presets import PRESETS
    from ..unet import UNet

    named = source in PRESETS and not Path(str(source)).exists()
    if not named and not (source or "").endswith(".json"):
        return loaded(source, preset, overrides, weights)
    preset_model = str(source) if named else None
    title, config, schedule = described(None if named else source, preset_model, preset, overrides, weights)
    torch.manual_seed(0)
    with stage("making random weights"):
        network = UNet(config).eval()
    return Checkpoint(network, schedule, f"{title} (random weights)", "random weights", [])


def described(
    source: str | None,
    preset_model: str | None,
    preset: str | None,
    overrides: dict[str, Any],
    weights: str | None = None,
) -> tuple[str, Any, Any]:
    """(title, UNetConfig, Schedule) of a named network, a config.json, or a checkpoint."""
    from ..config import UNetConfig
    from ..presets import preset as named
    from ..schedule import Schedule

    if preset_model is None and not (source or "").endswith(".json"):
        checkpoint = loaded(source, preset, overrides, weights)
        return checkpoint.source, checkpoint.model.config, checkpoint.schedule
    if source is not None and preset_model is not None:
        raise ValueError(f"give a SOURCE or --preset-model, not both; got {source!r} and {preset_model!r}")
    if weights is not None:
        raise ValueError("--weights is for files with several networks; leave it out here, where weights are random")
    if preset is not None:
        raise ValueError("--weights-preset is for weights without a config; leave it out here")
    if preset_model is not None:
        p = named(preset_model)
        title, network, chain = preset_model, {**p.model, "sample_size": p.image_size}, dict(p.schedule)
    else:
        title, network, chain = str(source), *_files(Path(str(source)))
    fields = UNetConfig.__dataclass_fields__, Schedule.__dataclass_fields__
    unknown = sorted(k for k in overrides if not any(k in f for f in fields))
    if unknown:
        raise ValueError(f"--set: neither UNetConfig nor Schedule has {', '.join(unknown)}")
    network |= {k: v for k, v in overrides.items() if k in fields[0]}
    try:
        config = UNetConfig.from_dict(network)
        if config.out_channels == 2 * config.in_channels:  # where no file says it, as `load` assumes it
            chain = {"variance_type": "learned_range", **chain}
        return title, config, Schedule.from_dict(chain | {k: v for k, v in overrides.items() if k in fields[1]})
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"the configuration of {title} is not usable: {error}") from None


def _files(config: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A U-Net's config.json and the scheduler's beside it, or in the folder that a pipeline has for it."""
    from ..checkpoints.diffusers import schedule_fields
    from ..checkpoints.files import read_json
    from ..checkpoints.layout import SCHEDULER, check_class

    network = read_json(config)
    check_class(network, config)
    for path in (config.parent / SCHEDULER, config.parent.parent / "scheduler" / SCHEDULER):
        if path.exists():
            return network, schedule_fields(read_json(path), [])
    return network, {}
