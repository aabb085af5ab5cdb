"""Foreign checkpoints and wrong settings: each gives a CheckpointError of one line, and crashes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_folder import WEIGHTS, as_bin, edit, refused, sound_folder, tiny
from safetensors.torch import save as safetensors_save

from ddpm_fast.checkpoints import CheckpointError, files, load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sound_folder(tmp_path)


# --- what is not there, or not a checkpoint ---


def test_nothing_there(tmp_path: Path, folder: Path) -> None:
    refused(tmp_path / "absent", "does not exist, neither as a folder nor as a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no weights")
    (tmp_path / "empty/model.pt").write_bytes(b"x")
    refused(tmp_path / "empty", r"it holds model\.pt: to load one of them, name the file")
    (folder / "unet/config.json").unlink()
    refused(folder, r"has no config\.json beside it.*google, diffusers-default")
    refused(folder, r"unknown preset 'googel'; did you mean google", preset="googel")
    (folder / WEIGHTS).unlink()
    refused(folder, "has no weights")


def test_a_preset_beside_a_configuration(folder: Path) -> None:
    refused(folder, r"preset='google' is for weights without a configuration", preset="google")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page, not the file itself"),
        (b"no weights", r"neither a safetensors nor a torch\.save file \(it begins with b'no weights'"),
        (b"\x80\x02.", "is damaged, or not a state dict"),
    ],
)
def test_files_that_are_no_weights(content: bytes, match: str, folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    path = folder / "unet/diffusion_pytorch_model.bin"
    path.write_bytes(content)
    refused(folder, match)
    refused(path, match)


def test_lfs_pointer_as_safetensors_and_as_config(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / WEIGHTS).write_bytes(pointer)
    refused(folder, "git-lfs pointer")
    (folder / "unet/config.json").write_bytes(pointer)
    refused(folder, "git-lfs pointer")


def test_a_fifo_does_not_block(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    refused(folder, "not a regular file")


def test_wrong_suffix(folder: Path) -> None:
    torch.save(tiny().state_dict(), folder / WEIGHTS)
    refused(folder, r"is a torch\.save file under a safetensors name")


# --- JSON ---


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "must hold a JSON object; it holds a list"),
        ("\xff", "not valid JSON"),
        (" " * (files.MAX_JSON_BYTES + 1), "holds 4,194,305 bytes; a JSON file here has at most"),
    ],
)
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_bad_json(name: str, text: str, match: str, folder: Path) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    refused(folder, match)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"norm_eps": -1}, r"UNetConfig\.norm_eps must be a positive number; got -1"),
        ({"block_out_channels": None}, "block_out_channels must be a list"),
        ({"layers_per_block": 10**9}, "too few for the 2 levels of 1000000000 layers"),
        ({"num_class_embeds": 10**30}, "cannot be built"),
        ({"num_class_embeds": 10**12}, "1 missing: class_embedding.weight"),
        ({"block_out_channels": [10**12, 10**12]}, "cannot be built"),
        ({"layers_per_block": 2}, r"missing: .*down_blocks\.0\.resnets\.1"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, r"missing: .*resnet_down"),
        ({"down_block_types": ["KDownBlock2D", "DownBlock2D"]}, "made of DownBlock2D, .*; got 'KDownBlock2D'"),
        ({"_class_name": "UNet2DConditionModel"}, "guided by text or images"),
        ({"_class_name": "VQModel"}, "is of a VQModel; only the unconditional UNet2DModel"),
    ],
)
def test_bad_unet_configs(values: dict[str, Any], match: str, folder: Path) -> None:
    edit(folder / "unet/config.json", **values)
    refused(folder, match)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            {"_class_name": "HeunDiscreteScheduler"},
            "names the scheduler HeunDiscreteScheduler; of diffusers' schedulers",
        ),
        ({"beta_schedule": "quadratic"}, "beta_schedule"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 10**10}, "10,000,000,000 timesteps; at most 1,000,000"),
        ({"trained_betas": 3}, "is not usable"),
        ({"trained_betas": [10**400]}, "is not usable"),
    ],
)
def test_bad_schedules(values: dict[str, Any], match: str, folder: Path) -> None:
    edit(folder / "scheduler/scheduler_config.json", **values)
    refused(folder, match)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"scheduler": ["diffusers", "HeunDiscreteScheduler"]}, "names the scheduler HeunDiscreteScheduler; of"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "guided by text or images"),
        ({"vqvae": ["diffusers", "VQModel"], "_class_name": "LDMPipeline"}, "a LDMPipeline with vqvae: latent"),
    ],
)
def test_other_pipelines(values: dict[str, Any], match: str, folder: Path) -> None:
    edit(folder / "model_index.json", **values)
    refused(folder, match)


def test_bad_labels(folder: Path) -> None:
    (folder / "labels.json").write_text('{"labels": [1]}')
    refused(folder, "names of the classes")
    (folder / "labels.json").write_text('{"labels": ["cat"]}')
    with pytest.raises(CheckpointError, match="1 names for 0 classes"):
        load(folder)


def test_unknown_fields_are_named_in_a_warning(folder: Path) -> None:
    edit(folder / "unet/config.json", novel_field=1, _meta=2)
    with pytest.warns(UserWarning, match="unknown fields: novel_field$"):
        load(folder)


# --- tensors that do not fit ---


def test_misfits_are_counted_and_named(folder: Path) -> None:
    state = tiny().state_dict()
    del state["conv_in.bias"], state["conv_out.bias"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    state["conv_norm_out.weight"] = torch.zeros(5)
    as_bin(folder, state)
    message = refused(folder, "does not fit its configuration")
    assert "2 missing: conv_in.bias, conv_out.bias;" in message
    assert "5 unexpected: extra.0, extra.1, extra.2 and 2 more;" in message
    assert message.endswith("1 mis-shaped: conv_norm_out.weight (file [5], config [4])")


def test_a_1x1_axis_is_squeezed_from_attention_only(folder: Path) -> None:
    state = tiny().state_dict()
    state["time_embedding.linear_1.weight"] = state["time_embedding.linear_1.weight"][:, :, None, None]
    as_bin(folder, state)
    refused(folder, r"1 mis-shaped: time_embedding\.linear_1\.weight \(file \[16, 4, 1, 1\], config \[16, 4\]\)")


def test_both_spellings_of_one_projection(folder: Path) -> None:
    state = tiny().state_dict()
    state["mid_block.attentions.0.query.weight"] = state["mid_block.attentions.0.to_q.weight"]
    as_bin(folder, state)
    refused(folder, r"has mid_block\.attentions\.0\.to_q\.weight twice")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value: float, folder: Path) -> None:
    state = tiny().state_dict()
    state["mid_block.resnets.1.conv1.bias"][2] = value
    (folder / WEIGHTS).write_bytes(files.safetensors_bytes(state))
    refused(folder, r"mid_block\.resnets\.1\.conv1\.bias holds 1 NaN or infinite")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_are_no_weights(dtype: torch.dtype, folder: Path) -> None:
    state = tiny().state_dict()
    state["conv_out.bias"] = torch.zeros(3).to(dtype)
    (folder / WEIGHTS).write_bytes(safetensors_save(state))
    refused(folder, rf"conv_out\.bias is {dtype}; weights must be one of float32")


def test_tensors_larger_than_their_file(folder: Path) -> None:
    """A stride of 0 lets four bytes claim any size."""
    state = tiny().state_dict()
    state["conv_in.weight"] = torch.zeros(1).expand(4, 3, 3, 3)
    as_bin(folder, state)
    refused(folder, "its tensors claim .* bytes, but it stores only")


def test_sparse_tensors(folder: Path) -> None:
    state = tiny().state_dict()
    state["conv_out.bias"] = state["conv_out.bias"].to_sparse()
    as_bin(folder, state)
    refused(folder, "conv_out.bias is not a dense tensor")


# --- other families, told by their keys ---


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"time_embed.0.weight": 0, "input_blocks.0.0.weight": 0}, "a guided-diffusion classifier"),
        ({"time_embed.0.weight": 0, "input_blocks.1.1.transformer_blocks.0.norm": 0}, "a latent diffusion model"),
        ({"temb.dense.0.weight": 0, "conv_in.weight": 0}, "is not a whole U-Net of Ho et al"),
        ({"module.temb.dense.0.weight": 0, "module.conv_in.weight": 0}, "is not a whole U-Net of Ho et al"),
        ({"model": {"model.init_conv.weight": 0}, "ema": {"step": 0}, "step": 0}, "a lucidrains"),
        ({"init_conv.weight": 0, "downs.0.0.weight": 0}, "a lucidrains"),
        ({"model.map_layer0.weight": 0, "model.enc.32x32_conv.weight": 0}, "an EDM network"),
        ({"time_embedding.linear_1.weight": 0, "down_blocks.0.attentions.0.attn2.to_q.weight": 0}, "guided by text"),
        ({"state": {}, "param_groups": []}, "an optimizer's state"),
        ({"model": {}, "ema": {"shadow_params": []}}, "has no tensors"),
        ({"format": 1, "step": 5, "settings": {}}, "the state of a training run"),
        ([{"temb.dense.0.weight": 0}, {}, 0, 0, {}], "is not a whole U-Net of Ho et al"),
        ([{"fc.weight": 0}, {}, 0, 0, {}], "known family; its 1 tensors are 0.fc.weight"),
        ({"fc.weight": 0}, "no checkpoint of a known family; its 1 tensors are fc.weight"),
        ({"fc.weight": 0, "epoch": "x"}, "no checkpoint of a known family; its 1 tensors are fc.weight"),
        ({"epoch": "x"}, "is no state dict: it has epoch"),
        ({1: 0}, "no checkpoint of a known family; its 1 tensors are 1"),
        ({}, "has no tensors"),
        ([1, 2], "is no state dict: it has 0, 1"),
        ("text", "holds a str, not a state dict"),
    ],
)
def test_other_families_are_named(content: Any, match: str, tmp_path: Path) -> None:
    def tensors(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: torch.zeros(2, 2) if v == 0 and k not in ("step",) else tensors(v) for k, v in value.items()}
        return [tensors(v) for v in value] if isinstance(value, list) else value

    torch.save(tensors(content), tmp_path / "model.pt")
    refused(tmp_path / "model.pt", match)
