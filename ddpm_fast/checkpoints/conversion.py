"""Any checkpoint that loads, written in the diffusers layout or, where it fits, as OpenAI's ``.pt``."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import SKIP_DOWN, SKIP_UP, UNetConfig
from ..schedule import Schedule
from ..unet import UNet, sinusoid
from ..whole_files import write_atomically
from .diffusers import save
from .express import for_diffusers
from .family import Checkpoint, stored_dtype
from .files import CheckpointError
from .openai import flags_of
from .openai_layout import GROUPS, Heads, Structure, head_count, to_theirs
from .openai_presets import RELEASES, releases_of

TARGETS = ("diffusers", "openai")


def write(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    to: str = "diffusers",
    dtype: torch.dtype | str | None = None,
) -> list[str]:
    """Writes a loaded checkpoint to the folder (diffusers) or the file (openai) ``out``; see `checkpoints.convert`.

    dtype: of the stored weights; None keeps the model's, float32. Returns notes: what the other format says
    otherwise or not at all. Raises CheckpointError for what it cannot express.
    """
    if to not in TARGETS:
        raise CheckpointError(f"convert writes {' or '.join(TARGETS)}; got to={to!r}")
    if not isinstance(checkpoint.model, UNet):
        raise CheckpointError(
            f"{checkpoint.source} is a {checkpoint.family} network, which {to} has not: it cannot be converted; "
            "it samples here as it is"
        )
    if to == "openai":
        return write_openai(checkpoint.model, checkpoint.schedule, Path(out), dtype)
    model, schedule, notes = for_diffusers(checkpoint.model, checkpoint.schedule)
    save(out, model, schedule, dtype=dtype, label_names=checkpoint.labels)
    if schedule.num_train_timesteps != 1000 and schedule.method == "ddpm":
        notes.append(f"DDPMPipeline takes 1000 steps unless told num_inference_steps={schedule.num_train_timesteps}")
    if model.class_embedding is not None:
        notes.append("DDPMPipeline passes no labels; give class_labels to the UNet2DModel in a loop of your own")
    return notes


# --- OpenAI's ---


def write_openai(model: UNet, schedule: Schedule, path: Path, dtype: torch.dtype | str | None = None) -> list[str]:
    """A ``.pt`` that improved- or guided-diffusion's ``load_state_dict`` takes. Returns the flags to use there."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; an OpenAI checkpoint is a file, such as {path / 'model.pt'}")
    dtype = stored_dtype(dtype)
    state = {name: t.detach().to("cpu") for name, t in model.state_dict().items()}
    rescaled = _rescaled(model.config, schedule, state)
    structure, heads = structure_of_config(model.config)
    releases = releases_of(structure)
    new_order = bool(releases) and RELEASES[releases[0]]["use_new_attention_order"]
    theirs = to_theirs(state, structure, heads, new_order)
    stored = {}
    for name, tensor in theirs.items():
        value = tensor.to(dtype or tensor.dtype, copy=True, memory_format=torch.contiguous_format)
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{name} has NaN or infinite values in {value.dtype}; such weights are not saved")
        stored[name] = value
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda stream: torch.save(stored, stream))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    flags = _flags(model.config, schedule, structure, heads, new_order, rescaled)
    return [f"the file holds no settings; in OpenAI's scripts: {flags}"]


def structure_of_config(config: UNetConfig) -> tuple[Structure, Heads]:
    """The inverse of `openai_layout.config_of`. CheckpointError names the first field that OpenAI's code has not."""
    normed = (None, GROUPS) if config.resnet_time_scale_shift == "default" else (GROUPS,)
    channels = config.time_proj_channels or config.block_out_channels[0]
    needed: dict[str, tuple[Any, ...]] = {
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "act_fn": ("silu", "swish"),
        "norm_eps": (1e-5,),
        "norm_num_groups": (GROUPS,),
        "downsample_padding": (1,),
        "mid_block_type": ("UNetMidBlock2D",),
        "add_attention": (True,),
        "mid_block_scale_factor": (1,),
        "center_input_sample": (False,),
        "block_scale_factor": (1,),
        "up_attention": ("all",) if any(kind.startswith("Attn") for kind in config.up_block_types) else ("all", "last"),
        "resnet_resample_shortcut": (False,),
        "class_embed_type": (None,),
        "attn_norm_num_groups": normed,
        "time_embedding_dim": (4 * channels, None) if channels == config.block_out_channels[0] else (4 * channels,),
    }
    for name, allowed in needed.items():
        value = getattr(config, name)
        if value not in allowed:
            raise CheckpointError(
                f"OpenAI's U-Net has no such {name}: {value!r}, where it has {' or '.join(map(repr, allowed))}"
            )
    skips = sorted({*SKIP_DOWN, *SKIP_UP} & {*config.down_block_types, *config.up_block_types})
    if skips:
        raise CheckpointError(f"OpenAI's U-Net has no {skips[0]} (NCSN++)")
    up_types = config.up_block_types[::-1]
    attention = tuple(kind.startswith("Attn") for kind in config.down_block_types)
    if attention != tuple(kind.startswith("Attn") for kind in up_types):
        raise CheckpointError("OpenAI's U-Net has attention at the same levels on both sides; this model has not")
    ways = [_by_resnet(kind, config.downsample_type) for kind in config.down_block_types[:-1]]
    ways += [_by_resnet(kind, config.upsample_type) for kind in up_types[1:]]
    if len(set(ways)) > 1:
        raise CheckpointError("OpenAI's U-Net resamples by convolutions or by residual blocks; this model mixes them")
    structure = Structure(
        channels=channels,
        blocks=config.layers_per_block,
        widths=config.block_out_channels,
        attention=attention,
        resblock_updown=any(ways),
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        classes=config.num_class_embeds,
    )
    return structure, _heads(config, structure)


def _by_resnet(kind: str, of_attention: str) -> bool:
    return kind.startswith("Resnet") or (kind.startswith("Attn") and of_attention == "resnet")


def _heads(config: UNetConfig, structure: Structure) -> Heads:
    odd = [c for c in structure.attended if c % config.head_dim(c)]
    if odd:
        raise CheckpointError(
            f"OpenAI's heads share all channels; {config.attention_head_dim} does not divide {odd[0]}"
        )
    counts = {c // config.head_dim(c) for c in structure.attended}
    if len(counts) == 1:  # improved-diffusion knows heads by number only
        return counts.pop()
    assert config.attention_head_dim is not None
    return (config.attention_head_dim,)


def _rescaled(config: UNetConfig, schedule: Schedule, state: dict[str, Tensor]) -> bool:
    """Whether the times are OpenAI's scaled ones. A table that `for_diffusers` made of them leaves the state."""
    steps = schedule.num_train_timesteps
    if config.time_embedding_type == "learned":
        times = torch.arange(steps, dtype=torch.float32) * (1000 / steps)
        rows = sinusoid(times, config.block_out_channels[0])
        table = state.pop("time_proj.weight").float()
        # a table that was stored in half precision is off by so much
        if table.shape != rows.shape or not torch.allclose(table, rows, rtol=0, atol=1e-2):
            raise CheckpointError("OpenAI's U-Net has no learned time embedding, and this one is no table of sinusoids")
        return steps != 1000
    if config.time_embedding_type != "positional":
        raise CheckpointError(f"OpenAI's U-Net has no time_embedding_type {config.time_embedding_type!r}")
    if schedule.time_offset or (schedule.time_scale != 1 and not math.isclose(schedule.time_scale, 1000 / steps)):
        plus = f" plus {schedule.time_offset:g}" if schedule.time_offset else ""
        raise CheckpointError(
            f"OpenAI's code scales times by 1000/{steps} or not at all; got {schedule.time_scale}{plus}"
        )
    return schedule.time_scale != 1


def _flags(
    config: UNetConfig, schedule: Schedule, structure: Structure, heads: Heads, new_order: bool, rescaled: bool
) -> str:
    size = config.image_size
    flags: dict[str, Any] = {"image_size": size[0]} if size else {}
    flags |= flags_of(structure, size[0] if size else None)
    deepest = structure.widths[-1]
    if isinstance(heads, tuple):
        flags["num_head_channels"] = heads[0]
    else:
        flags["num_heads"] = head_count(deepest, heads)
    flags |= {"use_new_attention_order": True} if new_order else {}
    steps = schedule.num_train_timesteps
    flags["diffusion_steps"] = steps
    linear = schedule.beta_schedule == "linear" and schedule.trained_betas is None
    ends = schedule.beta_start * steps / 1000, schedule.beta_end * steps / 1000
    if schedule.beta_schedule == "squaredcos_cap_v2" and schedule.trained_betas is None:
        flags["noise_schedule"] = "cosine"
    elif linear and math.isclose(ends[0], 0.0001) and math.isclose(ends[1], 0.02):
        flags["noise_schedule"] = "linear"
    else:
        flags["noise_schedule"] = "(none of theirs)"
    flags |= {"rescale_timesteps": rescaled, "predict_xstart": schedule.prediction_type == "sample"}
    if not structure.learn_sigma:
        flags["sigma_small"] = schedule.variance_type.startswith("fixed_small")
    return " ".join(f"--{name} {value}" for name, value in flags.items())
