"""What the sample store costs: its share of sampling time, and how long a set of 1,000 shards takes to go on.

    python -m benchmarks.store [--n 32] [--batch-size 16] [--steps N] [--shards 1000] [--out FILE]

Overhead: the bundled model on a CPU, as ``ddpm-fast sample`` draws it. Time outside the sampler (claims, checksums,
fsync, listings, the bar) over time inside it, by the wall clock, since it is the disk that is waited for. Shards of one
batch are the worst case. Resume: the fingerprint of the model, the manifest compared, every shard's presence, size and
times, up to the first claim; beside it all checksums compared, and a whole process on a set that is finished.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import ddpm_fast as df
from ddpm_fast.benchmarking.environment import environment
from ddpm_fast.store import UNFINISHED, SampleStore
from ddpm_fast.store import manifest as store_manifest
from ddpm_fast.store.claims import Claims
from ddpm_fast.store.workers import fill

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"overhead": 0.01, "resume_start_s": 2.0}  # at most


class Timed:
    """A sampler whose time is counted."""

    def __init__(self, sampler: df.Sampler):
        self.sampler, self.seconds, self.cpu_seconds = sampler, 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def sample(self, *args: Any, **options: Any) -> torch.Tensor:
        began, cpu = time.perf_counter(), time.process_time()
        x = self.sampler.sample(*args, **options)
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu
        return x


def manifest(checkpoint: Any, sampler: df.Sampler, n: int, shard_size: int) -> dict[str, Any]:
    return store_manifest.describe(
        checkpoint, sampler, n=n, seed=0, first_id=0, label=None, shard_size=shard_size, truncate=False, chain={}
    )


def overhead(checkpoint: Any, folder: Path, n: int, batch_size: int, steps: int | None) -> dict[str, Any]:
    """Sampling and everything else of a set of n images, a shard a batch."""
    sampler = df.Sampler(checkpoint.model, checkpoint.schedule, batch_size, steps=steps)
    sampler.sample(batch_size)  # warm
    timed = Timed(sampler)
    began = time.perf_counter()
    store, _ = SampleStore.begin(folder, manifest(checkpoint, sampler, n, batch_size))
    fill(store, timed, progress=True)  # type: ignore[arg-type]
    total_s = time.perf_counter() - began
    return {
        "images": n,
        "shard_size": batch_size,
        "steps": len(sampler.table),
        "ops": sampler.ops.name,
        "sampling_s": timed.seconds,
        "sampling_cpu_s": timed.cpu_seconds,  # of all threads: on a busy machine less than the wall clock's
        "store_s": total_s - timed.seconds,
        "store_ms_per_shard": 1000 * (total_s - timed.seconds) / len(store),
        "overhead": (total_s - timed.seconds) / timed.seconds,
    }


def resume(checkpoint: Any, folder: Path, shards: int, shard_size: int, repeats: int = 5) -> dict[str, Any]:
    """A set with one shard missing, opened again."""
    sampler = df.Sampler(checkpoint.model, checkpoint.schedule, shard_size)
    described = manifest(checkpoint, sampler, shards * shard_size, shard_size)
    store, _ = SampleStore.begin(folder, described)
    levels = np.random.default_rng(0).integers(0, 256, (shard_size, *store.image_shape)).astype(np.uint8)
    for shard in range(shards):
        store.write(shard, levels, None, folder / UNFINISHED / "x.tmp")
    last = folder / "checksums" / f"{shards - 1:06d}.sha256"
    content = last.read_bytes()
    starts, full = [], []
    for _ in range(repeats):
        last.unlink()
        began = time.perf_counter()
        store, _ = SampleStore.begin(folder, manifest(checkpoint, sampler, shards * shard_size, shard_size))
        assert store.check() == []
        with Claims(folder / UNFINISHED) as claims:
            (missing,) = set(range(shards)) - store.finished()
            assert claims.take(f"{missing:06d}")
            starts.append(time.perf_counter() - began)
        last.write_bytes(content)
        began = time.perf_counter()
        assert store.check(every=True) == []
        full.append(time.perf_counter() - began)
    return {
        "shards": shards,
        "shard_bytes": levels.nbytes,
        "resume_start_s": median(starts),
        "all_checksums_s": median(full),
    }


def whole_process(folder: Path, n: int, shard_size: int) -> float:
    """Seconds of ``ddpm-fast sample`` on a set that is finished, with the start of Python and torch."""
    words = [sys.executable, "-m", "ddpm_fast", "sample", "-n", str(n), "--batch-size", str(shard_size)]
    began = time.perf_counter()
    subprocess.run([*words, "--device", "cpu", "--out", str(folder)], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--n", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, help="of the chain; default: all of them")
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; default: the system's for temporary files"
    )
    parser.add_argument("--out", type=Path, help="a JSON file; default: standard output")
    args = parser.parse_args()
    checkpoint = df.load()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        shares = overhead(checkpoint, Path(name) / "a", args.n, args.batch_size, args.steps)
        starts = resume(checkpoint, Path(name) / "b", args.shards, args.batch_size)
        starts["whole_process_s"] = whole_process(Path(name) / "b", args.shards * args.batch_size, args.batch_size)
    facts = {
        "environment": environment(torch.device("cpu")),
        "overhead": shares,
        "resume": starts,
        "goals": GOALS,
        "ok": shares["overhead"] < GOALS["overhead"] and starts["resume_start_s"] < GOALS["resume_start_s"],
    }
    text = json.dumps(facts, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    raise SystemExit(not facts["ok"])


if __name__ == "__main__":
    main()
