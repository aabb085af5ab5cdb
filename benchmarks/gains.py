"""What each part of the CPU's operations gives: the same sampler with that part switched off, in turns.

    python -m benchmarks.gains [--batch 4] [--steps 4] [--rounds 6] [--dtype NAME...] [--out FILE]

google/ddpm-cifar10-32's configuration with random weights, each variant in a process of its own. A gain is the median
over rounds of the time without the part over the time with it. Predicted ones were written down before the first
measurement: from the FLOPs and passes that a part saves.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddpm_fast import Schedule, UNet, UNetConfig
from ddpm_fast.benchmarking import ours
from ddpm_fast.benchmarking.environment import environment
from ddpm_fast.benchmarking.providers import DTYPES, Case, Provider
from ddpm_fast.benchmarking.timing import OwnClock, compare, paired_ratio
from ddpm_fast.benchmarking.worker import Worker
from ddpm_fast.kernels import host_memory, onednn, upsample_difference, winograd
from ddpm_fast.ops import cpu_set as ops_cpu
from ddpm_fast.presets import PRESETS


def _no_compiled_norm() -> None:
    ops_cpu.compiled_norm = lambda dtype: None  # type: ignore[assignment]


def _no_packed_weights() -> None:
    onednn.WORTH = sys.maxsize


def _direct_upsampling() -> None:
    upsample_difference.DIRECT = float("inf")


def _malloc_as_it_comes() -> None:
    host_memory.keep_freed_memory = lambda: False


def _small_tiles() -> None:
    winograd.SCHEMES[torch.float32] = (winograd.F2,)


def _bmm() -> None:
    made = winograd.Products.__init__

    def init(self: Any, *args: Any) -> None:
        made(self, *args)
        self._packs = False

    winograd.Products.__init__ = init  # type: ignore[method-assign]


@dataclass(frozen=True)
class Part:
    """Something that one set of operations has and could do without."""

    name: str
    operations: str
    switch_off: Callable[[], None]  # in the worker's process, before anything is made
    predicted: dict[str, float]  # dtype -> time without it over time with it, at batch 4


PARTS = (
    Part("normalisation compiled", "cpu", _no_compiled_norm, {"float32": 1.04, "bfloat16": 1.08}),
    Part("weights packed once", "cpu", _no_packed_weights, {"float32": 1.05, "bfloat16": 1.10}),
    Part("upsampling by differences or summed taps", "cpu", _direct_upsampling, {"float32": 1.07, "bfloat16": 1.05}),
    Part("freed memory kept", "cpu", _malloc_as_it_comes, {"float32": 1.05, "bfloat16": 1.05}),
    Part("F(4x4, 3x3)", "winograd", _small_tiles, {"float32": 1.3}),
    Part("products as one grouped convolution", "winograd", _bmm, {"float32": 1.3, "bfloat16": 1.3}),
)


def make(case: Case, dtype: torch.dtype, operations: str, without: int | None) -> ours.Ours:
    """A sampler by a set of operations, without one of `PARTS`."""
    if without is not None:
        PARTS[without].switch_off()
    return ours.make(case, dtype, operations)


def measure(
    case: Case, dtype: str, rounds: tuple[int, int], budget_s: float, parts: Sequence[Part] = PARTS
) -> list[dict[str, Any]]:
    """A row for each of ``parts`` that ``dtype`` has: what it was predicted to give, and what it gave."""
    chosen = [(PARTS.index(p), p) for p in parts if dtype in p.predicted]
    # Of this module by its name, also where it is run as a script: workers import it.
    from benchmarks import gains

    wanted: dict[str, tuple[str, int | None]] = {p.operations: (p.operations, None) for _, p in chosen}
    wanted |= {f"{p.operations} without {p.name}": (p.operations, i) for i, p in chosen}
    with tempfile.TemporaryDirectory(prefix="ddpm-fast-gains-") as folder, ExitStack() as running:
        turns = {}
        for name, (operations, without) in wanted.items():
            provider = Provider(name, partial(gains.make, operations=operations, without=without), ours=True)
            turns[name] = running.enter_context(Worker(provider, dtype, case, Path(folder))).turn
        timed = compare(turns, clock=OwnClock(), rounds=rounds, budget_s=budget_s, repeat=False)
    rows = []
    for _, p in chosen:
        without = f"{p.operations} without {p.name}"
        gain = paired_ratio(timed[without].samples_ms, timed[p.operations].samples_ms)
        rows.append(
            {
                "operations": p.operations,
                "part": p.name,
                "dtype": dtype,
                "batch": case.batch,
                "predicted": p.predicted[dtype],
                "gain": {"value": gain.value, "low": gain.low, "high": gain.high},
                "ms_a_step": {
                    "with": timed[p.operations].median_ms / case.steps,
                    "without": timed[without].median_ms / case.steps,
                },
            }
        )
    return rows


def markdown(found: dict[str, Any]) -> str:
    """The table of docs/performance.md."""
    lines = ["| set | part | dtype | predicted | measured | ms a step without, with it |", "|---|---|---|---|---|---|"]
    for r in found["rows"]:
        gain, ms = r["gain"], r["ms_a_step"]
        lines.append(
            f"| {r['operations']} | {r['part']} | {r['dtype']} | {r['predicted']:.2f} | {gain['value']:.2f} "
            f"({gain['low']:.2f} .. {gain['high']:.2f}) | {ms['without']:.1f}, {ms['with']:.1f} |"
        )
    e = found["environment"]
    return "\n".join(lines) + (
        f"\n\nBatch {found['batch']}; {e['device']}, {e['threads']} threads; torch {e['versions']['torch']}; commit "
        f"{str(e['commit'])[:12]}. Command: `{e['command']}`."
    )


def model() -> UNet:
    torch.manual_seed(0)
    return UNet(UNetConfig(**{**PRESETS["cifar10"].model, "sample_size": 32})).eval()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6, help="at least")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for the rounds of a dtype")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="a .json file")
    args = parser.parse_args(argv)
    command = ["python", "-m", "benchmarks.gains", *(sys.argv[1:] if argv is None else argv)]
    found: dict[str, Any] = {"environment": environment(torch.device("cpu"), command), "batch": args.batch, "rows": []}
    case = Case(model(), Schedule(), args.batch, args.steps, torch.device("cpu"))
    for dtype in args.dtype:
        if onednn.computes(DTYPES[dtype]):
            found["rows"] += measure(case, dtype, (args.rounds, 4 * args.rounds), args.budget)
        else:
            print(f"{dtype}: this processor has no convolutions in it", file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
