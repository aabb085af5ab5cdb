"""One vocabulary for all commands, and former names of options that stay understood."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from models import TINY, unet

import ddpm_fast as df
from ddpm_fast import cli
from ddpm_fast.cli.commands import app
from ddpm_fast.cli.words import renamed

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SCHEDULE = df.Schedule(num_train_timesteps=10, beta_start=0.01, beta_end=0.5)


def options() -> list[tuple[str, str, Any]]:
    """(command, option, parameter) of all that help shows."""
    return [
        (name, word, parameter)
        for name, command in COMMANDS.items()
        for parameter in command.params
        for word in parameter.opts
        if word.startswith("-") and not getattr(parameter, "hidden", False)
    ]


def test_an_option_is_of_one_kind_in_every_command():
    """A flag here is no file there, and a name stands for one parameter."""
    kinds: dict[str, set[tuple[bool, str]]] = {}
    for _, word, parameter in options():
        kinds.setdefault(word, set()).add((parameter.is_flag, parameter.name))
    assert {word: kind for word, kind in kinds.items() if len(kind) > 1} == {}
    takers = {word: {name for name, option, _ in options() if option == word} for word in kinds}
    assert takers["--json"] >= {"inspect", "doctor", "verify", "plan", "evaluate", "roofs", "profile", "bench"}
    assert next(p for name, word, p in options() if (name, word) == ("profile", "--json")).is_flag
    assert takers["--preset"] == {"train"}
    assert takers["--weights-preset"] == {"sample", "inspect", "verify", "plan", "profile", "bench", "convert"}
    assert takers["--batch-size"] == {"sample", "inspect", "evaluate", "plan", "profile", "bench"}
    assert takers["--weights"] == takers["--weights-preset"] | {"evaluate"}
    assert not {"--batch", "--preset-model"} & set(takers)


def test_every_option_and_argument_has_a_help_text_that_is_a_sentence():
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if not getattr(parameter, "hidden", False) and parameter.name != "help":
                text = parameter.help or ""
                assert text and text.rstrip("\"'")[-1] in ".)" and not text.startswith("Of "), (name, parameter.name)


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--batch", "4", "x"], ["--batch-size", "4", "x"]),
        (["--batch=4", "--batcher"], ["--batch-size=4", "--batcher"]),
        (["--batch-size", "4"], ["--batch-size", "4"]),
    ],
)
def test_former_names_become_todays(words: list[str], wanted: list[str]):
    assert renamed(words, {"--batch": "--batch-size"}) == wanted


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), *capsys.readouterr()


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small: dict[str, Any] = {**TINY, "block_out_channels": (4, 8), "norm_num_groups": 2, "num_class_embeds": 2}
    df.save(tmp_path / "model", unet(small), SCHEDULE, label_names=["cat", "dog"])
    return tmp_path / "model"


def test_plan_understands_its_former_names(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    found = [
        run(monkeypatch, capsys, "plan", *words, "--json")
        for words in (("tiny", "--batch-size", 3), ("tiny", "--batch", 3), ("--preset-model", "tiny", "--batch=3"))
    ]
    assert [code for code, _, _ in found] == [0, 0, 0]
    assert found[0] == found[1] == found[2] and json.loads(found[0][1])["batch"] == 3


@pytest.mark.parametrize("command", ["sample", "inspect", "verify", "plan", "profile", "bench", "convert"])
def test_preset_is_understood_as_that_of_the_weights(command: str, saved: Path, monkeypatch: Any, capsys: Any):
    out = ("copy",) if command == "convert" else ()
    new = run(monkeypatch, capsys, command, saved, *out, "--weights-preset", "google")
    assert new == run(monkeypatch, capsys, command, saved, *out, "--preset", "google")
    assert new[0] == 2 and "is for weights without a configuration" in new[2]


def test_evaluate_understands_weights(tmp_path: Path, monkeypatch: Any, capsys: Any):
    words = ("evaluate", "a.npz", "--against", "b.npz", "--features", "inception")
    new = run(monkeypatch, capsys, *words, "--inception-weights", tmp_path / "none")
    assert new == run(monkeypatch, capsys, *words, "--weights", tmp_path / "none") and new[0] == 2


def test_evaluate_draws_from_the_network_that_is_named(saved: Path, tmp_path: Path, monkeypatch: Any, capsys: Any):
    """Trained weights of zeros draw other images than the averages beside them, so the distance differs."""
    average = df.load(saved).model.state_dict()
    trained = {name: torch.zeros_like(t) for name, t in average.items()}
    torch.save({"model": trained, "ema": average}, tmp_path / "run.pt")
    for place in ("unet/config.json", "scheduler/scheduler_config.json"):
        shutil.copy(saved / place, tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images)

    def distance(*words: str) -> float:
        given = ("evaluate", tmp_path / "run.pt", "--against", tmp_path / "data.npz", "--draw", 2, "--json", *words)
        code, out, err = run(monkeypatch, capsys, *map(str, given))
        assert code == 0, err
        return float(json.loads(out)["distance"])

    assert distance() == distance("--weights", "ema") != distance("--weights", "model")
    words = ("evaluate", str(tmp_path / "run.pt"), "--against", "x", "--draw", "2", "--weights", "no")
    wrong = run(monkeypatch, capsys, *words)
    assert wrong[0] == 2 and "no weights 'no'; it has model, ema" in wrong[2]


@pytest.mark.parametrize("form", ["new", "former", "former with ="])
def test_profile_saves_and_prints_its_numbers(form: str, saved: Path, monkeypatch: Any, capsys: Any):
    from profiling_stand_in import roofs

    monkeypatch.setattr("ddpm_fast.roofline.roofs", lambda device, dtype, refresh: roofs(device, dtype))
    words = ("profile", saved, "--batch-size", 1, "--steps", 1, "--device", "cpu", "--ops", "reference")
    more = {"new": ("--json", "--out", "p.json"), "former": ("--json", "p.json"), "former with =": ("--json=p.json",)}
    code, out, err = run(monkeypatch, capsys, *words, *more[form])
    kept = json.loads(Path("p.json").read_text())
    assert code == 0 and kept["batch"] == 1
    if form == "new":  # stdout has JSON alone
        assert json.loads(out)["rows"] == kept["rows"] and "written to p.json" in err
    else:
        assert "steps timed" in out and "written to p.json" in out


def test_verify_takes_a_class_by_its_name(saved: Path, monkeypatch: Any, capsys: Any):
    words = ("verify", saved, "-n", 1, "--steps", 2, "--probes", 1, "--device", "cpu", "--ops", "reference", "--json")
    by_name, by_number, other = (run(monkeypatch, capsys, *words, "--label", label) for label in ("dog", 1, 0))
    assert by_name[0] == 0 and json.loads(by_name[1]) == json.loads(by_number[1])
    assert json.loads(other[1]) != json.loads(by_name[1])
    code, _, err = run(monkeypatch, capsys, *words, "--label", "cow")
    assert code == 2 and "--label must be a whole number or one of cat, dog; got 'cow'" in err
    code, _, err = run(monkeypatch, capsys, *words, "--label", "all")
    assert code == 2 and "--label must be one class here, by number or name; got 'all'" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (("sample", "--set", "steps=5"), "--set steps=5: steps is no setting of the model but an option: --steps 5"),
        (("sample", "--set", "batch_size=5"), "an option: --batch-size 5"),
        (("sample", "--set", "batch=5"), "batch is no setting of the model but an option: --batch-size 5"),
        (("sample", "--set", "n=5"), "an option: -n 5"),
        (("sample", "--set", "truncate=true"), "an option: --truncate\n"),
        (("plan", "tiny", "--set", "gpu=h100"), "an option: --gpu h100"),
        (("profile", "tiny", "--set", "ops=cpu"), "an option: --ops cpu"),
    ],
)
def test_a_setting_that_is_an_option_leads_to_it(words: tuple[str, ...], message: str, monkeypatch: Any, capsys: Any):
    code, out, err = run(monkeypatch, capsys, *words)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_no_setting_of_a_model_is_taken_for_an_option():
    from dataclasses import fields

    from ddpm_fast.checkpoints import ho, lucidrains, openai
    from ddpm_fast.cli.words import SETTINGS_TOO

    known = {f.name for kind in (df.UNetConfig, df.Schedule) for f in fields(kind)} | {*lucidrains.KNOWN, *ho._ALIASES}
    known |= {*openai._SETTINGS, *openai._ARCHITECTURE, *openai._TRAINING}
    names = {
        p.name
        for command in COMMANDS.values()
        for p in command.params
        if "settings" in {q.name for q in command.params}
    }
    assert names & known - {"image_size", "label_dropout"} == set(SETTINGS_TOO)  # of train, which has its own rule
