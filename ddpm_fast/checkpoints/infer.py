"""What a diffusers U-Net's state dict tells of its configuration, and the presets for what it does not tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .files import CheckpointError

_CIFAR10, _LSUN256 = (128, 256, 256, 256), (128, 128, 256, 256, 512, 512)

# UNetConfig fields that no shape shows. "google": what the config.json of google/ddpm-* says of them.
PRESETS: dict[str, dict[str, Any]] = {
    "google": {
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
    },
    "diffusers-default": {
        "attention_head_dim": 8,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "downsample_padding": 1,
        "freq_shift": 0,
        "flip_sin_to_cos": True,
    },
}


def config_from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The UNetConfig fields that the shapes of a state dict (current names) determine.

    Raises CheckpointError where the tensors are not those of a U-Net of this kind.
    """
    try:
        return _config({name: tuple(t.shape) for name, t in tensors.items()})
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"the state dict is not a whole UNet2DModel: {type(error).__name__} at {error}") from None


def _config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    if any(".resnet_down." in n or ".skip_conv." in n for n in shapes):
        raise CheckpointError(
            "the state dict has NCSN++'s Skip blocks, of which shapes do not tell the last on either side; put the "
            "model's config.json beside the file"
        )
    levels = 1 + max(int(m[1]) for m in (re.match(r"down_blocks\.(\d+)\.", n) for n in shapes) if m)
    down = "down_blocks.0.resnets"
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    time_width = shapes["time_embedding.linear_1.weight"][0]
    scale_shift = shapes[f"{down}.0.time_emb_proj.weight"][0] == 2 * widths[0]
    config: dict[str, Any] = {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": sum(re.fullmatch(rf"{down}\.\d+\.conv1\.weight", n) is not None for n in shapes),
        "time_embedding_dim": None if time_width == 4 * widths[0] else time_width,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "mid_block_type": "UNetMidBlock2D" if "mid_block.resnets.0.conv1.weight" in shapes else None,
        "add_attention": "mid_block.attentions.0.to_q.weight" in shapes,
    }
    for way in ("down", "up"):
        config |= _blocks(shapes, way, levels)
    return config | _time_and_classes(shapes)


def _blocks(shapes: Mapping[str, tuple[int, ...]], way: str, levels: int) -> dict[str, Any]:
    """Block types of one side, and how its attention blocks resample."""
    types, resample = [], "conv"
    for i in range(levels):
        block = f"{way}_blocks.{i}"
        attends = f"{block}.attentions.0.to_q.weight" in shapes
        by_resnet = f"{block}.{way}samplers.0.conv1.weight" in shapes
        if attends and by_resnet:
            resample = "resnet"
        plain = f"Resnet{way.capitalize()}sampleBlock2D" if by_resnet else f"{way.capitalize()}Block2D"
        types.append(f"Attn{way.capitalize()}Block2D" if attends else plain)
    return {f"{way}_block_types": types, f"{way}sample_type": resample}


def _time_and_classes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    projection = shapes.get("time_proj.weight")
    if projection is not None:
        config["time_embedding_type"] = "fourier" if len(projection) == 1 else "learned"
        if len(projection) == 2:
            config["num_train_timesteps"] = projection[0]
    if "class_embedding.weight" in shapes:
        config["num_class_embeds"] = shapes["class_embedding.weight"][0]
    elif "class_embedding.linear_1.weight" in shapes:
        config["class_embed_type"] = "timestep"
    return config


def preset_config(preset: str, inferred: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The preset's UNetConfig fields for a model of these inferred ones and these tensor names."""
    config = dict(PRESETS[preset])
    widths = tuple(inferred["block_out_channels"])
    # scale-shift models normalise before the mid attention only where its groups are given
    if inferred["resnet_time_scale_shift"] == "scale_shift" and "mid_block.attentions.0.group_norm.weight" in names:
        config["attn_norm_num_groups"] = config["norm_num_groups"]
    if preset == "google" and widths in (_CIFAR10, _LSUN256):
        config["sample_size"] = 32 if widths == _CIFAR10 else 256
    return config


def preset_schedule(preset: str, widths: tuple[int, ...]) -> dict[str, Any]:
    """The preset's Schedule fields. google/ddpm-cifar10-32 has fixed_large, the 256-pixel models fixed_small."""
    return {"variance_type": "fixed_large" if preset == "google" and widths == _CIFAR10 else "fixed_small"}
