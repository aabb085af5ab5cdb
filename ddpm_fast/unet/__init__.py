"""The U-Net of Ho et al. 2020, with the names and semantics of diffusers' UNet2DModel."""

from ..config import UNetConfig
from .blocks import Attention, Resampler, ResnetBlock, TimeRows
from .model import UNet
from .skip import SkipDownBlock, SkipUpBlock
from .time_embedding import sinusoid

__all__ = [
    "Attention",
    "Resampler",
    "ResnetBlock",
    "SkipDownBlock",
    "SkipUpBlock",
    "TimeRows",
    "UNet",
    "UNetConfig",
    "sinusoid",
]
