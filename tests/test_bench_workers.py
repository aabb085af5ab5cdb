"""`ddpm-fast bench` on a CPU: each provider in a process of its own, held to what it is, timed by its own clock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_fakes import fake, is_alive
from models import TINY, normal, unet
from processes import interruptible

import ddpm_fast as df
from ddpm_fast.benchmarking import ours, run, text, timing, worker
from ddpm_fast.benchmarking.checks import Judge, Verdict
from ddpm_fast.benchmarking.providers import Case, Provider, chosen
from ddpm_fast.benchmarking.worker import Worker
from ddpm_fast.checkpoints import Checkpoint

CPU = torch.device("cpu")
SCHEDULE = df.Schedule(num_train_timesteps=20)
BUSY_MS = 24.0
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the fakes ask POSIX whether a process is there")


def case(model: df.UNet, batch: int = 2) -> Case:
    return Case(model, SCHEDULE, batch, 3, CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """One run of everything that can go right and wrong, by the processor's clock."""
    faults = [
        fake("noisy"),
        fake("Crooked", "crooked", is_ours=True, wrong="scale"),
        fake("fails"),
        fake("dies"),
        fake("selfish"),
        fake("observer"),
        fake("busy", ms=BUSY_MS),
        Provider("absent", ours.make, packages=("no_such_package_here",)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENCH_FAKES", str(folder))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.chdir(folder)  # where no source tree is
        settings = run.Settings(
            [2], ["float32"], 3, baseline="dies float32", rounds=(3, 3), clock="cpu", startups=False
        )
        return run.run(Checkpoint(unet(TINY), SCHEDULE, "tiny", "test", []), faults, settings)


def row(found: dict[str, Any], name: str) -> dict[str, Any]:
    (there,) = (r for r in found["rows"] if r["provider"] == name)
    return there


def pid(folder: Path, name: str) -> int:
    return int((folder / name).read_text())


def test_what_is_wrong_has_an_error_and_no_speed(found: dict[str, Any], folder: Path) -> None:
    red = row(found, "crooked")
    # 1e-4 of each value, but less of the values that are scaled by their tensor's RMS.
    assert not red["check"]["ok"] and 5e-5 < red["check"]["rms"] < red["check"]["largest"] < 1.1e-4
    assert row(found, "fails")["reason"] == "failed: 'missing key'" and row(found, "fails")["failed"]
    assert row(found, "absent")["reason"] == "no_such_package_here is not installed"
    for name in ("crooked", "fails", "dies", "absent"):
        assert not {"ms_a_step", "images_per_s", "tflops", "times_as_fast", "startup"} & set(row(found, name))
    assert run.wrong(found) == [red]
    for shown in (text.report_text(found), text.markdown(found)):
        assert "crooked float32: WRONG, so no speed: largest error " in shown
        assert shown.count("| crooked") == 0 and "\ncrooked  " not in shown
        assert "absent float32: no_such_package_here is not installed" in shown


def test_a_process_that_ends_is_a_row_and_the_rest_goes_on(found: dict[str, Any]) -> None:
    """It was the baseline, checked and warm; another takes its place."""
    gone = row(found, "dies")
    assert gone["reason"] == "failed: its process ended with exit code 7: the last words" and gone["failed"]
    assert "check" not in gone  # a table would call it wrong
    for name in ("noisy", "selfish", "observer", "busy"):
        assert row(found, name)["ms_a_step"]["rounds"] == 3 and row(found, name)["check"]["ok"]
        assert row(found, name)["times_as_fast"]["as"] == "noisy float32"


def test_the_worker_s_clock_is_what_counts(found: dict[str, Any]) -> None:
    """A loop until the worker's processor time is 24 ms, then a sleep of 50: this process's own time is near none, and
    the wall shows three times as much."""
    ms = row(found, "busy")["ms_a_step"]["median"] * 3
    assert BUSY_MS <= ms < BUSY_MS + 10


def test_what_one_sets_for_its_process_is_not_seen_by_another(found: dict[str, Any], folder: Path) -> None:
    seen = json.loads((folder / "seen.json").read_text())
    threads = torch.get_num_threads()
    assert seen["environment"] is seen["interpreter"] is None and seen["dtype"] == "torch.float32"
    assert seen["package"] == df.__file__ and seen["threads"] == threads and seen["openmp"] == str(threads)
    # glibc's default, which keep_freed_memory changes.
    assert [*json.loads((folder / "mapped.json").read_text()), seen["mapped"]] in ([True, False, True], [None] * 3)
    assert row(found, "selfish")["check"]["ok"] and pid(folder, "selfish") != os.getpid()


def test_a_worker_ends_when_its_check_is_red_and_all_end_with_the_run(found: dict[str, Any], folder: Path) -> None:
    # The others' processes were there when the observer looked: so it would have seen that of the red one.
    assert json.loads((folder / "seen.json").read_text())["alive"] == ["dies", "noisy", "selfish"]
    made = [p.name for p in folder.iterdir() if not p.suffix]
    assert sorted(made) == ["Crooked", "busy", "dies", "fails", "noisy", "observer", "selfish"]
    assert not [name for name in made if is_alive(pid(folder, name))]


def test_noise_on_standard_output_is_no_answer(found: dict[str, Any]) -> None:
    assert row(found, "noisy")["check"]["ok"] and row(found, "noisy")["ms_a_step"]["rounds"] == 3


def test_the_weights_are_the_same_and_a_dead_parent_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, labels and scaled times included; and a worker in the midst of work ends when its input does."""
    model = unet({**TINY, "num_class_embeds": 5})
    schedule = replace(SCHEDULE, time_scale=50.0)
    of = replace(case(model, batch=3), schedule=schedule)
    (reference,) = chosen(["reference"])
    here = reference.make(of, torch.float32)
    with Worker(reference, "float32", of, tmp_path) as there:
        x = normal(3, 3, 8, 8)
        assert there.noise == "philox" and torch.equal(there.network(x, 1), here.network(x, 1))
        assert torch.equal(there.chain(5), here.chain(5)) and not torch.equal(there.chain(6), here.chain(5))
        assert there.turn() > 0
        assert there.process.stdin is not None
        os.kill(there.process.pid, 0)
        os.write(there.process.stdin.fileno(), b'["chain", 0]\n' * 4000)
        there.process.stdin.close()
        assert there.process.wait(20.0) == 1


def test_an_interrupt_ends_the_workers(tmp_path: Path) -> None:
    """Of the parent alone, while it waits for a worker that sleeps for a minute."""
    df.save(tmp_path / "model", unet(TINY), SCHEDULE)
    code = (
        "import sys, bench_fakes; from ddpm_fast import cli; from ddpm_fast.benchmarking import providers\n"
        "slow = bench_fakes.fake('sleeps', 'cpu', ms=60_000.0)\n"
        "providers.providers = lambda: {'cpu': slow}\n"
        f"sys.argv = ['ddpm-fast', 'bench', {str(tmp_path / 'model')!r}, '--batch-size', '1', '--providers', 'cpu',\n"
        "            '--dtype', 'float32', '--steps', '1', '--no-startup']\n"
        "from ddpm_fast import roofline; roofline.roofs = lambda *args: roofline.Roofs('', '', 1, '', 1, 1, 1)\n"
        "cli.main()\n"
    )
    variables = {
        "BENCH_FAKES": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent, *sys.path])),
    }
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    ) as parent:
        assert parent.stderr is not None
        for line in parent.stderr:  # until it is checked and timed
            if "timing cpu" in line:
                break
        asleep = pid(tmp_path, "sleeps")
        assert is_alive(asleep)
        parent.send_signal(signal.SIGINT)
        said = parent.stderr.read()
    assert parent.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert not is_alive(asleep)


def test_an_error_of_this_process_ends_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait, and the one that is being checked, whatever is raised; and it passes on."""
    ended: list[str] = []

    class Fake(Worker):
        def __init__(self, provider: Provider, *args: Any):
            self.name = provider.name

        def end(self) -> None:
            ended.append(self.name)

    def verdict(self: Judge, sampling: Fake, *args: Any, **kwargs: Any) -> Verdict:
        if sampling.name == "b":
            raise KeyboardInterrupt
        return Verdict(0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0)

    monkeypatch.setattr(run, "Worker", Fake)
    monkeypatch.setattr(Judge, "verdict", verdict)
    made = [Provider("a", ours.make), Provider("b", ours.make)]
    with pytest.raises(KeyboardInterrupt):
        run.run(Checkpoint(unet(TINY), SCHEDULE, "tiny", "test", []), made, run.Settings([2], ["float32"], 3))
    assert ended == ["b", "a"]


def test_a_worker_rests_before_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its threads sleep: here they work through two windows and an eighth of a third. It is not in its time."""
    spent, slept = iter([0.0, 0.01, 0.01, 0.02, 0.02, 0.02125, 0.03, 0.0305]), []
    worker.rest(lambda: next(spent), slept.append)
    assert slept == [worker.WINDOW_S] * 4
    ticks = iter(range(1000))
    worker.rest(lambda: next(ticks), slept.append)  # never idle
    assert len(slept) == 4 + worker.WINDOWS

    class Sampling:
        def chain(self, seed: int) -> None:
            said.append("drawn")

    said: list[str] = []
    made = worker._Made(tmp_path)
    made.sampling, made.clock = Sampling(), timing.HostClock(lambda: float(len(said)))  # type: ignore[assignment]
    monkeypatch.setattr(worker, "rest", lambda: said.append("rested"))
    assert made.turn() == {"ms": 1000.0} and said == ["drawn", "rested"]


def test_a_clock_that_takes_what_runs_say() -> None:
    says = iter([9.0, 30.0, 60.0, 31.0, 62.0, 29.0, 58.0])
    timed = timing.compare(
        {"a": lambda: next(says)}, clock=timing.OwnClock(), warmup=1, rounds=(6, 6), repeat=False, precision=0.0
    )
    assert timed["a"].samples_ms == (30.0, 60.0, 31.0, 62.0, 29.0, 58.0)
    assert timing.OwnClock()(lambda: 2.5, 3) == 7.5
