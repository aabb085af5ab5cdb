"""How fast the engine samples here, where the time of a step goes, and whether it is right.

    python -m benchmarks.engine --out benchmarks/results               # google/ddpm-cifar10-32's network, bfloat16
    python -m benchmarks.engine --compiled --batch 64                  # beside diffusers' U-Net under torch.compile
    python -m benchmarks.engine --preset-model tiny --batch 1 --dtype float32 --steps 3       # on a CPU

Weights are random: speed does not depend on them. The house rule comes first; where it is broken the error is written
and no speed is. Forms whose images are not eager's, bit for bit, and forms that fail are named and not timed. Variants
take turns in `benchmarking.timing`'s harness; a row's images/s is the best form's, of a whole chain where one takes
less than --chain-seconds, else extrapolated. All runs on one card are one JSON file, written after each batch size:
a run that is cut short leaves what it had measured. `make gpu` runs it. `ddpm-fast bench` compares with more of other
people's software, and on a CPU too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_row import RIVAL, Row, line, missing_rival
from benchmarks.engine_text import heading, kernels_text, row_text
from ddpm_fast.benchmarking.environment import environment
from ddpm_fast.checkpoints import Checkpoint
from ddpm_fast.config import UNetConfig
from ddpm_fast.presets import PRESETS
from ddpm_fast.sampler import DTYPES
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import UNet
from ddpm_fast.verification import Report, verify
from ddpm_fast.whole_files import whole_file


def checkpoint(preset: str) -> Checkpoint:
    """A preset's network with random weights from seed 0, and its schedule."""
    p = PRESETS[preset]
    torch.manual_seed(0)
    model = UNet(UNetConfig(**{**p.model, "sample_size": p.image_size, "dropout": 0.0})).eval()
    return Checkpoint(model, Schedule(**p.schedule), preset, "random weights", [])


def verdict(report: Report) -> dict[str, Any]:
    return {
        "ok": report.ok,
        "largest": max(p.output.ours.largest for p in report.probes),
        "rms": max(p.output.ours.rms for p in report.probes),
        "torch_largest": max(p.output.torch.largest for p in report.probes),
        "torch_rms": max(p.output.torch.rms for p in report.probes),
        "exact": report.exact,
        "details": report.facts(),
    }


def measure(args: argparse.Namespace, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything, JSON-ready; ``save`` is called with what there is after the check and after each batch size."""
    ckpt = checkpoint(args.preset_model)
    report = verify(ckpt, DTYPES[args.dtype], device=args.device, n=2, steps=min(args.steps, 20), probes=4)
    why_not = missing_rival(args) if args.compiled else None
    found: dict[str, Any] = {
        "environment": environment(args.device),
        "model": args.preset_model,
        "dtype": args.dtype,
        "ops": report.ops,
        "chain": ckpt.schedule.num_train_timesteps,
        "timed_steps": args.steps,
        "check": verdict(report),
        "missing": {RIVAL: why_not} if why_not else {},
        "rows": [],
    }
    save(found)
    if not report.ok:
        return found
    rows = [Row(ckpt, batch, args) for batch in ([] if why_not else args.batch)]
    for row in rows:
        found["rows"].append(row.facts)
        _run(row.measure, row, args)
        save(found)
        print(row_text(row.facts), flush=True)
    for row in rows:
        _run(row.profile, row, args)
        save(found)
        if "kernel_us" in row.facts:
            print(kernels_text(row.facts), flush=True)
    return found


def _run(stage: Callable[[], None], row: Row, args: argparse.Namespace) -> None:
    try:
        stage()
    except Exception as error:  # a lost context, say: what other batches gave stays
        row.facts["failed"]["measuring"] = line(error)
    if args.device.type == "cuda":
        torch.cuda.empty_cache()


def write(out: Path, args: argparse.Namespace, found: dict[str, Any]) -> Path:
    """Into the card's file, beside its other runs."""
    card = found["environment"]["device"].replace(" ", "-").replace("/", "-").lower()
    path = out / f"engine-{card}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    run = " ".join([found["model"], found["dtype"], *(["beside torch.compile"] if args.compiled else [])])
    with whole_file(path) as file:
        file.write((json.dumps({**known, run: found}, indent=1) + "\n").encode())
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset-model", choices=tuple(PRESETS), default="cifar10")
    parser.add_argument("--batch", type=int, action="append", help="repeat for more; default: 1, 16, 64, 256")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--steps", type=int, default=50, help="of the chain, for each timing")
    parser.add_argument("--chain-seconds", type=float, default=20.0, help="a whole chain is timed if it takes less")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each variant")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action="store_true", help="beside diffusers' U-Net under torch.compile")
    parser.add_argument("--out", type=Path, help="a folder for the JSON")
    args = parser.parse_args(argv)
    args.batch = args.batch or [1, 16, 64, 256]
    chain = PRESETS[args.preset_model].schedule.get("num_train_timesteps", 1000)
    if min(args.batch) < 1 or not 1 <= args.steps <= chain or args.rounds < 1:
        parser.error(f"--batch and --rounds must be at least 1, --steps in 1..{chain}")

    def save(found: dict[str, Any]) -> None:
        if not found["rows"]:
            print(heading(found), flush=True)
        if args.out is not None:
            write(args.out, args, found)

    found = measure(args, save)
    if args.out is not None:
        print(f"written to {write(args.out, args, found)}")
    return 0 if found["check"]["ok"] and not any(r["failed"] for r in found["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
