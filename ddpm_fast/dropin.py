"""accelerate(pipeline): a diffusers DDPMPipeline or DDIMPipeline in, an object that is called the same way out.

diffusers itself is not imported: the pipeline's ``unet`` and ``scheduler`` are read by their configs and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoints.schedulers import DDIM, DDPM, schedule_fields
from .config import UNetConfig
from .images import picture
from .ops import Ops
from .sampler import Sampler, to_uint8
from .schedule import Schedule
from .unet import UNet

OUTPUT_TYPES = ("pil", "np", "numpy", "pt")
MOST_IMAGES = 2**30  # a pipeline draws all its images together, so the sampler must not cut them into batches
PROGRESS_UPDATES = 100  # of a progress bar, each of which waits for the device


@dataclass(frozen=True)
class ImageOutput:
    """What a call returns, by attribute, key or position, as diffusers' ``ImagePipelineOutput``."""

    images: Any  # list of Pillow images; [N, H, W, C] numpy in [0, 1]; or [N, C, H, W] tensor in [0, 1]

    def __getitem__(self, key: str | int | slice) -> Any:
        return {"images": self.images}[key] if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any]:
        return (self.images,)


class Accelerated:
    """A DDPMPipeline's call signature over a `Sampler`. What it does not have itself, the pipeline answers.

    The weights are those of the moment it was made: later changes of the pipeline are not followed.
    """

    def __init__(
        self,
        pipeline: Any,
        model: UNet,
        schedule: Schedule,
        dtype: torch.dtype,
        device: torch.device,
        ops: str | Ops = "auto",
        graph: str = "auto",
    ):
        self.pipeline, self.model, self.schedule = pipeline, model, schedule
        self.dtype, self.device, self._ops, self._graph = dtype, device, ops, graph
        self._sampler: tuple[object, Sampler] | None = None  # of one kind of chain: it holds a copy of the weights
        self._progress_bar_config: dict[str, Any] = dict(getattr(pipeline, "_progress_bar_config", None) or {})

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Keyword arguments of tqdm."""
        self._progress_bar_config = kwargs

    def to(self, *targets: torch.device | str | torch.dtype) -> Accelerated:
        """Compute on another device or in another dtype from now on. The pipeline itself stays where it is."""
        for target in targets:
            if isinstance(target, torch.dtype):
                self.dtype = target
            else:
                self.device = torch.device(target)
        self._sampler = None
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "pipeline" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple[Any]:
        """Draw ``batch_size`` images. Arguments and results are those of ``DDPMPipeline.__call__``.

        With the same generator, or list of one an image, the noise is the pipeline's own in this dtype, and so
        are the images up to rounding; without one it comes from torch's global generator of the device, as
        there. Tensors are float32 in any dtype. Raises ValueError for more steps than the model was trained with.
        """
        output_type = _output_type(output_type)
        return self._images(self._draw(batch_size, generator, num_inference_steps), output_type, return_dict)

    def _images(self, x: Tensor, output_type: str, return_dict: bool) -> ImageOutput | tuple[Any]:
        images: Any
        if output_type == "pil":
            images = [picture(image) for image in to_uint8(x).cpu().numpy()]
        else:
            images = (x / 2 + 0.5).clamp(0, 1)
            if output_type != "pt":
                images = images.cpu().permute(0, 2, 3, 1).numpy()
        return ImageOutput(images) if return_dict else (images,)

    def _draw(
        self, n: int, generator: Any, steps: int, schedule: Schedule | None = None, eta: float | None = None
    ) -> Tensor:
        """x_0 [n, C, H, W], with the pipeline's progress bar."""
        schedule = schedule or self.schedule
        chain = steps, schedule, eta
        if self._sampler is None or self._sampler[0] != chain:
            self._sampler = None  # its weights go before the next ones come
            sampler = Sampler(
                self.model,
                schedule,
                eta=eta,
                batch_size=MOST_IMAGES,
                steps=steps,
                dtype=self.dtype,
                device=self.device,
                ops=self._ops,
                graph=self._graph,
            )
            self._sampler = chain, sampler
        sampler = self._sampler[1]
        sampler.noise = generator if generator is not None else _global_generator(self.device)
        config = {"disable": not _is_first_process(), **self._progress_bar_config}
        if config["disable"]:
            return sampler.sample(n)
        with tqdm(total=steps, **config) as bar:

            def show(done: int, x: Tensor) -> None:
                if x.is_cuda:
                    torch.cuda.current_stream(x.device).synchronize()
                bar.update(done - bar.n)

            return sampler.sample(n, callback=show, interval=-(-steps // PROGRESS_UPDATES))


class AcceleratedDDIM(Accelerated):
    """A DDIMPipeline's call signature over a `Sampler`."""

    def __call__(  # type: ignore[override]
        self,
        batch_size: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple[Any]:
        """Draw ``batch_size`` images. Arguments and results are those of ``DDIMPipeline.__call__``.

        Noise and tensors as in `Accelerated`. Raises ValueError for an eta outside [0, 1], where upstream warns.
        """
        output_type = _output_type(output_type)
        schedule = replace(self.schedule, use_clipped_model_output=bool(use_clipped_model_output))
        x = self._draw(batch_size, generator, num_inference_steps, schedule, eta)
        return self._images(x, output_type, return_dict)


def accelerate(
    pipeline: Any,
    *,
    dtype: torch.dtype | None = None,  # of the network; default the pipeline's own
    device: torch.device | str | None = None,  # default the pipeline's own
    ops: str | Ops = "auto",
    graph: str = "auto",
) -> Accelerated:
    """A fast stand-in for a diffusers ``DDPMPipeline`` or ``DDIMPipeline``, called in the same way; the pipeline is
    left as it is.

    ops and graph are those of `Sampler`. Raises ValueError for a pipeline that has other parts than they: a
    UNet2DModel, compiled or not, and a DDPMScheduler or DDIMScheduler.
    """
    unet: Any = getattr(pipeline, "unet", None)
    unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wraps
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if not hasattr(unet, "config") or not hasattr(scheduler, "config"):
        raise ValueError(f"accelerate takes a diffusers DDPMPipeline or DDIMPipeline; got {type(pipeline).__name__}")
    steps = type(scheduler).__name__
    if steps not in (*DDPM, *DDIM):
        raise ValueError(
            f"accelerate runs the steps of a DDPMScheduler or DDIMScheduler; this pipeline has a {steps}; "
            "set pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)"
        )
    by_ddim = any(base.__name__ == "DDIMPipeline" for base in type(pipeline).__mro__)
    fields = {**dict(scheduler.config), "_class_name": steps}
    schedule = Schedule.from_dict(schedule_fields(fields, [], "DDIMPipeline" if by_ddim else "DDPMPipeline"))
    kind = type(unet).__name__
    if kind != "UNet2DModel":
        raise ValueError(f"accelerate takes a pipeline around a UNet2DModel; this one has a {kind}")
    with torch.device("meta"):
        model = UNet(UNetConfig.from_dict(dict(unet.config)))
    model.load_state_dict(unet.state_dict(), assign=True)
    return (AcceleratedDDIM if by_ddim else Accelerated)(
        pipeline,
        model.eval(),
        schedule,
        dtype=dtype or model.dtype,
        device=torch.device(device) if device is not None else model.device,
        ops=ops,
        graph=graph,
    )


def _output_type(name: str | None) -> str:
    name = name or "np"
    if name not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {name!r}")
    return name


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _global_generator(device: torch.device) -> torch.Generator:
    """The generator that torch.randn on ``device`` draws from when none is named."""
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
