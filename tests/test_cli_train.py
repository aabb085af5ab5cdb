"""``ddpm-fast train``: what it says it read, hints that work when pasted, and runs that go on by their own record."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_fast as df
from ddpm_fast import cli
from ddpm_fast.cli.options import assignments
from ddpm_fast.data import load_data
from ddpm_fast.training import state as train_state

SMALL = {
    "batch_size": 4,
    "num_train_timesteps": 10,
    "block_out_channels": "[4,8]",
    "down_block_types": "[DownBlock2D,AttnDownBlock2D]",
    "up_block_types": "[AttnUpBlock2D, UpBlock2D]",
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "precision": "fp32",
    "sample_every": 0,
    "lr_schedule": "constant",
}


def settings(**changes: Any) -> list[str]:
    return [word for name, value in {**SMALL, **changes}.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddpm-fast", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of two pictures each, 30 wide and 20 to 21 high."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog", "eel"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(2):
            pixels = random.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def said(err: str) -> list[str]:
    """The report's lines, without the progress."""
    return [line for line in err.splitlines() if re.match("ddpm-fast: (data|network|training): ", line)]


def steps_of(folder: Path) -> int:
    state = train_state.load_latest_state(folder / "state")
    assert state is not None
    return int(state["step"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = train_state.load_latest_state(folder / "state")
    assert state is not None
    return {**state["model"], **{f"ema {name}": tensor for name, tensor in state["ema"].items()}}


def test_train_says_what_it_read_and_prints_a_command_that_works(run: Any, photos: Path, tmp_path: Path):
    words = ("train", "photos", "--out", "my run", "--image-size", 8, "--label-dropout", 0.1, *settings(steps=2))
    code, out, err = run(*words)
    assert code == 0, err
    parameters = sum(p.numel() for p in df.load(tmp_path / "my run").model.parameters())
    assert said(err) == [
        "ddpm-fast: data: 6 images 30x20 to 30x21 from photos, scaled and cropped to 8x8, RGB, "
        "3 classes (cat, dog, eel)",
        f"ddpm-fast: network: {parameters:,} parameters for 8x8 images of 3 channels, 3 classes; "
        "10 % of the labels are dropped",
        f"ddpm-fast: training: steps 0 to 2, batches of 4, float32 on {'cuda' if torch.cuda.is_available() else 'cpu'}",
    ]
    hint = out.rpartition("; the model is in my run: ")[2]
    assert hint == "ddpm-fast sample 'my run' --label all\n" and out.startswith("trained 2 steps; ")
    assert run(*shlex.split(hint)[1:], "-n", 4, "--out", "x.npz")[0] == 0
    assert np.load("x.npz")["arr_1"].tolist() == [0, 1, 2, 0]  # 3 stands for none


def test_the_hint_of_a_model_without_classes_works_too(run: Any, photos: Path):
    code, out, err = run("train", "photos", "--unconditional", "--out", "r", "--image-size", 8, *settings(steps=1))
    assert (code, out) == (0, "trained 1 steps; the model is in r: ddpm-fast sample r\n")
    assert ", RGB, no classes" in err and "3 channels, without classes" in err
    assert run("sample", "r", "-n", 1)[0] == 0


def test_out_alone_goes_on_as_the_whole_command_would(run: Any, photos: Path, tmp_path: Path):
    first = ("train", "photos", "--image-size", 8, "--label-dropout", 0.2, *settings(steps=2, flip="true", dropout=0.1))
    more = ("--set", "steps=4")
    assert run(*first, *more, "--out", "whole")[0] == 0
    assert run(*first, "--out", "alone")[0] == 0
    code, _, err = run("train", "--out", "alone", *more)  # a constant rate may take more steps
    assert code == 0, err
    assert "training: continues at step 2 of 4, 2 to go, batches of 4, float32" in said(err)[2]
    whole, alone = weights(tmp_path / "whole"), weights(tmp_path / "alone")
    assert whole.keys() == alone.keys() and all(torch.equal(whole[name], alone[name]) for name in whole)
    code, out, err = run("train", "--out", "alone")  # the record has the new number of steps
    assert code == 0 and "continues at step 4 of 4, 0 to go" in err and out.startswith("trained 4 steps;")


def test_it_goes_on_from_another_folder_and_with_a_moved_data_set(
    run: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run("train", "photos", "--out", "r", "--image-size", 8, *settings(steps=1))[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("train", "--out", "../r", "--set", "steps=2")[0] == 0 and steps_of(tmp_path / "r") == 2
    photos.rename(tmp_path / "moved")
    code, _, err = run("train", "--out", "../r", "--set", "steps=3")
    assert code == 2 and err == (
        f"ddpm-fast: the images of the run in ../r are no longer at {photos}: say where they are: "
        "ddpm-fast train DATA --out ../r\n"
    )
    code, _, err = run("train", "../moved", "--out", "../r", "--set", "steps=3")
    assert code == 0, err
    assert steps_of(tmp_path / "r") == 3
    assert run("train", "--out", "../r", "--set", "steps=4")[0] == 0  # the record has the new place


@pytest.mark.parametrize(
    "words, message",
    [
        (("--set", "lr=1"), "train.lr: was 0.002, now 1"),
        (("--label-dropout", 0.5), "train.label_dropout: was 0.1, now 0.5"),
        (("--image-size", 16), "model.sample_size: was 8, now 16"),
        (("--set", "num_train_timesteps=20"), "schedule.num_train_timesteps: was 10, now 20"),
        (
            ("--preset", "cifar10"),
            "the run in r was begun with --preset tiny, and goes on with it; got --preset cifar10",
        ),
        (("--unconditional",), "the run in r was begun with labels; --unconditional needs another --out"),
    ],
    ids=str,
)
def test_what_differs_from_the_record_is_refused_by_name(
    words: tuple[Any, ...], message: str, run: Any, photos: Path, tmp_path: Path
):
    first = ("train", "photos", "--out", "r", "--image-size", 8, "--label-dropout", 0.1, *settings(steps=1))
    assert run(*first)[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    code, out, err = run("train", "--out", "r", *words)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()} == before
    assert run("train", "--out", "r", "--preset", "tiny", "--set", "steps=2", "--image-size", 8)[0] == 0
    assert run(*first, "--set", "steps=3", "--preset", "tiny")[0] == 0 and steps_of(tmp_path / "r") == 3


def test_other_images_are_refused(run: Any, photos: Path):
    assert run("train", "photos", "--out", "r", "--image-size", 8, *settings(steps=1))[0] == 0
    code, _, err = run("train", "avatars:pixel-art:6", "--out", "r", "--set", "steps=2")
    assert code == 2 and "needs labelled data; avatars:pixel-art:6 has no labels" in err
    shutil.copy("photos/cat/0.png", "photos/cat/9.png")
    code, _, err = run("train", "--out", "r", "--set", "steps=2")
    assert code == 2 and "data.digest" in err and "data.images: was 6, now 7" in err


def test_a_run_that_never_saved_a_state_begins_again(run: Any, photos: Path, tmp_path: Path):
    """By its record alone; or anew, if images are named."""
    assert run("train", "photos", "--out", "r", "--image-size", 8, *settings(steps=1))[0] == 0
    shutil.rmtree(tmp_path / "r/state")
    code, _, err = run("train", "--out", "r", "--label-dropout", 0.5)
    assert code == 0 and "steps 0 to 1" in err and "50 % of the labels are dropped" in err
    shutil.rmtree(tmp_path / "r/state")
    code, _, err = run("train", "photos", "--image-size", 4, *settings(steps=1), "--out", "r")
    assert code == 0 and "scaled and cropped to 4x4" in err and "3 channels, 3 classes" in err


def test_a_folder_without_or_with_a_damaged_record(run: Any, photos: Path, tmp_path: Path):
    whole = ("train", "photos", "--out", "r", "--image-size", 8, *settings(steps=1))
    assert run(*whole)[0] == 0
    record = tmp_path / "r/train_config.json"
    content = json.loads(record.read_text())
    record.unlink()
    code, _, err = run("train", "--out", "r")
    assert code == 2 and "has states of a run, but no train_config.json with its settings: give DATA and all" in err
    assert run(*whole)[0] == 0 and json.loads(record.read_text()) == content  # as it was before there was a record
    for text in ("{", "[]", '{"train": {}}', '{"train": 1, "model": {}, "schedule": {}}'):
        record.write_text(text)
        code, _, err = run("train", "--out", "r")
        assert code == 2 and "train_config.json does not read as a run's settings" in err and err.count("\n") == 1
    del content["preset"]  # a record of a version before it had the preset, or of Python
    record.write_text(json.dumps({**content, "source": ""}))
    code, _, err = run("train", "--out", "r")
    assert code == 2 and "was begun with images that no file holds" in err
    assert run("train", "photos", "--out", "r", "--set", "steps=2")[0] == 0 and steps_of(tmp_path / "r") == 2


def test_a_stopped_run_prints_the_command_that_goes_on(run: Any, photos: Path, tmp_path: Path):
    """A signal after the first step; the command that is printed then runs to the end."""
    import os
    import signal

    from ddpm_fast.training.step import Trainer

    step = Trainer.step

    def interrupted(self: Trainer, k: int, batch: Any) -> Any:
        if k == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, k, batch)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "step", interrupted)
            words = ("train", "photos", "--out", "a run", "--image-size", 8, "--device", "cpu", *settings(steps=3))
            code, out, err = run(*words)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out) == (130, "")
    last = err.splitlines()[-1]
    hint = last.removeprefix("ddpm-fast: stopped at step 1, which is saved; to go on: ")
    assert hint == "ddpm-fast train --out 'a run' --device cpu"
    assert run(*shlex.split(hint)[1:])[0] == 0 and steps_of(tmp_path / "a run") == 3


def test_an_interrupt_that_leaves_no_time_says_which_state_is_kept(
    run: Any, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As a second Ctrl-C does: at step 3, where states were saved after 1 and 2; and before any was."""
    from ddpm_fast.training.step import Trainer

    step, last = Trainer.step, 2

    def interrupted(self: Trainer, k: int, batch: Any) -> Any:
        if k == last:
            raise KeyboardInterrupt
        return step(self, k, batch)

    monkeypatch.setattr(Trainer, "step", interrupted)
    words = ("train", "photos", "--image-size", 8, *settings(steps=5, checkpoint_every=1), "--out")
    code, out, err = run(*words, "r")
    said = "ddpm-fast: interrupted; the state of step 2 is kept; to go on: ddpm-fast train --out r"
    assert (code, out, err.splitlines()[-1]) == (130, "", said)
    last = 0
    said = "ddpm-fast: interrupted; no state is saved yet; to go on: ddpm-fast train --out s"
    assert run(*words, "s")[2].splitlines()[-1] == said
    last = 99
    for folder in ("r", "s"):
        assert run("train", "--out", folder)[0] == 0 and steps_of(tmp_path / folder) == 5


def test_the_command_for_several_processes(monkeypatch: pytest.MonkeyPatch):
    from ddpm_fast.cli.train import resume_command

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resume_command(Path("r"), None, 4) == "torchrun --nproc-per-node=2 -m ddpm_fast train --out r"
    assert resume_command(Path("r"), "cuda:1", 1) == "ddpm-fast train --out r --device cuda:1"


def test_divergence_names_only_states_that_are_there(run: Any, photos: Path, tmp_path: Path):
    words = (
        "train",
        "photos",
        "--out",
        "r",
        "--image-size",
        8,
        *settings(steps=9, lr=1e30, grad_clip="null", log_every=1),
    )
    code, _, err = run(*words)
    assert code == 2 and "No state was saved before it; lower lr" in err and not (tmp_path / "r/state").exists()
    text = train_state.kept_text(tmp_path / "r")
    (tmp_path / "r/state").mkdir()
    (tmp_path / "r/state/step_000000007.pt").write_bytes(b"")
    assert (
        text != train_state.kept_text(tmp_path / "r") == f"The state before it is {tmp_path}/r/state/step_000000007.pt"
    )


@pytest.mark.parametrize(
    "setting, message",
    [
        ("image_size=24", "no setting is called 'image_size'; that is an option: --image-size 24"),
        ("resolution=24", "no setting is called 'resolution'; that is an option: --image-size 24"),
        ("strict=true", "no setting is called 'strict'; that is an option: --strict"),
        (
            "sample_size=24",
            "must be the data's 8x8; got 24. Give image_size (--image-size) to scale and crop the images",
        ),
        ("batch=4", "no setting is called 'batch'; did you mean batch_size?"),
        ("batch-size=4", "no setting is called 'batch-size'; did you mean batch_size?"),
        ("learning_rate=1", "no setting is called 'learning_rate'; did you mean lr?"),
        ("epochs=4", "no setting is called 'epochs'; did you mean steps?"),
        ("timesteps=4", "no setting is called 'timesteps'; did you mean num_train_timesteps?"),
        (
            "down_block_types=DownBlock2D,AttnDownBlock2D",
            "UNetConfig.down_block_types must be a list; got 'DownBlock2D,AttnDownBlock2D' (on the command line: "
            "--set down_block_types=[DownBlock2D,AttnDownBlock2D])",
        ),
    ],
)
def test_near_misses_lead_to_the_right_option(setting: str, message: str, run: Any, photos: Path, tmp_path: Path):
    words = ("train", "photos", "--out", "r", "--image-size", 8, *settings(steps=1), "--set", setting)
    code, out, err = run(*words)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and not (tmp_path / "r").exists()


@pytest.mark.parametrize("option", ["--steps", "--lr", "--batch-size", "--seed"])
def test_a_setting_that_is_given_as_an_option_leads_to_set(option: str, run: Any, photos: Path):
    code, _, err = run("train", "photos", option, 5)
    name = option.removeprefix("--").replace("-", "_")
    assert code == 2 and f"No such option: {option}" in err and f"--set {name}=5" in err


@pytest.mark.parametrize(
    "text, value",
    [
        ("[A,B]", ["A", "B"]),
        ("[A, B]", ["A", "B"]),
        ('["A", "B"]', ["A", "B"]),
        ("['A', 'B']", ["A", "B"]),
        ("('A', \"B\",)", ["A", "B"]),
        ("[4,8]", [4, 8]),
        ("(4, 8)", [4, 8]),
        ("[]", []),
        ("[1e-3,None,true,x]", [0.001, None, True, "x"]),
        ("[[a,b],[1,2]]", [["a", "b"], [1, 2]]),
        ("1e-6", 1e-6),
        ("True", True),
        ("None", None),
        ("null", None),
        ("linear", "linear"),
        ("16,8", "16,8"),
        ("a=b", "a=b"),
        ("'7'", "7"),
    ],
)
def test_values_of_set(text: str, value: Any):
    assert assignments([f"x={text}"]) == {"x": value}


def test_data_in_words(tmp_path: Path, photos: Path):
    (photos / "cat/broken.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="skipped 1 unreadable"):
        folder = load_data(photos, 16, channels=1)
    assert folder.describe() == (
        f"6 images 30x20 to 30x21 from {photos}, scaled and cropped to 16x16, grey, 3 classes (cat, dog, eel); "
        "1 unreadable skipped"
    )
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    assert load_data(tmp_path / "a.npz").describe() == f"1 image 8x8 from {tmp_path}/a.npz, RGB, no classes"
    assert ", scaled to 4x4, " in load_data(tmp_path / "a.npz", 4).describe()
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((3, 4, 8), np.uint8), arr_1=np.array([0, 1, 1]))
    assert load_data(tmp_path / "b.npz").describe() == f"3 images 8x4 from {tmp_path}/b.npz, RGB, 2 classes (0 to 1)"
