"""The timing harness against clocks that are known: sleeps by a fake clock, CUDA events by a stand-in."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from ddpm_fast.benchmarking import timing
from ddpm_fast.benchmarking.environment import cache_bytes, clocks, environment


class Time:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def work(self, *ms: float) -> Callable[[], None]:
        """A call that takes these milliseconds by turns."""
        rest: Iterator[float] = iter(())

        def run() -> None:
            nonlocal rest
            took = next(rest, None)
            if took is None:
                rest = iter(ms)
                took = next(rest)
            self.now += took / 1e3

        return run


@pytest.fixture
def fake() -> Time:
    return Time()


def test_known_times(fake: Time) -> None:
    runs = {"a": fake.work(10.0), "b": fake.work(4.0)}
    found = timing.compare(runs, clock=timing.HostClock(fake), now=fake, rounds=(5, 9))
    assert found["a"].median_ms == pytest.approx(10.0) and found["b"].median_ms == pytest.approx(4.0)
    assert found.ratio("b").value == pytest.approx(2.5)
    assert found.ratio("a") == timing.Ratio(1.0, 1.0, 1.0)
    assert len(found["a"].samples_ms) == 5  # nothing varies, so the least number of rounds is enough


def test_quartiles_and_minimum(fake: Time) -> None:
    found = timing.compare(
        {"a": fake.work(3.0, 1.0, 2.0, 5.0, 4.0)},
        clock=timing.HostClock(fake),
        now=fake,
        warmup=0,
        rounds=(5, 5),
        repeat=False,
    )["a"]
    assert found.samples_ms == pytest.approx((3.0, 1.0, 2.0, 5.0, 4.0))
    facts = found.facts()
    assert facts["quartiles_ms"] == pytest.approx([2.0, 4.0])
    assert (facts["median_ms"], facts["min_ms"], facts["rounds"], facts["calls"]) == pytest.approx((3.0, 1.0, 5, 1))


def test_variants_take_turns_in_an_order_that_is_drawn_and_reproducible(fake: Time) -> None:
    def orders(seed: int) -> list[str]:
        calls: list[str] = []
        runs = {name: (lambda n=name: (calls.append(n), fake.work(2.0)())) for name in "abc"}
        clock = timing.HostClock(fake)
        timing.compare(runs, clock=clock, now=fake, warmup=2, rounds=(8, 8), repeat=False, seed=seed)
        return calls

    first = orders(0)
    assert first[:6] == ["a", "a", "b", "b", "c", "c"]  # warm-up
    rounds = ["".join(first[6 + 3 * i : 9 + 3 * i]) for i in range(8)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(rounds)) > 2
    assert orders(0) == first and orders(1) != first


def test_a_machine_that_slows_down_does_not_change_a_ratio() -> None:
    """Paired: each round is three times slower than the one before, for both."""
    base = [8.0 * 3**i for i in range(6)]
    other = [2.0 * 3**i for i in range(6)]
    assert timing.paired_ratio(base, other) == timing.Ratio(4.0, 4.0, 4.0)
    assert np.median(base) / np.median(other[:-1]) != pytest.approx(4.0)  # medians of each would not pair


def test_the_interval_of_a_ratio_covers_the_truth_about_as_often_as_it_says() -> None:
    draw, covered, widths = random.Random(0), 0, []
    for _ in range(200):
        base = [2.0 * draw.lognormvariate(0, 0.1) for _ in range(25)]
        other = [draw.lognormvariate(0, 0.1) for _ in range(25)]
        r = timing.paired_ratio(base, other, resamples=300)
        assert r.low <= r.value <= r.high
        covered += r.low <= 2.0 <= r.high
        widths.append(r.high - r.low)
    assert 0.88 <= covered / 200 <= 0.995
    assert timing.paired_ratio(base, other) == timing.paired_ratio(base, other)
    # The deviation of a median of n is about 1.25 sigma / sqrt(n), here with sigma = 2 * 0.1 * sqrt(2).
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 1.25 * 0.2 * 2**0.5 / 5, rel=0.3)


def test_rounds_end_with_the_budget_or_when_nothing_is_left_to_learn(fake: Time) -> None:
    def rounds(**kwargs) -> int:
        runs = {"a": fake.work(100.0, 300.0, 200.0, 900.0, 50.0), "b": fake.work(100.0, 70.0, 260.0)}
        found = timing.compare(runs, clock=timing.HostClock(fake), now=fake, repeat=False, warmup=0, **kwargs)
        return len(found["a"].samples_ms)

    assert rounds(rounds=(3, 40), budget_s=0.0) == 3
    assert rounds(rounds=(3, 40), budget_s=1e9, most_s=0.0) == 1  # whatever the least number
    assert rounds(rounds=(3, 40), budget_s=1e9, precision=0.0) == 40
    assert rounds(rounds=(3, 40), budget_s=1e9, precision=1e9) == timing.SETTLED
    # A round takes about 0.45 s: ten of them fit into 4.7 s.
    assert 9 <= rounds(rounds=(3, 40), budget_s=4.7, precision=0.0) <= 11


def test_short_calls_are_repeated_within_a_sample(fake: Time) -> None:
    found = timing.compare(
        {"short": fake.work(0.01), "long": fake.work(30.0)}, clock=timing.HostClock(fake), now=fake, rounds=(5, 5)
    )
    assert found["short"].calls == 128 and found["long"].calls == 1  # 2^7 x 0.01 ms is the first above 1 ms
    assert found["short"].median_ms == pytest.approx(0.01) and found.ratio("long").value == pytest.approx(1 / 3000)


@pytest.mark.parametrize(
    ("variants", "options", "message"),
    [
        ({}, {}, "at least one variant"),
        ({"a": int}, {"baseline": "b"}, "must be one of a; got 'b'"),
        ({"a": int}, {"rounds": (3, 2)}, "rounds=(3, 2)"),
        ({"a": int}, {"rounds": (0, 2)}, "rounds=(0, 2)"),
        ({"a": int}, {"budget_s": float("nan")}, "budget_s=nan"),
    ],
)
def test_what_makes_no_sense_is_refused(variants, options, message) -> None:
    with pytest.raises(ValueError) as caught:
        timing.compare(variants, **options)
    assert message in str(caught.value)


def test_unpaired_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 3 rounds"):
        timing.paired_ratio([1.0, 2.0], [1.0, 2.0, 3.0])


class FakeCuda:
    """torch.cuda's events over a device that runs what was enqueued, a fixed time each."""

    def __init__(self) -> None:
        self.device_ms, self.log = 0.0, []

    def launch(self, ms: float) -> None:
        self.device_ms += ms
        self.log.append(ms)

    def _sleep(self, cycles: int) -> None:
        self.launch(cycles / 2e6)

    def Event(self, enable_timing: bool):
        assert enable_timing
        cuda = self

        class Event:
            at: float | None = None
            done = False

            def record(self) -> None:
                self.at = cuda.device_ms

            def synchronize(self) -> None:
                self.done = True

            def elapsed_time(self, end: Event) -> float:
                assert end.done, "elapsed_time before the end was waited for"
                return end.at - self.at

        return Event()


def test_cuda_events_bracket_the_calls_alone() -> None:
    cuda = FakeCuda()
    assert timing.CudaClock(cuda=cuda)(lambda: cuda.launch(0.25), 4) == pytest.approx(1.0)
    assert cuda.log == [0.25] * 4
    cuda.log.clear()
    assert timing.CudaClock(ahead=True, cuda=cuda)(lambda: cuda.launch(0.25), 2) == pytest.approx(0.5)
    assert cuda.log == [1.0, 0.25, 0.25]  # the GPU is busy first, outside the time
    assert isinstance(timing.clock_for(torch.device("cpu")), timing.HostClock)
    assert isinstance(timing.clock_for(torch.device("cuda")), timing.CudaClock)


def test_inputs_rotate_so_that_a_cache_is_cold() -> None:
    assert timing.copies_for(nbytes=10, cache_bytes=100) == 21  # twenty others, twice the cache
    assert timing.copies_for(nbytes=1000, cache_bytes=100) == 2
    assert timing.copies_for(nbytes=10, cache_bytes=100, most_bytes=50) == 5
    assert timing.copies_for(nbytes=0, cache_bytes=0) == 1
    x, word = torch.arange(6.0), "word"
    sets = timing.copied([x, word], cache_bytes=24)
    assert len(sets) == 3 and sets[0][0] is x
    assert len({s[0].data_ptr() for s in sets}) == 3 and all(torch.equal(s[0], x) and s[1] is word for s in sets)
    seen: list[int] = []
    run = timing.rotated(lambda a, _: seen.append(a.data_ptr()), sets)
    for _ in range(7):
        run()
    pointers = [s[0].data_ptr() for s in sets]
    assert seen == [*pointers, *pointers, pointers[0]]


def test_the_harness_adds_less_than_a_hundredth_to_a_step_of_ten_milliseconds() -> None:
    """The best of three: another process may hold the core."""
    found = [timing.overhead(10.0, rounds=8) for _ in range(3)]
    assert min(abs(f["reported"]) for f in found) < 0.01
    assert min(f["between"] for f in found) < 0.01
    assert all(f["reported"] > 0 and f["between"] > 0 for f in found)  # it is not free either


def test_a_real_sleep_by_the_real_clock() -> None:
    found = timing.compare({"sleep": lambda: time.sleep(0.004)}, rounds=(5, 5), repeat=False)["sleep"]
    assert 4.0 <= found.min_ms < 8.0


def test_the_record_names_device_threads_versions_commit_and_command() -> None:
    facts = environment(torch.device("cpu"), ["bench", "--full"])
    assert facts["command"] == "bench --full" and facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["device"] and facts["time"].endswith("+00:00")
    assert facts["commit"] is None or len(facts["commit"].split("+")[0]) == 40
    assert environment(torch.device("cpu"))["command"]


def test_clocks_and_caches_are_read_from_linux(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from ddpm_fast.benchmarking import environment as module

    info = tmp_path / "cpuinfo"
    info.write_text(
        "model name\t: Example CPU\ncpu MHz\t\t: 1800.5\n\nmodel name\t: Example CPU\ncpu MHz\t\t: 3000.0\n"
    )
    monkeypatch.setattr(module, "_CPUINFO", info)
    assert clocks(torch.device("cpu")) == {"cpu_mhz": [1800.5, 3000.0]}
    assert module.device_name(torch.device("cpu")).startswith("Example CPU, ")
    for index, size in enumerate(("32K", "1024K", "24M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(module, "_CACHES", tmp_path)
    assert cache_bytes(torch.device("cpu")) == 24 << 20
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "missing")
    assert clocks(torch.device("cpu")) == {"cpu_mhz": None}
