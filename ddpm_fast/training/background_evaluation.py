"""Evaluation beside a training run: a process of its own, at low priority, that training never waits for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOG = "evaluations.jsonl"
ERRORS = "evaluations.err"


class BackgroundEvaluation:
    """Starts ``ddpm-fast evaluate`` on the run's own folder, one process at a time.

    A result is one JSON object a line in the run's ``evaluations.jsonl``, its ``note`` the training step.
    """

    def __init__(
        self,
        run: Path,  # a folder that `load` reads; the process takes the weights it finds there when it starts
        against: str,  # the training images, as the command takes them
        image_size: int,
        images: int,  # drawn for each evaluation
        device: str = "cpu",
    ):
        self.run, self.skipped = run, 0
        self.command = [sys.executable, "-m", "ddpm_fast", "evaluate", str(run), "--draw", str(images)]
        self.command += ["--against", against, "--image-size", str(image_size), "--device", device, "--json"]
        self.command += ["--log", str(run / LOG)]
        self._process: subprocess.Popen | None = None

    def start(self, step: int) -> bool:
        """Evaluate the weights in the folder as those of ``step``; False, and nothing, if the last still runs."""
        if self.running:
            self.skipped += 1
            return False
        environment = dict(os.environ)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # it is one process
            environment.pop(name, None)
        environment["DDPM_FAST_STAGES"] = "0"  # what it writes there are errors
        if "cpu" in self.command:
            environment["OMP_NUM_THREADS"] = "1"  # the cores are training's
        with open(self.run / ERRORS, "ab") as errors:
            self._process = subprocess.Popen(
                [*self.command, "--note", str(step)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is meant for training
                preexec_fn=_low_priority if os.name == "posix" else None,
            )
        return True

    @property
    def running(self) -> bool:
        """Whether the last one is still at work."""
        return self._process is not None and self._process.poll() is None

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait for the last one; after ``timeout_s`` it is ended."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _low_priority() -> None:
    os.nice(15)
