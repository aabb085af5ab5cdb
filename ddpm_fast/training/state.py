"""What a training run leaves on disk so that it can go on after a kill: states, and a log cut back to them."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

from ..whole_files import check_folder, check_names, write_atomically

FORMAT = 1
KEPT_STATES = 2
_STATE_NAME = re.compile(r"step_(\d{9})\.pt")


class ResumeError(ValueError):
    """A run cannot be continued from what lies in its folder."""


def hold(out: Path) -> Callable[[], None]:
    """Keep ``out`` for this process until the function that comes back is called, or the process ends.

    Raises ResumeError where another process trains there. Where a folder cannot be locked (Windows, some network file
    systems) nothing is kept.
    """
    if fcntl is None:
        return lambda: None
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ResumeError(f"another process trains in {out}; wait for it, or train into another folder") from None
    except OSError:
        pass
    return partial(os.close, handle)


def write_json(path: Path, content: object) -> None:
    """``content`` as indented JSON, atomically."""
    text = json.dumps(content, indent=2) + "\n"
    write_atomically(path, lambda stream: stream.write(text.encode()))


RECORD = "train_config.json"
FILES = (RECORD, "log.jsonl", "model_index.json", "evaluations.jsonl", "evaluations.err")
FOLDERS = ("state", "samples", "unet", "scheduler")


def check_out(out: Path, option: str = "", make: bool = True) -> None:
    """Make the folder of a run, or only try to. OSError, in one line, where it or its files cannot be written."""
    check_folder(out, option, make)
    check_names(out, FILES, FOLDERS)


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """The settings of a run, in its folder; ``source``, where the images came from, as a path that holds anywhere."""
    source = record["source"]
    if source and Path(source).exists():
        source = str(Path(source).resolve())
    write_json(out / RECORD, {**record, "source": source})


def read_record(out: Path) -> dict[str, Any] | None:
    """What `write_record` wrote; ``begun`` says whether a state lies beside it. None for a folder without.

    Raises ResumeError for one that is damaged.
    """
    path = out / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sections = [record["train"], record["model"], record["schedule"]]
        if not all(isinstance(section, dict) for section in sections):
            raise TypeError
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError):
        raise ResumeError(f"{path} does not read as a run's settings; restore it, or remove it and give all") from None
    return {**record, "begun": bool(state_paths(out / "state"))}


def kept_text(out: Path) -> str:
    """Where the states of a run are, if there are any."""
    paths = state_paths(out / "state")
    return f"The state before it is {paths[-1]}" if paths else "No state was saved before it"


def state_paths(folder: Path) -> list[Path]:
    """The states in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step_*.pt") if _STATE_NAME.fullmatch(path.name))


def save_state(folder: Path, state: Mapping[str, Any]) -> Path:
    """Writes ``state`` under its step, and drops all but the last two.

    States of later steps go too: a run that is here again passed over them because they did not read.
    Raises OSError, in one line, where it cannot be written; the states before it are kept.
    """
    path = folder / f"step_{state['step']:09d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda stream: torch.save(dict(state), stream))
    except (OSError, RuntimeError) as error:
        failure = error if isinstance(error, OSError) else error.__context__
        if not isinstance(failure, OSError):  # torch.save puts a complaint about its own archive in front
            raise
        kept = (
            "once it can, the same command goes on from the state before"
            if state_paths(folder)
            else "none was before it"
        )
        raise OSError(f"{path} cannot be written ({failure.strerror or failure}); {kept}") from error
    paths = state_paths(folder)
    end = paths.index(path) + 1
    for stale in paths[: max(0, end - KEPT_STATES)] + paths[end:]:
        stale.unlink(missing_ok=True)
    return path


def load_latest_state(folder: Path) -> dict[str, Any] | None:
    """The newest state that reads, on the CPU; None if there is no state at all.

    Raises ResumeError if there are states and none of them reads.
    """
    paths = state_paths(folder)
    for path in reversed(paths):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of a damaged file torch.load raises nearly anything, IndexError among them
            warnings.warn(f"{path} does not read ({error!r}); trying the one before it", stacklevel=2)
            continue
        if state.get("format") != FORMAT:
            raise ResumeError(f"{path} has state format {state.get('format')}; this version reads {FORMAT}")
        return state
    if paths:
        raise ResumeError(f"none of the {len(paths)} states in {folder} reads; remove the folder to start over")
    return None


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], adjustable: frozenset[str]) -> None:
    """Compares what decides a run, and raises ResumeError naming every difference."""
    found = differences(saved, now, adjustable)
    if found:
        raise ResumeError(
            "a resumed run must have the settings it began with; "
            + "; ".join(f"{name}: was {old!r}, now {new!r}" for name, old, new in found)
            + ". Set them back, or train into another folder"
        )


def check_same_everywhere(settings: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError where the processes of one run (by rank) have different data or settings."""
    for rank, other in enumerate(settings):
        found = differences(settings[0], other)
        if found:
            raise ValueError(
                "all processes of a run need the same data and settings; "
                + "; ".join(f"{name}: process 0 has {a!r}, process {rank} {b!r}" for name, a, b in found)
                + ". Give each the same arguments and files"
            )


def differences(
    a: Mapping[str, Any], b: Mapping[str, Any], ignored: frozenset[str] = frozenset()
) -> list[tuple[str, Any, Any]]:
    """(name, in a, in b) of what differs between nested plain dicts.

    A setting that only one side knows (a newer version has more) is not compared.
    """
    found = []
    for section in b:
        old, new = a.get(section), b[section]
        if not isinstance(new, Mapping) or not isinstance(old, Mapping):
            if old != new:
                found.append((section, old, new))
            continue
        for key in sorted((set(old) & set(new)) - ignored):
            if old[key] != new[key]:
                found.append((f"{section}.{key}", old[key], new[key]))
    return found


def cut_log(path: Path, step: int) -> None:
    """Drops the lines after ``step``, which the continued run writes again, and a half-written last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    write_atomically(path, lambda stream: stream.write("".join(kept).encode()))


def plain(value: Any) -> Any:
    """Tuples to lists, all the way down: equal after a trip through a file."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
