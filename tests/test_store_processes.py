"""Sets drawn by real processes that are killed, restarted, and race each other: the bytes are always the same."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import TINY, unet
from store_processes import ROOT, Command, finished, free_port, gloo, until
from store_setup import expected, files, without_manifest

import ddpm_fast as df

if sys.platform == "win32":
    pytest.skip("NOT PROVEN HERE: processes are forked", allow_module_level=True)

SMALL: dict[str, Any] = {**TINY, "block_out_channels": (4, 8), "norm_num_groups": 2, "num_class_embeds": 3}
SCHEDULE = df.Schedule(num_train_timesteps=10, beta_start=0.01, beta_end=0.5)
N, SHARD, SHARDS = 155, 4, 39
WORDS = ("-n", N, "--shard-size", SHARD, "--batch-size", 2, "--label", "all", "--device", "cpu", "--ops", "reference")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    df.save(folder, unet(SMALL), SCHEDULE)
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the set, by the library: drawn here, in batches of two, one after the other."""
    loaded = df.load(model)
    sampler = df.Sampler(loaded.model, loaded.schedule, batch_size=2, ops="reference")
    labels = np.arange(N) % 3
    shards = [range(s, min(s + SHARD, N)) for s in range(0, N, SHARD)]
    images = [
        df.to_uint8(sampler.sample(len(ids), 0, labels[ids.start : ids.stop].tolist(), ids.start)) for ids in shards
    ]
    return expected(tmp_path_factory.mktemp("oracle"), np.concatenate(images), SHARD, labels)


class Runs:
    """Commands on one set."""

    def __init__(self, model: Path, folder: Path):
        self.model, self.folder, self.all = model, folder, []

    def start(self, environment: dict[str, str] | None = None, *more: object) -> Command:
        log = self.folder.with_name(f"log-{len(self.all)}")
        command = Command(("sample", self.model, *WORDS, "--out", self.folder, *more), log, environment)
        self.all.append(command)
        return command

    def pair(self, size: int = 2) -> list[Command]:
        port = free_port()
        return [self.start(gloo(rank, size, port)) for rank in range(size)]


@pytest.fixture
def runs(model: Path, tmp_path: Path):
    found = Runs(model, tmp_path / "set")
    yield found
    for command in found.all:
        command.kill()


def test_one_process(runs: Runs, whole: dict[str, bytes]):
    command = runs.start()
    assert command.wait() == 0, command.output()
    assert without_manifest(runs.folder) == whole
    assert f"{N} images in {runs.folder}: {SHARDS} shards, all finished" in command.output()


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_workers_draw_the_same_set_as_one(size: int, runs: Runs, whole: dict[str, bytes]):
    workers = runs.pair(size)
    assert [worker.wait() for worker in workers] == [0] * size, [w.output() for w in workers]
    assert without_manifest(runs.folder) == whole
    assert f"{N}/{N}" in workers[0].output()  # the bar counts what all have drawn
    assert [worker.output() for worker in workers[1:]] == [""] * (size - 1)  # and is shown once


def owners(folder: Path) -> set[int]:
    """The processes that claim a shard now."""
    found = set()
    for path in (folder / "unfinished").glob("*.claim"):
        try:
            found.add(json.loads(path.read_text())["pid"])
        except (FileNotFoundError, ValueError):  # given back, or not yet written
            continue
    return found


def kill_at_random_moments(runs: Runs, who: str, kills: int, seed: int) -> None:
    """Start, kill -9 at a moment that is random over the whole run, start again ..."""
    dice = random.Random(seed)
    marks = sorted(dice.randrange(SHARDS - 12) for _ in range(kills))
    for kill in range(kills):
        workers = [runs.start()] if who == "main" else runs.pair()
        # in the middle of what follows the mark; or of the start itself, where the mark is passed already
        until(lambda: finished(runs.folder) >= marks[kill] or not workers[0].running)
        time.sleep(dice.random() * (0.06 if finished(runs.folder) <= marks[kill] else 0.4))
        victims = {"main": [0], "worker": [1], "first": [0], "both": [0, 1]}[who]
        assert all(workers[v].running for v in victims), [w.output() for w in workers]
        for v in victims:
            os.kill(workers[v].process.pid, signal.SIGKILL)
        time.sleep(dice.random() * 0.05)  # the other one goes on for a moment
        for worker in workers:
            worker.kill()
    assert finished(runs.folder) < SHARDS


@pytest.mark.parametrize("who, kills, seed", [("main", 8, 1), ("worker", 4, 2), ("first", 4, 3), ("both", 4, 4)])
def test_killed_and_resumed_is_the_same_set(who: str, kills: int, seed: int, runs: Runs, whole: dict[str, bytes]):
    """20 moments in all. Half of the sets are finished by one process, half by two."""
    kill_at_random_moments(runs, who, kills, seed)
    ends = [runs.start()] if seed % 2 else runs.pair()
    assert [end.wait() for end in ends] == [0] * len(ends), [end.output() for end in ends]
    assert without_manifest(runs.folder) == whole  # no temporary file and no claim is left either


def test_two_independent_workers_race_for_one_folder(runs: Runs, whole: dict[str, bytes]):
    """Started together, so that they begin the set at once; a third finds it half-way; all end when it is whole."""
    workers = [runs.start(), runs.start()]
    until(lambda: finished(runs.folder) > SHARDS // 2)
    workers.append(runs.start())
    assert [worker.wait() for worker in workers] == [0, 0, 0], [w.output() for w in workers]
    assert without_manifest(runs.folder) == whole


def test_the_survivor_takes_over_what_a_killed_worker_had(runs: Runs, whole: dict[str, bytes]):
    first, second = runs.start(), runs.start()
    until(lambda: finished(runs.folder) > 3)
    until(lambda: first.process.pid in owners(runs.folder))
    first.kill()
    assert second.wait() == 0, second.output()
    assert without_manifest(runs.folder) == whole


def test_sigterm_gives_claims_back(runs: Runs):
    """What a batch queue sends before it kills."""
    command = runs.start()
    until(lambda: finished(runs.folder) > 3)
    os.kill(command.process.pid, signal.SIGTERM)
    assert command.wait() == 130, command.output()
    kept = f"{SHARD * finished(runs.folder)} of {N} images are finished and kept in {runs.folder}"
    assert command.output().splitlines()[-1] == f"ddpm-fast: interrupted; {kept}; the same command goes on"
    assert "Traceback" not in command.output()
    assert not list((runs.folder / "unfinished").iterdir())


def test_workers_complain_once(runs: Runs):
    """Of other options, found by rank 0: one line, and no process waits for it."""
    done = runs.start()
    assert done.wait() == 0
    port = free_port()
    before = files(runs.folder)
    workers = [runs.start(gloo(rank, 2, port), "--seed", 5) for rank in range(2)]
    assert [worker.wait() for worker in workers] == [2, 2]
    text = workers[0].output().strip()
    assert re.fullmatch(r"ddpm-fast: .* begun with other options: seed: was 0, now 5\. .*", text), text
    assert workers[1].output() == ""
    assert files(runs.folder) == before


def test_a_worker_killed_under_torchrun(model: Path, tmp_path: Path, whole: dict[str, bytes]):
    """torchrun restarts its workers, and the set is finished."""
    folder, log = tmp_path / "set", tmp_path / "log"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2")
    words = (*torchrun, "-m", "ddpm_fast", "sample", model, *WORDS, "--out", folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        agent = subprocess.Popen([sys.executable, *map(str, words)], env=environment, stdout=file, stderr=file)
    try:
        until(lambda: finished(folder) > 2)
        until(lambda: owners(folder))
        os.kill(owners(folder).pop(), signal.SIGKILL)
        assert agent.wait(300) == 0, log.read_text()
    finally:
        agent.kill()
    assert without_manifest(folder) == whole
    assert "SIGKILL" in log.read_text() or "-9" in log.read_text()  # it was not done by then
