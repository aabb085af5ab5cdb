"""A provider in a process of its own, and the handle by which others take turns with it.

What a provider sets for its whole process (its malloc, pages, thread pools, flags) is then no other's, and neither is
its memory or its crash. Each way goes one line of JSON; tensors lie in files. The lines have file descriptors of
their own, since whatever is printed, by whichever library, is to be taken for no answer: it goes to a log.

    with Worker(provider, "float32", case, folder) as worker:
        worker.network(x, 0), worker.chain(seed)     # a `Sampling`, as if it were in this process
        worker.turn()                                # milliseconds of a trajectory, by the worker's own clock
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .providers import DTYPES, Case, Provider, Sampling
from .timing import HostClock

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# At work for less than a tenth of such a window, a process is idle; or it never will be, after so many of them.
WINDOW_S, WINDOWS = 0.01, 100
EXIT_S = 5.0  # between the end of a process's answers and its own
WEIGHTS, REQUEST, LOG, GIVEN, DRAWN = "weights.pt", "request.pickle", "log.txt", "given.pt", "drawn.pt"


class WorkerError(RuntimeError):
    """A provider raised, or its process ended; the message says what of it is known."""

    def __init__(self, message: str, worker: Worker):
        super().__init__(message)
        self.worker = worker


class BudgetSpent(WorkerError):
    """The time until which a worker was to answer is over; it was ended."""

    def __init__(self, worker: Worker):
        super().__init__("not measured: the budget was spent", worker)


class Worker:
    """A `Sampling` elsewhere: a fresh interpreter that has made what ``provider`` makes. It must be ended.

    provider: told by its pickle, so ``make`` has to be importable there. folder: of one model and schedule alone: the
    first worker leaves them there for all others, and each makes a folder of its own. clock: "wall" or "cpu", of
    `turn`. until: by time.monotonic(), when it is ended if it has not answered; it may be changed. Raises WorkerError,
    as all that asks it does.
    """

    def __init__(
        self, provider: Provider, dtype: str, case: Case, folder: Path, clock: str = "wall", until: float = math.inf
    ):
        self.until, self._expired = until, False
        if not (folder / WEIGHTS).exists():
            torch.save((case.model, case.schedule), folder / WEIGHTS)
        self.folder = Path(tempfile.mkdtemp(prefix="worker-", dir=folder))
        request = {
            "provider": provider,
            "dtype": dtype,
            "batch": case.batch,
            "steps": case.steps,
            "device": case.device,
            "threads": torch.get_num_threads(),
            "clock": clock,
        }
        (self.folder / REQUEST).write_bytes(pickle.dumps(request))
        with (self.folder / LOG).open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ddpm_fast.benchmarking.worker", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment() | {"OMP_NUM_THREADS": str(request["threads"])},
                text=True,
                start_new_session=True,  # a group that `end` ends as a whole, compilers that it started included
            )
        try:
            self.noise = self._ask("make")["noise"]
        except BaseException:
            self.end()
            raise

    def network(self, x: Tensor, i: int) -> Tensor:
        torch.save(x, self.folder / GIVEN)
        self._ask("network", i)
        return self._drawn()

    def chain(self, seed: int) -> Tensor:
        self._ask("chain", seed)
        return self._drawn()

    def turn(self) -> float:
        """Milliseconds of one trajectory by the worker's clock; it is idle again when they are told."""
        return self._ask("turn")["ms"]

    def end(self) -> None:
        """No process is left. It may be called again."""
        if self.process.poll() is None:
            self._kill()
            self.process.wait()
        for pipe in self._pipes():
            with contextlib.suppress(OSError):  # of a request that it can no longer take
                pipe.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *raised: object) -> None:
        self.end()

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        """Of requests and of answers."""
        assert self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def _ask(self, name: str, *arguments: int) -> dict[str, Any]:
        requests, answers = self._pipes()
        with contextlib.suppress(OSError):  # it has ended; why is told below
            requests.write(json.dumps([name, *arguments]) + "\n")
            requests.flush()
        with self._in_time():
            line = answers.readline()
        if self._expired:
            raise BudgetSpent(self)
        if not line.endswith("\n"):
            raise WorkerError(self._ending(), self)
        answer = json.loads(line)
        if "failed" in answer:
            raise WorkerError(answer["failed"], self)
        return answer

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """End the process where it does not answer in time; who waits for it then finds its answers at their end."""
        if self.until == math.inf:
            yield
            return
        timer = threading.Timer(max(0.0, self.until - time.monotonic()), self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self) -> None:
        self._expired = True
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def _drawn(self) -> Tensor:
        return torch.load(self.folder / DRAWN, weights_only=True)

    def _ending(self) -> str:
        try:
            code = self.process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            return "its process answers no more"
        how = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
        said = (self.folder / LOG).read_text(errors="replace").split("\n")
        return ": ".join([f"its process ended with {how}", *[line for line in said if line.strip()][-1:]])


def environment() -> dict[str, str]:
    """Of a process that is to find this package, wherever it lies."""
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}


# --- in the worker ---


class _Made:
    """What answers requests, by their names."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sampling: Sampling
        self.clock: HostClock

    def make(self) -> dict[str, Any]:
        request = pickle.loads((self.folder / REQUEST).read_bytes())
        torch.set_num_threads(request["threads"])
        self.clock = HostClock(CLOCKS[request["clock"]])
        model, schedule = torch.load(self.folder.parent / WEIGHTS, weights_only=False)
        case = Case(model, schedule, request["batch"], request["steps"], request["device"])
        self.sampling = request["provider"].make(case, DTYPES[request["dtype"]])
        return {"noise": self.sampling.noise}

    def network(self, i: int) -> dict[str, Any]:
        given = torch.load(self.folder / GIVEN, weights_only=True)
        torch.save(self.sampling.network(given, i), self.folder / DRAWN)
        return {}

    def chain(self, seed: int) -> dict[str, Any]:
        torch.save(self.sampling.chain(seed), self.folder / DRAWN)
        return {}

    def turn(self) -> dict[str, Any]:
        ms = self.clock(lambda: self.sampling.chain(0))
        rest()
        return {"ms": ms}


def rest(now: Callable[[], float] = time.process_time, pause: Callable[[float], None] = time.sleep) -> None:
    """Until this process leaves the processor to the next one.

    Threads of a loop that has ended wait for another one with a core in their hands: some ms in GNU's OpenMP, tens in
    ONNX Runtime, 200 in LLVM's and Intel's OpenMP.
    """
    for _ in range(WINDOWS):
        began = now()
        pause(WINDOW_S)
        if now() - began < WINDOW_S / 10:
            break


def _requests() -> Callable[[], str]:
    """Lines of standard input, one a call. Its end is the parent's, however that came: then so is this process's."""
    lines = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    found: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            found.put(line)
        os._exit(1)  # whatever it is computing

    threading.Thread(target=read, daemon=True).start()
    return found.get


def serve(folder: Path) -> None:
    """Answers requests until there is nobody to ask."""
    answers = os.fdopen(os.dup(1), "w")  # duplicates are not inherited by what this process starts
    os.dup2(2, 1)
    take, made = _requests(), _Made(folder)
    while True:
        name, *arguments = json.loads(take())
        try:
            answer = getattr(made, name)(*arguments)
        except Exception as error:  # other people's software fails in its own ways
            answer = {"failed": str(error) or type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
