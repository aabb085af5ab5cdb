"""The simulated cluster against cases that can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.simulate_cluster import HOUR, Cluster, average, simulate, sweep, table

CALM = Cluster(
    workers=8,
    seconds_per_image=0.1,
    start_s=0,
    shard_overhead_s=0,
    hours_between_failures=math.inf,
    speed_spread=0,
    straggler_share=0,
)


def test_full_rounds_waste_nothing():
    outcome = simulate(8 * 5 * 100, 100, CALM)
    assert outcome.wall_s == pytest.approx(5 * 100 * 0.1)
    assert outcome.efficiency == pytest.approx(1) and outcome.failures == 0 and outcome.tail_s == pytest.approx(0)


def test_one_shard_too_many_costs_a_round():
    outcome = simulate(8 * 5 * 100 + 1, 100, CALM)
    assert outcome.wall_s == pytest.approx(50 + 0.1)  # the last shard is one image
    outcome = simulate((8 * 5 + 1) * 100, 100, CALM)
    assert outcome.efficiency == pytest.approx(41 / 48) and outcome.tail_s == pytest.approx(10)


def test_start_and_overhead_are_paid():
    outcome = simulate(8 * 5 * 100, 100, replace(CALM, start_s=7, shard_overhead_s=0.5))
    assert outcome.wall_s == pytest.approx(7 + 5 * 10.5)


def test_a_slow_worker_gets_less_work():
    """One at 0.4 beside seven: it is given 0.4 of their shards, and no static share waits for it."""
    outcome = simulate(100_000, 10, replace(CALM, straggler_share=0.3), seed=1)
    assert outcome.efficiency > 0.99


def test_lost_work_is_half_a_shard_a_failure():
    """Failures come at random within a shard of length d: the loss is d / 2 of each, d / (2 MTBF) of all work."""
    cluster = replace(CALM, hours_between_failures=2.0, stale_s=0, start_s=0)
    found = average(400_000, 1000, cluster, runs=10)  # shards of 100 s
    assert found["lost_share"] == pytest.approx(100 / (2 * 2 * HOUR), rel=0.3)
    expected = 400_000 * 0.1 / (2 * HOUR)  # running hours of all workers over the time between failures
    assert found["failures"] == pytest.approx(expected, rel=0.3)


def test_the_best_shard_balances_overhead_and_losses():
    """Losing d / (2 M) and paying o / d, the sum is least at d = sqrt(2 o M) (as Young 1974 for checkpoints)."""
    cluster = replace(CALM, workers=1, hours_between_failures=1.0, shard_overhead_s=2, stale_s=0)
    best_s = math.sqrt(2 * 2 * HOUR)  # 120 s: shards of 1,200 images
    rows = sweep(2_000_000, [1], [75, 1200, 19200], cluster, runs=3)
    efficiency = {r["shard"]: r["efficiency"] for r in rows}
    assert best_s == pytest.approx(120)
    assert efficiency[1200] > max(efficiency[75], efficiency[19200])
    assert efficiency[1200] == pytest.approx(1 - 2 * math.sqrt(2 * 2 / (2 * 2 * HOUR)), abs=0.01)
    assert "**" in table(rows)


def test_every_image_is_sampled_whatever_fails():
    cluster = replace(CALM, hours_between_failures=0.02, stale_s=30, start_s=5)
    for seed in range(5):
        outcome = simulate(3001, 100, cluster, seed)
        assert outcome.failures > 0 and np.isfinite(outcome.wall_s)
        assert outcome.wall_s >= 3001 * 0.1 / 8


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        simulate(100, 0, CALM)
