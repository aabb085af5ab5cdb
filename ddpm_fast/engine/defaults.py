"""What a sampler takes from its model where its caller names nothing."""

from __future__ import annotations

import torch

from ..unet import UNet


def device_of(model: object) -> torch.device:
    """Where the model's parameters are; the CPU for one without."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if first is None else first.device


def numbered(device: torch.device) -> torch.device:
    """The GPU that "cuda" means now; another one may be the current one when a sampler draws."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def image_shape_of(model: object) -> tuple[int, int, int]:
    """(C, H, W), where the model states it. Raises ValueError where it does not."""
    if isinstance(model, UNet) and model.config.image_size is not None:
        return (model.config.in_channels, *model.config.image_size)
    shape = getattr(model, "image_shape", None)
    if shape is not None:
        return shape
    raise ValueError(
        "image_shape=(C, H, W) is needed: the model does not state its image size (on the command line, "
        "--set image_size=N or, for a diffusers model, sample_size=N)"
    )
