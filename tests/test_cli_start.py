"""How the command line starts: help and mistakes without torch, and a word within two seconds of anything longer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ddpm_fast import stages
from ddpm_fast.benchmarking.names import PROVIDERS
from ddpm_fast.benchmarking.providers import DTYPES, providers
from ddpm_fast.cli import options
from ddpm_fast.cli.commands import app

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
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


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
    monkeypatch.setenv("RANK", "1")
    stages.show()
    with stages.stage("of the second process"):
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
