"""Our own sets of operations, by the `Sampler` that everyone uses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import StepProgram
from ..sampler import Sampler
from ..unet import UNet
from .providers import Case


class Ours:
    """A `Sampler`, and for its network's output a program of its own beside it."""

    noise = "philox"

    def __init__(self, case: Case, sampler: Sampler):
        self.case, self.sampler, self.labels = case, sampler, case.labels()

    @torch.inference_mode()
    def network(self, x: Tensor, i: int) -> Tensor:
        assert isinstance(self.sampler.model, UNet)
        program = StepProgram(self.sampler.model, self.sampler.table, self.case.batch, self.sampler.image_shape)
        program.begin(0, None, self.labels, x)
        program.counter[0] = i
        low = program.x.to(self.sampler.dtype) if program.low is None else program.low
        return program.prepared.run(low, program.time.now(program.ops), program.ops).clone()

    def chain(self, seed: int) -> Tensor:
        return self.sampler.sample(self.case.batch, seed, self.labels)


def make(case: Case, dtype: torch.dtype, operations: str, graph: str = "auto") -> Ours:
    """``operations`` and ``graph`` as `Sampler` takes them."""
    sampler = Sampler(
        case.model,
        case.schedule,
        batch_size=case.batch,
        steps=case.steps,
        method="ddpm",
        dtype=dtype,
        device=case.device,
        ops=operations,
        graph=graph,
    )
    return Ours(case, sampler)
