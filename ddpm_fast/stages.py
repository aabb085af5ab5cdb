"""Stages of a command on stderr, so that nobody waits in silence: importing torch, loading, compiling, measuring.

A stage that is over within a second or two says nothing. Only the command line shows stages; from Python they are
silent.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

DELAY_S = 1.5  # of silence, after which the stage at work is named

_shown = False
_last_line_s = 0.0
_last_line = ""


def show() -> None:
    """Name stages on stderr from now on. Of the processes that torchrun started, the first one speaks.

    DDPM_FAST_STAGES=0 in the environment keeps them silent, for a process whose stderr is for errors alone.
    """
    global _shown, _last_line_s, _last_line
    _last_line = ""
    _shown = os.environ.get("RANK", "0") == "0" and os.environ.get("DDPM_FAST_STAGES") != "0"
    _last_line_s = time.monotonic()


def hide() -> None:
    """Name no stages any more."""
    global _shown
    _shown = False


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Name the work inside, once ``DELAY_S`` have passed without a line about a stage."""
    if not _shown:
        yield
        return
    ended = False
    lock = Lock()

    def speak(line: str) -> None:
        with lock:  # cancel() does not stop a timer that is due already: its line would follow the error's
            if not ended:
                _say(line)

    silent_s = time.monotonic() - _last_line_s
    timer = threading.Timer(max(0.0, DELAY_S - silent_s), speak, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            ended = True


@contextmanager
def stage_now(text: str) -> Iterator[None]:
    """A stage that may hold the interpreter lock, so that no timer runs: a terminal shows it at once, and only while
    it lasts. A log gets the line of `stage`."""
    if not _shown or not sys.stderr.isatty():
        with stage(text):
            yield
        return
    line = f"ddpm-fast: {text}"
    print(line, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r" + " " * len(line) + "\r", end="", file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Print one note of a command on stderr, where stages are shown."""
    if _shown:
        print(f"ddpm-fast: note: {text}", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    global _last_line_s, _last_line
    _last_line_s = time.monotonic()
    if text == _last_line:  # a stage that comes once more
        return
    _last_line = text
    print(f"ddpm-fast: {text}", file=sys.stderr, flush=True)
