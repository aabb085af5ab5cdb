"""What cannot be written is found before the work, by every command, in one line; special files and links too."""

# ruff: noqa: F401, F811  (fixtures are imported)

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_setup import begin, files
from test_cli import Run, checkpoint, run

from ddpm_fast.store.workers import fill
from ddpm_fast.whole_files import check_file, check_folder, whole_file, write_once

LONG = "x" * 250 + ".png"  # a name that a file system takes, but not with what a temporary file adds


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """Things in the way: a file, a folder with a file's name, a set of shards."""
    (tmp_path / "file").write_text("x")
    for suffix in (".png", ".npz", ".json", ".gif", ".pt", ".html", ".tar"):
        (tmp_path / f"folder{suffix}").mkdir()
        (tmp_path / f"readonly{suffix}").write_text("x")
    import store_setup

    fill(begin(tmp_path / "set", n=4), store_setup.StandIn())
    for name in ("state", "unet"):
        (tmp_path / f"run-{name}").mkdir()
        (tmp_path / f"run-{name}" / name).write_text("x")
    (tmp_path / "run-log" / "log.jsonl").mkdir(parents=True)
    return tmp_path


A_FILE, A_FOLDER, READ_ONLY = "a file is in its way", "is a folder; give a file", "is read-only"
CASES: list[tuple[tuple[str, ...], str]] = [
    (("sample", "CKPT", "--out", "folder.png"), f"--out folder.png {A_FOLDER}"),
    (("sample", "CKPT", "--out", "folder.npz"), f"--out folder.npz {A_FOLDER}"),
    (("sample", "CKPT", "--out", "readonly.npz"), f"--out readonly.npz cannot be written to: it {READ_ONLY}"),
    (("sample", "CKPT", "--out", "file/a.npz"), f"file cannot be a folder: {A_FILE}"),
    (("sample", "CKPT", "--out", "file/below/a.npz"), A_FILE),
    (("sample", "CKPT", "--out", LONG), "cannot be written: File name too long"),
    (("sample", "CKPT", "--out", "/proc/nothing/a.npz"), "--out /proc/nothing/a.npz cannot be written: "),
    (("sample", "CKPT", "--out", "/proc/a.npz"), "--out /proc/a.npz cannot be written: "),
    (("sample", "CKPT", "--out", "file"), f"file cannot be a folder: {A_FILE}"),
    (("sample", "CKPT", "--out", "file", "--store"), f"file cannot be a folder: {A_FILE}"),
    (("sample", "CKPT", "--out", "/proc/nothing/set"), "--out /proc/nothing/set cannot be written: "),
    (("sample", "CKPT", "--out", "/proc/nothing/set", "--store"), "--out /proc/nothing/set cannot be written: "),
    (("sample", "CKPT", "--out", "a.npz", "--film", "folder.gif"), f"--film folder.gif {A_FOLDER}"),
    (("sample", "CKPT", "--out", "a.npz", "--film", "file/a.gif"), A_FILE),
    (("sample", "CKPT", "--out", "a.npz", "--film", "readonly.gif"), READ_ONLY),
    (("export", "set", "folder.npz"), f"folder.npz {A_FOLDER}"),
    (("export", "set", "folder.tar"), f"folder.tar {A_FOLDER}"),
    (("export", "set", "file/a.tar"), A_FILE),
    (("export", "set", "readonly.npz"), READ_ONLY),
    (("export", "set", "file"), A_FILE),
    (("export", "set", "/proc/nothing/pngs"), "/proc/nothing/pngs cannot be written"),
    (("export", "set", "a.zip"), "export writes an .npz, a .tar or a folder of PNGs; got a.zip"),
    (("train", "DATA", "--out", "file"), f"file cannot be a folder: {A_FILE}"),
    (("train", "DATA", "--out", "file/run"), A_FILE),
    (("train", "DATA", "--out", "/proc/nothing/run"), "--out /proc/nothing/run cannot be written: "),
    (("train", "DATA", "--out", "run-state"), f"run-state/state cannot be a folder: {A_FILE}"),
    (("train", "DATA", "--out", "run-unet"), f"run-unet/unet cannot be a folder: {A_FILE}"),
    (("train", "DATA", "--out", "run-log"), "run-log/log.jsonl must be a file, and a folder is in its way"),
    (("profile", "CKPT", "--html", "folder.html"), f"--html folder.html {A_FOLDER}"),
    (("profile", "CKPT", "--out", "file/a.json"), A_FILE),
    (("profile", "CKPT", "--trace", "readonly.json"), READ_ONLY),
    (("profile", "CKPT", "--html", "/proc/nothing.html"), "--html /proc/nothing.html cannot be written: "),
    (("bench", "CKPT", "--out", "folder.json"), f"--out folder.json {A_FOLDER}"),
    (("bench", "CKPT", "--out", "file/a.json"), A_FILE),
    (("bench", "CKPT", "--out", "readonly.json"), READ_ONLY),
    (("bench", "CKPT", "--out", "a.txt"), "--out must be a .json file; got a.txt"),
    (("convert", "CKPT", "file"), f"file cannot be a folder: {A_FILE}"),
    (("convert", "CKPT", "file/out"), A_FILE),
    (("convert", "CKPT", "run-unet"), f"run-unet/unet cannot be a folder: {A_FILE}"),
    (("convert", "CKPT", "/proc/nothing/out"), "OUT /proc/nothing/out cannot be written: "),
    (("convert", "CKPT", "folder.pt", "--to", "openai"), f"OUT folder.pt {A_FOLDER}"),
    (("convert", "CKPT", "readonly.pt", "--to", "openai"), READ_ONLY),
    (("evaluate", "a.npz", "--against", "b.npz", "--log", "folder.json"), f"--log folder.json {A_FOLDER}"),
    (("evaluate", "a.npz", "--against", "b.npz", "--log", "readonly.json"), READ_ONLY),
    (("evaluate", "a.npz", "--against", "b.npz", "--save", "folder.npz"), f"--save folder.npz {A_FOLDER}"),
    (("evaluate", "a.npz", "--against", "b.npz", "--save", "a.txt"), "--save must be an .npz file; got a.txt"),
    (("evaluate", "a.npz", "--against", "b.npz", "--cache", "file"), A_FILE),
]


@pytest.mark.parametrize("words, message", CASES, ids=[" ".join(w)[:60].replace("/", "_") for w, _ in CASES])
def test_it_is_found_before_the_work(
    words: tuple[str, ...],
    message: str,
    run: Run,
    checkpoint: Path,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """No model or image is loaded, so nothing can have been drawn, trained or measured; the rest stays as it was."""
    if "/proc" in message and not Path("/proc/self").exists():
        pytest.skip("NOT PROVEN HERE: no /proc")

    def work(*args: Any, **options: Any) -> Any:
        raise AssertionError("the work has begun")

    for name in ("checkpoints.load", "data.load_data", "evaluation.features.extractor", "sampler.Sampler"):
        monkeypatch.setattr(f"ddpm_fast.{name}", work)
    access = os.access

    def readable(path: Any, mode: int) -> bool:  # root may write anywhere
        return access(path, mode) and not (mode & os.W_OK and Path(path).name.startswith("readonly"))

    monkeypatch.setattr(os, "access", readable)
    before = files(places)
    code, out, err = run(*(w.replace("CKPT", str(checkpoint)).replace("DATA", "nowhere") for w in words))
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("ddpm-fast: "), err
    assert message in err and files(places) == before


def test_a_disk_that_is_full_is_found_before_the_work(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for words in (("sample", "--out", "a.png"), ("train", "DATA", "--out", "run")):
        code, _, err = run(*words)
        assert code == 2 and f"--out {words[-1]} cannot be written: No space left on device\n" in err


def test_what_is_right_is_let_through_and_leaves_nothing(tmp_path: Path):
    check_file(tmp_path / "new" / "a.png")
    (tmp_path / "old.png").write_bytes(b"old")
    check_file(tmp_path / "old.png")
    check_folder(tmp_path / "folder")
    check_folder(tmp_path / "unmade" / "folder", make=False)  # makes it, tries it, and removes it
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
    assert found == ["folder", "new", "old.png"] and (tmp_path / "old.png").read_bytes() == b"old"


def test_a_link_keeps_its_place(tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "there" / "a.png")
    for content in (b"1", b"2"):
        check_file(tmp_path / "link.png")
        with whole_file(tmp_path / "link.png") as file:
            file.write(content)
        assert (tmp_path / "link.png").is_symlink() and (tmp_path / "there" / "a.png").read_bytes() == content


@pytest.mark.skipif(sys.platform == "win32", reason="pipes have no names")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path):
    """As in ``ddpm-fast profile --out /dev/stdout``, which once would have replaced a device by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    check_file(pipe)
    with whole_file(pipe) as file:
        file.write(b"numbers")
    reader.join()
    assert found == [b"numbers"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_the_first_of_many_writes(tmp_path: Path):
    assert write_once(tmp_path / "a", b"1") and not write_once(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1" and os.listdir(tmp_path) == ["a"]
