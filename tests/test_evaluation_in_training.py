"""Evaluation beside training: the numbers of the weights of that step, and no waiting for them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_setup import images, run

from ddpm_fast import evaluation
from ddpm_fast.cli.evaluate import _drawn
from ddpm_fast.data import DataError, ImageData
from ddpm_fast.evaluation.features import extractor
from ddpm_fast.evaluation.image_stream import open_stream
from ddpm_fast.training import run as training_run
from ddpm_fast.training.background_evaluation import LOG, BackgroundEvaluation
from ddpm_fast.training.step import Trainer


def test_a_run_is_evaluated_by_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = images()
    path = tmp_path / "data.npz"
    np.savez(path, arr_0=data.images, arr_1=data.labels)
    data = ImageData(data.images, data.labels, data.label_names, str(path))
    run(tmp_path / "run", data, evaluate_every=6, evaluate_images=6)
    (entry,) = map(json.loads, (tmp_path / "run" / LOG).read_text().splitlines())
    assert entry["note"] == "6" and entry["count"] == 6 and entry["against_count"] == len(data)
    network = extractor("efficientnet-lite0")
    against = evaluation.reference(open_stream(path), network, cache=tmp_path / "own")
    result = evaluation.evaluate(_drawn(str(tmp_path / "run"), None, 6, 64, 0, "cpu"), against, network)
    assert entry["distance"] == pytest.approx(result.distance, rel=1e-3)


def test_data_without_a_source_cannot_be_read_by_another_process(tmp_path: Path):
    data = images()
    with pytest.raises(DataError, match="evaluate_every"):
        run(tmp_path, ImageData(data.images, data.labels, data.label_names), evaluate_every=2)


def test_training_does_not_wait(tmp_path: Path):
    beside = BackgroundEvaluation(tmp_path, "data", 8, 4)
    beside.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.perf_counter()
    assert beside.start(1) and beside.running
    assert not beside.start(2) and beside.skipped == 1
    beside.finish(0)
    assert not beside.running and time.perf_counter() - began < 20


def test_a_failure_is_told_in_the_run_and_stops_nothing(tmp_path: Path):
    beside = BackgroundEvaluation(tmp_path, "data", 8, 4)
    beside.command = [sys.executable, "-c", "import sys; sys.exit('no such data')"]
    beside.start(1)
    beside.finish()
    assert (tmp_path / "evaluations.err").read_text() == "no such data\n"


def test_no_process_outlives_a_run_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    beside = BackgroundEvaluation(tmp_path, "data", 8, 4)
    beside.command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(training_run, "_evaluation", lambda *_: beside)
    step = Trainer.step

    def fails_at_four(self: Trainer, k: int, batch: object) -> object:
        if k == 3:
            assert beside.running
            raise OSError("the disk is gone")
        return step(self, k, batch)

    monkeypatch.setattr(Trainer, "step", fails_at_four)
    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path, evaluate_every=2)
    assert not beside.running
