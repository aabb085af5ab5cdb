"""diffusers: as it ships, and as fast as its users make it.

"As shipped" is DDPMPipeline's own call. The others are what a careful user writes: the same U-Net in channels_last
and a low precision, or compiled, in a loop around DDPMScheduler that keeps x_t in float32 and, on a GPU, timesteps
on the device, since a timestep on the host would keep torch.compile from capturing CUDA graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.express import for_diffusers
from ..schedule import EXTENSIONS
from .providers import Case

Network = Callable[[Tensor, Tensor], Tensor]  # x [N, C, H, W] float32, t [] int64 -> [N, C or 2C, H, W]


class Flat(nn.Module):
    """A diffusers U-Net as (x, t) -> output, with the labels inside: what compilers and exporters take."""

    labels: Tensor | None

    def __init__(self, unet: nn.Module, labels: Tensor | None):
        super().__init__()
        self.unet = unet
        self.register_buffer("labels", labels)
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t, class_labels=self.labels, return_dict=False)[0]


def build(case: Case) -> tuple[Any, Any]:
    """(UNet2DModel, DDPMScheduler) with the case's weights, float32, on its device."""
    import diffusers

    library: Any = diffusers  # it has no types
    model, schedule, _ = for_diffusers(case.model, case.schedule)
    unet = library.UNet2DModel(**model.config.to_dict()).eval().requires_grad_(False)
    unet.load_state_dict(model.state_dict())
    fields = {name: value for name, value in schedule.to_dict().items() if name not in EXTENSIONS}
    return unet.to(case.device), library.DDPMScheduler(**fields)


class Looped:
    """Any network in a loop around DDPMScheduler."""

    noise = "torch"

    def __init__(self, case: Case, run: Network, scheduler: Any, layout: torch.memory_format):
        self.case, self.run, self.scheduler, self.layout = case, run, scheduler, layout
        scheduler.set_timesteps(case.steps)
        self.timesteps = [int(t) for t in scheduler.timesteps]
        # Tensors of their own, so aligned: compiled code copies inputs that are not.
        self.times = [t.clone() for t in scheduler.timesteps.to(case.device)]

    @torch.no_grad()
    def network(self, x: Tensor, i: int) -> Tensor:
        return self.run(x.contiguous(memory_format=self.layout), self.times[i]).clone()

    @torch.no_grad()
    def chain(self, seed: int) -> Tensor:
        generator = torch.Generator(self.case.device).manual_seed(seed)
        x = torch.randn(self.case.shape, generator=generator, device=self.case.device)
        x = x.contiguous(memory_format=self.layout)
        for i, t in enumerate(self.timesteps):
            out = self.run(x, self.times[i])
            x = self.scheduler.step(out.float(), t, x, generator=generator).prev_sample
        return x


class Shipped(Looped):
    """DDPMPipeline(...)(): its own loop, its images brought back to [-1, 1]."""

    def __init__(self, case: Case, unet: Any, scheduler: Any):
        import diffusers

        library: Any = diffusers
        self.pipeline = library.DDPMPipeline(unet, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        super().__init__(case, Flat(unet, None), scheduler, torch.contiguous_format)

    def chain(self, seed: int) -> Tensor:
        generator = torch.Generator(self.case.device).manual_seed(seed)
        drawn = self.pipeline(self.case.batch, generator, self.case.steps, output_type="np", return_dict=False)[0]
        return torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1


def make(case: Case, dtype: torch.dtype, shipped: bool = False, compiled: bool = False) -> Looped:
    """``shipped``: in float32 the pipeline's own call; in a low precision, and for a model with classes, which that
    call does not take, its eager U-Net in the loop above. ``compiled``: max-autotune with CUDA graphs on a GPU, and
    with weights frozen into the code on a CPU."""
    unet, scheduler = build(case)
    labels = case.labels()
    if shipped and dtype == torch.float32 and labels is None:
        return Shipped(case, unet, scheduler)
    layout = torch.contiguous_format if shipped else torch.channels_last
    net = Flat(unet, labels)
    nn.Module.to(net, dtype, memory_format=layout)  # type: ignore[call-overload]
    run: Callable[..., Tensor] = net
    if compiled:
        cuda = case.device.type == "cuda"
        how: dict[str, Any] = {"mode": "max-autotune"} if cuda else {"options": {"freezing": True}}
        inner = torch.compile(net, fullgraph=True, dynamic=False, **how)
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")

        def run(x: Tensor, t: Tensor) -> Tensor:
            if cuda:
                torch.compiler.cudagraph_mark_step_begin()
            return inner(x, t)

    return Looped(case, lambda x, t: run(x.to(dtype), t), scheduler, layout)
