"""`convert`: what it writes gives the same outputs in diffusers itself, and OpenAI's files come back bit for bit."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import openai_oracle as openai
import pytest
import test_checkpoints_ho as ho
import torch
from dropin_setup import LONG_TABLES
from openai_oracle import Net
from tensors import double, excess, same_chain
from torch import Tensor

from ddpm_fast.checkpoints import CheckpointError, convert, load, save
from ddpm_fast.house_rule import check
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import UNet, UNetConfig

SIZE = 8
TINY = Net(32, 1, (1, 2), (2,), heads=4)
FLAGS: dict[str, Any] = {
    "num_heads": 4,
    "image_size": SIZE,
    "diffusion_steps": 40,
    "noise_schedule": "cosine",
    "rescale_timesteps": True,
}
NETS = {
    "scaled_times": (TINY, FLAGS),
    "whole_times": (replace(TINY, blocks=2), {**FLAGS, "rescale_timesteps": False, "noise_schedule": "linear"}),
    "classes": (replace(TINY, classes=5), FLAGS),
    "updown": (
        replace(TINY, updown=True, mults=(1, 2, 2), scale_shift=False, ds=(1, 4), heads=1),
        {**FLAGS, "num_heads": 1},
    ),
    "fixed_gray": (replace(TINY, channels=1, out=1, ds=()), {**FLAGS, "sigma_small": True}),
    "head_channels": (replace(TINY, head_channels=32, ds=(1, 2)), {**FLAGS, "num_head_channels": 32}),
}


def stored(tmp_path: Path, net: Net) -> tuple[Path, dict[str, Tensor]]:
    path, sd = tmp_path / "model.pt", openai.weights(net)
    torch.save(sd, path)
    return path, sd


def inputs(net: Net, n: int = 4) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(n, net.channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0, 1, 17, 39]), None if net.classes is None else torch.tensor([0, 1, 3, 4])


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# --- to diffusers ---


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_openai_in_diffusers(name: str, tmp_path: Path) -> None:
    net, flags = NETS[name]
    path, sd = stored(tmp_path, net)
    out = tmp_path / "out"
    convert(path, out, overrides=flags)
    x, t, y = inputs(net)
    scale = 1000 / 40 if flags["rescale_timesteps"] else 1

    def expected(sd: dict[str, Tensor], x: Tensor) -> Tensor:
        return openai.forward(net, sd, x, scale * t, y)

    theirs = diffusers.UNet2DModel.from_pretrained(out / "unet").eval()
    assert excess(theirs(x, t, class_labels=y).sample, expected, sd, x) <= 1
    ours = load(out)
    assert excess(ours.model(x, ours.schedule.network_time(t), y), expected, sd, x) <= 1


@pytest.mark.parametrize("name", ["scaled_times", "whole_times", "fixed_gray"])
def test_ddpm_pipeline_draws_the_same_images(name: str, tmp_path: Path) -> None:
    net, flags = NETS[name]
    path, _ = stored(tmp_path, net)
    out = tmp_path / "out"
    notes = convert(path, out, overrides=flags)
    assert "DDPMPipeline takes 1000 steps unless told num_inference_steps=40" in notes
    pipeline = diffusers.DDPMPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        return pipeline(batch_size=2, generator=generator, num_inference_steps=40, output_type="np").images

    checkpoint = load(path, overrides=flags)
    sampler = Sampler(checkpoint.model, checkpoint.schedule, 2, noise=torch.Generator().manual_seed(3))
    ours = (sampler.sample(2) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert same_chain(ours, draw().reshape(ours.shape), pipeline.unet, lambda: draw().reshape(ours.shape), LONG_TABLES)
    assert (ours > 0).float().mean() > 0.2 and ours.std() > 0.1


@torch.no_grad()
def test_ho_in_diffusers(tmp_path: Path) -> None:
    sd = ho.weights(ho.TINY)
    torch.save(sd, tmp_path / "model.ckpt")
    convert(tmp_path / "model.ckpt", tmp_path / "out", overrides={"var_type": "fixedlarge", "image_size": SIZE})
    x, t = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 731])
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out")
    assert excess(pipeline.unet(x, t).sample, lambda sd, x: ho.forward(ho.TINY, sd, x, t), sd, x) <= 1
    assert pipeline.scheduler.config.variance_type == "fixed_large"


def test_half_precision(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, TINY)
    convert(path, tmp_path / "out", dtype=torch.float16, overrides=FLAGS)
    wide, half = load(path, overrides=FLAGS).model.state_dict(), load(tmp_path / "out")
    assert any("stored in float16" in note for note in half.notes)
    for name, tensor in half.model.state_dict().items():
        if name != "time_proj.weight":
            assert torch.equal(tensor, wide[name].half().float())


def test_save_says_what_it_changed(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, TINY)
    checkpoint = load(path, overrides={**FLAGS, "timestep_respacing": "10"})
    with pytest.warns(UserWarning) as record:
        save(tmp_path / "out", checkpoint.model, checkpoint.schedule)
    text = "\n".join(str(w.message) for w in record)
    assert "became a learned time embedding of 40 rows" in text and "'10' is left out" in text
    assert checkpoint.model.config.time_embedding_type == "positional"  # what was given is as it was
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path / "out")
        save(tmp_path / "again", loaded.model, loaded.schedule)


def test_what_diffusers_cannot_express(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, replace(TINY, mults=(1, 2, 3), ds=(2,)))
    for overrides, match in (
        (FLAGS, "heads of one size, this model 4 heads at every width, of 16 and 24 channels; convert to 'openai'"),
        ({**FLAGS, "num_heads": 1}, None),
    ):
        if match is None:
            convert(path, tmp_path / "out", overrides=overrides)
        else:
            with pytest.raises(CheckpointError, match=match):
                convert(path, tmp_path / "out", overrides=overrides)
            assert not (tmp_path / "out").exists()
    path, _ = stored(tmp_path, replace(TINY, mults=(2, 1)))
    with pytest.raises(CheckpointError, match="no field for a sinusoid of 32 channels over a first level of 64"):
        convert(path, tmp_path / "wide", overrides=FLAGS)


# --- back to OpenAI's ---

MORE = {
    **NETS,
    "wide_sinusoid": (replace(TINY, mults=(2, 1)), FLAGS),
    "heads_by_number": (replace(TINY, mults=(1, 2, 3)), FLAGS),
}


@pytest.mark.parametrize("name", MORE)
def test_there_and_back_is_the_same_file(name: str, tmp_path: Path) -> None:
    net, flags = MORE[name]
    path, sd = stored(tmp_path, net)
    notes = convert(path, tmp_path / "back.pt", to="openai", overrides=flags)
    assert same_state(torch.load(tmp_path / "back.pt", weights_only=True), sd)
    again = dict(re.findall(r"--(\w+) (\S+)", notes[-1]))
    assert again["diffusion_steps"] == "40" and again["noise_schedule"] == flags["noise_schedule"]
    assert again["rescale_timesteps"] == str(flags["rescale_timesteps"]) and again["image_size"] == str(SIZE)
    assert again.get("num_heads", "4") == str(flags["num_heads"]) or "num_head_channels" in flags
    if name in NETS:
        convert(path, tmp_path / "out", overrides=flags)
        convert(tmp_path / "out", tmp_path / "twice.pt", to="openai")
        assert same_state(torch.load(tmp_path / "twice.pt", weights_only=True), sd)


def test_the_order_of_rows_is_that_of_the_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_fast.checkpoints.openai_presets import RELEASES

    name = "64x64_diffusion"
    narrow = {**RELEASES[name], "num_channels": 64, "num_head_channels": 32, "class_cond": False}
    monkeypatch.setitem(RELEASES, name, narrow)
    net = Net(64, 3, (1, 2, 3, 4), (2, 4, 8), head_channels=32, new_order=True, updown=True)
    path, sd = stored(tmp_path, net)
    notes = convert(path, tmp_path / "back.pt", to="openai")
    assert same_state(torch.load(tmp_path / "back.pt", weights_only=True), sd)
    assert "--use_new_attention_order True" in notes[-1] and "--num_head_channels 32" in notes[-1]
    # A model whose order is not told by its architecture is written in the legacy order.
    other, sd = stored(tmp_path, replace(TINY, new_order=True))
    convert(other, tmp_path / "legacy.pt", to="openai", overrides={**FLAGS, "use_new_attention_order": True})
    legacy = torch.load(tmp_path / "legacy.pt", weights_only=True)
    assert not same_state(legacy, sd)
    x, t, _ = inputs(TINY)
    # The same network with its rows in another order, which the libraries may sum in another order.
    new = replace(TINY, new_order=True)
    truth = openai.forward(new, double(sd), x.double(), t)
    check(openai.forward(TINY, legacy, x, t), openai.forward(new, sd, x, t), truth)


OURS: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 16,
}


@torch.no_grad()
def test_a_diffusers_model_that_fits_becomes_openai_s(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UNet(UNetConfig(**OURS))
    save(tmp_path / "in", model, Schedule())
    convert(tmp_path / "in", tmp_path / "out.pt", to="openai")
    sd = torch.load(tmp_path / "out.pt", weights_only=True)
    net = Net(32, 1, (1, 2), (2,), heads=4, scale_shift=False, out=3)
    x, t, _ = inputs(net)
    assert excess(model(x, t), lambda sd, x: openai.forward(net, sd, x, t), sd, x) <= 1


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"norm_eps": 1e-6}, "no such norm_eps: 1e-06, where it has 1e-05"),
        ({"downsample_padding": 0}, "no such downsample_padding: 0"),
        ({"flip_sin_to_cos": False}, "no such flip_sin_to_cos"),
        ({"norm_num_groups": 16}, "no such norm_num_groups: 16"),
        ({"mid_block_type": None}, "no such mid_block_type: None"),
        ({"resnet_time_scale_shift": "scale_shift"}, "no such attn_norm_num_groups: None"),
        ({"time_embedding_dim": 64}, "no such time_embedding_dim: 64"),
        ({"time_embedding_type": "fourier"}, "no time_embedding_type 'fourier'"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 1000}, "this one is no table of sinusoids"),
        ({"up_block_types": ("UpBlock2D", "UpBlock2D")}, "attention at the same levels on both sides"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}, "this model mixes them"),
        ({"attention_head_dim": 24}, "24 does not divide 64"),
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D")}, r"has no SkipDownBlock2D \(NCSN"),
    ],
)
def test_what_openai_cannot_express(changed: dict[str, Any], match: str, tmp_path: Path) -> None:
    save(tmp_path / "in", UNet(UNetConfig(**{**OURS, **changed})), Schedule())
    with pytest.raises(CheckpointError, match=match):
        convert(tmp_path / "in", tmp_path / "out.pt", to="openai")
    assert not (tmp_path / "out.pt").exists()


def test_targets(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, TINY)
    with pytest.raises(CheckpointError, match="convert writes diffusers or openai; got to='onnx'"):
        convert(path, tmp_path / "out", to="onnx", overrides=FLAGS)
    with pytest.raises(CheckpointError, match="is a folder; an OpenAI checkpoint is a file"):
        convert(path, tmp_path, to="openai", overrides=FLAGS)


# --- the command ---


def test_command_line(tmp_path: Path) -> None:
    path, sd = stored(tmp_path, TINY)
    settings = [part for name, value in FLAGS.items() for part in ("--set", f"{name}={value}")]

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ddpm_fast", "convert", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)

    done = run(path, tmp_path / "out", "--dtype", "float32", *settings)
    assert done.returncode == 0, done.stderr
    assert "- inferred from the shapes: num_channels=32" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{path} (OpenAI) as diffusers in {tmp_path / 'out'}"
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet").state_dict()
    ours = load(tmp_path / "out").model.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert run(tmp_path / "out", tmp_path / "back.pt", "--to", "openai").returncode == 0
    assert same_state(torch.load(tmp_path / "back.pt", weights_only=True), sd)
    failed = run(path, tmp_path / "no")
    said = [line for line in failed.stderr.splitlines() if line != "ddpm-fast: importing torch"]  # where that is slow
    assert failed.returncode == 2 and len(said) == 1
    assert "do not tell num_heads" in failed.stderr
