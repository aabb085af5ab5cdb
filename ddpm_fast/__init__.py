"""ddpm_fast: the fastest exact DDPM engine.

import ddpm_fast as df
checkpoint = df.load()
images = df.Sampler(checkpoint.model, checkpoint.schedule).sample(16, progress=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._version import __version__

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

if TYPE_CHECKING:
    from .checkpoints import load, save
    from .config import UNetConfig
    from .diffusion import training_loss
    from .dropin import accelerate
    from .sampler import Sampler, to_uint8
    from .schedule import Schedule
    from .unet import UNet
else:
    # Imported when first asked for: the command line's main must run before torch's import, which takes seconds.
    _HOMES = {
        "Sampler": "sampler",
        "Schedule": "schedule",
        "UNet": "unet",
        "UNetConfig": "config",
        "accelerate": "dropin",
        "load": "checkpoints",
        "save": "checkpoints",
        "to_uint8": "sampler",
        "training_loss": "diffusion",
    }

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
