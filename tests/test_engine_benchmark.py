"""The engine's benchmark on a CPU: what it writes, and that it reports no speed where the check is red."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("benchmarks.engine", reason="benchmarks/ is not part of the installed package")

from benchmarks import engine, engine_row
from benchmarks.engine_text import row_text
from ddpm_fast import ops

WORDS = ["--preset-model", "tiny", "--batch", "1", "--batch", "2", "--dtype", "float32", "--steps", "2"]
QUICK = [*WORDS, "--rounds", "1", "--chain-seconds", "0", "--device", "cpu"]


def test_rows_follow_from_the_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine.main([*QUICK, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    (run,) = json.loads(path.read_text()).items()
    name, found = run
    assert name == "tiny float32" and found["check"]["ok"] and 0 < found["check"]["largest"] < 1e-4
    assert found["environment"]["versions"]["torch"] == torch.__version__ and found["environment"]["device"]
    for row, batch in zip(found["rows"], (1, 2), strict=True):
        ms = row["ms_a_step"]["none"]
        assert (row["batch"], row["best_graph"], row["extrapolated"]) == (batch, "none", True)
        assert row["images_per_s"] == pytest.approx(batch * 1000 / (ms * 1000), rel=1e-9)
    assert "extrapolated" in capsys.readouterr().out


def test_a_run_that_is_cut_short_leaves_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside another run of the same card, whose numbers stay."""
    measure = engine_row.Row.measure

    def second_fails(row: engine_row.Row) -> None:
        if row.batch == 2:
            raise KeyboardInterrupt
        measure(row)

    monkeypatch.setattr(engine_row.Row, "measure", second_fails)
    monkeypatch.setattr(engine, "environment", lambda device: {**environment, "device": "A Card/1"})
    environment = {"versions": {"torch": "2"}, "commit": None}
    (tmp_path / "engine-a-card-1.json").write_text('{"cifar10 bfloat16": 1}')
    with pytest.raises(KeyboardInterrupt):
        engine.main([*QUICK, "--out", str(tmp_path)])
    known = json.loads((tmp_path / "engine-a-card-1.json").read_text())
    assert known["cifar10 bfloat16"] == 1
    assert [row["batch"] for row in known["tiny float32"]["rows"]] == [1]
    assert "batch 1: " in capsys.readouterr().out


def test_no_speed_of_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ops.cpu()

    def wrong(*args, **kwargs):
        return right.conv(*args, **kwargs) * 1.01

    monkeypatch.setattr("ddpm_fast.ops.cpu", lambda: replace(right, name="wrong", conv=wrong))
    assert engine.main(QUICK) == 1
    out = capsys.readouterr().out
    assert "house rule BROKEN" in out and "images/s" not in out


def test_beside_diffusers_in_its_own_loop(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a compiler's minutes: what torch.compile is given draws the chain, and the ratio is of the medians."""
    pytest.importorskip("diffusers")
    calls = []

    def compile(module, **kwargs):
        return lambda x, t: (calls.append(int(t)), module(x, t))[1]

    monkeypatch.setattr(torch, "compile", compile)
    words = ["--dtype", "float32", "--steps", "2", "--rounds", "2", "--chain-seconds", "0", "--device", "cpu"]
    assert engine.main([*WORDS[:4], *words, "--compiled"]) == 0
    assert calls == [500, 0] * 4  # alone, unmeasured, and two rounds
    assert "torch.compile takes" in capsys.readouterr().out


def test_without_diffusers_it_says_what_was_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert engine.main([*QUICK[:-2], "--device", "cpu", "--compiled", "--out", str(tmp_path)]) == 0
    assert "torch.compile was NOT timed: diffusers is not installed" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())["tiny float32 beside torch.compile"]
    assert found["missing"] == {"torch.compile": "diffusers is not installed"}
    assert found["rows"] == []  # `gpu-speed` has ours


# --- a GPU's forms, made up ---


class Drawn:
    """A sampler whose images are its own, and which ran in some form."""

    def __init__(self, graph: str, batch: int, ran: str, images: torch.Tensor):
        self.graph, self.batch, self.images = graph, batch, images
        self.ops, self._programs = SimpleNamespace(name="triton"), {0: (None, SimpleNamespace(kind=ran))}

    def sample(self, n: int, first_id: int = 0, check_finite: bool = True) -> torch.Tensor:
        assert n == self.batch
        return self.images[first_id : first_id + n]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """torch.cuda and NVML as far as a row asks them; the bytes that are allocated."""
    bytes_now = {"now": 100 << 20, "most": 0}
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: bytes_now.update(most=bytes_now["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: bytes_now["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: bytes_now["most"])
    monkeypatch.setattr(engine_row.Row, "_kernels", lambda row: None)
    return bytes_now


def made_up_row(monkeypatch: pytest.MonkeyPatch, card: dict[str, int], **wrong: Any) -> dict[str, Any]:
    """Of batch 3. wrong: form -> what it does instead, "raise", "chunk" (runs as that) or "bits"."""
    right = torch.arange(12.0).view(3, 1, 2, 2)
    ms = {"none": 8.0, "step": 4.0, "chunk": 2.0, "loop": 1.0, engine_row.PDL: 0.8}

    def sampler(ckpt: Any, graph: str, batch: int, args: Any, steps: int) -> Drawn:
        how = wrong.get(graph) if batch == 3 else wrong.get("alone")
        if how == "raise":
            raise RuntimeError("no such\ngraph")
        card["most"] += len(graph) << 20
        ran = "loop" if graph == engine_row.PDL else graph
        return Drawn(graph, batch, how if how == "chunk" else ran, right + (how == "bits"))

    monkeypatch.setattr(engine_row, "sampler", sampler)
    monkeypatch.setattr(engine_row, "clock_for", lambda device: by_form)

    def by_form(run: Any, calls: int = 1) -> float:
        drawn = [c.cell_contents for c in run.__closure__ or () if isinstance(c.cell_contents, Drawn)]
        run()
        return 10 * ms[drawn[0].graph]

    class NoWatch:
        series, reason = (), "made up"

        def __init__(self, devices: Any):
            pass

        def __enter__(self) -> NoWatch:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(engine_row, "Watch", NoWatch)
    args = argparse.Namespace(
        device=SimpleNamespace(type="cuda"), compiled=False, steps=10, rounds=1, chain_seconds=0.0, dtype="bfloat16"
    )
    ckpt: Any = SimpleNamespace(schedule=SimpleNamespace(num_train_timesteps=1000))
    row = engine_row.Row(ckpt, 3, args)
    row.measure()
    return row.facts


def test_every_form_is_compared_and_the_fastest_counts(monkeypatch: pytest.MonkeyPatch, card: dict[str, int]) -> None:
    row = made_up_row(monkeypatch, card)
    pdl = engine_row.PDL
    assert row["ms_a_step"] == {"none": 8.0, "step": 4.0, "chunk": 2.0, "loop": 1.0, pdl: 0.8}
    # What is off unless asked for is no form of the headline's.
    assert row["best_graph"] == "loop" and row["images_per_s"] == pytest.approx(3 * 1000 / (1.0 * 1000))
    assert row["times_with_pdl"] == pytest.approx(1.25) and "launches 1.250 times as fast" in row_text(row)
    assert row["exact"] == {"step": True, "chunk": True, "loop": True, pdl: True, "last image alone": True}
    peaks = {"none": 4, "step": 4, "chunk": 5, "loop": 4, pdl: len(pdl)}
    assert row["peak_mib"] == peaks and row["gpu"] == {"note": "made up"}
    assert row["failed"] == {} and row["ran_as"] == {pdl: "loop"}


@pytest.mark.parametrize("how", ["raise", "bits"])
def test_a_form_that_fails_or_differs_is_named_and_not_timed(
    how: str, monkeypatch: pytest.MonkeyPatch, card: dict[str, int]
) -> None:
    row = made_up_row(monkeypatch, card, loop=how)
    assert "loop" not in row["ms_a_step"] and row["best_graph"] == "chunk"
    assert {"raise": "RuntimeError: no such graph", "bits": "not those of eager"}[how] in row["failed"]["loop"]
    assert row["exact"].get("loop") is (None if how == "raise" else False)
    assert "loop FAILED" in row_text(row)


def test_a_form_that_ran_as_another_is_said_to(monkeypatch: pytest.MonkeyPatch, card: dict[str, int]) -> None:
    row = made_up_row(monkeypatch, card, loop="chunk", alone="bits")
    assert row["ran_as"]["loop"] == "chunk" and "loop ran as chunk" in row_text(row)
    assert row["exact"]["last image alone"] is False and "last image alone NO" in row_text(row)
    assert row["failed"] == {"last image alone": "its bits depend on its batch"} and row["images_per_s"] > 0
