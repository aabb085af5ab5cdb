"""Shared libraries compiled on the user's machine, and kept on disk between processes.

An entry's name is a hash of all that its bytes depend on; beside it lies its SHA-256, so that a damaged entry is
seen before it is loaded, and built again. Files appear by rename, so that processes may build at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast")
COMPILERS = ("c++", "g++", "clang++")


def compiler() -> list[str]:
    """The C++ compiler as the start of a command: $CXX, or the first of `COMPILERS` on PATH.

    Raises RuntimeError, in one line, where there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for words in ([named] if named else []) + [[name] for name in COMPILERS]:
        if (path := shutil.which(words[0])) is not None:
            return [path, *words[1:]]
    raise RuntimeError(
        f'ops="winograd" compiles its transforms once and needs a C++ compiler; $CXX and {", ".join(COMPILERS)} were '
        'not found; install g++ or clang++ (macOS: xcode-select --install), or use ops="cpu"'
    )


def cached(name: str, source: str, defines: dict[str, str]) -> bool:
    """Whether `library` would find an entry without compiling; False where there is no compiler."""
    try:
        command = _command(defines)
    except RuntimeError:
        return False
    return _intact(_folder() / _entry(name, source, command))


@cache
def _loaded(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def library(name: str, source: str, defines: dict[str, str]) -> ctypes.CDLL:
    """The library of a C++ source, from the cache or compiled now; a few seconds.

    Raises RuntimeError where there is no compiler, or where it fails.
    """
    command = _command(defines)
    entry = _entry(name, source, command)
    path = _folder() / entry
    if _intact(path):
        try:
            return _loaded(str(path))
        except OSError:  # whole, but not for this system: build it again
            pass
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _build(path, source, command)
    except OSError:  # read-only or full: a library of this process alone
        path = Path(_private_folder()) / entry
        if not _intact(path):
            _build(path, source, command)
    return _loaded(str(path))


def _folder() -> Path:
    """Where entries are kept: the user's cache folder, by the XDG rule or the system's own."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "ddpm-fast"
    try:
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "ddpm-fast"
    except RuntimeError:  # a user without a home
        return Path(_private_folder())


@cache
def _private_folder() -> str:
    folder = tempfile.TemporaryDirectory(prefix="ddpm-fast-")
    _KEPT.append(folder)
    return folder.name


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def _command(defines: dict[str, str]) -> list[str]:
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
    return [*compiler(), *FLAGS, native, *(f"-D{key}={value}" for key, value in defines.items())]


def _entry(name: str, source: str, command: list[str]) -> str:
    facts = (source, *command, _version(tuple(command[:1])), _processor(), platform.platform())
    return f"{name}-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:24]}.so"


@cache
def _version(command: tuple[str, ...]) -> str:
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout


@cache
def _processor() -> str:
    """The instruction sets that -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("model name", "flags", "features", "cpu implementer", "cpu part")
    return "\n".join(sorted({line for line in lines if line.lower().startswith(wanted)}))


def _digest_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _intact(path: Path) -> bool:
    try:
        return _digest_of(path).read_text() == hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _build(path: Path, source: str, command: list[str]) -> None:
    """Compile to ``path``; OSError where its folder cannot be written."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
        text, made, digest = (Path(folder) / f"library.{suffix}" for suffix in ("cpp", "so", "sha256"))
        text.write_text(source, encoding="utf-8")
        done = subprocess.run([*command, str(text), "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            problem = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
            raise RuntimeError(
                f'{command[0]} cannot compile the transforms of ops="winograd": {problem}; name another compiler by '
                '$CXX, or use ops="cpu"'
            )
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, path)
        os.replace(digest, _digest_of(path))
