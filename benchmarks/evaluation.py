"""Evaluation: images a second through the extractor, and the memory that 50,000 images need.

    python -m benchmarks.evaluation                 # prints JSON

The memory is that of the whole command on an .npz of 50,000 images against statistics with as many features, with an
extractor that costs nothing (random features): what is held is the same. The speed is the real extractor's.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

from ddpm_fast.evaluation import evaluate, statistics
from ddpm_fast.evaluation.features import Extractor, extractor
from ddpm_fast.evaluation.image_stream import open_stream


def images_per_s(name: str, size: int, batch: int, rounds: int, device: str) -> float:
    """Median over rounds of one batch each, pixels to features."""
    network = extractor(name, device)
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    network(pixels)
    times = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        network(pixels)
        times.append(time.perf_counter() - began_s)
    return batch / median(times)


def write_random(path: Path, n: int, size: int) -> None:
    """An .npz of random images, written piece by piece."""
    random = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, size, size, 3)}
        np.lib.format.write_array_header_1_0(member, header)
        for first in range(0, n, 1000):
            member.write(random.bytes(min(1000, n - first) * size * size * 3))


def peak_mib(n: int, size: int, features: int) -> tuple[float, float]:
    """(MiB of this process before, MiB at its peak) of an evaluation of n images."""
    draw = torch.Generator().manual_seed(0)
    free = Extractor(
        "random", "FD", features, torch.device("cpu"), lambda x: torch.randn(len(x), features, generator=draw)
    )
    against = statistics((torch.randn(500, features, generator=draw) for _ in range(20)), 10_000, "random")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder) / "samples.npz", n, size)
        evaluate(open_stream(Path(folder) / "samples.npz"), against, free, batch_size=64)
    unit = 1024 if sys.platform != "darwin" else 1024**2
    return before / unit, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", default="efficientnet-lite0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=32, help="Pixels a side.")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=50_000, help="For the memory.")
    words = parser.parse_args()
    before, peak = peak_mib(words.images, words.size, 1280)
    speed = images_per_s(words.features, words.size, words.batch, words.rounds, words.device)
    facts = {
        "features": words.features,
        "device": words.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images_per_s": round(speed, 1),
        "images": words.images,
        "mib_before": round(before),
        "mib_peak": round(peak),
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
