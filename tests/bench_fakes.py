"""Providers for tests of `ddpm-fast bench`, which its workers import by this name: right ones, and each with one fault.

Each says in the folder $BENCH_FAKES who it is.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ddpm_fast
from ddpm_fast import ops
from ddpm_fast.benchmarking import ours
from ddpm_fast.benchmarking.providers import Case, Provider
from ddpm_fast.kernels import host_memory


class Crooked:
    """The reference with one thing wrong."""

    noise = "philox"

    def __init__(self, of: Case, wrong: str):
        self.right, self.wrong = ours.make(of, torch.float32, "reference"), wrong

    def network(self, x: Tensor, i: int) -> Tensor:
        out = self.right.network(x, i + 1 if self.wrong == "timestep" else i).clone()
        if self.wrong == "nan":
            out[-1, 0, 0, 0] = float("nan")
        return out * 1.0001 if self.wrong == "scale" else out

    def chain(self, seed: int) -> Tensor:
        x = self.right.chain(seed + 1 if self.wrong == "noise" else seed).clone()
        if self.wrong == "overflow":
            x[0, 0, 0, 0] = float("nan")
        return x.flip(0) if self.wrong == "order" else x


class Odd(Crooked):
    """Right, after something else that it does before each trajectory but the first, which is the check's."""

    def __init__(self, of: Case, before, first=None):
        super().__init__(of, "")
        self.before, self.first, self.drawn = before, first, None

    def chain(self, seed: int) -> Tensor:
        if self.drawn is None:
            self.drawn = super().chain(seed)
        else:
            self.before()
        return self.drawn


def make(of: Case, dtype: torch.dtype, name: str, **kwargs) -> Crooked:
    (Path(os.environ["BENCH_FAKES"]) / name).write_text(str(os.getpid()))
    return MAKERS[name](of, **kwargs)


def fake(name: str, title: str | None = None, is_ours: bool = False, **kwargs) -> Provider:
    """The provider that makes ``MAKERS[name]``, with its arguments."""
    return Provider(title or name, partial(make, name=name, **kwargs), ours=is_ours)


def fails(of: Case) -> Crooked:
    raise KeyError("missing key")


def sleeps(of: Case, ms: float = 0.0) -> Crooked:
    """``ms`` a step."""
    return Odd(of, partial(time.sleep, ms * of.steps / 1e3))


def busy(of: Case, ms: float) -> Crooked:
    """``ms`` of this process's own time a trajectory, and a sleep that is not in it."""

    def work() -> None:
        began = time.process_time()
        while time.process_time() - began < ms / 1e3:
            pass
        time.sleep(0.05)

    return Odd(of, work)


def hangs(of: Case) -> Crooked:
    """Is never made."""
    time.sleep(1000)
    raise AssertionError


def stalls(of: Case) -> Crooked:
    """Right, and checked; its turns never end."""
    return Odd(of, partial(time.sleep, 1000))


def noisy(of: Case) -> Crooked:
    """Prints in every way there is, what looks like an answer too."""

    def shout() -> None:
        print('{"ms": 0.25}', flush=True)
        os.write(1, b'{"ms": 0.25}\n' + b"x" * 100_000)
        subprocess.run(["echo", '{"failed": "not at all"}'], check=True)

    shout()
    return Odd(of, shout)


def dies(of: Case) -> Crooked:
    """At the third trajectory: checked, and warm, and then gone."""

    left = [1]

    def count() -> None:
        if not left:
            print("the last words", flush=True)
            os._exit(7)
        left.pop()

    return Odd(of, count)


def selfish(of: Case) -> Crooked:
    """Sets for its whole process what can be set, as our operations set its malloc."""
    os.environ["BENCH_FAKES_SET"] = "selfish"
    builtins.bench_fakes_set = "selfish"  # type: ignore[attr-defined]
    torch.set_default_dtype(torch.float64)
    before = mapped()
    host_memory.keep_freed_memory()
    (Path(os.environ["BENCH_FAKES"]) / "mapped.json").write_text(json.dumps([before, mapped()]))
    return Odd(of, lambda: None)


def observer(of: Case) -> Crooked:
    """Writes down what it finds set, and which of the providers before it are still there."""
    folder = Path(os.environ["BENCH_FAKES"])
    alive = [p.name for p in folder.iterdir() if not p.suffix and p.name != "observer" and is_alive(int(p.read_text()))]
    seen = {
        "environment": os.environ.get("BENCH_FAKES_SET"),
        "interpreter": getattr(builtins, "bench_fakes_set", None),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "openmp": os.environ.get("OMP_NUM_THREADS"),
        "mapped": mapped(),
        "package": ddpm_fast.__file__,
        "alive": sorted(alive),
    }
    (folder / "seen.json").write_text(json.dumps(seen))
    return Odd(of, lambda: None)


def wrong_attention(of: Case) -> ours.Ours:
    """Our own set, with a mistake in one operation."""
    with attention_times(1.1):
        return ours.make(of, torch.float32, "cpu")


@contextmanager
def attention_times(factor: float) -> Iterator[None]:
    right = ops.cpu()

    def wrong(*args, **kwargs) -> Tensor:
        return right.attention(*args, **kwargs) * factor

    before, ops.cpu = ops.cpu, lambda: replace(right, attention=wrong)
    try:
        yield
    finally:
        ops.cpu = before


MAKERS = {
    f.__name__: f
    for f in (Crooked, fails, sleeps, busy, hangs, stalls, noisy, dies, selfish, observer, wrong_attention)
}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def mapped() -> bool | None:
    """Whether glibc's malloc maps a block of 64 MiB by itself; None without mallinfo2."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError):
        return None
    fields = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    kind = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]})
    mallinfo2.restype = kind
    before = mallinfo2().hblks
    held = torch.empty(64 << 20, dtype=torch.uint8)
    return mallinfo2().hblks > before if held.numel() else None
