"""What tests that start or signal processes share."""

from __future__ import annotations

import signal


def interruptible() -> None:
    """``preexec_fn`` of a child that a test interrupts: SIGINT does its default there, as in a terminal.

    Children inherit that a signal is ignored, and a shell starts background jobs with SIGINT ignored, as nohup does
    with SIGHUP.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
