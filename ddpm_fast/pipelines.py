"""What a diffusers pipeline consists of, in our terms; diffusers itself is not imported.

Its network and scheduler are read by their configurations and weights.
"""

from __future__ import annotations

from typing import Any

import torch

from .checkpoints.files import listing
from .checkpoints.schedulers import DDIM, DDPM, schedule_fields
from .config import UNetConfig
from .schedule import Schedule
from .unet import UNet

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unet_of(pipeline: Any) -> Any:
    """Its UNet2DModel. ValueError for another network."""
    unet: Any = getattr(pipeline, "unet", None)
    for wrapper in ("module", "_orig_mod", "module"):  # what DataParallel and torch.compile wrap
        unet = getattr(unet, wrapper, unet)
    if not hasattr(unet, "config") or not hasattr(getattr(pipeline, "scheduler", None), "config"):
        raise ValueError(f"accelerate takes a diffusers DDPMPipeline or DDIMPipeline; got {type(pipeline).__name__}")
    kind = type(unet).__name__
    if kind != "UNet2DModel":
        raise ValueError(f"accelerate takes a pipeline around a UNet2DModel; this one has a {kind}")
    return unet


def schedule_of(pipeline: Any, ddim: bool) -> Schedule:
    """Its scheduler as a `Schedule`. ValueError for one whose steps are not DDPM's or DDIM's."""
    scheduler = pipeline.scheduler
    steps = type(scheduler).__name__
    if steps not in (*DDPM, *DDIM):
        raise ValueError(
            f"accelerate runs the steps of a DDPMScheduler or DDIMScheduler; this pipeline has a {steps}; "
            "set pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)"
        )
    fields = {**dict(scheduler.config), "_class_name": steps}
    return Schedule.from_dict(schedule_fields(fields, [], "DDIMPipeline" if ddim else "DDPMPipeline"))


def state_of(unet: Any) -> object:
    """What changes where the network does: its configuration, and of each weight where it lies, its version and a sum
    of its bits, since a change through ``.data`` leaves the version as it was."""
    weights = list(unet.state_dict(keep_vars=True).values())
    if any(w.is_meta for w in weights):
        raise ValueError("the pipeline's weights must be in memory; some are on meta: load it without offloading")
    marks = [(w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights]
    with torch.no_grad():
        sums = [w.view(_BITS[w.element_size()]).sum() for w in weights]
        bits = torch.stack([s.to(weights[0].device) for s in sums]).tolist()
    return dict(unet.config), marks, bits


def model_of(unet: Any) -> UNet:
    """A `UNet` over the network's own weights. ValueError for what is not as its configuration says."""
    config = UNetConfig.from_dict(dict(unet.config))
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise ValueError(
            "a pipeline passes no class labels, and this network needs them; save it, then "
            "Sampler(load(folder).model, ...).sample(n, labels=...)"
        )
    with torch.device("meta"):
        model = UNet(config)
    state = unet.state_dict()
    odd = sorted(state.keys() ^ model.state_dict().keys())
    if odd:
        raise ValueError(
            f"the network's weights must be those of its configuration; not so: {listing(odd)}; merge or remove "
            "adapters, fused projections and parametrizations first"
        )
    model.load_state_dict(state, assign=True)
    return model.eval()
