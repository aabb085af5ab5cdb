"""What accelerate's comparison with the pipeline costs, for the network of google/ddpm-cifar10-32 with random weights.

    python -m benchmarks.accelerate [--rounds 5] [--steps 20]

Each round times, one after the other: the comparison of the networks; that of 1000 scheduler steps; what a call spends
before it draws when nothing has changed; and one image by so many steps, from which that of 1000 steps is reckoned.
Medians over the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import diffusers
import torch

import ddpm_fast as df
from ddpm_fast.network_check import check_network
from ddpm_fast.presets import preset
from ddpm_fast.scheduler_check import checked_steps


def seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    library: Any = diffusers  # it has no types
    torch.manual_seed(0)
    unet = library.UNet2DModel(sample_size=32, **preset("cifar10").model).eval().to(device)
    pipeline = library.DDPMPipeline(unet, library.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    fast = df.accelerate(pipeline)
    model, schedule = fast._look()
    works: dict[str, Callable[[], object]] = {
        "networks compared": lambda: check_network(unet, unet, model, 1000),
        "1000 steps compared": lambda: checked_steps(pipeline.scheduler, schedule, 1000, (3, 3)),
        "nothing changed": lambda: (fast._look(), fast._checked_steps(schedule, args.steps, (3, 3), None, None)),
        "drawn": lambda: fast(1, num_inference_steps=args.steps, output_type="pt"),
    }
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.rounds):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    found = {name: median(each) for name, each in times.items()}
    image = found.pop("drawn") * 1000 / args.steps
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters, {device}, {torch.get_num_threads()} threads")
    print(f"one image by 1000 steps: {image:.1f} s (from {args.steps} steps)")
    for name, took in found.items():
        print(f"{name}: {took:.4f} s, {took / image:.2%} of it")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
