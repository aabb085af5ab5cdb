"""Training runs: they learn, and after a kill they go on as if nothing had happened, bit for bit."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_setup import CONFIG, CPU, MODEL, SCHEDULE, assert_same_run, images, run

from ddpm_fast import Sampler, Schedule, UNetConfig, to_uint8
from ddpm_fast.data import ImageData, load_data
from ddpm_fast.images import grid
from ddpm_fast.presets import TrainConfig
from ddpm_fast.training import TrainingDiverged, train
from ddpm_fast.training import state as train_state
from ddpm_fast.training.state import ResumeError
from ddpm_fast.training.step import Trainer


@pytest.fixture(autouse=True)
def one_thread():
    """The order of a sum, and so its last bit, may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def avatars() -> ImageData:
    """64 pictures of people, 16x16."""
    for package in ("dicebear", "dicebear_styles", "resvg_py"):
        pytest.importorskip(package)
    return load_data("avatars:pixel-art:64")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of CONFIG's six steps, with states at 3 and 6."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished")
    result = run(out)
    torch.set_num_threads(before)
    assert result.finished and result.step == 6 and result.out == out
    return out


def interrupted(finished: Path, out: Path, step: int = 3) -> Path:
    """What a kill after ``step`` leaves of ``finished``."""
    shutil.copytree(finished, out)
    for path in train_state.state_paths(out / "state"):
        if int(path.stem[5:]) > step:
            path.unlink()
    return out


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# Learning


def test_the_loss_falls_on_real_images(avatars: ImageData, tmp_path: Path) -> None:
    model = UNetConfig(
        sample_size=16,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    config = TrainConfig(batch_size=16, steps=60, lr=1e-2, warmup_steps=5, ema_decay=0.9, sample_every=0)
    result = train(avatars, tmp_path, model, Schedule(), config, device=CPU, progress=False)
    losses = [entry["loss"] for entry in log_of(tmp_path)]  # each the mean of ten steps
    assert losses[0] > 0.4  # a network that predicts nothing is at 1
    assert losses[-1] < 0.25
    assert result.loss == losses[-1]


# Going on after a kill


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adam", "weight_decay": 0.0, "lr_schedule": "constant", "grad_clip": None},
        {"precision": "bf16"},
    ],
    ids=["adamw-cosine", "adam-constant", "bf16"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(finished: Path, tmp_path: Path, changes: dict) -> None:
    whole = finished
    if changes:
        whole = tmp_path / "whole"
        run(whole, **changes)
    again = interrupted(whole, tmp_path / "again")
    torch.manual_seed(4711)  # of no account: no state outside the file enters
    result = run(again, **changes)
    assert result.finished and result.step == 6
    assert_same_run(again, whole, 6)


def test_a_run_in_one_piece_equals_one_with_checkpoints(finished: Path, tmp_path: Path) -> None:
    run(tmp_path, checkpoint_every=100, log_every=4)
    assert_same_run(tmp_path, finished, 6)
    assert [path.name for path in train_state.state_paths(tmp_path / "state")] == ["step_000000006.pt"]


def slow_run(folder: str, out: str, steps: int) -> None:
    """Runs in another process, to be killed."""
    torch.set_num_threads(1)
    run(Path(out), load_data(Path(folder) / "avatars.npz"), _AVATAR_MODEL, steps=steps, checkpoint_every=2)


_AVATAR_MODEL = UNetConfig.from_dict({**MODEL.to_dict(), "sample_size": 16})


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_killed_at_a_random_moment(avatars: ImageData, tmp_path: Path) -> None:
    steps, data = 40, tmp_path / "avatars.npz"
    np.savez(data, arr_0=avatars.images, arr_1=np.arange(len(avatars)) % 3)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = f"import test_training; test_training.slow_run({str(tmp_path)!r}, {str(killed)!r}, {steps})"
    here, root = Path(__file__).parent, Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(root)])}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    random = np.random.default_rng()
    moment = int(random.integers(1, 25))
    deadline_s = time.monotonic() + 300
    log = killed / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= moment):
        assert child.poll() is None and time.monotonic() < deadline_s
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    state = train_state.load_latest_state(killed / "state")
    reached = 0 if state is None else state["step"]
    assert reached >= moment - 3, "more than one checkpoint interval was lost"
    assert reached < steps
    for out in (killed, whole):
        slow_run(str(tmp_path), str(out), steps)
    assert_same_run(killed, whole, steps)
    for ours, theirs in zip(log_of(killed), log_of(whole), strict=True):
        assert all(ours[name] == theirs[name] for name in ("step", "loss", "lr", "grad_norm")), (moment, reached)


@pytest.fixture
def set_signal() -> Iterator[Callable[[signal.Signals, Any], None]]:
    """``signal.signal``, undone after the test."""
    before: dict[signal.Signals, Any] = {}

    def set_(number: signal.Signals, handler: Any) -> None:
        before.setdefault(number, signal.signal(number, handler))

    yield set_
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_saves_and_returns(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, set_signal: Any
) -> None:
    handler = signal.default_int_handler
    set_signal(number, handler)  # where the suite was started with it ignored, too
    step = Trainer.step

    def stop_at_four(self: Trainer, k: int, batch: object) -> object:
        if k == 3:
            signal.raise_signal(number)
            assert signal.getsignal(number) == handler  # a second one would end the process
        return step(self, k, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop_at_four)
        result = run(tmp_path)
    assert not result.finished and result.step == 4
    assert train_state.load_latest_state(tmp_path / "state")["step"] == 4
    assert run(tmp_path).finished
    assert_same_run(tmp_path, finished, 6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, set_signal: Any
) -> None:
    """As under nohup, or in the background of a script: the training goes on."""
    set_signal(number, signal.SIG_IGN)
    step = Trainer.step

    def ignored(self: Trainer, k: int, batch: object) -> object:
        if k == 3:
            signal.raise_signal(number)
        return step(self, k, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", ignored)
        assert run(tmp_path).finished
    assert signal.getsignal(number) is signal.SIG_IGN
    assert_same_run(tmp_path, finished, 6)


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_processes_do_not_train_in_one_folder(finished: Path, tmp_path: Path) -> None:
    """A lock is its opener's: the second one is another process to it, though it is this one."""
    out = interrupted(finished, tmp_path / "out", step=3)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    release = train_state.hold(out)
    with pytest.raises(ResumeError, match="another process trains in"):
        run(out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    release()
    assert run(out).finished
    train_state.hold(out)()  # and it has let go
    assert_same_run(out, finished, 6)


def test_an_export_lost_to_a_kill_is_made_again(finished: Path, tmp_path: Path) -> None:
    out = interrupted(finished, tmp_path / "out", step=6)
    shutil.rmtree(out / "unet")
    assert run(out).finished
    assert_same_run(out, finished, 6)


# What resuming refuses and allows


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.5}, [r"train\.lr: was 0\.01, now 0\.5"]),
        ({"batch_size": 4, "flip": False}, [r"train\.batch_size: was 8, now 4", r"train\.flip: was True, now False"]),
        ({"steps": 9}, [r"train\.steps: was 6, now 9"]),  # the cosine ends there
        ({"seed": 1}, [r"train\.seed: was 0, now 1"]),
        ({"precision": "bf16"}, [r"train\.precision: was 'auto'", r"precision\.dtype: was 'torch\.float32'"]),
        ({"data": images(19)}, [r"data\.digest: was", r"data\.images: was 20, now 19"]),
        (
            {"model": UNetConfig.from_dict({**MODEL.to_dict(), "block_out_channels": (8, 24)})},
            [r"model\.block_out_channels: was \[8, 16\], now \[8, 24\]"],
        ),
    ],
)
def test_other_settings_are_refused_by_name(finished: Path, tmp_path: Path, changes: dict, named: list[str]) -> None:
    out = interrupted(finished, tmp_path / "out")
    before = (out / "log.jsonl").read_bytes()
    with pytest.raises(ResumeError) as caught:
        run(out, **changes)
    for pattern in named:
        assert re.search(pattern, str(caught.value)), (pattern, str(caught.value))
    assert (out / "log.jsonl").read_bytes() == before


def test_another_schedule_or_resume_false_is_refused(finished: Path, tmp_path: Path) -> None:
    out = interrupted(finished, tmp_path / "out")
    with pytest.raises(ResumeError, match=r"schedule\.beta_end: was 0\.2, now 0\.1"):
        train(images(), out, MODEL, Schedule(num_train_timesteps=50, beta_end=0.1), CONFIG, CPU, progress=False)
    with pytest.raises(ResumeError, match="holds a run at step 3; resume it or give another folder"):
        train(images(), out, MODEL, SCHEDULE, CONFIG, CPU, resume=False, progress=False)


def test_settings_that_only_record_may_change(finished: Path, tmp_path: Path) -> None:
    out = interrupted(finished, tmp_path / "out")
    assert run(out, checkpoint_every=2, log_every=2, sample_count=3, sample_steps=7).finished
    assert_same_run(out, finished, 6)


def test_a_constant_rate_may_train_longer(tmp_path: Path) -> None:
    run(tmp_path / "a", lr_schedule="constant", steps=3)
    run(tmp_path / "a", lr_schedule="constant", steps=6)
    run(tmp_path / "b", lr_schedule="constant", steps=6)
    assert_same_run(tmp_path / "a", tmp_path / "b", 6)


# Records


def test_the_log_and_its_cut_on_resume(finished: Path, tmp_path: Path) -> None:
    entries = log_of(finished)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    for entry in entries:
        assert list(entry) == ["step", "loss", "lr", "grad_norm", "images_per_s", "elapsed_s"]
        assert entry["images_per_s"] > 0
    rates = [0.005, 0.01, 0.01, 0.01 * (0.5 + 0.5 * np.cos(np.pi / 4)), 0.005, 0.01 * (0.5 - 0.5 * np.cos(np.pi / 4))]
    assert [entry["lr"] for entry in entries] == pytest.approx(rates)
    assert all(a["elapsed_s"] <= b["elapsed_s"] for a, b in pairwise(entries))
    out = interrupted(finished, tmp_path / "out")
    with open(out / "log.jsonl", "ab") as log:
        log.write(b'{"step": 7, "lo\xff')  # a kill amid a line
    run(out)
    again = log_of(out)
    assert [entry["step"] for entry in again] == [1, 2, 3, 4, 5, 6]
    assert again[:3] == entries[:3]
    for ours, theirs in zip(again, entries):
        assert all(ours[name] == theirs[name] for name in ("loss", "lr", "grad_norm"))
    assert again[3]["elapsed_s"] > again[2]["elapsed_s"]


def test_a_log_entry_is_the_mean_of_its_interval(finished: Path, tmp_path: Path) -> None:
    run(tmp_path, log_every=4)
    single = [entry["loss"] for entry in log_of(finished)]
    assert [entry["step"] for entry in log_of(tmp_path)] == [4, 6]
    assert [entry["loss"] for entry in log_of(tmp_path)] == pytest.approx([np.mean(single[:4]), np.mean(single[4:])])


def test_the_exported_model_is_the_average(finished: Path) -> None:
    state = train_state.load_latest_state(finished / "state")
    exported = load_file(finished / "unet/diffusion_pytorch_model.safetensors")
    assert exported.keys() == state["ema"].keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, state["ema"][name]), name
    assert not torch.equal(state["ema"]["conv_in.weight"], state["model"]["conv_in.weight"])
    settings = json.loads((finished / "train_config.json").read_text())
    assert settings["train"] == CONFIG.to_dict() and settings["model"] == MODEL.to_dict()


def test_sample_grids_show_the_average_and_disturb_nothing(finished: Path, tmp_path: Path) -> None:
    run(tmp_path, sample_every=4, sample_count=5, sample_steps=5)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["step_000000004.png", "step_000000006.png"]
    assert_same_run(tmp_path, finished, 6)
    model = Trainer(images(), MODEL, SCHEDULE, CONFIG, CPU).ema.model
    model.load_state_dict(train_state.load_latest_state(tmp_path / "state")["ema"])
    x = Sampler(model, SCHEDULE, batch_size=5, steps=5, device=CPU).sample(
        5, seed=0, labels=torch.tensor([0, 1, 2, 0, 1])
    )
    want = grid(to_uint8(x).numpy())
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "samples/step_000000006.png")), want)


def test_a_picture_that_cannot_be_drawn_does_not_stop_training(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Sampler, *args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("memory must hold one image at a time, and does not")

    monkeypatch.setattr(Sampler, "sample", fail)
    with pytest.warns(RuntimeWarning, match="no samples at step 6: memory must hold one image"):
        run(tmp_path, sample_every=6)
    assert_same_run(tmp_path, finished, 6)


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(1)
    want = torch.rand(4)
    torch.manual_seed(1)
    run(tmp_path, steps=1)
    assert torch.equal(torch.rand(4), want)


def test_a_diverged_run_keeps_the_states_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.step

    def explode(self: Trainer, k: int, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
        loss, norm = step(self, k, batch)
        return (loss * float("nan"), norm) if k == 4 else (loss, norm)

    monkeypatch.setattr(Trainer, "step", explode)
    with pytest.raises(TrainingDiverged, match="loss and gradient must stay finite; at step 6"):
        run(tmp_path, log_every=100)
    assert train_state.load_latest_state(tmp_path / "state")["step"] == 3


def test_a_failing_batch_ends_the_run_with_its_error(tmp_path: Path) -> None:
    class Broken:
        shape = (20, 8, 8, 3)

        def __getitem__(self, index: object) -> np.ndarray:
            raise OSError("the disk is gone")

        def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
            return np.zeros(self.shape, np.uint8)

    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path, ImageData(Broken(), images().labels, tuple("abc")))


def test_the_bar_shows_loss_and_speed_and_a_log_little_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        train(images(), tmp_path / str(terminal), MODEL, SCHEDULE, CONFIG, CPU)
        shown[terminal] = stream.getvalue()
    loss = log_of(tmp_path / "True")[-1]["loss"]
    assert re.search(rf"6/6 .*loss {loss:.4f}, \d+ images/s", shown[True])
    lines = shown[False].splitlines()
    assert "\r" not in shown[False] and len(lines) == 2 and "0/6" in lines[0] and "6/6" in lines[1]
    assert "loss" in lines[1]


def test_a_new_run_may_begin_with_given_weights(finished: Path, tmp_path: Path) -> None:
    given = Trainer(images(), MODEL, SCHEDULE, replace(CONFIG, seed=7), CPU).model
    weights = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    begun = Trainer(images(), MODEL, SCHEDULE, CONFIG, CPU, init_from=given)
    for state in (begun.model.state_dict(), begun.ema.model.state_dict()):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in state.items())
    out = interrupted(finished, tmp_path / "out")
    train(images(), out, MODEL, SCHEDULE, CONFIG, CPU, progress=False, init_from=given)  # of no account any more
    assert_same_run(out, finished, 6)


# States on disk


@pytest.mark.parametrize("left", [0, 1, 0.5, 0.99])
def test_a_torn_state_is_passed_over_for_the_older(finished: Path, tmp_path: Path, left: float) -> None:
    out = interrupted(finished, tmp_path / "out", step=6)
    torn = out / "state/step_000000006.pt"
    content = torn.read_bytes()
    torn.write_bytes(content[: int(left) if left in (0, 1) else int(left * len(content))])
    with pytest.warns(UserWarning, match=r"step_000000006\.pt does not read"):
        result = run(out)
    assert result.finished
    assert_same_run(out, finished, 6)


@pytest.mark.parametrize("content", [b"torn", b"\x80\x02", b"PK\x03\x04", bytes(1000)])
def test_no_state_that_reads_is_an_error(finished: Path, tmp_path: Path, content: bytes) -> None:
    out = interrupted(finished, tmp_path / "out")
    (out / "state/step_000000003.pt").write_bytes(content)
    with pytest.warns(UserWarning, match="does not read"), pytest.raises(ResumeError, match="none of the 1 states"):
        run(out)


# CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_mixed_precision_on_a_gpu(tmp_path: Path, precision: str) -> None:
    config = replace(CONFIG, precision=precision, steps=8, checkpoint_every=4)
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(images(), whole, MODEL, SCHEDULE, config, device="cuda", progress=False)
    interrupted(whole, again, step=4)
    train(images(), again, MODEL, SCHEDULE, config, device="cuda", progress=False)
    assert_same_run(again, whole, 8)
    state = train_state.load_latest_state(again / "state")
    assert {t.dtype for t in state["model"].values()} == {torch.float32}
    assert bool(state["scaler"]) == (precision == "fp16")
    losses = [entry["loss"] for entry in log_of(again)]
    assert all(0.1 < loss < 3 for loss in losses)
