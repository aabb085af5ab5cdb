"""Folders whose scheduler is not DDPMScheduler: DDIM runs as DDIMPipeline does, other solvers' networks load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, PNDMScheduler
from dropin_setup import LONG_TABLES, SMALL
from models import diffusers_unet
from tensors import same_chain

import ddpm_fast as df
from ddpm_fast.checkpoints import CheckpointError, load, save


def written(folder: Path, scheduler: Any, pipeline: type = DDIMPipeline) -> Any:
    """The pipeline saved in folder, as upstream reads it back."""
    pipeline(diffusers_unet(SMALL), scheduler).save_pretrained(folder)
    loaded = pipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def theirs(pipeline: Any, **call: Any) -> torch.Tensor:
    """What the pipeline draws, in [0, 1], of seed 4, two images."""
    return pipeline(2, generator=torch.Generator().manual_seed(4), output_type="pt", **call).images


def ours(checkpoint: Any, **options: Any) -> torch.Tensor:
    """The checkpoint's images, in [0, 1], of the same noise."""
    x = df.Sampler(checkpoint.model, checkpoint.schedule, noise="torch", **options).sample(2, seed=4)
    return (x / 2 + 0.5).clamp(0, 1)


def agrees(images: torch.Tensor, pipeline: Any, **call: Any) -> bool:
    """Whether they are what the pipeline draws: fifty steps of an untrained network enlarge rounding a thousandfold."""
    return same_chain(images, theirs(pipeline, **call), pipeline.unet, lambda: theirs(pipeline, **call), LONG_TABLES)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_sample": False},
        {"clip_sample_range": 0.6, "prediction_type": "sample"},
        {"set_alpha_to_one": False, "steps_offset": 1},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"timestep_spacing": "linspace"},  # strides by T // n all the same
        {"num_train_timesteps": 130, "beta_end": 0.1, "timestep_spacing": "trailing"},  # 2.6 a step
        {"thresholding": True, "sample_max_value": 1.5, "beta_schedule": "scaled_linear"},
        {"trained_betas": [0.001 * (i + 1) for i in range(60)], "num_train_timesteps": 60},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_a_ddim_pipeline_draws_as_there(options: dict[str, Any], tmp_path: Path) -> None:
    pipeline = written(tmp_path, DDIMScheduler(**options))
    checkpoint = load(tmp_path)
    assert (checkpoint.schedule.method, checkpoint.schedule.num_inference_steps, checkpoint.schedule.eta) == (
        "ddim",
        50,
        0.0,
    )
    assert agrees(ours(checkpoint), pipeline)
    assert any("DDIM, of 50 steps and eta 0 as in DDIMPipeline" in note for note in checkpoint.notes)


@pytest.mark.parametrize("eta, steps, alpha", [(1.0, 10, False), (0.3, 7, True)])
def test_steps_and_eta_that_the_caller_names(eta: float, steps: int, alpha: bool, tmp_path: Path) -> None:
    pipeline = written(tmp_path, DDIMScheduler(set_alpha_to_one=alpha, timestep_spacing="linspace"))
    checkpoint = load(tmp_path)
    assert agrees(ours(checkpoint, eta=eta, steps=steps), pipeline, eta=eta, num_inference_steps=steps)
    stated = load(tmp_path, overrides={"eta": eta, "num_inference_steps": steps})
    assert torch.equal(ours(stated), ours(checkpoint, eta=eta, steps=steps))


def test_a_caller_may_ask_for_ddpm_instead(tmp_path: Path) -> None:
    written(tmp_path, DDIMScheduler(set_alpha_to_one=False))
    checkpoint = load(tmp_path)
    asked = df.Sampler(checkpoint.model, checkpoint.schedule, method="ddpm")
    stated = df.Sampler(checkpoint.model, load(tmp_path, overrides={"method": "ddpm"}).schedule)
    plain = df.Sampler(checkpoint.model, df.Schedule())
    assert len(asked.table) == 1000
    assert torch.equal(asked.table.rows, plain.table.rows) and torch.equal(stated.table.rows, plain.table.rows)


def test_a_ddim_scheduler_in_ddpm_s_pipeline_takes_every_step(tmp_path: Path) -> None:
    pipeline = written(tmp_path, DDIMScheduler(num_train_timesteps=1000), DDPMPipeline)
    table = df.Sampler(load(tmp_path).model, load(tmp_path).schedule).table
    assert table.timesteps == tuple(range(999, -1, -1)) and not table.rows[:, 6].any()
    assert agrees(ours(load(tmp_path), steps=20), pipeline, num_inference_steps=20)


def test_a_ddim_pipeline_makes_ddim_of_any_scheduler(tmp_path: Path) -> None:
    """As its constructor does with a DDPMScheduler that model_index.json names."""
    written(tmp_path, DDIMScheduler(clip_sample_range=0.7))
    edit(tmp_path / "model_index.json", scheduler=["diffusers", "DDPMScheduler"])
    edit(tmp_path / "scheduler" / "scheduler_config.json", _class_name="DDPMScheduler", variance_type="fixed_large")
    assert agrees(ours(load(tmp_path)), DDIMPipeline.from_pretrained(tmp_path))


def test_a_short_process_has_no_fifty_steps(tmp_path: Path) -> None:
    written(tmp_path, DDIMScheduler(num_train_timesteps=20))
    assert load(tmp_path).schedule.num_inference_steps == 20


@pytest.mark.parametrize("pipeline", [DDIMPipeline, DDPMPipeline])
def test_what_we_save_of_it_is_a_ddim_pipeline_again(pipeline: type, tmp_path: Path) -> None:
    scheduler = DDIMScheduler(set_alpha_to_one=False, clip_sample=False, beta_schedule="squaredcos_cap_v2")
    written(tmp_path / "a", scheduler, pipeline)
    checkpoint = load(tmp_path / "a")
    save(tmp_path / "b", checkpoint.model, checkpoint.schedule)
    back = pipeline.from_pretrained(tmp_path / "b")
    assert type(back.scheduler) is DDIMScheduler
    assert {k: v for k, v in back.scheduler.config.items() if not k.startswith("_")} == {
        k: v for k, v in scheduler.config.items() if not k.startswith("_")
    }
    assert load(tmp_path / "b").schedule == checkpoint.schedule
    with pytest.warns(UserWarning, match="is told its steps and eta when it is called"):
        save(tmp_path / "c", checkpoint.model, load(tmp_path / "a", overrides={"eta": 0.5}).schedule)


# --- other solvers ---


def test_a_pndm_folder_gives_the_network_and_its_training_schedule(tmp_path: Path) -> None:
    written(tmp_path, DDPMScheduler(), DDPMPipeline)
    scheduler = PNDMScheduler(beta_schedule="scaled_linear", beta_end=0.03, steps_offset=1, skip_prk_steps=True)
    scheduler.save_pretrained(tmp_path / "scheduler")
    edit(tmp_path / "model_index.json", _class_name="PNDMPipeline", scheduler=["diffusers", "PNDMScheduler"])
    checkpoint = load(tmp_path)
    assert checkpoint.schedule == df.Schedule(beta_schedule="scaled_linear", beta_end=0.03)
    torch.testing.assert_close(checkpoint.schedule.alphas_cumprod.float(), scheduler.alphas_cumprod)
    assert any("PNDMScheduler, whose steps are not run here" in note for note in checkpoint.notes)


def test_a_vp_sde_over_1000_timesteps_is_ddpm_s_process(tmp_path: Path) -> None:
    """alpha_bar(t) = exp(-t^2 (b1 - b0) / 2 - t b0) of the continuous process, at its 1000 times."""
    written(tmp_path, DDPMScheduler(), DDPMPipeline)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    (tmp_path / "model_index.json").unlink()
    path.write_text(json.dumps({"_class_name": "ScoreSdeVpScheduler", "num_train_timesteps": 1000, "beta_max": 20}))
    schedule = load(tmp_path).schedule
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:]
    torch.testing.assert_close(schedule.alphas_cumprod.log(), -(t**2) * 19.9 / 2 - t * 0.1, rtol=1.1e-2, atol=1e-3)
    edit(path, num_train_timesteps=2000)
    with pytest.raises(CheckpointError, match="only with 1000 timesteps are its times those of a DDPM"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("index", "scheduler", "match"),
    [
        ({"_class_name": "ScoreSdeVePipeline"}, {}, "noise levels .* by ScoreSdeVePipeline"),
        ({}, {"_class_name": "ScoreSdeVeScheduler"}, "noise levels .* by its ScoreSdeVePipeline or the like"),
        ({"scheduler": ["diffusers", "KarrasVeScheduler"]}, {}, "KarrasVeScheduler, .* not on the timesteps"),
        ({}, {"_class_name": "CMStochasticIterativeScheduler"}, "names the scheduler CMStochastic.*; of diffusers'"),
    ],
)
def test_other_processes_are_refused_with_what_to_do(
    index: dict[str, Any], scheduler: dict[str, Any], match: str, tmp_path: Path
) -> None:
    written(tmp_path, DDPMScheduler(), DDPMPipeline)
    edit(tmp_path / "model_index.json", **index)
    edit(tmp_path / "scheduler" / "scheduler_config.json", **scheduler)
    with pytest.raises(CheckpointError, match=match) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
