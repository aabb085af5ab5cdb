"""Is a provider right? Held to float64 on single steps, and to the float32 reference over the trajectory that is timed.

The network's outputs are held to the house rule (`house_rule`), and in float32 to `FLOAT32_LIMITS` where those are
more. Over a trajectory rounding compounds, so its limit only has to tell rounding from another computation: a loop with
a wrong coefficient, without its noise, or with images exchanged.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..house_rule import allowed, error, full_float32, worst
from ..sampler import Sampler
from ..step_table import step_table
from ..unet import UNet
from .providers import DISTINCT, Case, Sampling

PROBES = 3  # steps whose outputs are judged: the first, the last, and between
# (largest, RMS) that count as float32 in any case: sums of another form, such as Winograd's, are ten times further from
# float64 than a direct sum, and still a hundred times nearer than half precision.
FLOAT32_LIMITS = (1e-4, 1e-5)
# RMS of the difference of images in [-1, 1]. Two unrelated draws differ by about 0.5 and more.
CHAIN_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Verdict:
    """Errors and what they may be: of outputs scaled as the house rule has it, of the trajectory's images plain."""

    largest: float
    largest_allowed: float
    rms: float
    rms_allowed: float
    chain: float  # RMS
    chain_allowed: float
    chain_largest: float  # told, not judged

    @property
    def ok(self) -> bool:
        return (
            self.largest <= self.largest_allowed and self.rms <= self.rms_allowed and self.chain <= self.chain_allowed
        )

    def facts(self) -> dict[str, Any]:
        """JSON-ready: an infinite number is null."""
        values = {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}
        return {"ok": self.ok, **values}


class Judge:
    """Holds providers of one case to the truth, which it computes once."""

    def __init__(self, case: Case, seed: int = 0):
        self.case, self.seed = case, seed
        self.table = step_table(case.schedule, case.steps, "ddpm")
        count = min(PROBES, case.steps)
        self.probes = sorted({round(i * (case.steps - 1) / max(count - 1, 1)) for i in range(count)})
        self.distinct = min(DISTINCT, case.batch)
        shape = (self.distinct, *case.shape[1:])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(case.device)
        labels = case.labels()
        self.labels = None if labels is None else labels[: self.distinct]
        self.x = x
        self._truth: list[Tensor] = []
        self._allowed: dict[tuple[torch.dtype, bool], tuple[float, float]] = {}
        self._chains: dict[str, Tensor] = {}

    def verdict(self, sampling: Sampling, dtype: torch.dtype, strict: bool) -> Verdict:
        """``strict``: plain float32 is not allowed TF32 on a GPU. False: whatever torch does by default."""
        truths, errors = self.truth(), []
        x = self.spread(self.x)
        for i, truth in zip(self.probes, truths):
            errors.append(error(sampling.network(x, i), self.spread(truth)))
        largest, rms, _ = worst(errors)
        largest_allowed, rms_allowed = self.allowed(dtype, strict)
        drawn, wanted = sampling.chain(self.seed), self.chain(sampling.noise)
        off = (drawn.to(wanted.device).float().clamp(-1, 1) - wanted).abs().nan_to_num(nan=math.inf)
        chain, most = float(off.square().mean().sqrt()), float(off.max())
        return Verdict(largest, largest_allowed, rms, rms_allowed, chain, CHAIN_LIMIT[dtype], most)

    def spread(self, x: Tensor) -> Tensor:
        """[D, ...] -> [N, ...]: the distinct images by turns, as `Case.labels` has the classes."""
        return x[torch.arange(self.case.batch, device=x.device) % self.distinct]

    @torch.inference_mode()
    def truth(self) -> list[Tensor]:
        """The outputs [D, C or 2C, H, W] at the probes in float64."""
        if not self._truth:
            with full_float32():
                model = copy.deepcopy(self.case.model).to(self.case.device, torch.float64).eval()
                self._truth = [self.output(model, i) for i in self.probes]
        return self._truth

    @torch.inference_mode()
    def allowed(self, dtype: torch.dtype, strict: bool) -> tuple[float, float]:
        """(largest, RMS) by the house rule; torch's error is the larger of its two memory layouts."""
        key = (dtype, strict)
        if key not in self._allowed:
            errors = []
            plain = copy.deepcopy(self.case.model).to(self.case.device, dtype).eval()
            with full_float32(strict):
                for layout in (torch.contiguous_format, torch.channels_last):
                    torch.nn.Module.to(plain, memory_format=layout)  # type: ignore[call-overload]
                    errors += [error(self.output(plain, i, layout), t) for i, t in zip(self.probes, self.truth())]
            largest, rms, _ = worst(errors)
            self._allowed[key] = allowances(dtype, largest, rms)
        return self._allowed[key]

    def output(self, model: UNet, i: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
        t = self.table.times()[i]
        x = self.x.to(model.dtype, memory_format=layout)
        return model(x, t.double() if model.dtype == torch.float64 else t, self.labels)

    def chain(self, noise: str) -> Tensor:
        """The float32 reference's x_0 [N, C, H, W], from the same noise, clipped to [-1, 1]."""
        if noise not in self._chains:
            case = self.case
            with full_float32():
                sampler = Sampler(
                    case.model,
                    case.schedule,
                    batch_size=case.batch,
                    steps=case.steps,
                    method="ddpm",
                    device=case.device,
                    ops="reference",
                    graph="none",
                    noise=noise,
                )
                self._chains[noise] = sampler.sample(case.batch, self.seed, case.labels()).clamp(-1, 1)
        return self._chains[noise]


def allowances(dtype: torch.dtype, largest: float, rms: float, times: float = 2.0) -> tuple[float, float]:
    """(largest, RMS) that an error may have, where torch in the same dtype has these."""
    floors = FLOAT32_LIMITS if dtype == torch.float32 else (0.0, 0.0)
    return max(allowed(largest, times=times), floors[0]), max(allowed(rms, times=times), floors[1])
