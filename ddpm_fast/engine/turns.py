"""Calls on one object that come from many threads take turns."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Turns:
    """A lock around whole calls on an object whose buffers hold one call at a time.

    A thread waits for its turn. A call inside a call of the same thread, from a callback, would overwrite what the
    outer one computes: it is a RuntimeError, and the outer call goes on unharmed. On a GPU each turn also begins behind
    the work that the one before it left on its stream.

    A copy, pickled or not, has turns of its own, and so has a process made by fork.
    """

    def __init__(self, what: str, device: torch.device | None = None):
        self._what, self._device = what, device
        self._lock = threading.RLock()
        self._owner: int | None = None  # the thread whose turn it is
        self._end: torch.cuda.Event | None = None  # of the last turn's work on a GPU
        _ALL.add(self)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """One turn; it ends however the block does."""
        with self._lock:
            if self._owner is not None:
                raise RuntimeError(
                    f"a callback cannot call the {self._what} that calls it: the outer call is not finished; use a "
                    f"second {self._what} there, or call after the first has returned"
                )
            try:
                self._owner = threading.get_ident()
                with self._in_stream_order():
                    yield
            finally:
                self._owner = None

    @contextmanager
    def _in_stream_order(self) -> Iterator[None]:
        """Threads may use streams of their own, and the end of a call need not wait for the device."""
        if self._device is None or self._device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(self._device)
        if self._end is not None:
            stream.wait_event(self._end)
        try:
            yield
        finally:
            self._end = stream.record_event()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._what, self._device)

    def _after_fork(self) -> None:
        """In a new process no other thread is there to give the lock back."""
        if self._owner != threading.get_ident():
            self._lock, self._owner = threading.RLock(), None


_ALL: weakref.WeakSet[Turns] = weakref.WeakSet()


def _after_fork() -> None:
    for turns in list(_ALL):
        turns._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
