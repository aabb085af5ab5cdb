"""How fast the engine samples here, beside diffusers' U-Net under torch.compile, and whether it is right.

    python -m benchmarks.engine --out benchmarks/results            # google/ddpm-cifar10-32's network, bfloat16
    python -m benchmarks.engine --preset-model tiny --batch 1 --batch 4 --dtype float32 --steps 3   # on a CPU

Weights are random: speed does not depend on them. The house rule, graph against eager and batch 1 against batch n
come first; where one is broken the error is written and no speed is. Variants take turns in `benchmarking.timing`'s
harness, and what is reported is the median of a step's time, so images/s is an extrapolation to the whole chain, but
for --full. `make gpu` runs it. `ddpm-fast bench` compares with more of other people's software, and on a CPU too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.benchmarking.environment import environment
from ddpm_fast.benchmarking.providers import Case, chosen
from ddpm_fast.benchmarking.timing import clock_for, compare
from ddpm_fast.checkpoints import Checkpoint
from ddpm_fast.config import UNetConfig
from ddpm_fast.presets import PRESETS
from ddpm_fast.sampler import DTYPES, Sampler
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import UNet
from ddpm_fast.verification import Report, verify

GRAPHS = ("none", "step", "chunk", "loop")


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
        "exact": report.exact,
    }


def sampling(ckpt: Checkpoint, graph: str, batch: int, args: argparse.Namespace) -> Callable[[], object]:
    """A call that runs a chain of ``args.steps`` steps, x_T included."""
    sampler = Sampler(
        ckpt.model,
        ckpt.schedule,
        batch_size=batch,
        steps=args.steps,
        dtype=DTYPES[args.dtype],
        device=args.device,
        graph=graph,
    )
    return lambda: sampler.sample(batch)


def compiled(ckpt: Checkpoint, batch: int, args: argparse.Namespace) -> Callable[[], object] | None:
    """diffusers' U-Net as fast as torch makes it (`benchmarking.peers`), in its own loop. None without diffusers."""
    (provider,) = chosen(["diffusers-compile"])
    dtype = DTYPES[args.dtype]
    if provider.missing(args.device, dtype) is not None:
        return None
    made = provider.make(Case(ckpt.model, ckpt.schedule, batch, args.steps, args.device), dtype)
    return lambda: made.chain(0)


def launches_a_step(ckpt: Checkpoint, batch: int, args: argparse.Namespace) -> int | None:
    """Kernels that the profiler sees in a step, launched by the host; None off CUDA."""
    if args.device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    args = argparse.Namespace(**{**vars(args), "steps": 2})
    two = sampling(ckpt, "none", batch, args)
    args = argparse.Namespace(**{**vars(args), "steps": 12})
    twelve = sampling(ckpt, "none", batch, args)
    counts = []
    for run in (two, twelve):
        run()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        counts.append(sum(e.count for e in seen.key_averages() if not e.key.startswith(("Memcpy", "Memset"))))
    return (counts[1] - counts[0]) // 10


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, JSON-ready."""
    ckpt = checkpoint(args.preset_model)
    report = verify(ckpt, DTYPES[args.dtype], device=args.device, n=2, steps=min(args.steps, 20), probes=4)
    found: dict[str, Any] = {
        "environment": environment(args.device),
        "model": args.preset_model,
        "dtype": args.dtype,
        "ops": report.ops,
        "chain": ckpt.schedule.num_train_timesteps,
        "timed_steps": args.steps,
        "check": verdict(report),
        "rows": [],
    }
    if not report.ok:
        return found
    graphs = GRAPHS if args.device.type == "cuda" else ("none",)
    for batch in args.batch:
        variants: dict[str, Callable[[], object]] = {g: sampling(ckpt, g, batch, args) for g in graphs}
        baseline = compiled(ckpt, batch, args) if args.compiled else None
        if baseline is not None:
            variants["torch.compile"] = baseline
        rounds = (args.rounds, args.rounds)
        timed = compare(variants, clock=clock_for(args.device), rounds=rounds, repeat=False)
        ms = {name: timed[name].median_ms / args.steps for name in variants}
        fastest = min((m, g) for g, m in ms.items() if g in graphs)
        row = {
            "batch": batch,
            "ms_a_step": ms,
            "best_graph": fastest[1],
            "images_per_s": batch * 1e3 / (fastest[0] * found["chain"]),
            "extrapolated": args.steps < found["chain"],
            "launches_a_step": launches_a_step(ckpt, batch, args),
            "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if args.device.type == "cuda" else None,
        }
        if baseline is not None:
            row["times_torch_compile"] = ms["torch.compile"] / fastest[0]
        found["rows"].append(row)
        if args.device.type == "cuda":
            del variants, baseline
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return found


def table(found: dict[str, Any]) -> str:
    """The rows for a person."""
    check, env = found["check"], found["environment"]
    lines = [
        f"{found['model']}, {found['dtype']}, ops={found['ops']}, {env['device']}, torch {env['versions']['torch']}, "
        f"commit {(env['commit'] or 'unknown')[:12]}",
        f"house rule {'holds' if check['ok'] else 'BROKEN'}: largest {check['largest']:.3g}, rms {check['rms']:.3g}; "
        + (", ".join(f"{k}: {'equal' if v else 'DIFFERENT'}" for k, v in check["exact"].items()) or "nothing bitwise"),
    ]
    if not found["rows"]:
        return "\n".join([*lines, "no speed is reported for a configuration that is not right"])
    names = list(found["rows"][0]["ms_a_step"])
    lines.append("batch  images/s  " + "  ".join(f"{n} ms" for n in names) + "  launches")
    for r in found["rows"]:
        cells = "  ".join(f"{r['ms_a_step'][n]:{len(n) + 3}.3f}" for n in names)
        mark = "*" if r["extrapolated"] else " "
        lines.append(f"{r['batch']:>5}  {r['images_per_s']:>8.3g}{mark} {cells}  {r['launches_a_step'] or '-'}")
    if any(r["extrapolated"] for r in found["rows"]):
        lines.append(f"* extrapolated from {found['timed_steps']} of {found['chain']} steps")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset-model", choices=tuple(PRESETS), default="cifar10")
    parser.add_argument("--batch", type=int, action="append", help="repeat for more; default: 1, 16, 64, 256")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--steps", type=int, default=50, help="of the chain, for each timing")
    parser.add_argument("--full", action="store_true", help="time whole chains")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each variant")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="a folder for the JSON")
    args = parser.parse_args(argv)
    args.batch = args.batch or [1, 16, 64, 256]
    chain = PRESETS[args.preset_model].schedule.get("num_train_timesteps", 1000)
    args.steps = chain if args.full else args.steps
    if min(args.batch) < 1 or not 1 <= args.steps <= chain or args.rounds < 1:
        parser.error(f"--batch and --rounds must be at least 1, --steps in 1..{chain}")
    found = measure(args)
    print(table(found))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"engine-{found['model']}-{found['dtype']}-{found['environment']['device']}".replace(" ", "-").lower()
        path = args.out / f"{name}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written to {path}")
    return 0 if found["check"]["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
