"""Where x_T and every z come from.

`Philox` is the engine's: noise is a function of (seed, sample id, step, element), so an image does not depend
on the batch, the process or the moment it is drawn in. `TorchNoise` draws from torch generators in the order
and dtype of diffusers' DDPMPipeline, for outputs that match it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .kernels.reference import INITIAL_STEP, philox_normal

_BLOCK_ELEMENTS = 1 << 18  # normals made at once on the host: few calls, and still in cache


class NoiseSource(Protocol):
    """Noise for one batch of samples."""

    def initial(self) -> Tensor:
        """x_T [N, C, H, W], float32."""

    def step(self, index: int, count: int) -> Tensor | None:
        """z [N, C, H, W] for step ``index`` of ``count``; None: the step kernel draws it itself."""


class Philox:
    """philox_normal(seed, id, step, element): see kernels/reference.py."""

    def __init__(self, seed: Tensor, ids: Tensor, shape: tuple[int, int, int], in_kernel: bool = False):
        self.seed, self.ids, self.shape, self.in_kernel = seed, ids, shape, in_kernel
        per_step = len(ids) * shape[0] * shape[1] * shape[2]
        self._span = max(1, _BLOCK_ELEMENTS // max(per_step, 1))
        self._start = 0
        self._block: Tensor | None = None

    def initial(self) -> Tensor:
        step = torch.tensor([INITIAL_STEP], device=self.ids.device)
        return philox_normal(self.seed, self.ids, step, self.shape)

    def step(self, index: int, count: int) -> Tensor | None:
        if self.in_kernel:
            return None
        if self._block is None or not self._start <= index < self._start + len(self._block):
            steps = torch.arange(index, min(index + self._span, count), device=self.ids.device)
            block = philox_normal(self.seed, self.ids, steps, self.shape)
            self._start, self._block = index, block if len(steps) > 1 else block[None]
        return self._block[index - self._start]


class TorchNoise:
    """diffusers' stream: x_T in the network's dtype, then one draw a step whose timestep is above 0.

    A list of generators draws (1, C, H, W) from each in turn. A generator on the CPU draws there and copies.
    """

    def __init__(
        self,
        generators: torch.Generator | Sequence[torch.Generator],
        shape: tuple[int, int, int, int],
        draws: Sequence[bool],  # per step: does its timestep draw?
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.generators = [generators] if isinstance(generators, torch.Generator) else list(generators)
        if len(self.generators) not in (1, shape[0]):
            raise ValueError(f"a list of generators needs one an image; got {len(self.generators)} for {shape[0]}")
        self.shape, self.draws, self.dtype, self.device = shape, draws, dtype, device

    def _draw(self) -> Tensor:
        shape = self.shape if len(self.generators) == 1 else (1, *self.shape[1:])
        parts = [torch.randn(shape, generator=g, device=g.device, dtype=self.dtype) for g in self.generators]
        return torch.cat(parts).to(self.device)

    def initial(self) -> Tensor:
        return self._draw().float()

    def step(self, index: int, count: int) -> Tensor | None:
        return self._draw() if self.draws[index] else torch.zeros((), device=self.device).expand(self.shape)
