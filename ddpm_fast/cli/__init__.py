"""The ``ddpm-fast`` command: one file a command, or a few that belong together; `commands` lists them all."""

from .commands import app, main

__all__ = ["app", "main"]
