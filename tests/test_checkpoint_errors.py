"""Damaged, hostile and foreign checkpoints: each gives a CheckpointError of one line, runs nothing, crashes nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_save

from ddpm_fast.checkpoints import CheckpointError, files, load, save
from ddpm_fast.config import UNetConfig
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import UNet

CONFIG = UNetConfig(
    sample_size=4,
    block_out_channels=(4, 4),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=2,
    attention_head_dim=2,
)
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def tiny() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint for a test to damage."""
    save(tmp_path / "model", tiny(), Schedule())
    return tmp_path / "model"


def refused(source: Path, match: str, **kwargs: Any) -> str:
    with pytest.raises(CheckpointError, match=match) as caught:
        load(source, **kwargs)
    message = str(caught.value)
    assert message.isprintable(), "an error is one line"
    assert str(source) in message or kwargs or "configuration" in message
    return message


def as_bin(folder: Path, content: Any, **kwargs: Any) -> Path:
    """The folder with content as its only weights, a torch.save file."""
    (folder / WEIGHTS).unlink()
    path = folder / WEIGHTS.replace(".safetensors", ".bin")
    torch.save(content, path, **kwargs)
    return path


def edit(path: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**content, **values}))


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
        (b"<!DOCTYPE html><html>", r"neither a safetensors nor a torch\.save file \(it begins with b'<!DOCTYPE"),
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


# --- pickles ---


class Malicious:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_named_and_not_run(zipped: bool, folder: Path, tmp_path: Path) -> None:
    state = {**tiny().state_dict(), "conv_in.bias": Malicious(tmp_path / "trace")}
    path = as_bin(folder, state, _use_new_zipfile_serialization=zipped)
    refused(folder, r"is refused: unpickling it would run \w+\.mkdir, .*nothing was run")
    refused(path, "refused")
    assert not (tmp_path / "trace").exists()
    torch.load(path, weights_only=False)  # the trap works
    assert (tmp_path / "trace").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_raw_malicious_pickle(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Malicious(tmp_path / "trace"), protocol))
        message = refused(path, r"model\.pt is (refused|damaged, or not a state dict of plain tensors)")
        assert "weights_only" not in message, "never advise the unsafe way"
    assert not (tmp_path / "trace").exists()


def test_whole_modules_are_refused(folder: Path) -> None:
    as_bin(folder, torch.nn.Linear(2, 2))
    refused(folder, r"would run torch\.nn\.modules\.linear\.Linear")


def test_old_torch_reads_no_pickles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_bin(folder, tiny().state_dict())
    load(folder)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    refused(folder, r"only torch >= 2\.10 reads safely.*this is 2\.9\.1")


def test_zip_bombs_and_other_zips(folder: Path, tmp_path: Path) -> None:
    path = as_bin(folder, tiny().state_dict())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    refused(folder, "is a compressed zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    refused(folder, r"not one that torch\.save wrote")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(folder: Path) -> None:
    path = as_bin(folder, {})
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    refused(folder, "is a TorchScript archive")


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
        ({"model": {}, "ema": {"shadow_params": []}, "step": 0}, "a Score-SDE checkpoint"),
        ({"format": 1, "step": 5, "settings": {}}, "the state of a training run"),
        ([{"temb.dense.0.weight": 0}, {}, 0, 0, {}], "is not a whole U-Net of Ho et al"),
        ([{"fc.weight": 0}, {}, 0, 0, {}], "a list of 5 values, not .* as ddim's ckpt.pth is"),
        ({"fc.weight": 0}, "no checkpoint of a known family; its 1 tensors are fc.weight"),
        ({"fc.weight": 0, "epoch": "x"}, "is no state dict: it has epoch"),
        ({1: 0}, "is no state dict: it has 1"),
        ({}, "has no tensors"),
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


# --- shards ---


def sharded(folder: Path) -> Path:
    state = tiny().state_dict()
    names = sorted(state)
    (folder / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[:10], names[10:])):
        file = f"part-{i}.safetensors"
        (folder / "unet" / file).write_bytes(files.safetensors_bytes({n: state[n] for n in part}))
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert load(folder).schedule == Schedule()
    return index


@pytest.mark.parametrize(
    "name", ["../part-0.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "C:x", "", "a.json", "x\0", 3]
)
def test_index_names_that_lead_elsewhere(name: Any, folder: Path) -> None:
    index = sharded(folder)
    content = json.loads(index.read_text())
    content["weight_map"]["conv_in.bias"] = name
    index.write_text(json.dumps(content))
    refused(folder, "beneath the index's folder|must map tensor names to file names")


def test_shards_that_are_links_out_of_the_folder(folder: Path) -> None:
    sharded(folder)
    shard = folder / "unet/part-0.safetensors"
    shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to(folder.parent / "elsewhere.safetensors")
    refused(folder, "a link that leads out of its folder")


def test_shards_and_index_disagree(folder: Path) -> None:
    index = sharded(folder)
    content = json.loads(index.read_text())
    moved = next(iter(content["weight_map"]))
    content["weight_map"][moved] = "part-1.safetensors"
    index.write_text(json.dumps(content))
    refused(folder, f"part-0.safetensors and its index .* differ in: {moved}")
    (folder / "unet/part-1.safetensors").unlink()
    refused(folder, "differ in|does not exist")
    index.write_text("{}")
    refused(folder, "it has no weight_map")


# --- damaged bytes ---


def header_size(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


SOUND = files.safetensors_bytes(tiny().state_dict())
FOREIGN = safetensors_save(tiny().state_dict())  # without metadata, so without a CRC
BIN = io.BytesIO()
torch.save(tiny().state_dict(), BIN)


def loads(folder: Path, name: str, data: bytes) -> UNet:
    (folder / "unet" / name).write_bytes(data)
    return load(folder).model


def test_header_that_lies_about_its_size(folder: Path) -> None:
    for size in (len(SOUND), 2**63, 2**64 - 1):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + SOUND[8:])
        refused(folder, "header claims .* bytes")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 0) + SOUND[8:])
    refused(folder, "no safetensors header")
    with open(folder / WEIGHTS, "wb") as stream:
        stream.write(struct.pack("<Q", files.MAX_HEADER_BYTES + 1) + b"{")
        stream.truncate(2 * files.MAX_HEADER_BYTES)
    refused(folder, "a header of 16,777,217 bytes; at most")


def test_header_that_describes_other_tensors(folder: Path) -> None:
    start = header_size(SOUND)
    for change in (
        {"dtype": "F33"},
        {"shape": [-4]},
        {"data_offsets": [0, 10**30]},
        {"data_offsets": [8, 4]},
        {"data_offsets": "ab"},
        {"shape": [2**63, 2]},
    ):
        header = json.loads(SOUND[8:start])
        header.pop("__metadata__")
        header["conv_in.bias"] |= change
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + SOUND[start:])
        refused(folder, "damaged")


def test_names_from_a_hostile_file_cannot_break_the_line(folder: Path) -> None:
    state = {"a\nb\x1b[2J\u202e": torch.zeros(1), **tiny().state_dict()}
    (folder / WEIGHTS).write_bytes(files.safetensors_bytes(state))
    assert r"a\nb\x1b[2J\u202e" in refused(folder, "1 unexpected")


FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_truncation_says_how_much_is_missing(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(SOUND[:-5])
    tensors = len(SOUND) - header_size(SOUND)
    refused(folder, f"describes {tensors:,} bytes of tensors, the file holds {tensors - 5:,}")


@FUZZ
@given(cut=st.integers(0, len(SOUND) - 1))
def test_truncation_is_always_an_error(folder: Path, cut: int) -> None:
    with pytest.raises(CheckpointError):
        loads(folder, "diffusion_pytorch_model.safetensors", SOUND[:cut])


@FUZZ
@given(at=st.integers(0, len(FOREIGN.rstrip(b"\0")) - 1), value=st.integers(1, 255), half=st.booleans())
def test_a_changed_header_byte_is_always_an_error(folder: Path, at: int, value: int, half: bool) -> None:
    """In any program's file: the header of this one has neither metadata nor, but for padding, white space."""
    end = 8 + len(FOREIGN[8 : header_size(FOREIGN)].rstrip(b" "))
    at = at % end
    data = bytearray(FOREIGN)
    data[at] ^= value
    with pytest.raises(CheckpointError):
        loads(folder, "diffusion_pytorch_model.safetensors", bytes(data))


@FUZZ
@given(at=st.integers(0, len(SOUND) - 1), value=st.integers(1, 255))
def test_a_changed_byte_of_our_files_is_an_error_or_harmless(folder: Path, at: int, value: int) -> None:
    """Ours carry a CRC, so a changed weight is an error; padding and the word "format" decide nothing."""
    data = bytearray(SOUND)
    data[at] ^= value
    try:
        model = loads(folder, "diffusion_pytorch_model.safetensors", bytes(data))
    except CheckpointError:
        return
    assert at < header_size(SOUND), "a changed weight went unseen"
    assert_weights(model)


@FUZZ
@given(at=st.integers(0, len(BIN.getvalue()) - 1), value=st.integers(1, 255), cut=st.booleans())
def test_damage_to_a_bin_is_an_error_or_harmless(folder: Path, at: int, value: int, cut: bool) -> None:
    (folder / WEIGHTS).unlink(missing_ok=True)
    data = bytearray(BIN.getvalue())
    data[at] ^= value
    try:
        model = loads(folder, "diffusion_pytorch_model.bin", bytes(data[:at] if cut else data))
    except CheckpointError:
        return
    assert not cut, "a truncated file was loaded"
    assert_weights(model)


def assert_weights(model: UNet) -> None:
    expected = tiny().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@FUZZ
@given(data=st.binary(max_size=200), head=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x08" + bytes(7) + b"{"]))
def test_any_bytes_are_refused(folder: Path, data: bytes, head: bytes) -> None:
    (folder / WEIGHTS).unlink(missing_ok=True)
    with pytest.raises(CheckpointError):
        loads(folder, "diffusion_pytorch_model.bin", head + data)
