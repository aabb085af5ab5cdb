"""Real processes of ``ddpm-fast``, started in a fraction of a second: forked from a server that has torch loaded."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = [
    *("pytest", "numpy", "torch", "torch.distributed", "torch._dynamo", "safetensors.torch", "PIL.Image", "tqdm.auto"),
    *("ddpm_fast.cli.commands", "ddpm_fast.store.pictures", "ddpm_fast.store.export", "ddpm_fast.checkpoints"),
]


def _command(words: Sequence[str], environment: dict[str, str], log: str) -> None:
    """The body of a process: ``ddpm-fast`` with these words, its output in a file."""
    handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what an interpreter sets that starts in a terminal
    for name in ("SIGTERM", "SIGHUP"):
        ignored = name in environment.get("IGNORED", "")
        signal.signal(getattr(signal, name), signal.SIG_IGN if ignored else signal.SIG_DFL)
    sys.argv = ["ddpm-fast", *words]
    import torch

    torch.set_num_threads(1)
    from ddpm_fast import cli

    try:
        cli.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Command:
    """A running ``ddpm-fast``."""

    def __init__(self, words: Sequence[object], log: Path, environment: dict[str, str] | None = None):
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([path] if path else [])])  # for the server's own start
        forkserver.ensure_running()
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
        self.log = log
        self.process = context.Process(target=_command, args=([str(w) for w in words], environment or {}, str(log)))
        self.process.start()

    def kill(self) -> None:
        """SIGKILL, and its end is waited for. It may have ended before."""
        self.process.kill()
        self.process.join(30)

    def wait(self, timeout_s: float = 300) -> int:
        """Its exit code."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"not done in {timeout_s} s: {self.output()}")
        return self.process.exitcode

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def output(self) -> str:
        """What it wrote, less the lines that torch 2.10's Gloo writes once its peers are connected."""
        text = self.log.read_text() if self.log.exists() else ""
        return re.sub(r"\[Gloo\] Rank \d+ is connected to .*\n", "", text)


def gloo(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun says to a worker."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finished(folder: Path) -> int:
    """Shards that are finished, as a stranger sees it."""
    place = folder / "checksums"
    return len(list(place.iterdir())) if place.is_dir() else 0


def until(condition: Any, timeout_s: float = 300) -> None:
    """Wait for a condition; TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.002)
