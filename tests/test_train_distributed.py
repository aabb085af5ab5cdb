"""Training over several processes, with real ones on gloo: the loss curve and weights of one process alone, whoever
dies and however many go on; one complaint, one log, and no process left behind.

Each test of several processes starts them once and lets them train several runs: a start takes seconds, a run less.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_setup import CONFIG, CPU, MODEL, SCHEDULE, assert_same_run, images, run

from ddpm_fast import distributed
from ddpm_fast.cli import train as training_cli
from ddpm_fast.distributed import World
from ddpm_fast.training import state as train_state
from ddpm_fast.training import train
from ddpm_fast.training.step import DROPOUT, Batch, Trainer, make_batch, stream_seed

pytestmark = pytest.mark.skipif(
    os.name != "posix" or not torch.distributed.is_gloo_available(), reason="needs gloo and POSIX signals"
)
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
STEPS = 8
# Dropout's masks are each process' own, so that only without it one process is the yardstick.
PLAIN = replace(MODEL, dropout=0.0)

# Stated bounds in float32, over eight steps at a rate of 1e-2. Seen: 1.5e-7, 1e-6, 2e-5.
LOSS, NORM = 1e-6, 5e-6  # relative
WEIGHTS = 1e-4  # absolute
# The same number added to every key cancels in the softmax: this gradient is rounding, which Adam makes as large as
# any other. It moves differently in every order of sums, and no output depends on it.
NO_GRADIENT = "to_k.bias"


@pytest.fixture(autouse=True)
def one_thread():
    """As the other processes, so that sums are in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(count: int, words: list[str]) -> list[subprocess.Popen]:
    """``count`` processes of this Python as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def part_in(scenario: Callable[[World, Path], None], folder: Path) -> list[str]:
    """The words of a process that calls ``scenario``, of this file."""
    return ["-c", f"import test_train_distributed as t; t.take_part(t.{scenario.__name__}, {str(folder)!r})"]


def take_part(scenario: Callable[[World, Path], None], folder: str) -> None:
    torch.set_num_threads(1)
    with distributed.join() as world:
        scenario(world, Path(folder))


def finish(processes: list[subprocess.Popen]) -> list[tuple[str, str]]:
    """Wait for all; what each wrote to stdout and stderr. None outlives the test."""
    try:
        return [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()


def play(count: int, scenario: Callable[[World, Path], None], folder: Path) -> None:
    processes = start(count, part_in(scenario, folder))
    said = finish(processes)
    assert [process.returncode for process in processes] == [0] * count, "\n".join(errors for _, errors in said)


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_close_run(got: Path, want: Path, step: int = STEPS, loss: float = LOSS, norm: float = NORM) -> None:
    """Loss curves, gradient norms and weights of two runs within the stated bounds."""
    ours, theirs = log_of(got), log_of(want)
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs] == list(range(1, step + 1))
    for a, b in zip(ours, theirs):
        assert a["lr"] == b["lr"]
        assert a["loss"] == pytest.approx(b["loss"], rel=loss), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=norm), a["step"]
    states = [torch.load(out / "state" / f"step_{step:09d}.pt", weights_only=True) for out in (got, want)]
    for part in ("model", "ema"):
        assert states[0][part].keys() == states[1][part].keys()
        for name, tensor in states[0][part].items():
            bound = WEIGHTS if not name.endswith(NO_GRADIENT) else step * CONFIG.lr
            torch.testing.assert_close(tensor, states[1][part][name], rtol=0, atol=bound, msg=f"{part} {name}")


def cut_back(whole: Path, out: Path, step: int) -> Path:
    """What a kill after ``step`` leaves of ``whole``."""
    shutil.copytree(whole, out)
    for path in train_state.state_paths(out / "state"):
        if int(path.stem[5:]) > step:
            path.unlink()
    return out


def plain_run(out: Path, **changes: Any) -> Any:
    return run(out, model=PLAIN, **{"steps": STEPS, "checkpoint_every": 4, **changes})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process: "plain", and "half", whose matrices are float16."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    plain_run(folder / "plain")
    plain_run(folder / "half", precision="fp16", steps=4)
    torch.set_num_threads(before)
    return folder


# The draws: no processes needed


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_parts_of_a_batch_are_the_batch(size: int) -> None:
    """Images, flips, labels, t and noise of all ranks, one after the other, are those of one process, bit for bit."""
    data, one = images(), Trainer(images(), MODEL, SCHEDULE, CONFIG, CPU)
    for k in (0, 3):
        whole = make_batch(data, CONFIG, k, CPU)
        t, noise = one._draw(k, CONFIG.batch_size, whole.x0)
        parts, draws = [], []
        for rank in range(size):
            world = World(rank, size)
            parts.append(make_batch(data, CONFIG, k, CPU, world))
            draws.append(Trainer(data, MODEL, SCHEDULE, CONFIG, CPU, world=world)._draw(k, 8, parts[-1].x0))
        assert max(len(p.x0) for p in parts) - min(len(p.x0) for p in parts) <= 1
        assert torch.equal(torch.cat([p.x0 for p in parts]), whole.x0)
        assert torch.equal(torch.cat([p.labels for p in parts]), whole.labels)
        assert torch.equal(torch.cat([d[0] for d in draws]), t)
        assert torch.equal(torch.cat([d[1] for d in draws]), noise)


def test_dropout_has_a_stream_for_each_process_and_step() -> None:
    seeds = {stream_seed(0, DROPOUT, k, rank) for k in range(50) for rank in range(8)}
    assert len(seeds) == 400
    assert stream_seed(7, DROPOUT, 3, 0) == stream_seed(7, DROPOUT, 3)  # what one process has always drawn


def test_a_process_alone_agrees_with_itself() -> None:
    world, error = World(), KeyError("mine")
    assert (world.any(True), world.sum(1.5), world.gather("a"), world.share([1])) == (True, 1.5, ["a"], [1])
    with pytest.raises(KeyError) as caught:
        world.together(lambda: (_ for _ in ()).throw(error))
    assert caught.value is error
    assert distributed.of_environment({}) == World()
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert distributed.of_environment(torchrun) == World(5, 8, 1)


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.own_device(cuda, World(5, 8, 1)) == torch.device("cuda", 1)
    assert distributed.own_device(cuda, World()) == cuda and distributed.own_device(CPU, World(5, 8, 1)) == CPU
    with pytest.raises(ValueError, match="torch sees 2 here and this is local process 2"):
        distributed.own_device(cuda, World(2, 3, 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # CUDA_VISIBLE_DEVICES is each process' own
    assert distributed.own_device(cuda, World(5, 8, 3)) == torch.device("cuda", 0)


def test_a_batch_smaller_than_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="each needs an image of it; got batch_size 8 for 9 processes"):
        Trainer(images(), MODEL, SCHEDULE, CONFIG, CPU, world=World(0, 9))


# Two processes


def two(world: World, folder: Path) -> None:
    plain_run(folder / "plain")
    plain_run(folder / "half", precision="fp16", steps=4)
    run(folder / "dropout")
    if world.first:
        cut_back(folder / "dropout", folder / "dropout again", 3)
    world.barrier()
    run(folder / "dropout again")

    step = Trainer.step

    def stopped(self: Trainer, k: int, batch: Batch) -> Any:
        if world.rank == 1 and k == 3:
            signal.raise_signal(signal.SIGTERM)
        result = step(self, k, batch)
        dropout.append(torch.initial_seed())
        return result

    def overflowing(self: Trainer, k: int, batch: Batch) -> Any:
        """In the second step, one gradient of rank 1 is infinite."""
        weight, factor = self.model.conv_out.weight, float("inf") if world.rank == 1 and k == 1 else 1.0
        hook = weight.register_hook(lambda gradient: gradient * factor)
        result = step(self, k, batch)
        hook.remove()
        scales.append(self.scaler.get_scale())
        return result

    scales: list[float] = []
    dropout: list[int] = []
    Trainer.step = stopped  # type: ignore[method-assign]
    result = run(folder / "stopped")
    Trainer.step = overflowing  # type: ignore[method-assign]
    run(folder / "overflowing", model=PLAIN, precision="fp16", steps=3)
    Trainer.step = step  # type: ignore[method-assign]
    report = {"stopped at": result.step, "finished": result.finished, "scales": scales, "dropout": dropout}
    report["errors"] = errors = {}
    other = images()
    other.images[19] ^= world.rank  # on rank 1, one bit of each of an image's pixels is another
    for name, work in {
        "other data": lambda: run(folder / "x", data=other),
        "other rate": lambda: run(folder / "dropout", lr=0.5),
        "NaN": lambda: run(folder / "nan", lr=1e30, warmup_steps=0, log_every=4, grad_clip=None),
        "no image each": lambda: run(folder / "y", batch_size=1),
        "the command": lambda: training_cli.run(
            training_cli.Asked(None, folder, "huge", None, None, False, False, {}), "cpu"
        ),
        "full disk": lambda: run(folder / "full"),
    }.items():
        if name == "full disk" and world.first:
            train_state.save_state = full  # type: ignore[assignment]
        try:
            work()
        except (Exception, SystemExit) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    (folder / f"report {world.rank}").write_text(json.dumps(report))


def full(*args: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left of the scenario ``two``."""
    folder = tmp_path_factory.mktemp("pair")
    play(2, two, folder)
    return folder


def reports(folder: Path) -> list[dict]:
    return [json.loads((folder / f"report {rank}").read_text()) for rank in range(2)]


def test_two_processes_train_as_one(pair: Path, alone: Path) -> None:
    assert_close_run(pair / "plain", alone / "plain")
    settings = [json.loads((folder / "plain/train_config.json").read_text()) for folder in (pair, alone)]
    assert settings[0] == settings[1], "the number of processes is no setting of a run"
    assert sorted(p.name for p in (pair / "plain").iterdir()) == sorted(p.name for p in (alone / "plain").iterdir())


def test_half_precision_over_two_processes(pair: Path, alone: Path) -> None:
    """Each rounds its own part's products: the curves agree as float16 does with itself. Seen: 3e-4."""
    for ours, theirs in zip(log_of(pair / "half"), log_of(alone / "half"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=3e-3)


def test_an_overflow_anywhere_skips_the_update_everywhere(pair: Path) -> None:
    """The averaged gradient is infinite for all, so that all scalers halve their factor and the weights stay equal."""
    first, second = (report["scales"] for report in reports(pair))
    assert first == second == [65536.0, 32768.0, 32768.0]
    assert len(log_of(pair / "overflowing")) == 3


def test_with_dropout_a_resumed_run_equals_the_uninterrupted_one(pair: Path) -> None:
    assert_same_run(pair / "dropout again", pair / "dropout", 6)


def test_each_process_draws_its_own_masks(pair: Path) -> None:
    seeds = [report["dropout"] for report in reports(pair)]
    assert seeds == [[stream_seed(0, DROPOUT, k, rank) for k in range(4)] for rank in range(2)]
    assert len({*seeds[0], *seeds[1]}) == 8


def test_a_signal_to_one_stops_all_after_the_same_step(pair: Path) -> None:
    for report in reports(pair):
        assert (report["stopped at"], report["finished"]) == (4, False)
    assert [path.name for path in train_state.state_paths(pair / "stopped/state")] == [
        "step_000000003.pt",
        "step_000000004.pt",
    ]
    assert [entry["step"] for entry in log_of(pair / "stopped")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("other data", "ValueError", r"need the same data and settings; data\.digest: process 0 has '\w+', process 1 "),
        ("other rate", "ResumeError", r"train\.lr: was 0\.01, now 0\.5"),
        ("NaN", "TrainingDiverged", "loss and gradient must stay finite; at step"),
        ("no image each", "ValueError", "got batch_size 1 for 2 processes"),
        ("full disk", "OSError", "No space left on device"),
    ],
)
def test_one_complains_and_all_stop(pair: Path, name: str, error: str, message: str) -> None:
    own, others = (report["errors"][name] for report in reports(pair))
    assert own.startswith(f"{error}: ") and re.search(message, own)
    assert others == f"OtherProcessFailed: process 0 of 2 failed: {own}"


def test_the_command_speaks_for_all_by_one(pair: Path) -> None:
    own, others = (report["errors"]["the command"] for report in reports(pair))
    assert own.startswith("ValueError: no preset is called 'huge'")
    assert others == "SystemExit: 2", "with the exit code of an error, and not a word"


# Three, which do not divide the batch of eight


def three(world: World, folder: Path) -> None:
    plain_run(folder / "plain")
    plain_run(folder / "from two")
    if world.first:
        cut_back(folder / "plain", folder / "again", 4)
    world.barrier()
    plain_run(folder / "again")


def test_three_processes_and_a_run_that_two_began(tmp_path: Path, pair: Path, alone: Path) -> None:
    cut_back(pair / "plain", tmp_path / "from two", 4)
    play(3, three, tmp_path)
    assert_close_run(tmp_path / "plain", alone / "plain")
    assert_close_run(tmp_path / "from two", alone / "plain")
    assert_same_run(tmp_path / "again", tmp_path / "plain", STEPS)  # bit for bit, where the number is the same
    for entry in log_of(tmp_path / "from two")[:4]:
        assert entry in log_of(pair / "plain")


# A process dies


def slow(world: World, folder: Path) -> None:
    (folder / f"pid {world.rank}").write_text(str(os.getpid()))
    plain_run(folder / "run", steps=400, lr_schedule="constant", checkpoint_every=2)


def test_killed_on_one_worker_and_resumed_by_one(tmp_path: Path, alone: Path) -> None:
    processes, out = start(2, part_in(slow, tmp_path)), tmp_path / "run"
    moment, deadline_s = int(np.random.default_rng().integers(2, 8)), time.monotonic() + 120
    try:
        while not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("\n") >= moment):
            assert all(p.poll() is None for p in processes) and time.monotonic() < deadline_s
            time.sleep(0.02)
        processes[1].kill()
        processes[0].wait(timeout=60)  # it does not wait for the dead
    finally:
        finish(processes)
    assert processes[0].returncode not in (0, None)
    reached = train_state.load_latest_state(out / "state")["step"]
    assert reached >= moment - 2, "more than one checkpoint interval was lost"
    steps = reached + 4
    for folder in (out, tmp_path / "whole"):
        plain_run(folder, steps=steps, lr_schedule="constant", checkpoint_every=steps)
    assert_close_run(out, tmp_path / "whole", steps)


# The command


# What torch 2.10's Gloo prints once its peers are connected; processes that share stdout mix its pieces.
GLOO = r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. |Expected number of connected peer ranks is : |\n"


def test_torchrun_trains_and_speaks_once(tmp_path: Path) -> None:
    data, out = tmp_path / "data.npz", tmp_path / "out"
    pixels = images()
    np.savez(data, arr_0=pixels.images, arr_1=pixels.labels)
    settings = {**CONFIG.to_dict(), **PLAIN.to_dict(), **SCHEDULE.to_dict(), "steps": 4}
    del settings["sample_size"], settings["num_class_embeds"]  # these are the data's
    words = ["-m", "ddpm_fast", "train", str(data), "--image-size", "8", "--device", "cpu", "--out", str(out)]
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    line = f"trained 4 steps; the model is in {out}: ddpm-fast sample {out} --label all\n"
    assert done.stdout.endswith(line)
    assert re.sub(GLOO, "", done.stdout.removesuffix(line)) == ""
    assert done.stderr.count("training: steps 0 to 4, batches of 8 over 2 processes, float32 on cpu") == 1
    words = ["-m", "ddpm_fast", "train", "--out", str(out), "--device", "cpu"]  # all else is recorded there
    again = subprocess.run([*torchrun, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0 and again.stderr.count("continues at step 4 of 4, 0 to go") == 1, again.stderr
    train(pixels, tmp_path / "alone", PLAIN, SCHEDULE, replace(CONFIG, steps=4), CPU, progress=False)
    for ours, theirs in zip(log_of(out), log_of(tmp_path / "alone"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=LOSS)
