"""The timing harness, which is part of the package (`ddpm_fast.benchmarking.timing`), and what it costs.

python -m benchmarks.timing          # what the harness adds to a step of 10 ms, as shares of it; 1% at most
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ddpm_fast.benchmarking.environment import cache_bytes, environment
from ddpm_fast.benchmarking.timing import (
    Clock,
    Comparison,
    CudaClock,
    HostClock,
    Ratio,
    Run,
    Timed,
    clock_for,
    compare,
    copied,
    copies_for,
    overhead,
    paired_ratio,
    rotated,
)

__all__ = [
    "Clock",
    "Comparison",
    "CudaClock",
    "HostClock",
    "Ratio",
    "Run",
    "Timed",
    "cache_bytes",
    "clock_for",
    "compare",
    "copied",
    "copies_for",
    "environment",
    "overhead",
    "paired_ratio",
    "rotated",
]

LIMIT = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step-ms", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args(argv)
    found = overhead(args.step_ms, args.rounds)
    print(f"a step of {found['step_ms']:g} ms: reported {found['reported']:+.4%} of it too much (median)")
    print(f"time of a round outside its samples: {found['between']:.4%} of a step")
    return 0 if max(abs(found["reported"]), found["between"]) < LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
