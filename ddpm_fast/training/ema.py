"""Exponential moving average of a model's weights, the weights that are sampled from."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def ema_decay(step: int, limit: float) -> float:
    """Decay of the update after ``step`` finished ones: min(limit, (1 + step) / (10 + step)).

    The warm-up lets the average forget the random initial weights within a few steps.
    """
    return min(limit, (1 + step) / (10 + step))


class EMA(Generic[Model]):
    """Holds ``model``, a copy whose parameters follow ``ema = d * ema + (1 - d) * parameter`` (fp32)."""

    def __init__(self, model: Model, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay must be in [0, 1); got {decay}")
        self.decay = decay
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves towards ``model``; ``step`` counts the updates before this one."""
        weight = 1 - ema_decay(step, self.decay)
        averages = [p.detach() for p in self.model.parameters()]
        torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], weight)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
