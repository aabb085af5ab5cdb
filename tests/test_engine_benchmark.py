"""The engine's benchmark on a CPU: what it writes, and that it reports no speed where the check is red."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("benchmarks.engine", reason="benchmarks/ is not part of the installed package")

from benchmarks import engine
from ddpm_fast import ops

WORDS = ["--preset-model", "tiny", "--batch", "1", "--batch", "2", "--dtype", "float32", "--steps", "2"]


def test_rows_follow_from_the_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.main([*WORDS, "--rounds", "1", "--no-compiled", "--device", "cpu", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert found["check"]["ok"] and 0 < found["check"]["largest"] < 1e-4
    assert found["environment"]["versions"]["torch"] == torch.__version__ and found["environment"]["device"]
    for row, batch in zip(found["rows"], (1, 2), strict=True):
        ms = row["ms_a_step"]["none"]
        assert (row["batch"], row["best_graph"], row["extrapolated"]) == (batch, "none", True)
        assert row["images_per_s"] == pytest.approx(batch * 1000 / (ms * 1000), rel=1e-9)
    assert "extrapolated from 2 of 1000 steps" in capsys.readouterr().out


def test_no_speed_of_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    right = ops.cpu()

    def wrong(*args, **kwargs):
        return right.conv(*args, **kwargs) * 1.01

    monkeypatch.setattr("ddpm_fast.ops.cpu", lambda: replace(right, name="wrong", conv=wrong))
    assert engine.main([*WORDS, "--rounds", "1", "--no-compiled", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "house rule BROKEN" in out and "images/s" not in out


def test_beside_diffusers_in_its_own_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a compiler's minutes: what torch.compile is given draws the chain, and the ratio is of the medians."""
    pytest.importorskip("diffusers")
    calls = []

    def compile(module, **kwargs):
        return lambda x, t: (calls.append(int(t)), module(x, t))[1]

    monkeypatch.setattr(torch, "compile", compile)
    assert engine.main([*WORDS[:4], "--dtype", "float32", "--steps", "2", "--rounds", "2", "--device", "cpu"]) == 0
    assert calls == [500, 0] * 3  # one unmeasured, and two rounds
    assert "torch.compile ms" in capsys.readouterr().out
