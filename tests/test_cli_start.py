"""How the command line starts: help and mistakes without torch, and a word within two seconds of anything longer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import TINY, unet

import ddpm_fast as df
from ddpm_fast import cli, stages
from ddpm_fast.benchmarking.names import PROVIDERS
from ddpm_fast.benchmarking.providers import DTYPES, providers
from ddpm_fast.cli import options
from ddpm_fast.cli.commands import app
from ddpm_fast.evaluation.features import Extractor

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(command.name or command.callback.__name__ for command in app.registered_commands)  # type: ignore
HEAVY = ("torch", "numpy", "PIL", "triton", "safetensors", "huggingface_hub", "tqdm", "diffusers")
QUICK = [
    (),
    ("--help",),
    ("--version",),
    ("nonsense",),
    *((command, "--help") for command in COMMANDS),
    *((command, "--nonsense") for command in COMMANDS),
    ("bench", "--batch-size", "1", "4", "--providers", "cpu", "diffusers", "--nonsense"),
    ("sample", "-n", "two"),
]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DDPM_FAST_STAGES": "1", **more}


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_help_and_mistakes_import_nothing_heavy(words: tuple[str, ...]):
    code = f"""
import sys
from ddpm_fast.cli import main
sys.argv = ["ddpm-fast", *{words!r}]
try:
    main()
except SystemExit as stop:
    print("code", stop.code)
print("heavy", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    wrong = not {"--help", "--version"} & set(words) and words
    assert done.stdout.splitlines()[-2:] == [f"code {2 if wrong else 0}", "heavy []"], done.stderr
    assert len(done.stderr.splitlines()) == (1 if wrong else 0)


@pytest.mark.skipif(sys.platform == "win32", reason="resource")
@pytest.mark.parametrize("words", [("--help",), ("--version",), ("train", "--help"), ("bench", "--nonsense")], ids=str)
def test_help_costs_less_than_0_3_seconds_of_cpu(words: tuple[str, ...]):
    """user + sys of the process, the least of three: what else the machine does is not the command's."""
    import resource

    costs = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "ddpm_fast", *words], env=environment(), capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(costs) < 0.3


def test_the_names_that_are_known_before_torch_are_the_right_ones():
    assert list(providers()) == list(PROVIDERS)
    assert tuple(DTYPES) == options.DTYPES
    assert {name: options.chosen_dtype(name) for name in options.DTYPES} == DTYPES


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch):
    """Stages that are shown, as a command has them, with a tenth of a second for its second and a half."""
    monkeypatch.setattr(stages, "DELAY_S", 0.1)
    monkeypatch.delenv("DDPM_FAST_STAGES")
    stages.show()
    yield
    stages.hide()


def test_a_stage_is_named_when_it_takes_long(patience: None, capsys: pytest.CaptureFixture[str]):
    with stages.stage("quick"):
        pass
    with stages.stage("slow"):
        time.sleep(0.4)
    assert capsys.readouterr() == ("", "ddpm-fast: slow\n")


def test_many_quick_stages_are_no_silence(patience: None, capsys: pytest.CaptureFixture[str]):
    for i in range(10):
        with stages.stage(f"part {i}"):
            time.sleep(0.06)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 6 and all(line.startswith("ddpm-fast: part ") for line in lines)


def test_from_python_and_beside_rank_0_stages_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(stages, "DELAY_S", 0.0)
    with stages.stage("of a library"):
        time.sleep(0.1)
    for variable, value in (("RANK", "1"), ("DDPM_FAST_STAGES", "0")):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("DDPM_FAST_STAGES")
            patch.setenv(variable, value)
            stages.show()
            with stages.stage("of another process"):
                time.sleep(0.1)
            stages.hide()
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_a_terminal_sees_that_torch_is_being_imported_and_then_nothing_of_it(tmp_path: Path):
    import pty

    (tmp_path / "torch.py").write_text("import time\ntime.sleep(0.2)\nraise SystemExit(5)\n")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "ddpm_fast", "doctor"],
        env=environment(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT)))),
        stderr=theirs,
        stdout=subprocess.PIPE,
    ) as process:
        os.close(theirs)
        process.wait()
        seen = os.read(ours, 1000).decode()
    os.close(ours)
    assert process.returncode == 5
    line = "ddpm-fast: importing torch"
    assert seen == line + "\r" + " " * len(line) + "\r"


def test_a_log_has_a_line_when_the_import_takes_long(tmp_path: Path):
    (tmp_path / "torch.py").write_text(
        "import time\ntime.sleep(2.5)\nprint('imported', flush=True)\nraise SystemExit(5)\n"
    )
    process = subprocess.run(
        [sys.executable, "-m", "ddpm_fast", "doctor"],
        env=environment(PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT)))),
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.splitlines() == ["ddpm-fast: importing torch", "imported"]


class AtOnce:
    """A timer that needs no waiting for."""

    daemon = False

    def __init__(self, delay_s: float, function: Callable[..., None], arguments: list[str]):
        self.start = lambda: function(*arguments)

    def cancel(self) -> None:
        pass


PAIR = ("a.npz", "b.npz")
BENCH = ("--batch-size", "1", "--providers", "reference", "--dtype", "float32", "--steps", "1", "--budget", "20")


@pytest.mark.parametrize(
    "words, named",
    [
        (("sample", "model", "-n", "1"), ["loading model", "choosing the operations", "preparing the network"]),
        (("inspect", "model"), ["loading model", "counting what a step costs"]),
        (("doctor", "--json"), ["looking at devices and packages"]),
        (("verify", "model", "-n", "1", "--steps", "1", "--json"), ["loading model", "choosing the operations"]),
        (("plan", "tiny", "--json"), ["planning a step"]),
        (("convert", "model", "copy"), ["loading model", "writing copy"]),
        (("roofs", "--dtype", "float32", "--json"), ["measuring this device's peak rates in float32"]),
        (
            ("profile", "model", "--steps", "1", "--batch-size", "1", "--ops", "reference", "--json"),
            [
                "loading model",
                "preparing the network",
                "timing 1 step of 1 image",
                "measuring this device's peak rates",
            ],
        ),
        (
            ("bench", "tiny", "--set", "sample_size=8", *BENCH, "--rounds", "1", "--no-startup", "--json"),
            ["making random weights", "measuring this device's peak rates", "batch 1: the truth, in float64"],
        ),
        (
            ("evaluate", "a.npz", "--against", "b.npz", "--cache", "cache", "--json"),
            ["loading the network whose features are compared", "computing the features of 20 images of b.npz"],
        ),
        (("evaluate", "--pair", *PAIR, "--json"), ["loading the network whose", "comparing the two sets"]),
        (
            ("train", "a.npz", "--out", "r", "--set", "steps=1", "--set", "sample_every=0", "--set", "batch_size=1"),
            ["reading a.npz", "building the network", "data: 20 images", "network: ", "training: steps 0 to 1"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_command_names_its_stages_on_stderr(
    words: tuple[str, ...], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """What takes long has a name, in this order; and --json leaves stdout to JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "roofs"))
    monkeypatch.setattr(
        "ddpm_fast.roofline._SHAPES", {"copy": ([1], []), "gemm": ([(8, 8, 8)], []), "conv": ([(1, 8, 4)], [])}
    )
    monkeypatch.setattr("ddpm_fast.roofline.BUDGET_S", 0.0)
    monkeypatch.setattr(stages, "threading", SimpleNamespace(Timer=AtOnce))
    monkeypatch.delenv("DDPM_FAST_STAGES")
    df.save(tmp_path / "model", unet(TINY), df.Schedule(num_train_timesteps=4))
    for seed, name in enumerate(PAIR):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / name, arr_0=pixels)
    if "evaluate" in words:
        monkeypatch.setattr("ddpm_fast.evaluation.features._efficientnet_lite0", lambda device: Extractor(
            "mean", "FD", 3, device, lambda x: x.float().mean((2, 3))
        ))  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert not stop.value.code, err
    lines = [line.removeprefix("ddpm-fast: ") for line in err.splitlines()]
    places = [next((i for i, line in enumerate(lines) if line.startswith(name)), -1) for name in named]
    assert -1 not in places and places == sorted(places), (lines, places)
    if "--json" in words:
        json.loads(out)


AVERAGES = (
    "ddpm-fast: note: of the 2 networks in the file (model, ema) the averaged one, ema, is used; weights=NAME "
    "(--weights NAME) takes another"
)


@pytest.fixture
def two_networks(tmp_path: Path) -> str:
    network = unet(TINY)
    df.save(tmp_path / "model", network, df.Schedule(num_train_timesteps=4))
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    path = tmp_path / "model" / "unet" / "weights.pt"
    torch.save({"model": network.state_dict(), "ema": {n: t + 0.01 for n, t in network.state_dict().items()}}, path)
    return str(path)


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "-n", "1"),
        ("verify", "--steps", "1", "--probes", "1", "--json"),
        ("plan", "--json"),
        ("profile", "--json", "--steps", "2"),
        ("evaluate", "--draw", "2", "--against", "none.npz"),
    ],
    ids=lambda words: words[0],
)
def test_a_checkpoints_notes_are_on_stderr_and_only_there(
    words: tuple[str, ...], two_networks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """Every command that draws from a checkpoint or judges it says which network it is that it took."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DDPM_FAST_STAGES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "roofs"))
    monkeypatch.setattr(
        "ddpm_fast.roofline._SHAPES", {"copy": ([1], []), "gemm": ([(8, 8, 8)], []), "conv": ([(1, 8, 4)], [])}
    )
    monkeypatch.setattr("ddpm_fast.roofline.BUDGET_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", words[0], two_networks, *words[1:]])
    with pytest.raises(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if ": note: " in line] == [AVERAGES], err
    assert "note: " not in out
    if "--json" in words:
        json.loads(out)


@pytest.mark.parametrize("rank, said", [("0", 1), ("1", 0)])
def test_only_the_first_of_several_processes_prints_notes(
    rank: str, said: int, two_networks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.delenv("DDPM_FAST_STAGES")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", "plan", two_networks])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.count("note: ") == said


@pytest.mark.parametrize("source", ["bundled", "model"])
def test_the_bundled_model_and_a_diffusers_folder_have_no_notes(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DDPM_FAST_STAGES")
    df.save(tmp_path / "model", unet(TINY), df.Schedule(num_train_timesteps=4))
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", "plan", *([source] if source == "model" else [])])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and "note: " not in capsys.readouterr().err


def test_a_stage_that_has_ended_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """A timer that is due cannot be cancelled; its line would come after the error."""
    late: list[Any] = []

    class Late:
        def __init__(self, seconds: float, function: Any, args: Any = ()):
            late.append(lambda: function(*args))

        def start(self) -> None:
            pass

        cancel = start

    monkeypatch.setattr(stages, "threading", SimpleNamespace(Timer=Late))
    monkeypatch.delenv("DDPM_FAST_STAGES")
    stages.show()
    try:
        with stages.stage("loading x"):
            pass
        late[0]()
        with stages.stage("loading y"):
            late[1]()
    finally:
        stages.hide()
    assert capsys.readouterr().err == "ddpm-fast: loading y\n"
