"""What diffusers' files have no field for, said in the fields that they have, or refused."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import UNetConfig
from ..schedule import SECTIONS, Schedule
from ..unet import UNet, sinusoid
from .files import CheckpointError
from .schedulers import DDIM_STEPS


def for_diffusers(model: UNet, schedule: Schedule) -> tuple[UNet, Schedule, list[str]]:
    """The same model and schedule in diffusers' fields alone, and notes of what was changed for that.

    Scaled times become a learned time embedding whose rows are the sinusoids of the scaled times: the same network
    at every timestep. Returns what it was given where nothing need change. The weights are shared, not copied.

    Raises CheckpointError for what diffusers' UNet2DModel cannot do.
    """
    notes: list[str] = []
    config = model.config
    if config.time_proj_channels not in (None, config.block_out_channels[0]):
        raise CheckpointError(
            f"diffusers' UNet2DModel has no field for a sinusoid of {config.time_proj_channels} channels over a first "
            f"level of {config.block_out_channels[0]}; convert to 'openai' keeps such a model"
        )
    fields: dict[str, object] = {"time_proj_channels": None}
    if config.num_attention_heads is not None:
        fields |= {"num_attention_heads": None, "attention_head_dim": _head_dim(config)}
    rows = None
    if schedule.time_scale != 1:
        if config.time_embedding_type != "positional" or config.class_embed_type == "timestep":
            raise CheckpointError(
                f"diffusers cannot scale the times (by {schedule.time_scale}) of a model with "
                f"time_embedding_type {config.time_embedding_type!r}, class_embed_type {config.class_embed_type!r}"
            )
        steps = schedule.num_train_timesteps
        times = schedule.time_scale * torch.arange(steps, dtype=torch.float32)
        rows = sinusoid(times, config.block_out_channels[0], config.freq_shift, config.flip_sin_to_cos)
        fields |= {"time_embedding_type": "learned", "num_train_timesteps": steps}
        notes.append(
            f"the network takes times scaled by {schedule.time_scale:g}; for diffusers they became a learned time "
            f"embedding of {steps} rows"
        )
    changed = replace(config, **fields)  # type: ignore[arg-type]
    if changed != config:
        model = _rebuilt(model, changed, rows)
    return model, _schedule(schedule, notes), notes


def _head_dim(config: UNetConfig) -> int:
    kinds = (*config.down_block_types, *reversed(config.up_block_types))
    attended = {w for w, kind in zip(config.block_out_channels * 2, kinds) if kind.startswith("Attn")}
    if config.mid_block_type is not None and config.add_attention:
        attended.add(config.block_out_channels[-1])
    sizes = sorted({config.head_dim(width) for width in attended})
    if len(sizes) > 1:
        raise CheckpointError(
            f"diffusers' UNet2DModel has heads of one size, this model {config.num_attention_heads} heads at every "
            f"width, of {' and '.join(map(str, sizes))} channels; convert to 'openai' keeps such a model"
        )
    return sizes[0] if sizes else 8


def _rebuilt(model: UNet, config: UNetConfig, rows: torch.Tensor | None) -> UNet:
    state = dict(model.state_dict())
    if rows is not None:
        state["time_proj.weight"] = rows.to(model.device, model.dtype)
    with torch.device("meta"):
        rebuilt = UNet(config)
    rebuilt.load_state_dict(state, strict=True, assign=True)
    return rebuilt.train(model.training)


def _schedule(schedule: Schedule, notes: list[str]) -> Schedule:
    fields: dict[str, object] = {"time_scale": 1.0}
    if schedule.timestep_spacing == SECTIONS:
        fields["timestep_spacing"] = "linspace"
        notes.append("for shorter chains diffusers has linspace, which rounds some steps otherwise than OpenAI's rule")
    if schedule.method == "ddim":
        default = min(DDIM_STEPS, schedule.num_train_timesteps)
        if schedule.eta or schedule.num_inference_steps not in (None, default, schedule.num_train_timesteps):
            fields |= {"eta": 0.0, "num_inference_steps": default}
            notes.append(
                f"a DDIMPipeline is told its steps and eta when it is called, not by its files: {default} and 0 "
                f"there, not {schedule.num_inference_steps} and {schedule.eta:g}"
            )
        if schedule.beta_schedule in ("laplace", "sigmoid") and schedule.trained_betas is None:
            raise CheckpointError(f"diffusers' DDIMScheduler has no beta_schedule {schedule.beta_schedule!r}")
    steps = schedule.timestep_respacing or (schedule.num_inference_steps if schedule.method == "ddpm" else None)
    if steps:
        fields["timestep_respacing"] = ""
        notes.append(f"diffusers' files do not say which steps to take: {steps!r} is left out")
    if schedule.use_clipped_model_output:
        fields["use_clipped_model_output"] = False
        notes.append("OpenAI's DDIM is diffusers' with use_clipped_model_output=True, given to DDIMPipeline's call")
    return replace(schedule, **fields)  # type: ignore[arg-type]
