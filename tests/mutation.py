"""Kernels with one planted bug: a check that stays green on them proves nothing."""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
_counter = itertools.count()


def mutant(folder: Path, module: str, file: str, old: str, new: str) -> ModuleType:
    """Module ``module`` of a copy of kernels/ in which ``old`` is ``new`` everywhere in ``file``.

    The copy is a package of its own, so the bug reaches every module that imports the changed one.
    """
    name = f"kernels_mutant_{next(_counter)}"
    package = folder / name
    package.mkdir()
    for source in KERNELS.glob("*.py"):
        shutil.copy(source, package)
    text = (package / file).read_text()
    assert old in text, f"kernels/{file} no longer holds {old!r}: plant this bug anew"
    (package / file).write_text(text.replace(old, new))
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        return importlib.import_module(f"{name}.{module}")
    finally:
        sys.path.remove(str(folder))


def assert_turns_red(check: Callable[[ModuleType], None], module: ModuleType) -> None:
    """``check`` must fail on the mutated module, by its own assertion and by nothing else."""
    with pytest.raises(AssertionError):
        check(module)
