"""Damaged and hostile files: each gives a CheckpointError of one line, runs nothing, uses little memory."""

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
from checkpoint_folder import WEIGHTS, as_bin, refused, sound_folder, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_save
from test_reader_fuzz import bounded_memory

from ddpm_fast.checkpoints import CheckpointError, files, load
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import UNet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sound_folder(tmp_path)


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
        message = refused(
            path, r"model\.pt is refused: it is a pickle that would run \w+\.mkdir, .*; nothing in it was run"
        )
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
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_lengths_in_a_pickle_are_not_believed(tmp_path: Path) -> None:
    """A text that claims 2 GiB of a file of 20 bytes is read as far as it goes."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"conv_in.weight")
    with bounded_memory(), pytest.raises(CheckpointError, match="is damaged, or not a state dict of plain tensors"):
        files.read_weights(path)


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
