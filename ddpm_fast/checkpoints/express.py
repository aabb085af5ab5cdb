"""What diffusers' files have no field for, said in the fields that they have, or refused."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from ..config import SKIP_DOWN, SKIP_UP, UNetConfig
from ..schedule import SECTIONS, Schedule
from ..unet import UNet, sinusoid
from ..vp_sde import CONTINUOUS, PREDICTORS
from .files import CheckpointError
from .schedulers import DDIM_STEPS


def for_diffusers(model: UNet, schedule: Schedule) -> tuple[UNet, Schedule, list[str]]:
    """The same model and schedule in diffusers' fields alone, and notes of what was changed for that.

    Scaled times become a learned time embedding whose rows are the sinusoids of the scaled times: the same network
    at every timestep. Attention that follows only the last block of a level is joined by ones that add zero. Returns
    what it was given where nothing need change. The weights are shared, not copied.

    Raises CheckpointError for what diffusers' UNet2DModel cannot do.
    """
    notes: list[str] = []
    config = model.config
    if config.time_proj_channels not in (None, config.block_out_channels[0]):
        raise CheckpointError(
            f"diffusers' UNet2DModel has no field for a sinusoid of {config.time_proj_channels} channels over a first "
            f"level of {config.block_out_channels[0]}; convert to 'openai' keeps such a model"
        )
    _refuse_score_sde(config)
    fields: dict[str, object] = {"time_proj_channels": None, "up_attention": "all"}
    if config.num_attention_heads is not None:
        fields |= {"num_attention_heads": None, "attention_head_dim": _head_dim(config)}
    added: dict[str, Tensor] = {}
    if schedule.time_scale != 1 or schedule.time_offset:
        how = f"scaled by {schedule.time_scale:g}" + (f" plus {schedule.time_offset:g}" if schedule.time_offset else "")
        if config.time_embedding_type != "positional" or config.class_embed_type == "timestep":
            raise CheckpointError(
                f"diffusers cannot give a model with time_embedding_type {config.time_embedding_type!r}, "
                f"class_embed_type {config.class_embed_type!r}, its times {how}"
            )
        steps = schedule.num_train_timesteps
        times = schedule.network_time(torch.arange(steps))
        assert isinstance(times, Tensor)
        added["time_proj.weight"] = sinusoid(
            times, config.block_out_channels[0], config.freq_shift, config.flip_sin_to_cos
        )
        fields |= {"time_embedding_type": "learned", "num_train_timesteps": steps}
        notes.append(
            f"the network takes times {how}; for diffusers they became a learned time embedding of {steps} rows"
        )
    attended = [kind == "AttnUpBlock2D" for kind in config.up_block_types]
    if config.up_attention == "last" and any(attended):
        notes.append(
            "diffusers has attention after every residual block on the way up, this model after the last of a level: "
            "the others are added with zero weights, for the same outputs at more work"
        )
    changed = replace(config, **fields)  # type: ignore[arg-type]
    if changed != config:
        model = _rebuilt(model, changed, added)
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


def _refuse_score_sde(config: UNetConfig) -> None:
    kinds = {*config.down_block_types, *config.up_block_types}
    why = None
    if config.block_scale_factor != 1 and kinds - {*SKIP_DOWN, *SKIP_UP}:
        why = f"no field for sums divided by {config.block_scale_factor:g} in all blocks (Score-SDE's skip_rescale)"
    elif config.resnet_resample_shortcut:
        why = "no 1x1 convolution around residual blocks that resample, as Score-SDE's DDPM++ has"
    elif config.norm_num_groups is None and kinds - {*SKIP_DOWN, *SKIP_UP}:
        why = "norms of min(C // 4, 32) groups (norm_num_groups null) in Skip blocks alone"
    if why:
        raise CheckpointError(f"diffusers' UNet2DModel has {why}: this model cannot be converted; it samples here")


def _rebuilt(model: UNet, config: UNetConfig, added: dict[str, Tensor]) -> UNet:
    """The model under another config: tensors that are new come from ``added``, or are attention that adds zero."""
    state = dict(model.state_dict())
    if config.up_attention != model.config.up_attention:
        state = {_last_attention(name, config): tensor for name, tensor in state.items()}
    state |= {name: tensor.to(model.device, model.dtype) for name, tensor in added.items()}
    with torch.device("meta"):
        rebuilt = UNet(config)
    for name, tensor in rebuilt.state_dict().items():
        if name not in state and ".attentions." in name:
            state[name] = torch.zeros(tensor.shape, device=model.device, dtype=model.dtype)
    rebuilt.load_state_dict(state, strict=True, assign=True)
    return rebuilt.train(model.training)


def _last_attention(name: str, config: UNetConfig) -> str:
    """An up block's only attention under the name of the last of several."""
    match = re.match(r"up_blocks\.(\d+)\.attentions\.0\.", name)
    if match is None or config.up_block_types[int(match[1])] != "AttnUpBlock2D":
        return name
    return f"up_blocks.{match[1]}.attentions.{config.layers_per_block}.{name[match.end() :]}"


def _schedule(schedule: Schedule, notes: list[str]) -> Schedule:
    fields: dict[str, object] = {"time_scale": 1.0, "time_offset": 0.0}
    if schedule.method in PREDICTORS:
        fields["method"] = "ddpm"
        notes.append(
            f"diffusers has no {schedule.method} for this model: there it is drawn from by DDPM (fixed_large, no clip)"
        )
    if schedule.beta_schedule == CONTINUOUS:
        fields |= {"beta_schedule": "linear", "trained_betas": tuple(schedule.betas.tolist())}
        notes.append(f"the SDE's marginals became {schedule.num_train_timesteps} trained_betas")
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
