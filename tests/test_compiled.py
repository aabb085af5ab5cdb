"""Libraries compiled once: found by the next process, never loaded damaged; and what is said without a compiler."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_fast import ops
from ddpm_fast.engine.choose_ops import choose_ops, for_cpu
from ddpm_fast.ops import compiled


def _compiler() -> bool:
    try:
        return bool(compiled.compiler())
    except RuntimeError:
        return False


needs_compiler = pytest.mark.skipif(not _compiler(), reason="NO C++ COMPILER: the cache of libraries is NOT TESTED")

ANSWER = 'extern "C" int answer() { return ANSWER; }'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ddpm-fast"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where libraries were compiled to."""
    seen: list[Path] = []
    build = compiled._build
    monkeypatch.setattr(compiled, "_build", lambda path, *rest: (seen.append(path), build(path, *rest)))
    return seen


def answer(value: int = 42) -> int:
    return compiled.library("test", ANSWER, {"ANSWER": str(value)}).answer()


@needs_compiler
def test_an_entry_is_compiled_once_and_named_by_all_it_depends_on(
    folder: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
):
    assert not compiled.cached("test", ANSWER, {"ANSWER": "42"})
    assert answer() == 42 and answer() == 42 and len(builds) == 1
    assert compiled.cached("test", ANSWER, {"ANSWER": "42"})
    assert answer(43) == 43 and len(builds) == 2
    names = {compiled._entry("test", ANSWER, compiled._command({}))}
    names.add(compiled._entry("test", ANSWER + " ", compiled._command({})))
    names.add(compiled._entry("test", ANSWER, compiled._command({"A": "1"})))
    for fact in ("_version", "_processor"):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, fact, lambda *command: "another")
            names.add(compiled._entry("test", ANSWER, compiled._command({})))
    assert len(names) == 5
    left = sorted(p.suffix for p in folder.iterdir())
    assert left == [".sha256", ".sha256", ".so", ".so"], "nothing of the building is left behind"


@needs_compiler
@pytest.mark.parametrize("damage", ["cut short", "one bit", "no digest", "another library"])
def test_a_damaged_entry_is_built_again(folder: Path, builds: list[Path], damage: str):
    whole = compiled._folder() / compiled._entry("test", ANSWER, compiled._command({"ANSWER": "42"}))
    if damage == "another library":  # whole, as its digest says, but not for this system
        folder.mkdir(parents=True)
        whole.write_bytes(b"MZ")
        whole.with_suffix(".sha256").write_text(hashlib.sha256(b"MZ").hexdigest())
        assert answer() == 42 and builds == [whole]
        return
    assert answer() == 42
    path, fine = builds[0], builds[0].read_bytes()
    compiled._loaded.cache_clear()
    if damage == "cut short":
        path.unlink()
        path.write_bytes(fine[: len(fine) // 2])
    elif damage == "one bit":
        path.unlink()
        path.write_bytes(fine[:1000] + bytes([fine[1000] ^ 1]) + fine[1001:])
    else:
        path.with_suffix(".sha256").unlink()
    assert answer() == 42 and len(builds) == 2
    assert path.read_bytes()[:64] == fine[:64] and compiled._intact(path)


@needs_compiler
def test_a_folder_that_cannot_be_written_costs_a_compilation_and_no_more(
    tmp_path: Path, builds: list[Path], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()  # root may write anywhere, but not below a file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert answer() == 42 and answer() == 42
    assert len(builds) == 1 and tmp_path not in builds[0].parents


# compiled.py alone, which needs no torch: a process in 0.1 s
ALONE = """
import runpy, sys
library = runpy.run_path(sys.argv[1])["library"]
print(library("test", sys.argv[2], {"ANSWER": "42"}).answer())
"""


def processes(count: int, **changed: str) -> list[str]:
    """What ``count`` processes at once print."""
    words = [sys.executable, "-c", ALONE, compiled.__file__, ANSWER]
    running = [
        subprocess.Popen(words, env=os.environ | changed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    results = []
    for process in running:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        results.append(out.strip())
    return results


@needs_compiler
def test_processes_build_at_once_and_later_ones_only_load(folder: Path, tmp_path: Path):
    assert processes(3) == ["42"] * 3
    assert sorted(p.suffix for p in folder.iterdir()) == [".sha256", ".so"]
    # A compiler that answers to --version as the real one, and fails at all else.
    real, fake = compiled.compiler()[0], tmp_path / "bin" / "c++"
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert processes(1) == ["42"]
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\nexit 1\n')
    fake.chmod(0o755)
    with pytest.raises(AssertionError, match="ends with code 1 and says nothing; name another compiler"):
        processes(1, CXX=str(fake))


def without_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    without_compiler(monkeypatch, tmp_path)
    with pytest.raises(
        RuntimeError, match=r'^ops="winograd" cannot .*: there is no C\+\+ compiler .*; install g\+\+ or clang\+\+'
    ) as e:
        ops.winograd()
    assert "\n" not in str(e.value)
    assert not compiled.cached("test", ANSWER, {})


@needs_compiler
def test_what_the_compiler_says_is_passed_on_in_one_line(folder: Path):
    with pytest.raises(RuntimeError, match=r"cannot compile .*fails: .*error: .*; name another compiler") as e:
        compiled.library("test", "int f() { return unknown; }", {})
    assert "\n" not in str(e.value)


def test_cxx_names_the_compiler_with_its_arguments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -u")
    assert compiled.compiler() == [sys.executable, "-u"]


def test_auto_takes_winograd_for_long_runs_and_says_why():
    import torch

    asked: list[torch.dtype] = []
    assert for_cpu(0.9e12 * 4, 4, torch.float32, asked.append)[0] == "cpu" and not asked, "nothing is compiled in vain"
    assert for_cpu(1.1e12 * 4, 4, torch.float32, asked.append)[0] == "winograd" and asked == [torch.float32]
    name, reason = for_cpu(1e15, 4, torch.float32, lambda dtype: "there is no C++ compiler")
    assert name == "cpu" and "no C++ compiler" in reason
    assert "pays off from 1 TFLOP" in for_cpu(1e9, 1, torch.float32, asked.append)[1]


def test_auto_falls_to_cpu_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import torch

    import ddpm_fast as df

    with torch.device("meta"):
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        model = df.UNet(df.UNetConfig(sample_size=32, block_out_channels=(64, 128), **blocks))
    arguments = (torch.device("cpu"), model, torch.float32, (3, 32, 32), 64)
    assert choose_ops("auto", *arguments, steps=1)[0].name == "cpu"
    if _compiler():
        assert choose_ops("auto", *arguments, steps=1000)[0].name == "winograd"
    without_compiler(monkeypatch, tmp_path)
    chosen, reason = choose_ops("auto", *arguments, steps=1000)
    assert chosen.name == "cpu" and "C++ compiler" in reason
    assert choose_ops("auto", *arguments[:2], torch.float64, *arguments[3:], steps=1000)[0].name == "cpu"


def test_the_flops_of_a_run_are_those_of_its_operations():
    """Within 1% of what the recorded operations cost, which knows of no names."""
    import torch

    import ddpm_fast as df
    from ddpm_fast.engine.choose_ops import flops_of_an_image
    from ddpm_fast.ops import recording, reference
    from ddpm_fast.unet import TimeRows

    config = {"block_out_channels": (8, 16, 24), "norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": 1}
    config |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D")}
    config |= {"up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "sample_size": 16}
    model = df.UNet(df.UNetConfig(**config)).eval()
    operations, log = recording(reference(), "plain")
    time = TimeRows(torch.zeros(1, model.config.time_width))
    with torch.inference_mode():
        model.run(torch.zeros(1, 3, 16, 24), time, operations)
    counted = sum(record.cost.flops for record in log)
    assert abs(flops_of_an_image(model, 16, 24) / counted - 1) < 0.01
