"""Which of diffusers' schedulers train a DDPM, and what their files say in the fields of `Schedule`.

A DDPMScheduler and a DDIMScheduler are drawn from as they are. Of other solvers of the same process the network is
taken with its training schedule. Schedulers of another process are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import CheckpointError

DDPM = ("DDPMScheduler", "GaussianDDPMScheduler", "DDPMParallelScheduler")
DDIM = ("DDIMScheduler", "DDIMParallelScheduler")
DDIM_STEPS = 50  # DDIMPipeline's default
DDPM_STEPS = 1000  # DDPMPipeline's, whatever the model was trained with
# Their training fields have DDPMScheduler's names and defaults.
SOLVERS = (
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
    "UniPCMultistepScheduler",
)
VP = "ScoreSdeVpScheduler"
BY_SIGMA = ("ScoreSdeVeScheduler", "KarrasVeScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
PIPELINES_BY_SIGMA = ("ScoreSdeVePipeline", "KarrasVePipeline")
TRAINING = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def check_scheduler(name: object, path: Path) -> None:
    """CheckpointError for a scheduler class whose process is not DDPM's. None: the file names none."""
    if name in BY_SIGMA:
        raise CheckpointError(f"{path} names the scheduler {name}, {by_sigma('its ScoreSdeVePipeline or the like')}")
    if name is not None and name not in (*DDPM, *DDIM, *SOLVERS, VP):
        raise CheckpointError(
            f"{path} names the scheduler {name}; of diffusers' schedulers DDPMScheduler and DDIMScheduler are "
            f"supported, and the networks trained for {', '.join(SOLVERS[:3])} and the like"
        )


def by_sigma(pipeline: str) -> str:
    """Why a score network over noise levels is refused, and what to do."""
    return (
        "whose network is trained on noise levels (sigmas), not on the timesteps of a DDPM: it cannot be drawn from "
        f"here; run it in diffusers, by {pipeline}"
    )


def schedule_fields(config: Mapping[str, Any], notes: list[str], pipeline: str | None = None) -> dict[str, Any]:
    """A scheduler_config.json in the fields of `Schedule`; what is read otherwise than it is written is noted.

    pipeline: the class that model_index.json names, which has a say in how many steps are drawn.
    """
    name = config.get("_class_name")
    values = _current_names({k: v for k, v in config.items() if not k.startswith("_")}, notes)
    if name == VP:
        return _variance_preserving(values, notes)
    if name in SOLVERS and pipeline != "DDIMPipeline":  # which makes a DDIMScheduler of any
        notes.append(
            f"the scheduler is a {name}, whose steps are not run here: its training schedule is kept, and the network "
            "drawn from by DDPM (or method='ddim' with steps=), x0 clipped to [-1, 1] (clip_sample)"
        )
        return {k: v for k, v in values.items() if k in TRAINING}
    if name not in DDIM and pipeline != "DDIMPipeline":
        values.pop("set_alpha_to_one", None)
        return values
    total = values.get("num_train_timesteps", 1000)
    steps = DDPM_STEPS if pipeline == "DDPMPipeline" else DDIM_STEPS
    steps = min(steps, total) if isinstance(total, int) else steps
    values.pop("variance_type", None)
    notes.append(
        f"the {'scheduler is a DDIMScheduler' if name in DDIM else 'pipeline is a DDIMPipeline'}: what draws by "
        f"default is DDIM, of {steps} steps and eta 0 as in {pipeline or 'DDIMPipeline'}; method='ddpm' is Algorithm 2"
    )
    return {**values, "method": "ddim", "num_inference_steps": steps}


def _current_names(values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Fields under today's names; what old revisions called otherwise is noted."""
    for old, new in (("timesteps", "num_train_timesteps"), ("clip_predicted_image", "clip_sample")):
        if old in values:
            value = values.pop(old)
            if new not in values:
                values[new] = value
                notes.append(f"the schedule's old field {old} is read as {new}")
    if "predict_epsilon" in values:
        epsilon = values.pop("predict_epsilon")
        if "prediction_type" not in values:
            values["prediction_type"] = "epsilon" if epsilon else "sample"
            notes.append(f"the schedule's old field predict_epsilon={epsilon} is read as prediction_type")
    values.pop("tensor_format", None)
    if values.pop("timestep_values", None) is not None:
        notes.append("the schedule's old field timestep_values is ignored, as it always was upstream")
    return values


def _variance_preserving(values: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The VP SDE of Song et al. 2021, where it is DDPM's process: beta(t) / T over T = 1000 timesteps."""
    total, ends = values.get("num_train_timesteps", 2000), (values.get("beta_min", 0.1), values.get("beta_max", 20))
    if total != 1000 or not all(isinstance(b, (int, float)) and b > 0 for b in ends):
        raise CheckpointError(
            f"a {VP} of num_train_timesteps={total!r}, beta_min={ends[0]!r}, beta_max={ends[1]!r} is not supported: "
            "only with 1000 timesteps are its times those of a DDPM; write a DDPMScheduler's scheduler_config.json "
            "if you know how the network was trained"
        )
    notes.append(
        f"the scheduler is a {VP}, whose steps are not run here: its betas are DDPM's from {ends[0] / 1000:g} to "
        f"{ends[1] / 1000:g}, and the network is drawn from by DDPM, x0 clipped to [-1, 1] (clip_sample)"
    )
    return {"num_train_timesteps": 1000, "beta_start": ends[0] / 1000, "beta_end": ends[1] / 1000}
