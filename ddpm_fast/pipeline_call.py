"""The arguments and results of a diffusers pipeline's call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .code_origin import is_stock
from .images import check_channels, picture
from .sampler import to_uint8

Generators = torch.Generator | Sequence[torch.Generator] | None
OUTPUT_TYPES = ("pil", "np", "numpy", "pt")


class ImageOutput(Mapping[str, Any]):
    """What a call returns, by attribute, key or position, as diffusers' ``ImagePipelineOutput``."""

    def __init__(self, images: Any):
        self.images = images  # list of Pillow images; [N, H, W, C] numpy in [0, 1]; or [N, C, H, W] tensor in [0, 1]

    def __getitem__(self, key: str | int | slice) -> Any:
        return {"images": self.images}[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("images",))

    def __len__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return f"ImageOutput(images={self.images!r})"

    def to_tuple(self) -> tuple[Any]:
        return (self.images,)


def refuse_others(pipeline: Any, others: Mapping[str, Any]) -> None:
    """TypeError, as the pipeline's own, for arguments that its call does not have."""
    if others:
        watch = any("callback" in name for name in others)
        advice = "; to watch the steps, call Sampler(model, schedule).sample(n, callback=...)" if watch else ""
        raise TypeError(f"a {type(pipeline).__name__}'s call has no argument {', '.join(others)}{advice}")


def check_output_type(name: str | None, channels: int) -> str:
    name = name or "np"
    if name not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {name!r}")
    if name == "pil":  # now, not when the images are drawn
        check_channels(channels, "take output_type='np'")
    return name


def check_generator(given: Any) -> torch.Generator | list[torch.Generator] | None:
    each = list(given) if isinstance(given, (list, tuple)) else [given]
    if given is not None and not (each and all(isinstance(g, torch.Generator) for g in each)):
        raise ValueError(f"generator must be a torch.Generator, a list of one an image, or None; got {given!r}")
    return each if isinstance(given, (list, tuple)) else given


def images_of(x: Tensor, output_type: str, pipeline: Any) -> Any:
    """x_0 [n, C, H, W] as a call returns it; pictures by the pipeline's own ``numpy_to_pil`` where it has one."""
    converter = getattr(pipeline, "numpy_to_pil", None)
    name = "numpy_to_pil"
    own = name in getattr(pipeline, "__dict__", {}) or not is_stock(("diffusers",), type(pipeline), name)
    if output_type == "pil" and not own:
        return [picture(image) for image in to_uint8(x).cpu().numpy()]
    images = (x / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    pixels = images.cpu().permute(0, 2, 3, 1).numpy()
    return converter(pixels) if converter is not None and output_type == "pil" else pixels


def first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def global_generator(device: torch.device) -> torch.Generator:
    """The generator that torch.randn on ``device`` draws from when none is named."""
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
