"""accelerate(pipeline): a diffusers DDPMPipeline or DDIMPipeline in, an object that is called the same way out.

It draws the pipeline's own images, or refuses and names what differs: see `network_check` and `scheduler_check`.
diffusers itself is not imported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import fingerprints
from .arguments import dtype_called, whole_number
from .engine.turns import Turns
from .network_check import check_network
from .ops import Ops
from .pipeline_call import (
    Generators,
    ImageOutput,
    check_generator,
    check_output_type,
    first_process,
    global_generator,
    images_of,
    refuse_others,
)
from .pipelines import check_pipeline, describe, execution_device, model_of, schedule_of, unet_of
from .progress import Bar
from .sampler import DTYPES, Sampler
from .schedule import Schedule
from .scheduler_check import checked_steps
from .unet import UNet

MOST_IMAGES = 2**30  # a pipeline draws all its images together, so the sampler must not cut them into batches
PROGRESS_UPDATES = 100  # of a progress bar, each of which waits for the device


class _Read(NamedTuple):
    """A pipeline's network, as it was when it was read and compared."""

    unet: Any
    state: object  # its fingerprint
    model: UNet


class _Chain(NamedTuple):
    """What a sampler is made for."""

    model: UNet
    steps: int | tuple[int, ...]
    schedule: Schedule
    eta: float | None
    dtype: torch.dtype
    device: torch.device


class Accelerated:
    """A DDPMPipeline's call signature over a `Sampler`. What it does not have itself, the pipeline answers.

    The pipeline's network and scheduler are read at each call: one that was trained on, moved or replaced is followed,
    and compared with the pipeline's own again. Calls from several threads take turns.
    """

    ddim = False

    def __init__(
        self,
        pipeline: Any,
        dtype: torch.dtype | str | None = None,  # None: the pipeline's
        device: torch.device | None = None,  # None: the pipeline's
        ops: str | Ops = "auto",
        graph: str = "auto",
    ):
        self.pipeline, self._ops, self._graph = pipeline, ops, graph
        self._dtype, self._device = None if dtype is None else _computed(dtype), device
        self._bar: dict[str, Any] | None = None  # None: the pipeline's
        self._forget()
        self._look()
        _computed(self.dtype)

    def _forget(self) -> None:
        """What is made anew at the next call."""
        self._read: _Read | None = None
        self._steps: tuple[object, int | tuple[int, ...]] | None = None  # what they were checked for, and the steps
        self._sampler: tuple[_Chain, Sampler] | None = None  # it holds a copy of the weights
        self._turns = Turns("accelerated pipeline")

    def __repr__(self) -> str:
        what = f"{type(self).__name__}({describe(self.pipeline)}"
        try:
            mine, theirs = (str(d).removeprefix("torch.") for d in (self.dtype, unet_of(self.pipeline).dtype))
        except (ValueError, AttributeError):  # a pipeline that a call would refuse
            return what + ")"
        other = "" if mine == theirs else f" (the pipeline's own network is in {theirs})"
        ops = self._ops if isinstance(self._ops, str) else self._ops.name
        return f"{what}; computes in {mine}{other} on {self.device}, ops={ops!r}, graph={self._graph!r})"

    @property
    def unet(self) -> Any:
        """The pipeline's own network, in its own dtype and on its own device: `to` and ``dtype=`` leave it alone."""
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
        """What images are computed in. The pipeline's network may be in another: see `to`."""
        return self._dtype or unet_of(self.pipeline).dtype

    @property
    def device(self) -> torch.device:
        """Where images are computed: with offloading, not where the network's weights lie."""
        return self._device or execution_device(self.pipeline, unet_of(self.pipeline))

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
        """Compute on another device or in another dtype from now on: ``to(device, dtype)``, in any order or by name.

        Unlike a pipeline's own ``to``, it changes `dtype` and `device` of this object alone: the pipeline and its
        ``unet`` stay as they are, so ``fast.unet.dtype`` may differ from ``fast.dtype``. The images are those of the
        pipeline in that dtype, up to rounding. To convert the network too, call ``fast.pipeline.to(dtype)``.

        Returns:
            The object itself.

        Raises:
            ValueError: images are computed in float32, bfloat16 or float16 alone.
        """
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
        """The pipeline and the settings: what is made anew at the next call is neither copied nor pickled."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_read", "_steps", "_sampler", "_turns")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

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
        **others: Any,
    ) -> ImageOutput | tuple[Any]:
        """Draw ``batch_size`` images. Arguments and results are those of ``DDPMPipeline.__call__``.

        With the same generator, or list of one per image, the noise is the pipeline's own in this dtype, and so
        are the images up to rounding; without one it comes from torch's global generator of the device, as
        there. Tensors are float32 in any dtype.

        Raises:
            ValueError: more steps than the model was trained with, or the pipeline would draw other images.
            TypeError: an argument that ``DDPMPipeline.__call__`` does not have, such as ``callback_on_step_end``.
        """
        refuse_others(self.pipeline, others)
        return self._call(batch_size, generator, num_inference_steps, output_type, return_dict)

    def _call(
        self,
        n: int,
        generator: Any,
        steps: int,
        output_type: str | None,
        return_dict: bool,
        eta: float | None = None,
        clipped: bool | None = None,
    ) -> ImageOutput | tuple[Any]:
        with self._turns.taken():
            model, schedule = self._look()
            n, steps = whole_number("batch_size", n), whole_number("num_inference_steps", steps)
            if n < 0:
                raise ValueError(f"batch_size must be 0 or more; got {n}")
            output_type = check_output_type(output_type, model.config.in_channels)
            generator = check_generator(generator)
            if self.ddim:
                schedule = replace(schedule, use_clipped_model_output=bool(clipped))
            dtype, device = self.dtype, self.device
            chosen = self._checked_steps(
                schedule, steps, (model.config.in_channels, model.config.out_channels), eta, clipped
            )
            x = self._draw(n, generator, _Chain(model, chosen, schedule, eta, _computed(dtype), device))
        images = images_of(x, output_type, self.pipeline)
        return ImageOutput(images) if return_dict else (images,)

    def _look(self) -> tuple[UNet, Schedule]:
        """The pipeline's network and process, as they are now. A network is compared with ours when it is read."""
        check_pipeline(self.pipeline)
        outer, unet, schedule = self.pipeline.unet, unet_of(self.pipeline), schedule_of(self.pipeline, self.ddim)
        state = fingerprints.of_network(outer, unet)
        if self._read is None or self._read.unet is not unet or self._read.state != state:
            self._read = None
            model = model_of(unet)
            check_network(outer, unet, model, schedule.num_train_timesteps)
            if hasattr(outer, "_hf_hook"):  # the comparison may have put the weights on the GPU
                self.pipeline.maybe_free_model_hooks()
            moved = fingerprints.of_network(outer, unet)
            self._read = _Read(unet, moved, model if moved == state else model_of(unet))
        return self._read.model, schedule

    def _checked_steps(
        self, schedule: Schedule, steps: int, channels: tuple[int, int], eta: float | None, clipped: bool | None
    ) -> int | tuple[int, ...]:
        """The steps of the sampler. They are compared with the scheduler's when something has changed."""
        scheduler = self.pipeline.scheduler
        key = (fingerprints.of_scheduler(scheduler), schedule, steps, channels, eta, clipped)
        if self._steps is None or self._steps[0] != key:
            options = {"eta": eta, "use_clipped_model_output": clipped} if self.ddim else {}
            chosen = checked_steps(scheduler, schedule, steps, channels, eta, options)
            self._steps = key, chosen if isinstance(chosen, int) else tuple(chosen)
        return self._steps[1]

    def _draw(self, n: int, generator: Any, chain: _Chain) -> Tensor:
        """x_0 [n, C, H, W], with the pipeline's progress bar."""
        sampler = self._sampler_for(n, chain)
        sampler.noise = generator if generator is not None else global_generator(chain.device)
        bar_config = getattr(self.pipeline, "_progress_bar_config", None) if self._bar is None else self._bar
        config = {"disable": not first_process(), **(bar_config or {})}
        if config["disable"]:
            return sampler.sample(n)
        steps = len(sampler.table)
        with Bar(total=steps, **config) as bar:

            def show(done: int, x: Tensor) -> None:
                if x.is_cuda:
                    torch.cuda.current_stream(x.device).synchronize()
                bar.update(done - bar.n)

            return sampler.sample(n, callback=show, interval=-(-steps // PROGRESS_UPDATES))

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
        **others: Any,
    ) -> ImageOutput | tuple[Any]:
        """Draw ``batch_size`` images. Arguments and results are those of ``DDIMPipeline.__call__``.

        Noise, tensors and errors are those of `Accelerated`. An eta outside [0, 1], for which diffusers warns, is a
        ValueError.
        """
        refuse_others(self.pipeline, others)
        return self._call(
            batch_size, generator, num_inference_steps, output_type, return_dict, eta, use_clipped_model_output
        )


def accelerate(
    pipeline: Any,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    ops: str | Ops = "auto",
    graph: str = "auto",
) -> Accelerated:
    """A fast stand-in for a diffusers ``DDPMPipeline`` or ``DDIMPipeline``, called in the same way. The pipeline
    is left as it is.

    It draws the pipeline's own images from the same generator, or refuses. Whenever it reads a network, it runs the
    pipeline's and its own on two small images at two timesteps, and compares the outputs: hooks of accelerate and
    diffusers that place weights run there too. It follows edited betas and a scheduler's own timesteps, and compares
    the scheduler's steps with its own.

    Args:
        pipeline: a UNet2DModel, compiled, wrapped for several devices or plain, with a DDPMScheduler or DDIMScheduler.
        dtype: of the network, as a torch.dtype or by its name; default the pipeline's own.
        device: default the pipeline's own.
        ops: as in `Sampler`.
        graph: as in `Sampler`.

    Raises:
        ValueError: the pipeline has other parts or code of its own, or draws other images than its configuration and
            weights say. The message names what differs.
    """
    by_ddim = any(base.__name__ == "DDIMPipeline" for base in type(pipeline).__mro__)
    where = None if device is None else torch.device(device)
    return (AcceleratedDDIM if by_ddim else Accelerated)(pipeline, dtype, where, ops, graph)


def _computed(dtype: torch.dtype | str) -> torch.dtype:
    try:
        return dtype_called(dtype)
    except ValueError:
        got = dtype if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ValueError(f"accelerate computes in {', '.join(DTYPES)}; got {got}; name one of them by dtype=") from None
