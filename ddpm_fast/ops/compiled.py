"""Shared libraries compiled on the user's machine, and kept on disk between processes.

An entry's name is a hash of all that its bytes depend on; beside it lies its SHA-256, so that a damaged entry is
seen before it is loaded, and built again. Files appear by rename, so that processes may build at once. Whatever keeps a
library from being had is one `BuildError`, which names the cause: the compiler, the disk, or the loader.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast")
COMPILERS = ("c++", "g++", "clang++")
ANSWER_S = 20.0  # for a compiler to say its version
COMPILE_S = 120.0  # for a library, which takes two or three seconds where nothing is wrong
OTHER_COMPILER = "name another compiler by $CXX"
OTHER_FOLDERS = "name other folders by XDG_CACHE_HOME and TMPDIR"
# What compilers say of the place where they write, by the error that it is.
_OF_THE_PLACE = {
    "no space left on device": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "read-only file system": errno.EROFS,
    "permission denied": errno.EACCES,
}


class BuildError(RuntimeError):
    """A library cannot be had here. ``reason`` says why in a few words; the message is one line, with what to do."""

    def __init__(self, reason: str, advice: str):
        super().__init__(f'ops="winograd" cannot compile its transforms: {reason}; {advice}, or use ops="cpu"')
        self.reason, self.advice = reason, advice


class NoCompilerError(BuildError):
    """There is no C++ compiler, which is no fault: `cpu` does without one."""


def compiler() -> list[str]:
    """The C++ compiler as the start of a command: $CXX, or the first of `COMPILERS` on PATH.

    Raises NoCompilerError where there is none.
    """
    named = named_compiler()
    for words in ([named] if named else []) + [[name] for name in COMPILERS]:
        if (path := shutil.which(words[0])) is not None:
            return [path, *words[1:]]
    raise NoCompilerError(
        f"there is no C++ compiler ($CXX, {', '.join(COMPILERS)})",
        "install g++ or clang++ (macOS: xcode-select --install)",
    )


def named_compiler() -> list[str]:
    """$CXX as words; [] where it is not set."""
    text = os.environ.get("CXX", "")
    try:
        return shlex.split(text)
    except ValueError as error:  # a quotation that is not closed
        raise BuildError(f"$CXX is no command ({error}): {text}", OTHER_COMPILER) from None


def cached(name: str, source: str, defines: Mapping[str, str]) -> bool:
    """Whether `library` would find an entry without compiling; False where there is no compiler."""
    try:
        command = _command(defines)
        return _intact(_folder() / _entry(name, source, command))
    except BuildError:
        return False


@cache
def _loaded(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def library(name: str, source: str, defines: Mapping[str, str]) -> ctypes.CDLL:
    """The library of a C++ source, from the cache or compiled now; a few seconds.

    It is kept in the user's cache folder, and where that cannot hold it in a folder of this process alone.

    Raises:
        BuildError: where there is no compiler, it fails, or what it makes cannot be kept or loaded.
    """
    command = _command(defines)
    entry = _entry(name, source, command)
    failures = []
    for find in (_folder, _private_folder):
        folder = None
        try:
            folder = find()
            path = folder / entry
            if _intact(path):
                try:
                    return _loaded(str(path))
                except OSError:  # whole, but not for this system: build it again
                    pass
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _build(path, source, command)
        except OSError as error:
            failures.append(_problem_with(error, folder))
            continue
        try:
            return _loaded(str(path))
        except OSError as error:  # a file system that programs may not run from, or a library for another processor
            failures.append(_problem_with_loading(folder, error))
    reasons = list(dict.fromkeys(reason for reason, _ in failures))
    raise BuildError(", and ".join(reasons), failures[-1][1])


def probe(command: Sequence[str], timeout_s: float = ANSWER_S) -> None:
    """Compile and load the smallest library, where `library` would. BuildError, with its cause, where that fails."""
    source, failures = 'extern "C" int answer() { return 42; }', []
    for find in (_folder, _temporary):
        place = None
        try:
            place = find()
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".probe-", dir=place) as folder:
                path = Path(folder) / "probe.so"
                _build(path, source, [*command, *FLAGS], timeout_s)
                ctypes.CDLL(str(path)).answer()
            return
        except AttributeError:
            raise BuildError(f"{command[0]} makes a library without its functions", OTHER_COMPILER) from None
        except OSError as error:
            loading = error.errno is None and place is not None
            failures.append(_problem_with_loading(place, error) if loading else _problem_with(error, place))
    raise BuildError(", and ".join(reason for reason, _ in failures), failures[-1][1])


def _temporary() -> Path:
    return Path(tempfile.gettempdir())


def user_cache() -> Path:
    """The user's folder for caches, by the XDG rule or the system's own; for a user without a home a temporary one."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named)
    try:
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    except RuntimeError:
        return _private_folder()


def _folder() -> Path:
    return user_cache() / "ddpm-fast"


def _private_folder() -> Path:
    """A folder that goes when the process ends. OSError where there can be none."""
    return Path(_made_once().name)


@cache
def _made_once() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ddpm-fast-")


def surroundings() -> tuple[str | None, ...]:
    """What in the environment decides whether a library can be had."""
    return tuple(os.environ.get(name) for name in ("CXX", "PATH", "XDG_CACHE_HOME", "HOME", "TMPDIR"))


_WARNED: list[str] = []


def warn_once(message: str) -> None:
    """Warn of the first thing that could not be compiled; of what follows from the same cause nothing more is said."""
    if not _WARNED:
        _WARNED.append(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def _command(defines: Mapping[str, str]) -> list[str]:
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64", "i686") else "-mcpu=native"
    return [*compiler(), *FLAGS, native, *(f"-D{key}={value}" for key, value in defines.items())]


def _entry(name: str, source: str, command: list[str]) -> str:
    facts = (source, *command, _version(tuple(command[:1])), _processor(), platform.platform())
    return f"{name}-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:24]}.so"


@cache
def _version(command: tuple[str, ...]) -> str:
    return _run([*command, "--version"], ANSWER_S).stdout


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


def _build(path: Path, source: str, command: list[str], timeout_s: float = COMPILE_S) -> None:
    """Compile to ``path``. OSError where its folder cannot hold it, BuildError where the compiler fails."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=path.parent) as folder:
        text, made, digest = (Path(folder) / f"library.{suffix}" for suffix in ("cpp", "so", "sha256"))
        text.write_text(source, encoding="utf-8")
        done = _run([*command, str(text), "-o", str(made)], timeout_s, folder)
        if done.returncode:
            said = done.stderr.strip()
            for words, number in _OF_THE_PLACE.items():
                if words in said.lower():
                    raise OSError(number, next(line.strip() for line in said.splitlines() if words in line.lower()))
            lines = [line for line in said.splitlines() if "error" in line] or said.splitlines()[:1]
            problem = lines[0].strip()[:200] if lines else f"it ends with code {done.returncode} and says nothing"
            raise BuildError(f"{command[0]} fails: {problem}", OTHER_COMPILER)
        if not made.exists():
            raise BuildError(f"{command[0]} ends well and writes nothing", OTHER_COMPILER)
        digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, path)
        os.replace(digest, _digest_of(path))


def _run(words: list[str], timeout_s: float, folder: str | None = None) -> subprocess.CompletedProcess[str]:
    """A compiler's run, with its temporary files in ``folder``. BuildError where it does not start or does not end."""
    environment = {**os.environ, "LC_ALL": "C"} | ({} if folder is None else {"TMPDIR": folder})
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # a compiler is several processes, which end together
        )
    except OSError as error:
        raise BuildError(f"{words[0]} cannot be run ({_one_line(error)})", OTHER_COMPILER) from None
    try:
        out, said = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end(process)
        raise BuildError(f"{words[0]} does not end within {timeout_s:g} s", OTHER_COMPILER) from None
    except BaseException:
        _end(process)
        raise
    return subprocess.CompletedProcess(words, process.returncode, out, said)


def _end(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):  # Windows, or it has ended by itself
        process.kill()
    process.communicate()


def _problem_with(error: OSError, folder: Path | None) -> tuple[str, str]:
    """(reason, advice) where a folder cannot hold a library; None: where there is no folder at all."""
    if folder is None:
        return " ".join((error.strerror or str(error)).split()), OTHER_FOLDERS
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left in {folder}", f"make room, or {OTHER_FOLDERS}"
    return f"{folder} cannot be written to ({error.strerror or _one_line(error)})", OTHER_FOLDERS


def _problem_with_loading(folder: Path | None, error: Exception) -> tuple[str, str]:
    said = _one_line(error).rpartition(".so: ")[2]
    return f"a library cannot be loaded from {folder} ({said})", f"{OTHER_FOLDERS}, or another compiler by $CXX"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
