"""Who draws which shard: claim files, so that workers need nothing in common but a folder.

A claim is a file that can be created once (O_EXCL), and its owner touches it as long as it lives. Two workers may
still hold one shard for a moment, where an owner was taken for dead too early; both then write the same bytes, so
claims save work and are not what keeps a store right.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

HEARTBEAT_S = 15.0
# Of another machine's claim that does not move. Clients of a network file system see times up to a minute late.
STALE_S = 120.0
EMPTY_S = 5.0  # of a claim whose owner died before it wrote its name
_at_work: set[str] = set()  # tokens of this process


class Claims:
    """This process's claims in a folder, kept alive by a thread between `start` and `stop`.

    A dead owner on this machine is known at once; one on another machine, or one that hangs, when its claim has not
    moved for ``stale_s`` seconds of the observer's own clock.
    """

    def __init__(self, folder: Path, heartbeat_s: float = HEARTBEAT_S, stale_s: float = STALE_S):
        self.folder, self.heartbeat_s, self.stale_s = folder, heartbeat_s, stale_s
        self.token = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._me = {"token": self.token, "host": host(), "pid": os.getpid(), "started": _started(os.getpid())}
        self._held: set[str] = set()
        self._seen: dict[str, tuple[Any, float]] = {}  # others' claims: how they looked, since when (monotonic)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Claims:
        _at_work.add(self.token)
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread, and gives back what is still held."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for name in tuple(self._held):
            self.release(name)
        _at_work.discard(self.token)

    def take(self, name: str) -> bool:
        """Whether ``name`` is this process's now. OSError where the folder is gone or full."""
        path = self._path(name)
        if not self._create(path):
            if not self.abandoned(name):
                return False
            path.unlink(missing_ok=True)
            for left in self.folder.glob(f"{name}.*.tmp"):  # what its owner was writing
                left.unlink(missing_ok=True)
            if not self._create(path):
                return False
        self._held.add(name)
        self._seen.pop(name, None)
        return True

    def release(self, name: str) -> None:
        """Give it back, if it is still this process's."""
        self._held.discard(name)
        with suppress(OSError):
            if self._owner(name).get("token") == self.token:
                self._path(name).unlink(missing_ok=True)

    def others(self) -> list[str]:
        """Names that some other process claims."""
        return sorted(p.stem for p in self.folder.glob("*.claim") if p.stem not in self._held)

    def abandoned(self, name: str) -> bool:
        """Whether the owner of a claim is known to be dead, or has not been heard of for too long."""
        try:
            owner, moved = self._owner(name), self._path(name).stat().st_mtime_ns
        except FileNotFoundError:
            return True
        if owner.get("host") == self._me["host"] and not _at_work_here(owner):
            return True
        look, now = (owner.get("token"), moved), time.monotonic()
        before, since = self._seen.setdefault(name, (look, now))
        if before != look:
            self._seen[name] = look, now
            return False
        return now - since > (self.stale_s if owner else min(EMPTY_S, self.stale_s))

    def temporary(self, name: str) -> Path:
        """Where this process writes the files of ``name`` before they have their own names."""
        return self.folder / f"{name}.{self.token}.tmp"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.claim"

    def _create(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(self._me, file)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return True

    def _owner(self, name: str) -> dict[str, Any]:
        """What its owner wrote; {} as long as it has not, or where it was cut short."""
        try:
            content = json.loads(self._path(name).read_text())
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat_s):
            for name in tuple(self._held):
                with suppress(OSError):  # taken by another, or the folder is gone: the next write says so
                    os.utime(self._path(name))


def host() -> str:
    """Where a process id means something: host, boot, and namespace of process ids (containers share host names)."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _stat(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on (its third field): the name before it may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process began, in clock ticks since boot: with its id, the process itself. None where unknown."""
    fields = _stat(pid)
    return None if fields is None else fields[19]


def _at_work_here(owner: dict[str, Any]) -> bool:
    """Whether an owner on this machine may still be at work."""
    if owner.get("pid") == os.getpid():
        return owner.get("token") in _at_work
    return alive(owner.get("pid", 0), owner.get("started"))


def alive(pid: int, started: str | None) -> bool:
    """Whether a process of this machine still runs; True where that cannot be told."""
    if not Path("/proc/self/stat").exists():
        return True
    fields = _stat(pid)
    return fields is not None and fields[0] not in "ZX" and (started is None or fields[19] == started)
