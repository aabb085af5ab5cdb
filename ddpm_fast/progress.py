"""Progress on stderr: a bar that moves in a terminal and in a notebook, and in a log file a line every half minute."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

LINE_S = 30.0  # between the lines of a log


def animated() -> bool:
    """Whether someone sees a bar move: stderr is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


class Bar(tqdm):
    """tqdm's bar without its monitor, a thread that outlives all bars. With ``miniters=1`` there is no need for one."""

    monitor_interval = 0


class _NoBar:
    """Takes what a bar takes, and shows nothing. tqdm starts its monitor thread for a disabled bar too."""

    def __init__(self, total: float, initial: float = 0):
        self.total, self.n = total, initial

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, n: float = 1) -> None:
        self.n += n

    def set_postfix_str(self, text: str = "", refresh: bool = True) -> None:
        pass

    def close(self) -> None:
        pass


def progress_bar(wanted: bool, total: int, unit: str, desc: str | None = None, **options: Any) -> Any:
    """A bar by tqdm, or one that shows nothing where it is not ``wanted``. Neither leaves a thread.

    Args:
        options: tqdm's own.
    """
    if not wanted:
        return _NoBar(total, options.get("initial", 0))
    if not animated():
        options |= {"mininterval": LINE_S, "file": _Lines()}
    return Bar(total=total, unit=unit, desc=desc, **{"miniters": 1, **options})


class _Lines:
    """stderr for a bar that is to leave lines: each state of it ends in a line feed, not in front of the next one."""

    def write(self, text: str) -> None:
        if text.startswith("\r") and text.strip():  # the rest moves the cursor
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
