"""What `make gpu` relies on where few packages are installed and kernels may go wrong: rehearsed without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def pytest_run(folder: Path, plugin: str, *words: str) -> tuple[int, str]:
    """(exit code, output) of pytest with ``plugin``'s source loaded before any conftest."""
    (folder / "stand_in.py").write_text(plugin)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    known = filter(None, [os.environ.get("PYTHONPATH")])
    paths = os.pathsep.join([*map(str, (folder, TESTS, TESTS.parent)), *known])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "stand_in", "-p", "no:cacheprovider", "-m", "gpu", "-rs", *words],
        env={**environment, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


NO_DIFFUSERS = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


def test_a_file_whose_imports_are_missing_is_left_out_and_named(tmp_path: Path) -> None:
    for name in ("conftest.py", "tensors.py", "models.py", "test_unet.py", "test_unet_skip.py", "test_philox.py"):
        shutil.copy(TESTS / name, tmp_path)
    code, said = pytest_run(tmp_path, NO_DIFFUSERS, "--collect-only", "-q", ".")
    assert code == 0, said
    assert "test_unet_skip.py:0: diffusers is not installed, which this file imports" in said
    assert re.search(r"^8/\d+ tests collected", said, re.MULTILINE), said


# In place of torch, whose import takes longer than all of this.
A_GPU_THAT_BREAKS = """
import sys
from unittest.mock import MagicMock
torch = sys.modules["torch"] = MagicMock()
torch.get_num_threads.return_value = 1
broken = []
def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.is_available = lambda: True
torch.cuda.synchronize = synchronize
"""
BREAKING = """
import time
import pytest, stand_in
pytestmark = pytest.mark.gpu
def test_fails(): assert False
def test_breaks(): stand_in.broken.append(1); raise RuntimeError("misaligned")
def test_after(): assert not stand_in.broken
def test_hangs(): time.sleep(100)
def test_last(): pass
"""


def test_a_lost_context_and_a_hang_cost_one_test_each(tmp_path: Path) -> None:
    """A worker that lost the GPU, and one whose test hangs, end; another goes on with what is left."""
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_breaking.py").write_text(BREAKING)
    limits = ("-o", "faulthandler_timeout=1", "-o", "faulthandler_exit_on_timeout=true")
    code, said = pytest_run(tmp_path, A_GPU_THAT_BREAKS, "-n", "1", "--dist", "load", "-v", *limits, ".")
    assert code == 1
    outcomes = re.findall(r"(PASSED|FAILED) \S*::(\w+)", said)
    assert {name: outcome for outcome, name in outcomes} == {
        "test_fails": "FAILED",
        "test_breaks": "FAILED",
        "test_after": "PASSED",
        "test_hangs": "FAILED",
        "test_last": "PASSED",
    }, said
    assert "lost in this test: CUDA error: an illegal memory access" in said


def test_in_one_process_what_follows_a_lost_context_says_so(tmp_path: Path) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_breaking.py").write_text(BREAKING)
    code, said = pytest_run(tmp_path, A_GPU_THAT_BREAKS, "-n", "0", "-q", "-k", "breaks or last", ".")
    assert code == 1 and "not run: the CUDA context was lost in test_breaking.py::test_breaks" in said


def test_an_import_that_is_a_mistake_is_still_an_error(tmp_path: Path) -> None:
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "test_mistake.py").write_text("import ddpm_slow\n")
    code, said = pytest_run(tmp_path, A_GPU_THAT_BREAKS, "--collect-only", "-q", ".")
    assert code == 2 and "No module named 'ddpm_slow'" in said
