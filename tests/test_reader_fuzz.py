"""Hostile bytes for every reader: each file is read whole and sound, or refused in one line; nothing runs, memory
stays small. With the state dicts of test_checkpoint_fuzz.py these are 10,000 cases, the same in every run."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_folder import CONFIG, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_save
from torch import Tensor

from ddpm_fast.checkpoints import CheckpointError, contents_of, diffusers, identify, load
from ddpm_fast.checkpoints.family import Found, check_storage
from ddpm_fast.checkpoints.files import (
    CRC_FIELD,
    read_json,
    read_safetensors,
    read_sharded,
    read_weights,
    safetensors_bytes,
)
from ddpm_fast.checkpoints.layout import Layout
from ddpm_fast.schedule import Schedule

CASES = {
    "damaged safetensors": 1900,
    "safetensors headers": 1600,
    "JSON": 800,
    "settings": 300,
    "shard indices": 1000,
    "damaged zips": 1500,
    "pickles inside sound zips": 1200,
    "old pickles": 500,
    "any bytes": 400,
    "containers": 250,
    "DDUF files": 150,
}
STATE_DICTS = 400  # test_checkpoint_fuzz.py
MARGIN = 512 << 20  # bytes of address space that reading a file of a few KB may take


def test_there_are_10000_cases() -> None:
    assert sum(CASES.values()) + STATE_DICTS == 10_000


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Within, an allocation of more than MARGIN fails, where the system can say so."""
    if not sys.platform.startswith("linux"):
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MARGIN, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def cases(name: str, check: Callable[[random.Random], None]) -> None:
    """Runs CASES[name] of them, each a script of 12 bytes by Hypothesis that says what is done to the file.

    Derandomised, so the same ones every time. Bytes are its cheapest strategy by far.
    """
    ran = 0

    @settings(
        max_examples=CASES[name],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(min_size=12, max_size=12))
    def one(script: bytes) -> None:
        nonlocal ran
        ran += 1
        check(random.Random(script))

    with bounded_memory():
        one()
    assert ran == CASES[name]


def outcome(read: Callable[[Path], Any], path: Path, data: bytes) -> Any:
    """What read makes of a file of these bytes; None where it was refused, in one clear line."""
    path.write_bytes(data)
    try:
        return read(path)
    except CheckpointError as error:
        message = str(error)
        assert message.isprintable() and str(path.parent) in message
        assert "MemoryError" not in message and "alloc" not in message
        return None


def sound(content: Any, path: Path) -> None:
    """As `load` goes on: tensors that the file really holds, or a refusal."""
    try:
        tensors = contents_of(content, path).tensors
        check_storage(Found(str(path), path, tensors), tensors)
        identify(content, Layout(path, CONFIG.to_dict(), None, None, []), str(path))
    except CheckpointError as error:
        assert str(error).isprintable()
        return
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= 4 * path.stat().st_size


STATE: dict[str, Tensor] = {
    "conv_in.weight": torch.arange(6.0).view(2, 3),
    "conv_in.bias": torch.ones(2, dtype=torch.float16),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three bytes changed; now and then the end cut off, a stretch taken out, or one repeated."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        changed[rng.randrange(len(data))] ^= rng.choice([1 << rng.randrange(8), rng.randint(1, 255)])
    a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    shape = rng.randrange(8)
    if shape == 0:
        return bytes(changed[:a])
    if shape == 1:
        return bytes(changed[:a] + changed[b:])
    return bytes(changed[:b] + changed[a:] if shape == 2 else changed)


def stored_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


# --- safetensors ---


def test_damaged_safetensors(tmp_path: Path) -> None:
    """Of ours, which carry a checksum, no changed weight goes unseen."""
    files = {True: safetensors_bytes(STATE), False: safetensors_save(STATE)}
    weights = files[True][8 + int.from_bytes(files[True][:8], "little") :]
    read = 0

    def check(rng: random.Random) -> None:
        nonlocal read
        ours = rng.random() < 0.5
        data = damaged(files[ours], rng)
        tensors = outcome(read_safetensors, tmp_path / "a.safetensors", data)
        if tensors is not None:
            read += 1
            assert stored_bytes(tensors) <= len(data)
            assert not ours or data.endswith(weights) or CRC_FIELD.encode() not in data

    cases("damaged safetensors", check)
    assert read > 100  # a changed weight of another program's file is not seen


HOSTILE: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    5,
    12,
    2**31,
    2**40,
    2**63,
    10**40,
    1e300,
    True,
    None,
    "",
    "F32",
    [],
    {},
    [0],
    "\u202e",
]


def test_safetensors_headers(tmp_path: Path) -> None:
    """Well-formed JSON that lies: of types, shapes, offsets, names, lengths."""
    plain = safetensors_save(STATE)
    start = 8 + int.from_bytes(plain[:8], "little")

    def check(rng: random.Random) -> None:
        header = json.loads(plain[8:start])
        for _ in range(rng.randint(1, 3)):
            entry = header[rng.choice(sorted(header))]
            if not isinstance(entry, dict):
                continue
            key = rng.choice(["dtype", "shape", "data_offsets", "data_offsets", "other"])
            value = entry.get(key)
            if isinstance(value, list) and value and rng.random() < 0.7:
                value[rng.randrange(len(value))] = rng.choice(HOSTILE)
            else:
                entry[key] = rng.choice([*HOSTILE, "BOOL", "I64", "F8_E4M3", "C64", [2, 3], [0, 24], [24, 28]])
        if rng.random() < 0.2:
            header[rng.choice(["__metadata__", "x" * 300, ""])] = rng.choice(HOSTILE)
        text = json.dumps(header).encode()
        length = len(text) if rng.random() < 0.9 else rng.choice([0, 1, len(text) + 1, 2**32, 2**63, 2**64 - 1])
        payload = plain[start:] * rng.choice([1, 1, 1, 0, 2])
        path = tmp_path / "a.safetensors"
        content = outcome(read_weights, path, struct.pack("<Q", length) + text + payload)
        if content is not None:
            sound(content, path)

    cases("safetensors headers", check)


# --- JSON, and the index of shards ---


def test_json(tmp_path: Path) -> None:
    text = json.dumps(
        {"_class_name": "UNet2DModel", "block_out_channels": [8, 16], "norm_eps": 1e-6, "a": None}
    ).encode()
    pieces = [b"[" * 3000, b'{"a":' * 2000, b"9" * 6000, b"1e9999", b"NaN", b"\\ud800", b"\xef\xbb\xbf", b"\0"]

    def check(rng: random.Random) -> None:
        data = damaged(text, rng)
        if rng.random() < 0.2:
            at = rng.randrange(len(data) + 1)
            data = data[:at] + rng.choice(pieces) + data[at:]
        content = outcome(read_json, tmp_path / "config.json", data)
        assert content is None or isinstance(content, dict)

    cases("JSON", check)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_settings() -> None:
    """Well-formed config.json and scheduler_config.json that say nonsense: refused, or a model and a schedule."""
    state, config = tiny().state_dict(), CONFIG.to_dict()
    scheduler = {"_class_name": "DDPMScheduler", **Schedule().to_dict(), "method": "ddpm", "beta_min": 0.1}
    words = ["DownBlock2D", "SkipDownBlock2D", ["SkipUpBlock2D"] * 2, [4, 4], "fourier", "learned", "timestep", "ddim"]
    words += ["DDIMScheduler", "PNDMScheduler", "ScoreSdeVpScheduler", "sections", "250", [[1]], float("nan"), 10**6]

    def check(rng: random.Random) -> None:
        files: list[dict[str, Any]] = [dict(config), dict(scheduler)]
        for _ in range(rng.randint(1, 4)):
            file = rng.choice(files)
            file[rng.choice(sorted(file))] = rng.choice([*HOSTILE, *words])
        try:
            found = Found("here", Path("here"), state, config=files[0], scheduler=files[1])
            checkpoint = diffusers.FAMILY.load(found)  # type: ignore[misc]
        except CheckpointError as error:
            assert str(error).isprintable() and len(str(error)) > 20
            return
        assert all(bool(p.isfinite().all()) for p in checkpoint.model.parameters())
        assert checkpoint.schedule.alphas_cumprod.ndim == 1

    cases("settings", check)


def test_shard_indices(tmp_path: Path) -> None:
    """Names that lead elsewhere, to other files of the folder, or to nothing. A pickle outside is not opened."""
    inside, outside = tmp_path / "model", tmp_path / "secret.safetensors"
    inside.mkdir()
    outside.write_bytes(safetensors_save({"conv_in.bias": torch.full((2,), 13.0)}))
    for name, tensor in STATE.items():
        (inside / f"{name}.safetensors").write_bytes(safetensors_save({name: tensor}))
    (inside / "link.safetensors").symlink_to(outside)
    index = inside / "weights.safetensors.index.json"
    sound_map = {name: f"{name}.safetensors" for name in STATE}
    names = [
        "../secret.safetensors",
        str(outside),
        "link.safetensors",
        "..",
        ".",
        "",
        "model/../..",
        "a\\b",
        "C:x",
        "\0",
    ]
    names += [index.name, "conv_in.bias.safetensors", "x" * 5000, "nowhere.bin", 3, None, ["a"], {"b": 1}]

    def check(rng: random.Random) -> None:
        weight_map: dict[str, Any] = dict(sound_map)
        for _ in range(rng.randint(0, 2)):
            weight_map[rng.choice([*STATE, "more", "../more"])] = rng.choice(names)
        content = {"metadata": {}, "weight_map": rng.choice([weight_map] * 12 + [[], None, "x", {}])}
        text = json.dumps(content).encode()
        tensors = outcome(read_sharded, index, damaged(text, rng) if rng.random() < 0.4 else text)
        if tensors is not None:
            assert {name: t.tolist() for name, t in tensors.items()} == {name: t.tolist() for name, t in STATE.items()}

    cases("shard indices", check)


# --- structures in a file, and DDUF files ---


def test_containers(tmp_path: Path) -> None:
    """Networks and averages among values of every kind, at any depth: loaded as they are, or refused in one line."""
    state = {name: t.detach() for name, t in tiny().state_dict().items()}
    averages = [t + 1 for t in state.values()]
    path = tmp_path / "a.pt"
    loaded = 0

    def value(rng: random.Random, depth: int) -> Any:
        kind = rng.randrange(12 if depth < 4 else 6)
        if kind < 6:
            return [None, 3, "text", torch.zeros(2), torch.zeros(()), b"bytes"][kind]
        if kind < 8:
            few = rng.sample(sorted(state), rng.choice([1, 5, len(state)]))
            return {rng.choice(["", "module.", "net."]) + name: state[name] for name in few}
        if kind == 8:
            return {"shadow_params": rng.choice([averages, averages[1:], averages[::-1], [None], []]), "decay": 0.9}
        if kind == 9:
            return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
        keys = ["model", "ema", "a.b", "", ".", "..", 3, None, "module", "state_dict", "n_averaged", "x" * 300]
        return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(5))}

    def check(rng: random.Random) -> None:
        nonlocal loaded
        content = {"model": state, **{f"k{i}": value(rng, 0) for i in range(rng.randrange(4))}}
        if rng.random() < 0.5:
            content = value(rng, 0)
        layout = Layout(path, CONFIG.to_dict(), None, None, [], rng.choice([None, None, "model", "ema", "k0", "", "."]))
        try:
            found, family = identify(content, layout, "here")
            assert family.load is not None
            checkpoint = family.load(found)
        except CheckpointError as error:
            assert str(error).isprintable() and len(str(error)) > 20
            return
        loaded += 1
        for name, tensor in checkpoint.model.state_dict().items():
            assert torch.equal(tensor, state[name]) or torch.equal(tensor, state[name] + 1)

    cases("containers", check)
    assert loaded > 30


def test_dduf_files(tmp_path: Path, trap: Path) -> None:
    """Every member that is read has a checksum; members with other names are not even unpacked."""
    members = {
        "model_index.json": b"{}",
        "unet/config.json": json.dumps(CONFIG.to_dict()).encode(),
        "unet/diffusion_pytorch_model.safetensors": safetensors_save(tiny().state_dict()),
        "unet/../../../outside.txt": b"x",
        "../outside.txt": b"x",
        "unet/modeling.py": b"raise SystemExit",
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    read = 0

    def check(rng: random.Random) -> None:
        nonlocal read
        checkpoint = outcome(load, tmp_path / "a.dduf", damaged(stream.getvalue(), rng))
        if checkpoint is not None:
            read += 1
            expected = tiny().state_dict()
            assert all(torch.equal(t, expected[n]) for n, t in checkpoint.model.state_dict().items())

    cases("DDUF files", check)
    assert read < 50 and not list(tmp_path.parent.rglob("outside.txt"))


# --- torch.save ---


class Runs:
    """Unpickled by anything but weights_only, it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """Where Runs leaves its trace; there is none at the end."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "a file's own code was run"


def torch_file(content: Any, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def test_damaged_zips(tmp_path: Path, trap: Path) -> None:
    """Every change of a byte that is read is seen by a checksum."""
    files = [torch_file(STATE), torch_file({**STATE, "x": Runs(trap)})]
    path = tmp_path / "a.bin"

    def check(rng: random.Random) -> None:
        which = rng.randrange(4) == 0
        content = outcome(read_weights, path, damaged(files[which], rng))
        if content is not None:
            assert not which
            assert {name: t.tolist() for name, t in content.items()} == {name: t.tolist() for name, t in STATE.items()}

    cases("damaged zips", check)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickles_inside_sound_zips(tmp_path: Path, trap: Path) -> None:
    """The checksums are right, so that the unpickler meets every change."""
    members = []
    beside = {"args": argparse.Namespace(a=1), "model": STATE, "x": np.float64(2)}
    for content in (STATE, {**STATE, "x": Runs(trap)}, [STATE, {"state": {}}, 3], beside, {**beside, "y": Runs(trap)}):
        with zipfile.ZipFile(io.BytesIO(torch_file(content))) as archive:
            members.append({name: archive.read(name) for name in archive.namelist()})
    path = tmp_path / "a.pt"
    read = 0

    def check(rng: random.Random) -> None:
        nonlocal read
        parts = dict(rng.choice(members))
        name = next(n for n in parts if n.endswith("data.pkl"))
        parts[name] = damaged(parts[name], rng)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for member, data in parts.items():
                archive.writestr(member, data)
        content = outcome(read_weights, path, stream.getvalue())
        if content is not None:
            read += 1
            sound(content, path)

    cases("pickles inside sound zips", check)
    assert read > 20


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_old_pickles(tmp_path: Path, trap: Path) -> None:
    """torch.save's format before 1.6, which has no checksum, and plain pickles."""
    whole = {**STATE, "x": Runs(trap)}
    files = [torch_file(STATE, False), torch_file(whole, False), pickle.dumps(Runs(trap)), pickle.dumps({"a": [1.0]})]
    settings_beside = {"args": argparse.Namespace(a=[1, 2]), "model": STATE, "x": np.float64(2)}
    files += [torch_file(settings_beside, False), torch_file({**settings_beside, "x": Runs(trap)}, False)]
    files += [pickle.dumps(settings_beside, protocol) for protocol in range(2, 6)]
    path = tmp_path / "a.pth"

    def check(rng: random.Random) -> None:
        content = outcome(read_weights, path, damaged(rng.choice(files[:1] * 3 + files), rng))
        if content is not None:
            sound(content, path)

    cases("old pickles", check)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_bytes(tmp_path: Path) -> None:
    heads = [b"", b"\x80\x02", b"PK\x03\x04", b"\x08" + bytes(7) + b"{", b"version https://git-lfs", b"\x80\x04\x95"]

    def check(rng: random.Random) -> None:
        data = rng.choice(heads) + rng.randbytes(rng.randrange(200))
        name = rng.choice(["a.bin", "a.pt", "a.safetensors", "a.index.json"])
        assert outcome(read_weights, tmp_path / name, data) is None

    cases("any bytes", check)
