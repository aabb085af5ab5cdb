"""The noise schedule, and the tables that turn every sampler here into one formula.

Notation of Ho et al. 2020 (DDPM), timesteps counted from 0: a_t = alphas_cumprod[t], and a_p its value at the
next timestep visited (1 past the last), so that a chain which skips steps is the same formulas with
beta_t = 1 - a_t / a_p. Tables are float64; x keeps its own dtype.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arguments import whole_number
from .kernels.reference import threshold
from .respacing import sections, truncated
from .vp_sde import CONTINUOUS, PREDICTORS, alphas_cumprod, why_not

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")  # upstream's
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")  # upstream's
SECTIONS = "sections"  # OpenAI's rule, `respacing.sections`
TRUNCATED = "truncated"  # lucidrains' rule, `respacing.truncated`
# Fields that upstream does not have. At their defaults they are left out of `to_dict`.
EXTENSIONS = (
    "time_scale",
    "time_offset",
    "timestep_respacing",
    "use_clipped_model_output",
    "method",
    "eta",
    "num_inference_steps",
    "set_alpha_to_one",
)
METHODS = ("ddpm", "ddim", *PREDICTORS)
# With a terminal SNR of zero, epsilon says nothing of x_0 and the quotient is infinite; a small finite divisor
# reaches the same clipped x_0 without the NaN of inf - inf.
LEAST_SIGNAL = 1e-12


@dataclass(frozen=True)
class Schedule:
    """The diffusion process. Field names, meaning and defaults are those of diffusers' ``DDPMScheduler``.

    One difference: upstream's fixed_large_log takes the root of a log and gives NaN; here it is what its name
    intends, the same deviation as fixed_large. The fields from time_scale on are not upstream's: they say what OpenAI's
    code bases do, what a ``DDIMScheduler`` does in its pipeline, and what Score-SDE does (time_offset, method).
    beta_schedule "vp_sde" is not upstream's either: a_t of the VP SDE at t = 1/T, 2/T, ..., 1.
    Raises ValueError: the field, what came, what is allowed.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: str = "fixed_small"
    clip_sample: bool = True
    prediction_type: str = "epsilon"
    thresholding: bool = False  # dynamic thresholding (Saharia et al. 2022) in place of the clip
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    time_scale: float = 1.0  # the network is given time_scale * t (1000 / T: OpenAI's rescale_timesteps)
    time_offset: float = 0.0  # plus this much
    timestep_respacing: str = ""  # the chain where no other is asked for, by `respacing.sections`; "": all timesteps
    use_clipped_model_output: bool = False  # DDIM takes the noise from the clipped x_0, not from the network
    method: str = "ddpm"  # the default; "ddim": the file is a DDIMScheduler's; a predictor of `vp_sde`: Score-SDE's
    eta: float = 0.0  # of that DDIM
    num_inference_steps: int | None = None  # of that method, where no steps are asked for; None: all
    set_alpha_to_one: bool = True  # DDIM ends at a_p = 1; false: at a_0

    def __post_init__(self) -> None:
        if self.trained_betas is not None:
            betas = tuple(float(b) for b in self.trained_betas)
            object.__setattr__(self, "trained_betas", betas)
            if len(betas) != self.num_train_timesteps or not all(0 < b <= 1 for b in betas):
                raise _wrong("trained_betas", f"{len(betas)} values", f"{self.num_train_timesteps} numbers in (0, 1]")
        for name, allowed in (
            ("beta_schedule", (*BETA_SCHEDULES, CONTINUOUS)),
            ("variance_type", VARIANCE_TYPES),
            ("prediction_type", PREDICTION_TYPES),
            ("timestep_spacing", (*SPACINGS, SECTIONS, TRUNCATED)),
            ("method", METHODS),
        ):
            if getattr(self, name) not in allowed:
                raise _wrong(name, getattr(self, name), "one of " + ", ".join(allowed))
        flags = ("clip_sample", "thresholding", "rescale_betas_zero_snr", "use_clipped_model_output")
        for name in (*flags, "set_alpha_to_one"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "true or false")
        for name, least in (("num_train_timesteps", 1), ("steps_offset", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise _wrong(name, value, f"an integer of at least {least}")
        positive = ("beta_start", "beta_end", "clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio")
        for name in (*positive, "time_scale"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise _wrong(name, value, "a positive number")
        if not isinstance(self.time_offset, (int, float)) or not 0 <= self.time_offset < math.inf:
            raise _wrong("time_offset", self.time_offset, "a number of at least 0")
        if not isinstance(self.eta, (int, float)) or isinstance(self.eta, bool) or not 0 <= self.eta <= 1:
            raise _wrong("eta", self.eta, "a number in [0, 1]")
        if self.eta and self.method != "ddim":
            raise _wrong("eta", self.eta, "0 unless method is 'ddim'")
        steps = self.num_inference_steps
        if steps is not None and (
            not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= self.num_train_timesteps
        ):
            raise _wrong("num_inference_steps", steps, f"null or in 1..{self.num_train_timesteps}")
        if self.dynamic_thresholding_ratio > 1:
            raise _wrong("dynamic_thresholding_ratio", self.dynamic_thresholding_ratio, "in (0, 1]")
        if max(self.beta_start, self.beta_end) >= 1:
            raise _wrong("beta_end", self.beta_end, "below 1")
        if not isinstance(self.timestep_respacing, str):
            raise _wrong("timestep_respacing", self.timestep_respacing, 'text, like "250" or "ddim50"')
        if self.timestep_respacing:
            sections(self.timestep_respacing, self.num_train_timesteps)
        if self.method in PREDICTORS and (reason := why_not(self)):
            raise ValueError(f"Schedule.method={self.method!r} does not fit {reason}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Schedule:
        """From a ``scheduler_config.json``: "_" keys are metadata, unknown ones are named in a warning."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(k for k in values if k not in known and not k.startswith("_"))
        if unknown:
            warnings.warn(f"Schedule ignores unknown fields: {', '.join(unknown)}", stacklevel=2)
        return cls(**{k: v for k, v in values.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in diffusers' field names; what is not diffusers' only where it is not at its default."""
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in EXTENSIONS or getattr(self, f.name) != f.default
        }
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    # --- tables, float64, [T] on the CPU ---

    @cached_property
    def betas(self) -> Tensor:
        """beta_t, the variance of step t's noise (DDPM, section 2)."""
        betas = _betas(self)
        return _rescale_zero_snr(betas) if self.rescale_betas_zero_snr else betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """a_t, the product of (1 - beta) up to t (DDPM, above equation 4)."""
        return torch.cumprod(1 - self.betas, dim=0)

    @property
    def learned(self) -> str:
        """How the network states its variance: fixed, learned or learned_range."""
        return self.variance_type if self.variance_type.startswith("learned") else "fixed"

    def alphas(self, t: int, prev_t: int | None = None) -> tuple[float, float]:
        """(a_t, a_p) for a step from t to prev_t (default t - 1; below 0 means x_0, where a_p = 1)."""
        if not 0 <= t < self.num_train_timesteps:
            raise ValueError(f"t must be in 0..{self.num_train_timesteps - 1}; got {t}")
        prev_t = t - 1 if prev_t is None else prev_t
        return float(self.alphas_cumprod[t]), float(self.alphas_cumprod[prev_t]) if prev_t >= 0 else 1.0

    def network_time(self, t: int | Tensor) -> int | float | Tensor:
        """What the network is given for timestep t: t itself, or time_scale * t + time_offset in float32."""
        if self.time_scale == 1 and not self.time_offset:
            return t
        return self.time_scale * (t.to(torch.float32) if isinstance(t, Tensor) else t) + self.time_offset

    # --- the forward process ---

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """q(x_t | x_0) in closed form: sqrt(a_t) x_0 + sqrt(1 - a_t) eps (DDPM, equation 4)."""
        signal, sigma = self._at(t, x0)
        return signal * x0 + sigma * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (Salimans and Ho 2022)."""
        signal, sigma = self._at(t, x0)
        return signal * noise - sigma * x0

    def target(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """What the network is trained to output, by prediction_type."""
        if self.prediction_type == "epsilon":
            return noise
        return x0 if self.prediction_type == "sample" else self.velocity(x0, noise, t)

    # --- the reverse process ---

    def predict_x0(self, out: Tensor, t: int | Tensor, x: Tensor) -> Tensor:
        """x_0 from the network's output at x_t, not clipped (DDPM, equation 15; Salimans and Ho 2022 for v)."""
        if self.prediction_type == "sample":
            return out
        signal, sigma = self._at(t, x)
        if self.prediction_type == "v_prediction":
            return signal * x - sigma * out
        signal = signal.clamp(min=LEAST_SIGNAL) if isinstance(signal, Tensor) else max(signal, LEAST_SIGNAL)
        return (x - sigma * out) / signal

    def predict_epsilon(self, out: Tensor, t: int | Tensor, x: Tensor) -> Tensor:
        """The noise from the network's output at x_t."""
        if self.prediction_type == "epsilon":
            return out
        signal, sigma = self._at(t, x)
        return (x - signal * out) / sigma if self.prediction_type == "sample" else signal * out + sigma * x

    def clip_x0(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding, or the clip to +-clip_sample_range, or nothing."""
        if self.thresholding:
            return threshold(x0, self.dynamic_thresholding_ratio, self.sample_max_value)
        return x0.clamp(-self.clip_sample_range, self.clip_sample_range) if self.clip_sample else x0

    def posterior(self, t: int, prev_t: int | None = None) -> tuple[float, float, float]:
        """(c0, cx, variance) of q(x_p | x_t, x_0) = N(c0 x_0 + cx x_t, variance) (DDPM, equations 6 and 7)."""
        a_t, a_p = self.alphas(t, prev_t)
        alpha_t, beta_t = a_t / a_p, 1 - a_t / a_p
        c0 = math.sqrt(a_p) * beta_t / (1 - a_t)
        cx = math.sqrt(alpha_t) * (1 - a_p) / (1 - a_t)
        return c0, cx, beta_t * (1 - a_p) / (1 - a_t)

    def log_variances(self, t: int, prev_t: int | None = None) -> tuple[float, float]:
        """(log of the posterior variance floored at 1e-20, log beta_t): the two ends of a learned range."""
        a_t, a_p = self.alphas(t, prev_t)
        return math.log(max(self.posterior(t, prev_t)[2], 1e-20)), math.log(1 - a_t / a_p)

    def variance(self, t: int, prev_t: int | None = None, v: Tensor | None = None) -> Tensor | float:
        """sigma_t^2 by variance_type; v [N, C, H, W] is the second half of the output of a learned one.

        fixed_small is the posterior's beta~_t, fixed_large is beta_t (DDPM, section 3.2); learned_range
        interpolates their logs (Nichol and Dhariwal 2021, equation 15); learned is v itself, as upstream.
        """
        low, high = self.log_variances(t, prev_t)
        if self.learned == "fixed":
            return math.exp(low if self.variance_type.startswith("fixed_small") else high)
        if v is None:
            raise ValueError(f"variance_type={self.variance_type!r} needs a network with 2C output channels")
        if self.variance_type == "learned":
            return v
        fraction = (v + 1) / 2
        return torch.exp(fraction * high + (1 - fraction) * low)

    def step(
        self,
        out: Tensor,  # [N, C, H, W], or [N, 2C, H, W] with a learned variance
        t: int,
        x: Tensor,  # [N, C, H, W]: x_t
        noise: Tensor | None = None,  # [N, C, H, W]: z; not read at t = 0, where none is added
        prev_t: int | None = None,  # default t - 1
    ) -> Tensor:
        """x_t -> x_{t-1}: one pass of Algorithm 2's loop, in plain torch. Equals DDPMScheduler.step."""
        t, channels = int(t), x.shape[1]
        v = None
        if self.learned != "fixed" and out.shape[1] == 2 * channels:
            out, v = out.chunk(2, dim=1)
        if out.shape != x.shape:
            raise ValueError(
                f"the network's output {tuple(out.shape)} must have x's shape {tuple(x.shape)}, "
                f"or twice its channels with a learned variance; variance_type is {self.variance_type!r}"
            )
        x0 = self.clip_x0(self.predict_x0(out, t, x))
        c0, cx, _ = self.posterior(t, prev_t)
        mean = c0 * x0 + cx * x
        if t == 0:
            return mean
        if noise is None:
            raise ValueError(f"step needs noise at t > 0; got none at t={t}")
        variance = self.variance(t, prev_t, v)
        return mean + variance**0.5 * noise

    def timesteps(self, steps: int | None = None) -> list[int]:
        """The timesteps visited by a chain of ``steps`` (default all T), descending, by timestep_spacing.

        In numpy, whose last bits decide which way the halves round, for the very list of upstream.
        """
        total = self.num_train_timesteps
        steps = total if steps is None else steps
        if not 1 <= steps <= total:
            raise ValueError(f"steps must be between 1 and num_train_timesteps={total}; got {steps}")
        if self.timestep_spacing == SECTIONS:
            return sections(str(steps), total)
        if self.timestep_spacing == TRUNCATED:
            return truncated(steps, total)
        if self.timestep_spacing == "linspace":
            return [int(t) for t in np.linspace(0, total - 1, steps).round()[::-1]]
        if self.timestep_spacing == "trailing":
            # For some step counts numpy's arange yields one value more, near 0: past the last timestep.
            return [int(t) - 1 for t in np.arange(total, 0, -total / steps).round()[:steps]]
        chain = [i * (total // steps) + self.steps_offset for i in reversed(range(steps))]
        if chain[0] >= total:
            raise ValueError(
                f"steps_offset={self.steps_offset} with {steps} steps starts past the last timestep, {total - 1}"
            )
        return chain

    def _at(self, t: int | Tensor, like: Tensor) -> tuple[Any, Any]:
        """(sqrt(a_t), sqrt(1 - a_t)): floats for one t, [N, 1, ...] in like's dtype for a tensor of N."""
        if isinstance(t, (list, tuple, np.ndarray)):
            t = torch.as_tensor(t, device=like.device)
        if not isinstance(t, Tensor):
            a_t, _ = self.alphas(whole_number("t", t))
            return math.sqrt(a_t), math.sqrt(1 - a_t)
        if t.is_floating_point() or t.dtype == torch.bool:
            raise ValueError(f"timesteps must be integers; got {t.dtype}")
        a = self.alphas_cumprod.to(t.device)[t].reshape(-1, *(1,) * (like.ndim - 1))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        return a.sqrt().to(like.device, dtype), (1 - a).sqrt().to(like.device, dtype)


def _wrong(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"Schedule.{name} must be {allowed}; got {value!r}")


def _betas(s: Schedule) -> Tensor:
    kind: Any = {"dtype": torch.float64, "device": "cpu"}  # whatever torch's defaults are
    total = s.num_train_timesteps
    if s.trained_betas is not None:
        return torch.tensor(s.trained_betas, **kind)
    if s.beta_schedule == "linear":  # DDPM, section 4
        return torch.linspace(s.beta_start, s.beta_end, total, **kind)
    if s.beta_schedule == "scaled_linear":
        return torch.linspace(s.beta_start**0.5, s.beta_end**0.5, total, **kind) ** 2
    if s.beta_schedule == CONTINUOUS:
        a = alphas_cumprod(s.beta_start, s.beta_end, total)
        return 1 - torch.cat((a[:1], a[1:] / a[:-1]))
    if s.beta_schedule == "sigmoid":  # Xu et al. 2022 (GeoDiff)
        return torch.sigmoid(torch.linspace(-6, 6, total, **kind)) * (s.beta_end - s.beta_start) + s.beta_start
    alpha_bar = _cosine if s.beta_schedule == "squaredcos_cap_v2" else _laplace
    return torch.tensor(
        [min(1 - alpha_bar((i + 1) / total) / alpha_bar(i / total), 0.999) for i in range(total)], **kind
    )


def _cosine(u: float) -> float:
    """a(u) of Nichol and Dhariwal 2021, equation 17, up to its constant factor."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(u: float) -> float:
    """a(u) whose log signal-to-noise ratio is Laplace distributed (Hang et al. 2024)."""
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _rescale_zero_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(a) so that the last a_t is 0 and the first stays (Lin et al. 2023, algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    a = root**2
    return 1 - torch.cat((a[:1], a[1:] / a[:-1]))
