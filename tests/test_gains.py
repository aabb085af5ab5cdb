"""benchmarks/gains.py: each switch switches, and a gain is time without over time with."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks import gains
from ddpm_fast.benchmarking.providers import Case
from ddpm_fast.kernels import host_memory, onednn, upsample_difference, winograd
from ddpm_fast.ops import cpu_set as ops_cpu

F32, BF16 = torch.float32, torch.bfloat16


def norm_is_compiled() -> bool:
    return ops_cpu.compiled_norm(F32) is not None


def weights_are_packed() -> bool:
    return onednn.Weight(torch.zeros(256, 256, 1, 1))._packs


def upsampling_has_its_own_form() -> bool:
    packed = upsample_difference.pack_upsample_conv(torch.zeros(64, 64, 3, 3), dtype=F32)
    return packed.form(torch.Size((4, 64, 32, 32))) != "direct"


def memory_is_kept() -> bool:
    return host_memory.keep_freed_memory()


def tiles_are_large() -> bool:
    winograd.scheme_for.cache_clear()
    return winograd.scheme_for(F32, 4, 256, 16, 16, 256) is winograd.F4


def products_are_one_convolution() -> bool:
    return winograd.Products(torch.zeros(16, 16, 3, 3), winograd.F2, F32)._packs


OBSERVED = {
    "normalisation compiled": norm_is_compiled,
    "weights packed once": weights_are_packed,
    "upsampling by differences or summed taps": upsampling_has_its_own_form,
    "freed memory kept": memory_is_kept,
    "F(4x4, 3x3)": tiles_are_large,
    "products as one grouped convolution": products_are_one_convolution,
}


@pytest.mark.parametrize("part", gains.PARTS, ids=lambda p: f"{p.operations}, {p.name}")
def test_a_switch_switches_its_part_off(part: gains.Part, monkeypatch: pytest.MonkeyPatch):
    observed = OBSERVED[part.name]
    if not observed():
        pytest.skip("this machine does without it")
    for owner, name in (
        (ops_cpu, "compiled_norm"),
        (onednn, "WORTH"),
        (upsample_difference, "DIRECT"),
        (host_memory, "keep_freed_memory"),
        (winograd.Products, "__init__"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    monkeypatch.setattr(winograd, "SCHEMES", copy.copy(winograd.SCHEMES))
    part.switch_off()
    assert not observed()
    monkeypatch.undo()
    assert observed()


def test_a_gain_is_the_time_without_over_the_time_with(monkeypatch: pytest.MonkeyPatch):
    made: list[tuple[str, Any]] = []

    class Fake:
        def __init__(self, provider: Any, dtype: str, *rest: object):
            made.append((provider.name, provider.make.keywords["without"]))
            self.ms = {"cpu": 80.0, "cpu without freed memory kept": 100.0}.get(provider.name, 120.0)

        def turn(self) -> float:
            return self.ms

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *raised: object) -> None:
            pass

    monkeypatch.setattr(gains, "Worker", Fake)
    case = Case(None, None, 2, 4, torch.device("cpu"))  # type: ignore[arg-type]
    parts = [p for p in gains.PARTS if p.operations == "cpu" and p.name in ("freed memory kept",)]
    rows = gains.measure(case, "float32", (2, 2), 1.0, parts)
    assert made == [("cpu", None), ("cpu without freed memory kept", gains.PARTS.index(parts[-1]))]
    assert [r["gain"]["value"] for r in rows] == [1.25]
    assert rows[0]["ms_a_step"] == {"with": 20.0, "without": 25.0}
    facts: dict[str, Any] = {
        "device": "Example CPU",
        "threads": 2,
        "versions": {"torch": "2.13"},
        "commit": "0123456789abcdef",
    }
    table = gains.markdown(
        {"environment": {**facts, "command": "python -m benchmarks.gains"}, "batch": 2, "rows": rows}
    )
    assert "| cpu | freed memory kept | float32 | 1.05 | 1.25 (1.25 .. 1.25) | 25.0, 20.0 |" in table.splitlines()
    assert table.endswith(
        "Batch 2; Example CPU, 2 threads; torch 2.13; commit 0123456789ab. Command: `python -m benchmarks.gains`."
    )
