"""The released improved- and guided-diffusion models, as the flags of their code bases, and those flags' defaults.

The architecture of a release is its fingerprint: it tells what no shape shows (heads, schedule, ...).
"""

from __future__ import annotations

from typing import Any

from .openai_layout import Structure

CLASSES = 1000  # NUM_CLASSES: every class-conditional release is of ImageNet

# By image size, where channel_mult is left empty (guided-diffusion; 32 is improved-diffusion's).
DEFAULT_MULTS: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}

_COMMON: dict[str, Any] = {
    "num_heads": 4,
    "num_head_channels": -1,
    "use_new_attention_order": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "sigma_small": False,
    "predict_xstart": False,
}

# `model_and_diffusion_defaults` of the two code bases, as far as sampling needs them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "improved-diffusion": {**_COMMON, "rescale_timesteps": True},
    "guided-diffusion": {**_COMMON, "rescale_timesteps": False},
}

_RELEASED: dict[str, Any] = {
    **_COMMON,
    "learn_sigma": True,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "rescale_timesteps": False,
}
_IMPROVED: dict[str, Any] = {
    **_RELEASED,
    "num_channels": 128,
    "num_res_blocks": 3,
    "attention_resolutions": "16,8",
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
    "rescale_timesteps": True,
}
_CIFAR10 = {**_IMPROVED, "image_size": 32}
_IMAGENET64 = {**_IMPROVED, "image_size": 64}
_LSUN = {
    **_RELEASED,
    "image_size": 256,
    "num_channels": 128,
    "num_res_blocks": 2,
    "attention_resolutions": "16",
    "num_heads": 1,
    "use_scale_shift_norm": False,
}
_GUIDED: dict[str, Any] = {
    **_RELEASED,
    "num_channels": 256,
    "num_res_blocks": 2,
    "attention_resolutions": "32,16,8",
    "num_head_channels": 64,
    "resblock_updown": True,
}
_GUIDED256 = {**_GUIDED, "image_size": 256}

RELEASES: dict[str, dict[str, Any]] = {
    "cifar10_uncond_50M_500K": _CIFAR10,
    "cifar10_uncond_vlb_50M_500K": _CIFAR10,
    "imagenet64_uncond_100M_1500K": _IMAGENET64,
    "imagenet64_uncond_vlb_100M_1500K": _IMAGENET64,
    "imagenet64_cond_270M_250K": {**_IMAGENET64, "num_channels": 192, "class_cond": True, "rescale_timesteps": False},
    "lsun_uncond_100M_1200K_bs128": _LSUN,
    "lsun_uncond_100M_2400K_bs64": _LSUN,
    "64x64_diffusion": {
        **_GUIDED,
        "image_size": 64,
        "num_channels": 192,
        "num_res_blocks": 3,
        "noise_schedule": "cosine",
        "use_new_attention_order": True,
        "class_cond": True,
    },
    "128x128_diffusion": {**_GUIDED, "image_size": 128, "num_head_channels": -1, "class_cond": True},
    "256x256_diffusion": {**_GUIDED256, "class_cond": True},
    "256x256_diffusion_uncond": _GUIDED256,
    "lsun_bedroom": _GUIDED256,
    "lsun_cat": _GUIDED256,
    "lsun_horse": _GUIDED256,
    "lsun_horse_nodropout": _GUIDED256,
    "512x512_diffusion": {**_GUIDED, "image_size": 512, "class_cond": True},
}


def structure_from(flags: dict[str, Any]) -> Structure:
    """The structure that the flags of a release build."""
    size = flags["image_size"]
    mults = DEFAULT_MULTS[size]
    attended = {size // int(resolution) for resolution in flags["attention_resolutions"].split(",")}
    return Structure(
        channels=flags["num_channels"],
        blocks=flags["num_res_blocks"],
        widths=tuple(int(mult * flags["num_channels"]) for mult in mults),
        attention=tuple(2**level in attended for level in range(len(mults))),
        resblock_updown=flags["resblock_updown"],
        scale_shift=flags["use_scale_shift_norm"],
        in_channels=3,
        out_channels=6 if flags["learn_sigma"] else 3,
        classes=CLASSES if flags["class_cond"] else None,
    )


def releases_of(structure: Structure) -> list[str]:
    """The released files of this architecture; they all have the same settings."""
    return [name for name, flags in RELEASES.items() if structure_from(flags) == structure]
