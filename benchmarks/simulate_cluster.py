"""Dealing shards to many workers, simulated: efficiency, lost work and the best shard size.

    python -m benchmarks.simulate_cluster                                  # the tables of docs/scale.md
    python -m benchmarks.simulate_cluster --images 10000000 --workers 64 4096 --shard 256 1024

The rules are the sample store's. A free worker takes the first shard that is neither finished nor claimed. A worker
that dies loses what it had of its shard, starts again after a while, and the shard is taken up when its claim is seen
to be stale. Workers with nothing to do wait until the set is whole. A finished shard is never done again. Time is
simulated, from the given rates; nothing is measured here.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

HOUR = 3600.0


@dataclass(frozen=True)
class Cluster:
    """Workers, and what goes wrong with them."""

    workers: int = 64
    seconds_per_image: float = 1 / 57.5  # of a worker at nominal speed
    start_s: float = 40.0  # process start, loading, preparing, capture: at the beginning and after a failure
    shard_overhead_s: float = 0.05  # claim, write, flush, rename
    hours_between_failures: float = 200.0  # of one worker, exponential; inf: none
    stale_s: float = 120.0  # until a dead worker's claim is taken over, as between machines
    speed_spread: float = 0.03  # deviation of the log of a worker's speed
    straggler_share: float = 0.01  # workers that run at straggler_speed
    straggler_speed: float = 0.4


@dataclass(frozen=True)
class Outcome:
    """One simulated run."""

    wall_s: float
    efficiency: float  # images x nominal seconds, over wall x the workers' speeds
    lost_share: float  # sampling that was thrown away with dead workers, of all sampling
    failures: int
    tail_s: float  # from the first worker that finds nothing left to do, to the end


def simulate(images: int, shard: int, cluster: Cluster, seed: int = 0) -> Outcome:
    """Runs until every shard of ``images`` is finished. ValueError for sizes below 1."""
    if images < 1 or shard < 1 or cluster.workers < 1:
        raise ValueError(f"images, shard and workers must be at least 1; got {images}, {shard}, {cluster.workers}")
    random = np.random.default_rng(seed)
    speeds = np.exp(random.normal(0, cluster.speed_spread, cluster.workers))
    speeds[random.random(cluster.workers) < cluster.straggler_share] = cluster.straggler_speed
    run = _Run(images, shard, cluster, speeds, random)
    return run.outcome()


class _Run:
    """The event loop: one event a worker, the moment it looks for its next shard."""

    def __init__(self, images: int, shard: int, cluster: Cluster, speeds: np.ndarray, random: np.random.Generator):
        self.images, self.shard, self.cluster, self.speeds, self.random = images, shard, cluster, speeds, random
        self.shards = -(-images // shard)
        self.fresh = 0  # shards below were taken at least once
        self.given_up: list[tuple[float, int]] = []  # (from when a claim is stale, shard)
        self.waiting: list[int] = []  # workers with nothing to do
        self.sampled_s = self.lost_s = self.end = 0.0
        self.failures = 0
        self.first_idle = math.inf
        self.stale_from = 0.0  # of the last shard that was given up

    def outcome(self) -> Outcome:
        free = [(self.cluster.start_s, worker) for worker in range(self.cluster.workers)]
        fails = self.random.exponential(self.cluster.hours_between_failures * HOUR, self.cluster.workers)
        heapq.heapify(free)
        while free:
            now, worker = heapq.heappop(free)
            if now >= fails[worker]:  # died while idle or starting
                free_again = fails[worker] + self.cluster.start_s
                fails[worker] = self._next_failure(free_again)
                self.failures += 1
                heapq.heappush(free, (max(now, free_again), worker))
                continue
            taken = self._take(now)
            if taken is None:
                self.first_idle = min(self.first_idle, now)
                if self.given_up:
                    heapq.heappush(free, (self.given_up[0][0], worker))
                else:
                    self.waiting.append(worker)
                continue
            size = min(self.shard, self.images - taken * self.shard)
            seconds = size * self.cluster.seconds_per_image / self.speeds[worker]
            done = now + seconds + self.cluster.shard_overhead_s
            if fails[worker] < done:
                self._die(worker, taken, now, fails, free)
                if self.waiting:  # someone takes it up
                    heapq.heappush(free, (self.stale_from, self.waiting.pop()))
            else:
                self.sampled_s += seconds
                self.end = max(self.end, done)
                heapq.heappush(free, (done, worker))
        ideal = self.images * self.cluster.seconds_per_image
        return Outcome(
            wall_s=self.end,
            efficiency=ideal / (self.end * float(self.speeds.sum())),
            lost_share=self.lost_s / (self.sampled_s + self.lost_s),
            failures=self.failures,
            tail_s=max(0.0, self.end - min(self.first_idle, self.end)),
        )

    def _take(self, now: float) -> int | None:
        if self.given_up and self.given_up[0][0] <= now:
            return heapq.heappop(self.given_up)[1]
        if self.fresh < self.shards:
            self.fresh += 1
            return self.fresh - 1
        return None

    def _die(self, worker: int, taken: int, now: float, fails: np.ndarray, free: list[tuple[float, int]]) -> None:
        moment = float(fails[worker])
        self.failures += 1
        self.lost_s += moment - now
        back = moment + self.cluster.start_s
        self.stale_from = moment + self.cluster.stale_s
        heapq.heappush(self.given_up, (self.stale_from, taken))
        fails[worker] = self._next_failure(back)
        heapq.heappush(free, (back, worker))

    def _next_failure(self, start: float) -> float:
        return start + float(self.random.exponential(self.cluster.hours_between_failures * HOUR))


def average(images: int, shard: int, cluster: Cluster, runs: int) -> dict[str, float]:
    """Means over simulated runs of different seeds."""
    outcomes = [simulate(images, shard, cluster, seed) for seed in range(runs)]
    return {name: float(np.mean([getattr(o, name) for o in outcomes])) for name in Outcome.__dataclass_fields__}


def sweep(images: int, workers: list[int], shards: list[int], cluster: Cluster, runs: int) -> list[dict[str, Any]]:
    """Every number of workers with every shard size."""
    return [
        {
            "workers": w,
            "shard": s,
            "shards": -(-images // s),
            **average(images, s, replace(cluster, workers=w), runs),
        }
        for w in workers
        for s in shards
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: efficiency by workers and shard size, the best of each row marked; then what the best lost."""
    shards = sorted({r["shard"] for r in rows})
    lines = [
        "| workers | " + " | ".join(f"{s:,}" for s in shards) + " | hours | failures | lost | tail |",
        "|---:" * (len(shards) + 5) + "|",
    ]
    for workers in sorted({r["workers"] for r in rows}):
        mine = {r["shard"]: r for r in rows if r["workers"] == workers}
        best = max(mine.values(), key=lambda r: r["efficiency"])
        cells = [f"{'**' if r is best else ''}{r['efficiency']:.1%}{'**' if r is best else ''}" for r in mine.values()]
        lines.append(
            f"| {workers:,} | {' | '.join(cells)} | {best['wall_s'] / HOUR:.3g} | {best['failures']:.1f} | "
            f"{best['lost_share']:.3%} | {best['tail_s']:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    defaults = Cluster()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[50_000, 10_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 512, 4096])
    parser.add_argument("--shard", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--runs", type=int, default=5, help="Simulated runs that a figure is the mean of.")
    parser.add_argument("--json", action="store_true")
    for name in Cluster.__dataclass_fields__:
        if name != "workers":
            parser.add_argument("--" + name.replace("_", "-"), type=float, default=getattr(defaults, name))
    words = parser.parse_args()
    cluster = Cluster(**{n: getattr(words, n) for n in Cluster.__dataclass_fields__ if n != "workers"})
    for images in words.images:
        rows = sweep(images, words.workers, words.shard, cluster, words.runs)
        if words.json:
            print(json.dumps({"images": images, "cluster": cluster.__dict__, "rows": rows}))
        else:
            print(
                f"{images:,} images, efficiency by shard size (columns); hours, failures, lost work, tail: of the best"
            )
            print(table(rows) + "\n")


if __name__ == "__main__":
    main()
