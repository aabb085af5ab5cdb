"""How many classes a model has, what they are called, and the label that stands for none of them."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import TINY, unet

import ddpm_fast as df
from ddpm_fast import cli
from ddpm_fast.classes import listed, null_class

SCHEDULE = df.Schedule(num_train_timesteps=4, beta_start=0.01, beta_end=0.5)
SMALL: dict[str, Any] = {**TINY, "block_out_channels": (4, 8), "norm_num_groups": 2}
NAMES = ["cat", "dog", "eel"]


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
def models(tmp_path: Path) -> Path:
    """Three classes with names, with and without a null class, and without names."""
    df.save(tmp_path / "dropout", unet({**SMALL, "num_class_embeds": 4}), SCHEDULE, label_names=NAMES)
    df.save(tmp_path / "plain", unet({**SMALL, "num_class_embeds": 3}), SCHEDULE, label_names=NAMES)
    df.save(tmp_path / "nameless", unet({**SMALL, "num_class_embeds": 3}), SCHEDULE)
    return tmp_path


SAID = {"dropout": "3 classes (cat, dog, eel)", "plain": "3 classes (cat, dog, eel)", "nameless": "3 classes (0 to 2)"}


@pytest.mark.parametrize("name", SAID)
def test_the_error_for_a_missing_label_names_the_classes(name: str, models: Path, run: Any):
    code, _, err = run("sample", name, "-n", 1)
    assert code == 2 and f"this model has {SAID[name]}: pass labels" in err and "--label" in err
    loaded = df.load(models / name)
    with pytest.raises(ValueError) as refusal:
        df.Sampler(loaded.model, loaded.schedule).sample(1)
    assert SAID[name] in str(refusal.value)


@pytest.mark.parametrize("to", ["x.npz", "set"])
def test_all_is_every_class_and_not_the_one_that_stands_for_none(to: str, models: Path, run: Any):
    assert (
        run("sample", "dropout", "-n", 5, "--label", "all", "--out", to, *(("--store",) if to == "set" else ()))[0] == 0
    )
    if to == "set":
        assert json.loads((models / "set/manifest.json").read_text())["labels"] == {"rule": "all", "classes": 3}
    else:
        assert np.load("x.npz")["arr_1"].tolist() == [0, 1, 2, 0, 1]
    # it can still be asked for by its number: that is what guidance starts from
    assert run("sample", "dropout", "-n", 1, "--label", 3, "--out", "none.npz")[0] == 0
    assert np.load("none.npz")["arr_1"].tolist() == [3]


def test_a_model_without_a_null_class_keeps_all_its_classes(models: Path, run: Any):
    for name in ("plain", "nameless"):
        assert run("sample", name, "-n", 4, "--label", "all", "--out", "x.npz")[0] == 0
        assert np.load("x.npz")["arr_1"].tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "name, line, nobody",
    [
        ("dropout", "classes     3: cat, dog, eel; 3 stands for none, for guidance\n", 3),
        ("plain", "classes     3: cat, dog, eel\n", None),
        ("nameless", "classes     3: 0 to 2\n", None),
    ],
)
def test_inspect_says_classes_names_and_the_null_class(
    name: str, line: str, nobody: int | None, models: Path, run: Any
):
    assert line in run("inspect", name)[1]
    facts = json.loads(run("inspect", name, "--json")[1])
    assert (facts["classes"], facts["null_class"]) == (3, nobody)
    assert facts["labels"] == (None if name == "nameless" else NAMES)


def test_inspect_says_nothing_of_classes_where_there_are_none(tmp_path: Path, run: Any):
    df.save(tmp_path / "without", unet(SMALL), SCHEDULE)
    assert "classes" not in run("inspect", "without")[1]
    facts = json.loads(run("inspect", "without", "--json")[1])
    assert (facts["classes"], facts["null_class"], facts["labels"]) == (None, None, None)


def test_evaluation_draws_of_every_class_and_of_no_other(models: Path):
    from ddpm_fast.cli.evaluate import _drawn

    loaded = df.load(models / "dropout")
    images = np.concatenate(list(_drawn(str(models / "dropout"), None, 5, 5, 0, "cpu").batches(5)))
    sampler = df.Sampler(loaded.model, loaded.schedule, batch_size=5, device="cpu")
    wanted = df.to_uint8(sampler.sample(5, labels=[0, 1, 2, 0, 1])).numpy()
    assert np.array_equal(images, wanted)
    assert not np.array_equal(images, df.to_uint8(sampler.sample(5, labels=[0, 1, 2, 3, 0])).numpy())


def test_the_rule_in_numbers():
    assert null_class(None, None) is None and null_class(4, None) is None and null_class(4, ["a"] * 4) is None
    assert null_class(4, ["a"] * 3) == 3 and null_class(4, ["a"] * 2) is None
    assert null_class(4, None, guided=True) == 3 and null_class(4, ["a"] * 3, guided=True) == 3
    assert listed(12, [f"n{i}" for i in range(12)]) == "n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, ..."
    assert listed(10, [str(i) for i in range(10)]) == "0 to 9" and listed(1) == "0"


def test_the_hint_at_export_works_when_pasted(models: Path, run: Any):
    words = ("sample", "plain", "-n", 2, "--label", "all", "--out", "a set")
    assert run(*words, "--store")[0] == 0
    code, _, err = run(*words, "--pngs")
    hint = err.partition("or ddpm-fast ")[2].partition(" for PNGs")[0]
    assert code == 2 and hint == "export 'a set' FOLDER"
    assert run(*shlex.split(hint))[0] == 0 and len(list((models / "FOLDER").glob("*.png"))) == 2
