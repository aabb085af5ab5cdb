"""Measured roofs: their arithmetic under a clock that is known, the file that keeps them, and one real measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ddpm_fast import roofline
from ddpm_fast.kernels import cost
from ddpm_fast.roofline import Roofs

CPU = torch.device("cpu")
SHAPES = {"copy": ([1, 2], []), "gemm": ([(8, 16, 32)], []), "conv": ([(2, 8, 4), (1, 16, 8)], [])}


class Script:
    """A clock that answers what it is told, and counts."""

    def __init__(self, *ms: float):
        self.ms, self.asked = ms, 0

    def __call__(self, run, calls: int = 1) -> float:
        run()
        self.asked += 1
        return self.ms[self.asked % len(self.ms)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_SHAPES", SHAPES)


@pytest.mark.usefixtures("small")
def test_a_roof_is_the_best_shape_by_its_shortest_run() -> None:
    clock = Script(5.0, 4.0, 2.0)  # whatever the order, 2 ms is the least
    found = roofline.measure(CPU, torch.float32, clock, budget_s=0.0)
    assert found.copy_bytes_per_s == pytest.approx(2 * 2 * 2**20 / 2e-3)  # 2 MiB, read and written
    assert found.gemm_flops_per_s == pytest.approx(2 * 8 * 16 * 32 / 2e-3)
    assert found.conv_flops_per_s == pytest.approx(2 * 1 * 8 * 8 * 16 * 16 * 9 / 2e-3)
    # What kernels/cost.py counts for that convolution.
    assert cost.conv((1, 16, 8, 8), 16, torch.float32).flops == 2 * 8 * 8 * 16 * 16 * 9
    assert (found.dtype, found.threads, found.torch) == ("float32", torch.get_num_threads(), torch.__version__)


@pytest.mark.usefixtures("small")
def test_runs_fill_the_budget() -> None:
    clock = Script(10.0)
    roofline.measure(CPU, torch.float32, clock, budget_s=0.6)
    # 0.2 s a roof: 2 copies of 10 runs, a product of 20, 2 convolutions of 10, and one unmeasured run each.
    assert clock.asked == 2 * 11 + 21 + 2 * 11


def test_time_at_the_roofs_and_shares_of_them() -> None:
    r = Roofs("device", "float32", 1, "2", copy_bytes_per_s=100.0, gemm_flops_per_s=1000.0, conv_flops_per_s=500.0)
    assert r.seconds("conv", flops=1000, bytes_moved=10) == 2.0  # by convolution's roof
    assert r.seconds("attention", flops=1000, bytes_moved=10) == 1.0  # by the product's
    assert r.seconds("norm_act", flops=0, bytes_moved=300) == 3.0  # by memory
    assert r.share("conv", 1000, 10, seconds=8.0) == 0.25
    assert {name: r.flops_per_s(name) for name in ("conv", "upsample_conv", "conv_step", "linear")} == {
        "conv": 500.0,
        "upsample_conv": 500.0,
        "conv_step": 500.0,
        "linear": 1000.0,
    }


@pytest.mark.usefixtures("small")
def test_they_are_measured_once_for_each_device_dtype_threads_and_torch(tmp_path: Path, monkeypatch) -> None:
    cache, clock = tmp_path / "below" / "roofs.json", Script(1.0)

    def get(dtype: torch.dtype = torch.float32, **kwargs) -> Roofs:
        return roofline.roofs("cpu", dtype, cache=cache, clock=clock, budget_s=0.0, **kwargs)

    first = get()
    asked = clock.asked
    assert asked and get() == first and clock.asked == asked
    get(torch.bfloat16)
    assert clock.asked > asked and len(json.loads(cache.read_text())) == 2
    asked = clock.asked
    monkeypatch.setattr(torch, "get_num_threads", lambda: 96)
    assert get().threads == 96 and clock.asked > asked
    asked = clock.asked
    monkeypatch.setattr(torch, "__version__", "99.0")
    get()
    assert clock.asked > asked and len(json.loads(cache.read_text())) == 4


@pytest.mark.usefixtures("small")
def test_measured_again_the_higher_counts(tmp_path: Path) -> None:
    """Another process, or a cold processor, can only lower a roof."""
    cache = tmp_path / "roofs.json"

    def get(ms: float, refresh: bool = True) -> Roofs:
        return roofline.roofs("cpu", torch.float32, refresh, cache, Script(ms), 0.0)

    first = get(2.0)
    assert get(4.0) == first and get(1.0, refresh=False) == first
    faster = get(1.0)
    for name in roofline.RATES:
        assert getattr(faster, name) == pytest.approx(2 * getattr(first, name))
    assert get(8.0, refresh=False) == faster


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("broken", ["", "[]", "{", '{"key": {"device": "x"}}', "\x00"])
def test_a_broken_cache_is_measured_anew(tmp_path: Path, broken: str) -> None:
    cache = tmp_path / "roofs.json"
    cache.write_text(broken)
    found = roofline.roofs("cpu", torch.float32, cache=cache, clock=Script(1.0), budget_s=0.0)
    assert list(json.loads(cache.read_text()).values()) == [found.facts()]


@pytest.mark.usefixtures("small")
def test_a_folder_that_cannot_be_written_costs_only_the_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = roofline.roofs("cpu", torch.float32, cache=tmp_path / "file" / "x.json", clock=Script(1.0), budget_s=0.0)
    assert found.copy_bytes_per_s > 0


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert roofline.cache_file() == tmp_path / "ddpm_fast" / "roofs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert roofline.cache_file() == tmp_path / ".cache" / "ddpm_fast" / "roofs.json"


def test_the_convolution_that_is_timed_is_a_convolution() -> None:
    work, run = roofline._convolutions(CPU, torch.float32, (2, 8, 4))
    x, weight = (roofline._random(CPU, torch.float32, *s) for s in ((2, 8, 4, 4), (8, 8, 3, 3)))
    got = run()
    assert torch.allclose(got.double(), torch.nn.functional.conv2d(x.double(), weight.double(), padding=1), atol=1e-5)
    assert work == 2 * 2 * 16 * 8 * 8 * 9


def test_a_real_measurement_is_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything from a phone to a server: bounds that a wrong unit would break."""
    from ddpm_fast.benchmarking.timing import HostClock

    shapes = {"copy": ([16], []), "gemm": ([(256, 256, 256)], []), "conv": ([(1, 64, 16)], [])}
    monkeypatch.setattr(roofline, "_SHAPES", shapes)
    found = roofline.measure(CPU, torch.float32, HostClock(), budget_s=0.0)
    assert 1e8 < found.copy_bytes_per_s < 1e13
    assert 1e8 < found.gemm_flops_per_s < 1e15 and 1e8 < found.conv_flops_per_s < 1e15
    text = roofline.roofs_text([found])
    assert f"{found.copy_bytes_per_s / 1e9:.1f} GB/s" in text and "TFLOP/s" in text
