"""The last line of a command that a signal ends: what is kept, and how to go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
