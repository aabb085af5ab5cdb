"""accelerate(pipeline): a diffusers DDPMPipeline or DDIMPipeline in, an object that is called the same way out.

diffusers itself is not imported: see `pipelines`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .arguments import whole_number
from .images import check_channels, picture
from .ops import Ops
from .pipelines import model_of, schedule_of, state_of, unet_of
from .sampler import DTYPES, Sampler, to_uint8
from .schedule import Schedule
from .unet import UNet

Generators = torch.Generator | Sequence[torch.Generator] | None
OUTPUT_TYPES = ("pil", "np", "numpy", "pt")
MOST_IMAGES = 2**30  # a pipeline draws all its images together, so the sampler must not cut them into batches
PROGRESS_UPDATES = 100  # of a progress bar, each of which waits for the device


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


class _Read(NamedTuple):
    """A pipeline's network, as it was when it was read."""

    unet: Any
    state: object  # of its configuration and weights
    model: UNet


class _Chain(NamedTuple):
    """What a sampler is made for."""

    model: UNet
    steps: int
    schedule: Schedule
    eta: float | None
    dtype: torch.dtype
    device: torch.device


class Accelerated:
    """A DDPMPipeline's call signature over a `Sampler`. What it does not have itself, the pipeline answers.

    The pipeline's network and scheduler are read at each call: one that was trained on, moved or replaced is followed.
    """

    ddim = False

    def __init__(
        self,
        pipeline: Any,
        dtype: torch.dtype | None = None,  # None: the pipeline's
        device: torch.device | None = None,  # None: the pipeline's
        ops: str | Ops = "auto",
        graph: str = "auto",
    ):
        self.pipeline, self._ops, self._graph = pipeline, ops, graph
        self._dtype, self._device = dtype, device
        self._read: _Read | None = None
        self._sampler: tuple[_Chain, Sampler] | None = None  # it holds a copy of the weights
        self._bar: dict[str, Any] | None = None  # None: the pipeline's
        _computed(self.dtype)

    @property
    def unet(self) -> Any:
        """The pipeline's."""
        return self.pipeline.unet

    @unet.setter
    def unet(self, unet: Any) -> None:
        self.pipeline.unet = unet

    @property
    def scheduler(self) -> Any:
        """The pipeline's."""
        return self.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.pipeline.scheduler = scheduler

    @property
    def dtype(self) -> torch.dtype:
        """Of the network."""
        return self._dtype or self._look()[0].dtype

    @property
    def device(self) -> torch.device:
        return self._device or self._look()[0].device

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Keyword arguments of tqdm."""
        self._bar = kwargs

    def to(
        self,
        *targets: torch.device | str | int | torch.dtype | None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,  # there are none
    ) -> Accelerated:
        """Compute on another device or in another dtype from now on. The pipeline itself stays where it is."""
        for target in (*targets, device, dtype):
            if isinstance(target, torch.dtype):
                self._dtype = _computed(target)
            elif target is not None:
                self._device = torch.device(target)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "pipeline" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __getstate__(self) -> dict[str, Any]:
        """What is made anew at the next call is neither copied nor pickled."""
        return {**self.__dict__, "_read": None, "_sampler": None}

    @overload
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: Literal[True] = True,
    ) -> ImageOutput: ...

    @overload
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        *,
        return_dict: bool,
    ) -> ImageOutput | tuple[Any]: ...

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple[Any]:
        """Draw ``batch_size`` images. Arguments and results are those of ``DDPMPipeline.__call__``.

        With the same generator, or list of one an image, the noise is the pipeline's own in this dtype, and so
        are the images up to rounding; without one it comes from torch's global generator of the device, as
        there. Tensors are float32 in any dtype. Raises ValueError for more steps than the model was trained with.
        """
        return self._call(batch_size, generator, num_inference_steps, output_type, return_dict)

    def _call(
        self,
        n: int,
        generator: Any,
        steps: int,
        output_type: str | None,
        return_dict: bool,
        eta: float | None = None,
        **fields: Any,  # of the schedule
    ) -> ImageOutput | tuple[Any]:
        model, schedule = self._look()
        n, steps = whole_number("batch_size", n), whole_number("num_inference_steps", steps)
        if n < 0:
            raise ValueError(f"batch_size must be 0 or more; got {n}")
        output_type = _output_type(output_type, model.config.in_channels)
        generator = _generator(generator)
        dtype, device = self._dtype or model.dtype, self._device or model.device
        x = self._draw(n, generator, _Chain(model, steps, replace(schedule, **fields), eta, _computed(dtype), device))
        images: Any
        if output_type == "pil":
            images = [picture(image) for image in to_uint8(x).cpu().numpy()]
        else:
            images = (x / 2 + 0.5).clamp(0, 1)
            if output_type != "pt":
                images = images.cpu().permute(0, 2, 3, 1).numpy()
        return ImageOutput(images) if return_dict else (images,)

    def _look(self) -> tuple[UNet, Schedule]:
        """The pipeline's network and process, as they are now."""
        unet, schedule = unet_of(self.pipeline), schedule_of(self.pipeline, self.ddim)
        state = state_of(unet)
        if self._read is None or self._read.unet is not unet or self._read.state != state:
            self._read = _Read(unet, state, model_of(unet))
        return self._read.model, schedule

    def _draw(self, n: int, generator: Any, chain: _Chain) -> Tensor:
        """x_0 [n, C, H, W], with the pipeline's progress bar."""
        sampler = self._sampler_for(n, chain)
        sampler.noise = generator if generator is not None else _global_generator(chain.device)
        bar_config = getattr(self.pipeline, "_progress_bar_config", None) if self._bar is None else self._bar
        config = {"disable": not _is_first_process(), **(bar_config or {})}
        if config["disable"]:
            return sampler.sample(n)
        with tqdm(total=chain.steps, **config) as bar:

            def show(done: int, x: Tensor) -> None:
                if x.is_cuda:
                    torch.cuda.current_stream(x.device).synchronize()
                bar.update(done - bar.n)

            return sampler.sample(n, callback=show, interval=-(-chain.steps // PROGRESS_UPDATES))

    def _sampler_for(self, n: int, chain: _Chain) -> Sampler:
        """The sampler at hand, where it is for this chain. On a CPU the length of a batch has a say in ops="auto"."""
        any_batch = self._ops != "auto" or chain.device.type != "cpu"
        if self._sampler is None or self._sampler[0] != chain or n > self._sampler[1].batch_size:
            self._sampler = None  # its weights go before the next ones come
            sampler = Sampler(
                chain.model,
                chain.schedule,
                eta=chain.eta,
                batch_size=MOST_IMAGES if any_batch else max(n, 1),
                steps=chain.steps,
                dtype=chain.dtype,
                device=chain.device,
                ops=self._ops,
                graph=self._graph,
            )
            self._sampler = chain, sampler
        return self._sampler[1]


class AcceleratedDDIM(Accelerated):
    """A DDIMPipeline's call signature over a `Sampler`."""

    ddim = True

    @overload  # type: ignore[override]
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: Literal[True] = True,
    ) -> ImageOutput: ...

    @overload
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        *,
        return_dict: bool,
    ) -> ImageOutput | tuple[Any]: ...

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> ImageOutput | tuple[Any]:
        """Draw ``batch_size`` images. Arguments and results are those of ``DDIMPipeline.__call__``.

        Noise and tensors as in `Accelerated`. Raises ValueError for an eta outside [0, 1], where upstream warns.
        """
        clipped = bool(use_clipped_model_output)
        return self._call(
            batch_size,
            generator,
            num_inference_steps,
            output_type,
            return_dict,
            eta,
            use_clipped_model_output=clipped,
        )


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
    UNet2DModel, compiled, wrapped for several devices or plain, and a DDPMScheduler or DDIMScheduler.
    """
    by_ddim = any(base.__name__ == "DDIMPipeline" for base in type(pipeline).__mro__)
    where = None if device is None else torch.device(device)
    return (AcceleratedDDIM if by_ddim else Accelerated)(pipeline, dtype, where, ops, graph)


def _computed(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES.values():
        raise ValueError(f"accelerate computes in {', '.join(DTYPES)}; got {dtype}; name one of them by dtype=")
    return dtype


def _output_type(name: str | None, channels: int) -> str:
    name = name or "np"
    if name not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}; got {name!r}")
    if name == "pil":  # now, not when the images are drawn
        check_channels(channels, "take output_type='np'")
    return name


def _generator(given: Any) -> torch.Generator | list[torch.Generator] | None:
    each = list(given) if isinstance(given, (list, tuple)) else [given]
    if given is not None and not (each and all(isinstance(g, torch.Generator) for g in each)):
        raise ValueError(f"generator must be a torch.Generator, a list of one an image, or None; got {given!r}")
    return each if isinstance(given, (list, tuple)) else given


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
