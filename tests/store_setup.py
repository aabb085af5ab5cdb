"""Sets of samples for tests: a stand-in sampler whose images can be told by their ids, and what a set must hold."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ddpm_fast.store import SampleStore

SHAPE = (4, 6, 3)  # H, W, C


class StandIn:
    """A `Sampler` as far as workers know one. Levels are a hash of (seed, id, label), so that any mix-up shows."""

    def __init__(self, batch_size: int = 4, steps: int = 10, shape: tuple[int, int, int] = SHAPE):
        self.batch_size, self.table, self.shape = batch_size, range(steps), shape
        self.drawn: list[int] = []  # ids, in the order they were drawn
        self.at_shard: dict[int, Any] = {}  # first id -> what to do before it is drawn

    def sample(
        self, n: int, seed: int, labels: Any, first_id: int, callback: Any = None, interval: int = 1
    ) -> torch.Tensor:
        self.at_shard.get(first_id, lambda: None)()
        self.drawn += range(first_id, first_id + n)
        given = [None] * n if labels is None else labels.tolist()
        x = np.stack([levels(seed, i, k, self.shape) for i, k in zip(range(first_id, first_id + n), given)])
        if callback is not None:
            for batch in range(0, n, self.batch_size):
                part = torch.zeros(min(self.batch_size, n - batch), 1)
                for step in range(0, len(self.table) + 1, interval):
                    callback(step, part)
        return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1


def levels(seed: int, sample_id: int, label: int | None = None, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """The image [H, W, C] uint8 of the stand-in."""
    key = hashlib.sha256(f"{seed} {sample_id} {label}".encode()).digest()
    return np.random.default_rng(np.frombuffer(key, np.uint64)).integers(0, 256, shape).astype(np.uint8)


def manifest(n: int = 22, shard_size: int = 4, **changes: Any) -> dict[str, Any]:
    """Of the stand-in's sets; ``changes`` by field, or by dotted name with "__" for the dot."""
    values: dict[str, Any] = {
        "format": 1,
        "n": n,
        "seed": 3,
        "first_id": 0,
        "shard_size": shard_size,
        "image_shape": list(SHAPE),
        "labels": None,
        "model": {"fingerprint": "f" * 64, "config": {"block_out_channels": [4, 8]}},
        "schedule": {"num_train_timesteps": 10, "beta_end": 0.5},
        "sampler": {
            "method": None,
            "steps": None,
            "eta": 0.0,
            "table": "t" * 64,
            "dtype": "float32",
            "ops": "reference",
            "batch_size": 4,
            "to_uint8": "round",
        },
        "device": "cpu",
        "threads": 1,
        "source": "a",
        "environment": {"torch": "2.13.0"},
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values[section] if section else values)[key] = value
    return values


def begin(folder: Path, **changes: Any) -> SampleStore:
    return SampleStore.begin(folder, manifest(**changes))[0]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def expected(folder: Path, images: np.ndarray, shard_size: int, labels: np.ndarray | None = None) -> dict[str, bytes]:
    """The files of a whole set of these images [n, H, W, C], written by numpy and hashed here; all but the manifest."""
    out: dict[str, bytes] = {}
    scratch = folder / "scratch.npy"
    folder.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(images), shard_size)):
        lines = []
        for kind, array in (("labels", labels), ("images", images)):
            if array is None:
                continue
            np.save(scratch, array[start : start + shard_size])
            name = f"{kind}/{shard:06d}.npy"
            out[name] = scratch.read_bytes()
            lines.append(f"{hashlib.sha256(out[name]).hexdigest()}  {name}\n")
        out[f"checksums/{shard:06d}.sha256"] = "".join(lines).encode()
    scratch.unlink()
    return out


def without_manifest(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name != "manifest.json"}


def checkpoint(model: torch.nn.Module, schedule: Any) -> Any:
    return SimpleNamespace(model=model, schedule=schedule, source="somewhere")
