"""Where the better choice cannot be had, "auto" takes the next one, says why once, and nothing else fails of it."""

# ruff: noqa: F401, F811  (fixtures are imported)

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY, unet
from test_cli import Run, checkpoint, run
from training_setup import images

import ddpm_fast as df
from ddpm_fast import doctor_checks, ops
from ddpm_fast.engine import choose_ops as choosing
from ddpm_fast.engine.choose_ops import choose_ops, why_not_triton
from ddpm_fast.ops import compiled, cpu_set, winograd_set
from ddpm_fast.store import SampleStore

SCHEDULE = df.Schedule(num_train_timesteps=20, beta_start=4e-3, beta_end=0.3)
WIDE: dict[str, Any] = {**TINY, "block_out_channels": (16, 32)}  # enough for the Winograd set's own convolutions


def _compiler() -> str | None:
    try:
        return compiled.compiler()[0]
    except RuntimeError:
        return None


CXX = _compiler()
needs_compiler = pytest.mark.skipif(CXX is None, reason="NO C++ COMPILER: falling back from one is NOT TESTED")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A process that has compiled nothing yet, with folders of its own, to which every run is a long one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(compiled, "_WARNED", [])
    monkeypatch.setattr(winograd_set, "_KERNELS", {})
    monkeypatch.setattr(choosing, "LONG_RUN", 0)
    caches = compiled._made_once, compiled._version, cpu_set.compiled_norm, choosing._why_not_compiled, why_not_triton
    for known in caches:
        known.cache_clear()
    yield
    for known in caches:
        known.cache_clear()


def script(path: Path, *lines: str) -> str:
    """A compiler that says its version, and otherwise does this."""
    path.write_text("\n".join(("#!/bin/sh", '[ "$1" = --version ] && exec echo 1', *lines)))
    path.chmod(0o755)
    return str(path)


# Each breaks the compiler or its folders, and is the reason that must be named.
BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], None], str]] = {}


def broken(reason: str) -> Callable[[Any], Any]:
    def add(how: Callable[[pytest.MonkeyPatch, Path], None]) -> Any:
        BROKEN[how.__name__] = how, reason
        return how

    return add


@broken(r"false fails: it ends with code 1 and says nothing")
def fails_silently(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CXX", "false")


@broken(r"true ends well and writes nothing")
def writes_nothing(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CXX", "true")


@broken(r"c\+\+ fails: x\.cpp:1: error: what is this\?")
def complains(patch: pytest.MonkeyPatch, folder: Path) -> None:
    words = "echo In file x.cpp >&2", "echo 'x.cpp:1: error: what is this?' >&2", "exit 1"
    patch.setenv("CXX", script(folder / "c++", *words))


@broken(r"no space is left in .*/cache/ddpm-fast, and no space is left in .*/ddpm-fast-\w+$")
def disk_is_full(patch: pytest.MonkeyPatch, folder: Path) -> None:
    words = "/tmp/x.s: fatal error: error writing to it: No space left on device"
    patch.setenv("CXX", script(folder / "c++", f"echo '{words}' >&2; exit 1"))


@broken(r"no space is left in .*/cache/ddpm-fast, and ")
def nothing_can_be_written(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def fail(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(Path, "write_text", fail)


@broken(r"file/ddpm-fast cannot be written to \(.*\), and No usable temporary directory")
def there_is_no_folder(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").touch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    for name in ("TMPDIR", "TEMP", "TMP"):
        patch.setenv(name, str(folder / "file"))
    patch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(folder / "file")])


@broken(r"cannot be run \(.*Exec format error.*\)|cannot be run \(.*\)")
def is_no_program(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "c++").write_bytes(b"\x7fELF nothing")
    (folder / "c++").chmod(0o755)
    patch.setenv("CXX", str(folder / "c++"))


@broken(r"a library cannot be loaded from .*/cache/ddpm-fast \(.*\), and a library cannot be loaded from ")
def makes_no_library(patch: pytest.MonkeyPatch, folder: Path) -> None:
    lines = "while [ $# -gt 1 ]; do [ $1 = -o ] && echo nonsense > $2; shift; done"
    patch.setenv("CXX", script(folder / "c++", lines))


@broken(r"c\+\+ does not end within 1 s")
def hangs(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(compiled, "COMPILE_S", 1.0)
    patch.setattr(compiled._build, "__defaults__", (1.0,))
    patch.setenv("CXX", script(folder / "c++", "sleep 600 &", "wait"))


@broken(r"\$CXX is no command \(No closing quotation\): 'c\+\+")
def is_misquoted(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("CXX", "'c++")


@needs_compiler
@pytest.mark.parametrize("how", BROKEN)
def test_auto_takes_cpu_where_compiling_fails_and_says_why_once(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    model = unet(WIDE)
    expected = df.Sampler(model, SCHEDULE, ops=ops.cpu(compiled=False), steps=3).sample(2)
    break_it, reason = BROKEN[how]
    break_it(monkeypatch, tmp_path)
    with pytest.warns(RuntimeWarning) as said:
        sampler = df.Sampler(model, SCHEDULE, steps=3)
        got = sampler.sample(2)
        df.Sampler(model, SCHEDULE, steps=4).sample(1)
    (message,) = [str(warning.message) for warning in said]
    assert message.startswith('ops="auto" takes "cpu" in place of "winograd", since ') and "\n" not in message
    assert sampler.ops.name == "cpu" and "long enough for winograd, but " in sampler.ops_reason
    for text in (message, sampler.ops_reason):
        assert says(reason, text), text
    assert torch.equal(got, expected), "normalisation runs on torch's operations too"
    with pytest.raises(RuntimeError) as raised:
        df.Sampler(model, SCHEDULE, steps=3, ops="winograd")
    text = str(raised.value)
    assert text.startswith('ops="winograd" cannot compile its transforms: ') and text.endswith('or use ops="cpu"')
    assert says(reason, text.partition(";")[0]) and "\n" not in text
    places = "cache" in reason or "file" in reason
    assert ("make room" if "space" in reason else "by XDG_CACHE_HOME and TMPDIR" if places else "by $CXX") in text


def says(reason: str, text: str) -> bool:
    return re.search(reason, text) is not None


@needs_compiler
def test_a_compiler_that_hangs_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nor does its child keep us: a driver that is ended alone leaves the compiler proper, which holds the pipes."""
    monkeypatch.setattr(compiled._build, "__defaults__", (1.0,))
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "sleep 60 &", f"echo $! > {tmp_path}/child", "wait"))
    began = time.monotonic()
    with pytest.raises(compiled.BuildError, match="does not end within 1 s"):
        compiled.library("test", "", {})
    assert time.monotonic() - began < 20
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}/stat").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    raise AssertionError("the compiler's child is still there")


@needs_compiler
def test_a_short_run_warns_of_its_normalisation_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choosing, "LONG_RUN", 1e30)
    monkeypatch.setenv("CXX", "false")
    with pytest.warns(RuntimeWarning) as said:
        for dtype in ("float32", "bfloat16"):
            df.Sampler(unet(TINY), SCHEDULE, steps=2, dtype=dtype).sample(1)
    (message,) = [str(warning.message) for warning in said]
    assert message.startswith("normalisation runs on torch's operations, a few percent slower, since ")
    assert message.endswith("false fails: it ends with code 1 and says nothing")


def test_without_a_compiler_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = df.Sampler(unet(TINY), SCHEDULE, steps=2)
        sampler.sample(1)
    assert sampler.ops.name == "cpu" and "there is no C++ compiler" in sampler.ops_reason


@needs_compiler
@pytest.mark.parametrize("folder", ["cache is full", "no home", "cache is a file"])
def test_another_folder_serves_without_a_word(folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if folder == "cache is full":
        real = Path.write_text

        def write(self: Path, *args: Any, **kwargs: Any) -> int:
            if str(self).startswith(str(tmp_path / "cache")):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(self, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", write)
    elif folder == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")

        def home() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", home)
    else:
        (tmp_path / "cache").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert df.Sampler(unet(WIDE), SCHEDULE, steps=2).ops.name == "winograd"


@needs_compiler
def test_threads_may_build_at_once():
    source, answers = 'extern "C" int answer() { return 42; }', []

    def build() -> None:
        answers.append(compiled.library("threads", source, {}).answer())

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == [42] * 4


def test_other_caches_are_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Roofs are measured and statistics computed where there is no home and no folder that can be written to."""
    from ddpm_fast.evaluation.distances import default_cache
    from ddpm_fast.roofline import cache_file, roofs

    assert (
        roofs("cpu", "float32", budget_s=1e-3).dtype == "float32" and (tmp_path / "cache/ddpm_fast/roofs.json").exists()
    )
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert roofs("cpu", "float32", budget_s=1e-3).dtype == "float32"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # invalid by the XDG rule, and to be ignored
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_file().is_relative_to(tmp_path) and default_cache().is_relative_to(tmp_path)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert roofs("cpu", "float32", budget_s=1e-3).dtype == "float32" and default_cache().is_absolute()


# --- Triton ---


def test_auto_takes_reference_where_triton_fails(monkeypatch: pytest.MonkeyPatch):
    """torch's CPU stands in for the GPU: what is asked is that one launch, and what it raises."""
    device = torch.device("cpu")

    def fail(*args: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore of it")

    monkeypatch.setattr(choosing.ops_module, "triton", lambda: replace(ops.reference(), initial_noise=fail))
    with pytest.warns(RuntimeWarning) as said:
        reason = why_not_triton(device)
        assert why_not_triton(device) == reason
    assert reason == (
        "Triton does not work here "
        "(RuntimeError: Failed to find C compiler. Please specify via CC environment variable.)"
    )
    assert len(said) == 1 and 'ops="auto" takes "reference" in place of "triton"' in str(said[0].message)
    monkeypatch.setattr(choosing, "why_not_triton", lambda device: reason)
    chosen, why = choose_ops("auto", torch.device("cuda", 0))
    assert chosen.name == "reference" and why == f"the device is cuda, but {reason}"
    monkeypatch.setattr(choosing, "why_not_triton", lambda device: None)
    monkeypatch.setattr(choosing.ops_module, "triton", lambda: replace(ops.reference(), name="triton"))
    assert choose_ops("auto", torch.device("cuda", 0))[0].name == "triton"


def test_one_kernel_tells_whether_triton_works(device: torch.device):
    pytest.importorskip("triton")
    assert why_not_triton(device) is None


# --- sets of samples ---


@pytest.fixture
def words(checkpoint: Path) -> tuple[object, ...]:
    return ("sample", checkpoint, "-n", 4, "--batch-size", 2, "--shard-size", 2, "--steps", 2, "--out", "set")


def without_a_shard(folder: Path) -> None:
    for path in folder.glob("*/000001.*"):
        path.unlink()


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@needs_compiler
@pytest.mark.parametrize("given", [(), ("--ops", "winograd")])
def test_a_set_is_not_gone_on_with_by_other_operations(
    given: tuple[str, ...], run: Run, words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run(*words, *given)[0] == 0
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    assert manifest["sampler"]["ops"] == "winograd" and manifest["ops_reason"]
    without_a_shard(tmp_path / "set")
    before = content(tmp_path / "set")
    monkeypatch.setattr(winograd_set, "_KERNELS", {})
    monkeypatch.setenv("CXX", "false")
    code, out, err = run(*words, *given)
    assert code == 2 and out == "" and content(tmp_path / "set") == before
    (line,) = [line for line in err.splitlines() if "importing" not in line]
    assert "set was begun with winograd operations, which this machine cannot have: " in line
    assert "false fails: it ends with code 1 and says nothing; name another compiler by $CXX, " in line
    monkeypatch.delenv("CXX")
    assert run(*words, *given)[0] == 0 and SampleStore.open(tmp_path / "set").whole()


@needs_compiler
def test_a_set_begun_without_a_compiler_goes_on_so(
    run: Run, words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With one, too: the normalisation rounds as it did, and the bytes are those of one run."""
    monkeypatch.setenv("CXX", "false")
    code, _, err = run(*words)
    assert code == 0 and err.count("warning") == 1 and 'takes "cpu" in place of "winograd"' in err
    whole = content(tmp_path / "set")
    begun = json.loads(whole["manifest.json"])
    assert (begun["sampler"]["ops"], begun["sampler"]["normalisation"]) == ("cpu", "torch")
    assert "false fails" in begun["ops_reason"]
    without_a_shard(tmp_path / "set")
    monkeypatch.delenv("CXX")
    for known in (cpu_set.compiled_norm, choosing._why_not_compiled):
        known.cache_clear()
    for given in ((), ("--ops", "cpu")):
        assert run(*words, *given)[0] == 0
        assert content(tmp_path / "set") == whole
        without_a_shard(tmp_path / "set")


@needs_compiler
def test_a_set_begun_with_a_compiled_normalisation_is_not_gone_on_with_without(
    run: Run, words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run(*words, "--ops", "cpu")[0] == 0
    without_a_shard(tmp_path / "set")
    monkeypatch.setenv("CXX", "false")
    cpu_set.compiled_norm.cache_clear()
    code, _, err = run(*words, "--ops", "cpu")
    last = err.splitlines()[-1]
    assert code == 2 and "false fails" in last
    assert "was begun with cpu operations, which this machine cannot have: " in last
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    del manifest["sampler"]["normalisation"]  # of a set that was begun before this was recorded
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest))
    assert run(*words, "--ops", "cpu")[0] == 0


# --- training ---


def test_a_training_does_not_die_of_what_is_only_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Whatever a preview or the start of an evaluation raises; and before the first of them a state was saved."""
    from test_training import CONFIG, MODEL
    from test_training import SCHEDULE as OF_TRAINING

    from ddpm_fast.training import run as training
    from ddpm_fast.training.state import load_latest_state

    states: list[int] = []

    def fail(*args: object, **kwargs: object) -> None:
        states.append(load_latest_state(tmp_path / "run" / "state")["step"])
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "step.png"))

    def train(name: str) -> Any:
        config = {**CONFIG.to_dict(), "sample_every": 2, "sample_count": 1, "sample_steps": 2, "checkpoint_every": 100}
        return training.train(
            images(), tmp_path / name, MODEL, OF_TRAINING, type(CONFIG)(**config), "cpu", progress=False
        )

    monkeypatch.setattr(training, "save_picture", fail)
    with pytest.warns(RuntimeWarning) as said:
        result = train("run")
    lines = [str(w.message) for w in said if "no samples" in str(w.message)]
    assert result.finished and states == [2, 2, 6] and len(lines) == 3
    assert lines[0].startswith("no samples at step 2: [Errno 28] No space left on device")

    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("one line\nand another")

    monkeypatch.setattr(training, "Sampler", broken)
    with pytest.warns(RuntimeWarning, match=r"^no samples at step 2: one line$"):
        assert train("other").finished
    a, b = (load_latest_state(tmp_path / name / "state")["model"] for name in ("run", "other"))
    assert all(torch.equal(a[key], b[key]) for key in a), "what is looked at changes nothing"


def test_an_evaluation_that_does_not_start_does_not_end_a_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from test_training import CONFIG, MODEL
    from test_training import SCHEDULE as OF_TRAINING

    from ddpm_fast.training import run as training

    class Evaluation:
        running = False

        def start(self, step: int) -> None:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

        def finish(self, timeout_s: float | None = None) -> None:
            pass

    monkeypatch.setattr(training, "_evaluation", lambda trainer, out: Evaluation())
    config = type(CONFIG)(**{**CONFIG.to_dict(), "evaluate_every": 3})
    with pytest.warns(RuntimeWarning, match=r"^no evaluation at step 3: \[Errno 12\] Cannot allocate memory$"):
        result = training.train(images(), tmp_path / "run", MODEL, OF_TRAINING, config, "cpu", progress=False)
    assert result.finished


# --- doctor ---


def doctor(run: Run) -> tuple[dict[str, Any], str]:
    facts = json.loads(run("doctor", "--json")[1])
    code, text, _ = run("doctor")
    assert code == 0
    return facts, text


@needs_compiler
def test_doctor_tries_what_it_reports(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CXX", raising=False)
    facts, text = doctor(run)
    assert facts["compiler"] == {"named": None, "command": CXX, "problem": None}
    assert facts["auto"]["cpu"]["ops"] == "winograd" and "- on cpu, ops=auto takes winograd (" in text
    assert all(f["problem"] is None and f["free_mib"] > 0 for f in facts["folders"].values())
    assert f"- {CXX} compiles the transforms of ops=winograd" in text
    assert not list(Path(facts["folders"]["cache"]["folder"]).glob(".probe*")), "what was tried is gone"
    monkeypatch.setenv("CXX", "no-such-compiler")
    facts, text = doctor(run)
    assert f"- $CXX is no-such-compiler, which is not found; {CXX} compiles in its place" in text
    monkeypatch.setenv("CXX", "/nowhere/c++")  # called as the one that is found
    assert f"- $CXX is /nowhere/c++, which is not found; {CXX} compiles in its place" in doctor(run)[1]


@needs_compiler
@pytest.mark.parametrize("how", [name for name in BROKEN if name not in ("nothing_can_be_written", "hangs")])
def test_doctor_names_what_does_not_work(how: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    break_it, reason = BROKEN[how]
    break_it(monkeypatch, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        facts, text = doctor(run)
    reason = reason.replace("/ddpm-fast-\\w+$", "").replace("No usable temporary directory", ".*")
    for told in (facts["compiler"]["problem"], facts["auto"]["cpu"]["reason"]):
        assert says(reason, told), told
    assert (
        facts["auto"]["cpu"]["ops"] == "cpu" and f"- on cpu, ops=auto takes cpu ({facts['compiler']['problem']}" in text
    )
    assert f"- no C++ for winograd and for a faster normalisation of cpu: {facts['compiler']['problem']}" in text


def test_doctor_names_folders_that_cannot_be_written(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    facts, text = doctor(run)
    assert facts["folders"]["cache"]["problem"] and facts["folders"]["temporary"]["problem"] is None
    assert f"- the cache folder {tmp_path}/file/ddpm-fast cannot be written to (" in text
    assert "or name another by XDG_CACHE_HOME" in text

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "cannot be written to (No space left on device, " in doctor(run)[1]


def test_doctor_says_what_auto_takes_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor_checks, "why_not_triton", {torch.device("cuda:1"): "x"}.get)
    facts = doctor_checks.auto_facts(["cuda:0", "cuda:1"], None)
    assert facts == {
        "cuda:0": {"ops": "triton", "reason": "fused kernels run on this GPU"},
        "cuda:1": {"ops": "reference", "reason": "x"},
    }
