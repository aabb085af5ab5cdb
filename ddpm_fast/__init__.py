"""ddpm_fast: the fastest exact DDPM engine.

    import ddpm_fast as df
    checkpoint = df.load()
    images = df.Sampler(checkpoint.model, checkpoint.schedule).sample(16, progress=True)
"""

from .config import UNetConfig
from .diffusion import training_loss
from .sampler import Sampler, to_uint8
from .schedule import Schedule
from .unet import UNet

__version__ = "0.1.0"

__all__ = ["Sampler", "Schedule", "UNet", "UNetConfig", "to_uint8", "training_loss"]
