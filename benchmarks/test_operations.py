"""Each operation beside its definition and torch's own: pytest benchmarks --benchmark-only.

On a GPU the Triton kernels are timed, on a CPU the sets `cpu` and `winograd`. ``extra_info`` of each (in
--benchmark-json) has GB/s, TFLOP/s and the share of this device's measured roof, by the shortest of the runs. What
is not right fails, and has no time.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.operations import OPERATIONS, Operation, prepared
from ddpm_fast import ops as sets
from ddpm_fast.benchmarking.environment import cache_bytes, environment
from ddpm_fast.benchmarking.providers import DTYPES
from ddpm_fast.roofline import roofs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OURS = ("triton",) if DEVICE.type == "cuda" else ("cpu", "winograd")
WHO = tuple(name for name in (*OURS, "reference") if hasattr(sets, name)) + ("torch",)
AT_ONCE = 50 if DEVICE.type == "cuda" else 1  # calls before the GPU is waited for


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "dtype" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--dtype", None)
        names = ("bfloat16",) if DEVICE.type == "cuda" else ("float32", "bfloat16")
        metafunc.parametrize("dtype", chosen.split(",") if chosen else names)


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.label)
def test_operation(benchmark: Any, request: pytest.FixtureRequest, op: Operation, who: str, dtype: str) -> None:
    batch = request.config.getoption("--batch", None) or (256 if DEVICE.type == "cuda" else 4)
    precision = DTYPES[dtype]
    try:
        run, wrong = prepared(op, who, batch, precision, DEVICE, cache_bytes(DEVICE))
    except RuntimeError as error:  # a set that needs a compiler or a GPU that is not here
        pytest.skip(f"{who}: {error}")
    assert wrong is None, f"{who}: {wrong}"

    def calls() -> None:
        for _ in range(AT_ONCE):
            run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op.label} {dtype} batch {batch}"
    benchmark(calls)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info.update(rates(op, batch, precision, benchmark.stats.stats.min / AT_ONCE))


def rates(op: Operation, batch: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """What a call of ``seconds`` achieves."""
    cost, roof = op.cost(batch, dtype), roofs(DEVICE, dtype)
    return {
        "ms": seconds * 1e3,
        "gb_per_s": cost.bytes / seconds / 1e9,
        "tflop_per_s": cost.flops / seconds / 1e12,
        "share_of_roof": roof.share(op.roof, cost.flops, cost.bytes, seconds),
        "environment": _environment(),
    }


@functools.cache
def _environment() -> dict[str, Any]:
    return environment(DEVICE)
