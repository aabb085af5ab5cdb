"""Real processes that a signal ends while they make something: what was made is kept, and the same command goes on."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, unet
from PIL import Image
from store_processes import ROOT, Command, finished, until
from store_setup import files

import ddpm_fast as df
from ddpm_fast.images import grid
from ddpm_fast.store.pictures import PictureFolder

if sys.platform == "win32":
    pytest.skip("NOT PROVEN HERE: processes are forked", allow_module_level=True)

SMALL: dict[str, Any] = {**TINY, "block_out_channels": (4, 8), "norm_num_groups": 2, "num_class_embeds": 3}
SCHEDULE = df.Schedule(num_train_timesteps=10, beta_start=0.01, beta_end=0.5)
N, BATCH = 40, 2
WORDS = ("-n", N, "--batch-size", BATCH, "--label", "all", "--device", "cpu", "--ops", "reference", "--first-id", 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    df.save(folder, unet(SMALL), SCHEDULE)
    return folder


@pytest.fixture(scope="module")
def images(model: Path) -> np.ndarray:  # [N, H, W, C] uint8
    """By the library, in batches of two, one after the other."""
    loaded = df.load(model)
    sampler = df.Sampler(loaded.model, loaded.schedule, batch_size=BATCH, ops="reference")
    labels = [i % 3 for i in range(5, 5 + N)]
    return df.to_uint8(sampler.sample(N, 0, labels, 5)).numpy()


class Place:
    """One output in an empty folder, and the commands that make it."""

    def __init__(self, model: Path, folder: Path):
        self.model, self.folder, self.all = model, folder / "in", []
        self.folder.mkdir()

    def start(self, *words: object, ignored: str = "") -> Command:
        log = self.folder.with_name(f"log-{len(self.all)}")
        self.all.append(Command(words, log, {"IGNORED": ignored}))
        return self.all[-1]

    def sample(self, out: str, *more: object) -> Command:
        return self.start("sample", self.model, *WORDS, "--out", self.folder / out, *more)


@pytest.fixture
def place(model: Path, tmp_path: Path):
    found = Place(model, tmp_path)
    yield found
    for command in found.all:
        command.kill()


def stop(command: Command, number: int) -> str:
    """Send a signal and wait; the last line."""
    assert command.running, command.output()
    os.kill(command.process.pid, number)
    code = command.wait()
    output = command.output()
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130), output
    assert "Traceback" not in output
    return output.splitlines()[-1]


def pngs(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> what changes when a file is written anew."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.png")} if folder.is_dir() else {}


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM", "SIGHUP"])
def test_a_folder_of_pngs_goes_on(name: str, place: Place, images: np.ndarray):
    folder = place.folder / "pngs"
    command = place.sample("pngs")
    until(lambda: len(pngs(folder)) >= 3 * BATCH or not command.running)
    said = stop(command, getattr(signal, name))
    before = pngs(folder)
    assert 3 * BATCH <= len(before) < N
    for image in folder.glob("*.png"):  # none is half written
        assert np.array_equal(np.asarray(Image.open(image)), images[int(image.stem) - 5])
    if name != "SIGKILL":
        kept = f"{len(before)} of {N} images are finished and kept in {folder}; the same command goes on"
        assert said == f"ddpm-fast: interrupted; {kept}"
    again = place.sample("pngs")
    assert again.wait() == 0, again.output()
    after = pngs(folder)
    whole = len(before) // BATCH * BATCH  # of a batch that was being written, the images are drawn again
    assert [n for n in sorted(before)[:whole] if after[n] != before[n]] == []
    found = files(folder)
    assert set(found) == {f"{i:06d}.png" for i in range(5, 5 + N)} | {"set.json", "labels.csv"}
    for i in range(5, 5 + N):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(found[f"{i:06d}.png"]))), images[i - 5])
    assert found["labels.csv"].decode().splitlines()[1:] == [f"{i:06d}.png,{i % 3}" for i in range(5, 5 + N)]
    assert again.output().splitlines()[-1] == f"{N} images in {folder}"
    one = place.sample("uninterrupted")
    assert one.wait() == 0 and files(place.folder / "uninterrupted") == found


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("out", ["a.npz", "a.png"])
def test_a_file_goes_on(out: str, name: str, place: Place, images: np.ndarray):
    parts = place.folder / f"{out}.parts"
    command = place.sample(out)
    until(lambda: finished(parts) >= 3 or not command.running)
    said = stop(command, getattr(signal, name))
    count = finished(parts)
    assert 3 <= count < N // BATCH and not (place.folder / out).exists()
    if name != "SIGKILL":
        kept = f"{BATCH * count} of {N} images are finished and kept in {parts}; the same command goes on"
        assert said == f"ddpm-fast: interrupted; {kept}"
    before = {p.name: p.stat().st_ino for p in (parts / "images").glob("*.npy")}
    again = place.sample(out)
    until(lambda: finished(parts) >= count + 2 or not again.running)
    now = {p.name: p.stat().st_ino for p in (parts / "images").glob("*.npy")}
    assert again.running and {n for n in sorted(before)[:count] if now[n] != before[n]} == set()
    assert again.wait() == 0, again.output()
    assert os.listdir(place.folder) == [out]
    if out.endswith(".npz"):
        with np.load(place.folder / out) as file:
            assert file.files == ["arr_0", "arr_1"] and np.array_equal(file["arr_0"], images)
            assert file["arr_1"].tolist() == [i % 3 for i in range(5, 5 + N)]
    else:
        assert np.array_equal(np.asarray(Image.open(place.folder / out)), grid(images))
    content = (place.folder / out).read_bytes()
    one = place.sample(out)  # over the one that is there
    assert one.wait() == 0 and files(place.folder) == {out: content}


def test_what_a_killed_run_left_is_not_taken_for_another_set(place: Place):
    command = place.sample("a.npz")
    until(lambda: finished(place.folder / "a.npz.parts") >= 1 or not command.running)
    stop(command, signal.SIGKILL)
    other = place.sample("a.npz", "--seed", 1)
    assert other.wait() == 2
    text = other.output()
    assert "a.npz.parts holds a set that was begun with other options: seed: was 0, now 1. Set them back, or" in text
    assert text.rstrip().endswith("a.npz.parts, which an interrupted run left") and text.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_store_says_what_is_kept(number: int, place: Place):
    folder = place.folder / "set"
    command = place.sample("set", "--store")
    until(lambda: finished(folder) >= 2 or not command.running)
    said = stop(command, number)
    count = BATCH * finished(folder)
    assert said == (
        f"ddpm-fast: interrupted; {count} of {N} images are finished and kept in {folder}; the same command goes on"
    )


def test_a_film_is_there_when_its_batch_ends(place: Place, images: np.ndarray):
    """And again after an interruption, although the first batch is there already."""
    film = place.folder / "film.png"
    for out in ("pngs", "a.npz"):
        contents = []
        for _ in range(2):
            film.unlink(missing_ok=True)
            command = place.sample(out, "--film", film)
            until(lambda: film.exists() or not command.running)
            stop(command, signal.SIGKILL)
            contents.append(film.read_bytes())
            last = np.asarray(Image.open(film))
            factor = 1200 // (11 * 8)
            assert np.array_equal(last[: 8 * factor, -8 * factor :][::factor, ::factor], images[0])
        assert contents[0] == contents[1]


def test_nohup_is_respected(place: Place):
    """A process that is started with SIGHUP ignored goes on when its terminal closes."""
    command = place.start("sample", place.model, *WORDS, "--out", place.folder / "pngs", ignored="SIGHUP")
    until(lambda: len(pngs(place.folder / "pngs")) >= 2 or not command.running)
    os.kill(command.process.pid, signal.SIGHUP)
    assert command.wait() == 0, command.output()
    assert len(pngs(place.folder / "pngs")) == N


def test_temporary_files_of_the_dead_are_cleared_away(place: Place):
    """A process that dies while it writes a PNG leaves it under a name that no reader takes for an image."""
    folder = place.folder / "pngs"
    first = place.sample("pngs")
    until(lambda: len(pngs(folder)) >= 2 or not first.running)
    stop(first, signal.SIGKILL)
    own = PictureFolder.open(folder)._temporary
    machine = own.name.partition("-")[0]
    names = {p.name for p in folder.iterdir() if p.name.startswith(".")}
    assert names <= {f"{machine}-{first.process.pid}.png.tmp"}
    dead, far = own.with_name(f"{machine}-{first.process.pid}.png.tmp"), own.with_name(".0123-1.png.tmp")
    for path in (dead, own, far):
        path.write_bytes(b"x")
    second = place.sample("pngs")
    assert second.wait() == 0, second.output()
    assert (dead.exists(), own.exists(), far.exists()) == (False, True, True)


# --- streams that nobody reads ---


def piped(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ddpm_fast", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), text=True)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("words", [("--help",), ("inspect", "MODEL")])
def test_results_that_nobody_reads_end_a_command_silently(words: tuple[str, ...], model: Path):
    """As in ``ddpm-fast inspect | true``: no traceback, no complaint at the end, and SIGPIPE's exit code."""
    process = piped(*(model if word == "MODEL" else word for word in words))
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = [line for line in process.stderr.read().splitlines() if "importing torch" not in line]
    assert (process.wait(60), said) == (141, [])


def test_messages_that_nobody_reads_end_no_work(model: Path, tmp_path: Path):
    process = piped("sample", model, "-n", 4, "--label", 1, "--batch-size", 2, "--out", tmp_path / "pngs")
    assert process.stdout is not None and process.stderr is not None
    process.stderr.close()
    assert process.stdout.read() == f"4 images in {tmp_path / 'pngs'}\n" and process.wait(60) == 0
    assert len(pngs(tmp_path / "pngs")) == 4


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_results_that_cannot_be_written_are_an_error():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ddpm_fast", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    said = "ddpm-fast: standard output cannot be written to: No space left on device"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, said)


# --- training ---


def training(data: Path, out: Path) -> list[str]:
    """The words of a training without an end, which would save its first state at that end."""
    settings = {
        **{"steps": 10**6, "checkpoint_every": 10**6, "sample_every": 0, "log_every": 1, "batch_size": 4},
        **{
            "num_train_timesteps": 10,
            "block_out_channels": "[4, 8]",
            "norm_num_groups": 2,
            "attention_head_dim": 4,
            "precision": "fp32",
        },
        "down_block_types": '["DownBlock2D", "DownBlock2D"]',
        "up_block_types": '["UpBlock2D", "UpBlock2D"]',
    }
    words = ["train", str(data), "--out", str(out), "--image-size", "8", "--device", "cpu"]
    return words + [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", arr_0=np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8))
    return tmp_path / "data.npz"


def logged(out: Path) -> int:
    """Steps that are in a training's log."""
    path = out / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def saved_step(out: Path) -> int:
    (path,) = (out / "state").glob("step_*.pt")
    return int(torch.load(path, weights_only=True)["step"])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_a_training(name: str, place: Place, data: Path):
    out = place.folder / "run"
    command = place.start(*training(data, out))
    until(lambda: logged(out) >= 2 or not command.running)
    said = stop(command, getattr(signal, name))
    assert saved_step(out) == logged(out) >= 2
    assert f"stopped at step {logged(out)}, which is saved; to go on: ddpm-fast train --out {out}" in said


def test_nohup_keeps_a_training_going(place: Place, data: Path):
    out = place.folder / "run"
    command = place.start(*training(data, out), ignored="SIGHUP")
    until(lambda: logged(out) >= 2 or not command.running)
    os.kill(command.process.pid, signal.SIGHUP)
    steps = logged(out)
    until(lambda: logged(out) >= steps + 3 or not command.running)
    assert command.running and not (out / "state").exists()


def test_a_terminal_that_closes_saves_a_training(data: Path, tmp_path: Path):
    """The terminal is gone for messages too: none of them may end the process before its state is saved."""
    import fcntl
    import pty
    import termios

    def own_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    out = tmp_path / "run"
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm_fast", *training(data, out)],
        **{"stdin": slave, "stdout": slave, "stderr": slave},
        env=environment(),
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(slave)
    try:
        os.set_blocking(master, False)
        until(lambda: drain(master) or logged(out) >= 2 or process.poll() is not None)
        os.close(master)
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert saved_step(out) == logged(out) >= 2


def drain(handle: int) -> None:
    """Read what there is in a terminal, which would stop its writers once it is full."""
    with contextlib.suppress(BlockingIOError):
        while os.read(handle, 1 << 16):
            pass
