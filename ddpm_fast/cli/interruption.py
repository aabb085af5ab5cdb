"""How a command ends before its time: what its last line says, and streams that nobody reads any more."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_PIPE_CLOSED = 128 + 13  # of a program that SIGPIPE ends


@contextmanager
def says_what_is_kept(kept: Callable[[], str], speaks: bool = True) -> Iterator[None]:
    """Where the block is interrupted, end the command with one line about what is kept, and exit code 130.

    Args:
        kept: says it; called when the block was left, so after its temporary files are gone.
        speaks: False for all but one of several processes.
    """
    try:
        yield
    except KeyboardInterrupt:
        if speaks:
            print(f"ddpm-fast: interrupted; {kept()}", file=sys.stderr)
        raise SystemExit(130) from None


class _Stream:
    """A stream, but for what happens where nobody reads it any more: a terminal that closed, a program that ended."""

    def __init__(self, stream: TextIO, at_end: Callable[[TextIO, OSError], None]):
        self._stream, self._at_end = stream, at_end

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._at_end(self._stream, error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._at_end(self._stream, error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def streams() -> Iterator[None]:
    """Standard output and error that make no traceback, whether they are closed now or later.

    Messages that nobody reads are lost, and work goes on. Results that nobody reads any more (``| head``) end the
    command silently, with the exit code that SIGPIPE gives.
    """
    before = sys.stdout, sys.stderr
    out, err = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115
    sys.stdout, sys.stderr = cast(TextIO, _Stream(out, _end)), cast(TextIO, _Stream(err, _discard))
    try:
        yield
    finally:
        try:
            sys.stdout.flush()  # else at the interpreter's end, which would complain
            sys.stderr.flush()
        finally:
            sys.stdout, sys.stderr = before


def _end(stream: TextIO, error: OSError) -> None:
    _discard(stream, error)
    if error.errno in (errno.EPIPE, errno.EIO):  # a program that ended, a terminal that closed
        raise SystemExit(_PIPE_CLOSED)
    print(f"ddpm-fast: standard output cannot be written to: {error.strerror}", file=sys.stderr)
    raise SystemExit(2)


def _discard(stream: TextIO, error: OSError) -> None:
    """Send to nowhere what a stream still holds and will get."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
