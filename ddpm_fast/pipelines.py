"""Reads a diffusers pipeline: its U-Net as a `UNet`, its scheduler as a `Schedule`. diffusers itself is not imported.

`network_check` and `scheduler_check` then compare what was read with what the pipeline computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .checkpoints.files import listing
from .checkpoints.schedulers import DDIM, DDPM, SOLVERS, schedule_fields
from .code_origin import is_from, is_stock, named, written_in
from .config import UNetConfig
from .schedule import PREDICTION_TYPES, Schedule
from .unet import UNet

PIPELINES = ("DDPMPipeline", "DDIMPipeline")
PARTS = ("unet", "scheduler")
TAKES = "accelerate takes a diffusers DDPMPipeline or DDIMPipeline"
# A float32 beta below 2^-24 is lost in alphas_cumprod, which then stays as it was. This one changes nothing either,
# and keeps the posterior's quotients finite.
LEAST_BETA = 2.0**-40
UNDERFLOW = 1e-6  # of float32's alphas_cumprod in a schedule whose last ones are beyond its range


def config_of(thing: Any) -> dict[str, Any]:
    """The configuration of a diffusers object, as diffusers' own code reads it: by attributes.

    A FrozenDict holds each value as an item and as an attribute. ``scheduler.config.clip_sample = False`` changes the
    attribute alone.
    """
    config = getattr(thing, "config", None) or {}
    edits = getattr(config, "__dict__", {})
    return {key: edits.get(key, value) for key, value in dict(config).items()}


def check_pipeline(pipeline: Any) -> None:
    """Raise ValueError unless the pipeline draws as DDPMPipeline or DDIMPipeline does: by their loop, from a U-Net and
    a scheduler alone."""
    kind = type(pipeline)
    others = [(name, part) for name, part in _parts(pipeline) if name not in PARTS and part is not None]
    if others:
        what = ", ".join(f"{name} ({type(part).__name__})" for name, part in others)
        raise ValueError(
            f"{TAKES}, which consists of a unet and a scheduler; this {kind.__name__} has {what} too, so its unet "
            "draws latents or needs conditions: draw by the pipeline itself"
        )
    if not any(base.__name__ in PIPELINES and is_from("diffusers", base) for base in kind.__mro__):
        raise ValueError(f"{TAKES}; got {kind.__name__}{_same_parts(pipeline)}")
    for method, does in (("__call__", "draws the images"), ("progress_bar", "hands out the timesteps")):
        own = vars(pipeline).get(method) if method != "__call__" else None
        stock = is_stock(("diffusers",), kind, method) if own is None else written_in(("diffusers",), own)
        if not stock:
            owner = next(c for c in kind.__mro__ if method in vars(c))
            patched = own is not None or is_from("diffusers", owner)
            by = named(own or getattr(kind, method)) if patched else f"{owner.__name__}.{method}"
            raise ValueError(
                f"this {kind.__name__} {does} by a {method} of its own ({by}), which accelerate would not "
                "run; without it, accelerate a plain DDPMPipeline(pipeline.unet, pipeline.scheduler)"
            )


def _parts(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """The components that a diffusers pipeline has registered: (library, class) in its configuration."""
    if not hasattr(pipeline, "unet"):
        return
    for name, value in config_of(pipeline).items():
        if not name.startswith("_") and isinstance(value, (list, tuple)) and len(value) == 2:
            yield name, getattr(pipeline, name, None)


def _same_parts(pipeline: Any) -> str:
    """What to do with a pipeline of another kind, where its network could be drawn from."""
    unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    if type(unet).__name__ == "UNet2DModel" and (_steps(scheduler) or _is_solver(scheduler)):
        return "; to draw by DDIM, accelerate DDIMPipeline(pipeline.unet, pipeline.scheduler)"
    return ""


def unet_of(pipeline: Any) -> Any:
    """The pipeline's UNet2DModel, without wrappers. ValueError for another network."""
    unet: Any = getattr(pipeline, "unet", None)
    for wrapper in ("module", "_orig_mod", "module"):  # of DataParallel and torch.compile
        if is_from("torch", type(unet)):
            unet = getattr(unet, wrapper, unet)
    inside = getattr(unet, "module", None)
    if inside is not None and not any(c.__name__ == "UNet2DModel" for c in type(unet).__mro__):
        raise ValueError(
            f"accelerate looks through the wrappers of torch alone; this pipeline's unet is a {type(unet).__name__} "
            f"around a {type(inside).__name__}: set pipeline.unet = pipeline.unet.module"
        )
    if not hasattr(unet, "config") or not hasattr(getattr(pipeline, "scheduler", None), "config"):
        raise ValueError(f"{TAKES}; got {type(pipeline).__name__} without a unet and a scheduler of diffusers")
    owner = next((c for c in type(unet).__mro__ if "forward" in vars(c)), type(unet))
    if owner.__name__ != "UNet2DModel":
        own = any(c.__name__ == "UNet2DModel" for c in type(unet).__mro__)
        raise ValueError(
            f"accelerate takes a pipeline around a UNet2DModel; this one has a {type(unet).__name__}"
            f"{', whose forward is its own' if own else ''}"
        )
    return unet


def describe(pipeline: Any) -> str:
    """A pipeline in a few words; one that is not taken, by its classes alone."""
    unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    kinds = [type(thing).__name__ for thing in (pipeline, unet, scheduler)]
    try:
        config, total = unet_of(pipeline).config, pipeline.scheduler.config.num_train_timesteps
        size = config.sample_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        count = sum(p.numel() for p in pipeline.unet.parameters())
    except (ValueError, AttributeError):
        return "{} of {} and {}".format(*kinds)
    network = f"{kinds[1]} of {count:,} parameters for images of {config.in_channels}x{height}x{width}"
    return f"{kinds[0]} of {network}, {kinds[2]} of {total} timesteps"


def execution_device(pipeline: Any, unet: Any) -> torch.device:
    """Where the pipeline draws: with offloading, not where its weights lie."""
    if any(hook in vars(m) for m in unet.modules() for hook in ("_hf_hook", "_diffusers_hook")):
        return torch.device(pipeline._execution_device)
    return torch.device(unet.conv_in.weight.device)


def _steps(scheduler: Any) -> str | None:
    """The scheduler of diffusers whose steps this one takes, by its class or a base of it."""
    return next((c.__name__ for c in type(scheduler).__mro__ if c.__name__ in (*DDPM, *DDIM)), None)


def _is_solver(scheduler: Any) -> bool:
    """Whether it solves a DDPM's process, so that a DDIMScheduler of its configuration is right."""
    kinds = {c.__name__ for c in type(scheduler).__mro__}
    config = config_of(scheduler)
    predicts = config.get("prediction_type", "epsilon") in PREDICTION_TYPES
    return bool(kinds & set(SOLVERS)) and predicts and not config.get("use_flow_sigmas")


def schedule_of(pipeline: Any, ddim: bool) -> Schedule:
    """The scheduler as a `Schedule`, with the scheduler's own ``alphas_cumprod``, which may have been edited.

    Raises:
        ValueError: its steps are not DDPM's or DDIM's, or no betas give its ``alphas_cumprod``.
    """
    scheduler = pipeline.scheduler
    steps = _steps(scheduler)
    if steps is None:
        advice = "its process is not a DDPM's, or its steps are its own: draw by the pipeline itself"
        if _is_solver(scheduler):
            advice = "to draw by DDIM, set pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)"
        raise ValueError(
            "accelerate runs the steps of a DDPMScheduler or DDIMScheduler; this pipeline has a "
            f"{type(scheduler).__name__}; {advice}"
        )
    fields = {**config_of(scheduler), "_class_name": steps}
    schedule = Schedule.from_dict(schedule_fields(fields, [], "DDIMPipeline" if ddim else "DDPMPipeline"))
    given = getattr(scheduler, "alphas_cumprod", None)
    alphas = torch.as_tensor([] if given is None else given).detach().to("cpu", torch.float64)
    betas = _betas(alphas, schedule.num_train_timesteps)
    if betas is not None:
        return replace(schedule, trained_betas=tuple(betas.tolist()), rescale_betas_zero_snr=False)
    if alphas.shape == schedule.alphas_cumprod.shape and (alphas - schedule.alphas_cumprod).abs().max() < UNDERFLOW:
        return schedule
    raise ValueError(
        f"the scheduler's alphas_cumprod must be {schedule.num_train_timesteps} numbers that fall from 1 at most to 0 "
        "at least, the last alone being 0; these are not, by an edit or because float32 ends before them: change them, "
        "or draw by the pipeline itself"
    )


def _betas(alphas: Tensor, total: int) -> Tensor | None:  # [total] float64
    """The betas of ``alphas_cumprod``, which is what a scheduler's steps read; None where there are none."""
    if alphas.shape != (total,):
        return None
    betas = 1 - alphas / torch.cat((torch.ones(1, dtype=torch.float64), alphas[:-1]))
    return betas.clamp(min=LEAST_BETA) if ((betas >= 0) & (betas <= 1)).all() else None  # NaN is neither


def model_of(unet: Any) -> UNet:
    """A `UNet` over the network's own weights. ValueError for what is not as its configuration says."""
    config = UNetConfig.from_dict(config_of(unet))
    if config.num_class_embeds is not None or config.class_embed_type is not None:
        raise ValueError(
            "a pipeline passes no class labels, and this network needs them; save it, then "
            "Sampler(load(folder).model, ...).sample(n, labels=...)"
        )
    with torch.device("meta"):
        model = UNet(config)
    state, wanted = unet.state_dict(), model.state_dict()
    odd = sorted(state.keys() ^ wanted.keys())
    if odd:
        raise ValueError(
            f"the network's weights must be those of its configuration; not so: {listing(odd)}; merge or remove "
            "adapters, fused projections and parametrizations first"
        )
    reshaped = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if state[name].shape != tensor.shape
    ]
    if reshaped:
        raise ValueError(
            f"the network's weights must have the shapes that its configuration gives; not so: {listing(reshaped)}; "
            "put back a layer of that shape, or draw by the pipeline itself"
        )
    model.load_state_dict(state, assign=True)
    return model.eval()
