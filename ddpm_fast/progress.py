"""Progress on stderr: a bar that moves in a terminal and in a notebook, and in a log file a line every half minute."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import tqdm

LINE_S = 30.0  # between the lines of a log


def animated() -> bool:
    """Whether someone sees a bar move: stderr is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


def progress_bar(wanted: bool, total: int, unit: str, desc: str | None = None, **options: Any) -> Any:
    """tqdm's bar, or one that does nothing where it is not ``wanted``. options: tqdm's."""
    if not animated():  # miniters: else tqdm adds lines of its own every ten seconds
        options |= {"mininterval": LINE_S, "miniters": 1, "file": _Lines()}
    return tqdm(total=total, disable=not wanted, unit=unit, desc=desc, **options)


class _Lines:
    """stderr for a bar that is to leave lines: each state of it ends in a line feed, not in front of the next one."""

    def write(self, text: str) -> None:
        if text.startswith("\r") and text.strip():  # the rest moves the cursor
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()
