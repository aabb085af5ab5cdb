"""Who can draw a trajectory: our sets of operations and other people's software, each made for one case.

A provider makes a `Sampling` for a `Case`: the same weights, labels, batch and steps for all. What is not available
here is named with its reason, so that a table shows that it was not forgotten.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from .. import ops as ops_module
from ..schedule import Schedule
from ..unet import UNet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DISTINCT = 2  # images of a batch that a check computes in float64; the others repeat them
GRAPHS = ("none", "step", "chunk", "loop")


@dataclass(frozen=True)
class Case:
    """What every provider of one comparison is given."""

    model: UNet  # float32, in evaluation mode
    schedule: Schedule
    batch: int
    steps: int  # of the chain, respaced where it has fewer than the schedule
    device: torch.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of x: [N, C, H, W]."""
        size, c = self.model.config.image_size, self.model.config
        if size is None:
            raise ValueError("the model does not state its image size; give it as sample_size")
        return (self.batch, c.in_channels, *size)

    def labels(self) -> Tensor | None:
        """One class an image, where the model has classes: the first `DISTINCT` of them by turns."""
        c = self.model.config
        if self.model.class_embedding is None:
            return None
        if c.class_embed_type == "identity":
            raise ValueError("bench has no labels for a model that takes class embeddings themselves")
        classes = c.num_class_embeds or c.num_train_timesteps or self.schedule.num_train_timesteps
        return torch.arange(self.batch, device=self.device) % min(classes, DISTINCT)


class Sampling(Protocol):
    """A provider that is ready for a case."""

    noise: str  # "philox" or "torch": whose stream `chain` draws from its seed, as `Sampler` names them

    def network(self, x: Tensor, i: int) -> Tensor:
        """The network's output at step ``i`` of the chain, for x [N, C, H, W] float32."""

    def chain(self, seed: int) -> Tensor:
        """A whole trajectory from x_T, drawn from ``seed``, to x_0 [N, C, H, W]."""


@dataclass(frozen=True)
class Provider:
    """One way to draw. ``make`` may raise anything: what it raises is what the table says of it.

    Workers get it pickled: ``make`` is a function of a module, or a partial of one.
    """

    name: str
    make: Callable[[Case, torch.dtype], Sampling]
    ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES.values())
    packages: tuple[str, ...] = ()  # what it needs besides our own requirements
    operations: str | None = None  # the set in ops/, of ours
    compiles: bool = False  # its first use may be slower than the next, which finds compiled code on disk
    lacks: Callable[[torch.device, torch.dtype], str | None] | None = None  # what else it may want

    def missing(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)}, not on {device.type}"
        if dtype not in self.dtypes:
            return f"has no {str(dtype).removeprefix('torch.')}"
        if self.operations is not None:
            try:
                getattr(ops_module, self.operations)()
            except AttributeError:
                return f"this version has no ops.{self.operations}()"
            except RuntimeError as error:  # no Triton, or no compiler
                return str(error)
        absent = [p for p in self.packages if importlib.util.find_spec(p) is None]
        if absent:
            return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
        return None if self.lacks is None else self.lacks(device, dtype)


def providers() -> dict[str, Provider]:
    """All of them by name."""
    from . import exported, guided, ours, peers

    full, halves = DTYPES["float32"], (DTYPES["bfloat16"], DTYPES["float16"])

    def own(
        name: str, operations: str, devices: tuple[str, ...], graph: str = "auto", compiles: bool = True
    ) -> Provider:
        make = partial(ours.make, operations=operations, graph=graph)
        return Provider(name, make, True, devices, operations=operations, compiles=compiles)

    def diffusers(name: str, shipped: bool = False, compiled: bool = False) -> Provider:
        make = partial(peers.make, shipped=shipped, compiled=compiled)
        return Provider(name, make, packages=("diffusers",), compiles=compiled)

    found = [
        own("reference", "reference", ("cpu", "cuda"), compiles=False),
        own("cpu", "cpu", ("cpu",)),
        own("winograd", "winograd", ("cpu",)),
        *(own(f"triton-{g}", "triton", ("cuda",), g) for g in GRAPHS),
        own("triton", "triton", ("cpu", "cuda")),
        diffusers("diffusers", shipped=True),
        diffusers("diffusers-channels-last"),
        diffusers("diffusers-compile", compiled=True),
        Provider(
            "openvino",
            exported.openvino,
            devices=("cpu",),
            dtypes=(full, halves[0]),
            packages=("diffusers", "openvino"),
            lacks=exported.openvino_lacks,
        ),
        Provider(
            "onnxruntime",
            exported.onnxruntime,
            devices=("cpu",),
            dtypes=(full,),
            packages=("diffusers", "onnxruntime", "onnx", "onnxscript"),
        ),
        Provider("guided", guided.make, devices=("cuda", "cpu"), dtypes=halves),
    ]
    return {p.name: p for p in found}


def default_names(device: torch.device) -> tuple[str, ...]:
    """What is compared where nobody chooses."""
    if device.type == "cuda":
        return (
            *(f"triton-{g}" for g in GRAPHS),
            "diffusers",
            "diffusers-channels-last",
            "diffusers-compile",
            "guided",
        )
    return (
        "cpu",
        "winograd",
        "reference",
        "diffusers",
        "diffusers-channels-last",
        "diffusers-compile",
        "openvino",
        "onnxruntime",
    )


def chosen(names: Sequence[str]) -> list[Provider]:
    """The providers called so; ValueError names the ones there are."""
    known = providers()
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ValueError(f"no provider is called {unknown[0]!r}; there are: {', '.join(known)}")
    return [known[n] for n in dict.fromkeys(names)]
