"""ddpm_fast: the fastest exact DDPM engine.

import ddpm_fast as df
checkpoint = df.load()
images = df.Sampler(checkpoint.model, checkpoint.schedule).sample(16, progress=True)
"""

from ._version import __version__
from .checkpoints import load, save
from .config import UNetConfig
from .diffusion import training_loss
from .dropin import accelerate
from .sampler import Sampler, to_uint8
from .schedule import Schedule
from .unet import UNet

__all__ = [
    "Sampler",
    "Schedule",
    "UNet",
    "UNetConfig",
    "__version__",
    "accelerate",
    "load",
    "save",
    "to_uint8",
    "training_loss",
]
