"""The ``ddpm-fast`` command: one file a command, or a few that belong together; `commands` lists them all."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """The entry point: that of `commands`. Ctrl-C makes no traceback while it is imported either."""
    try:
        from .commands import main as run
    except KeyboardInterrupt:
        print("ddpm-fast: interrupted; nothing was begun", file=sys.stderr)
        raise SystemExit(130) from None
    run()
