"""What a provider needs before its first image, and the memory it takes, each in a process of its own.

In one process with others, imports, compiled code and freed memory of one would be counted to another. The caches of
compiled code lie in an empty folder the first time; a second process finds them filled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import load
from .providers import DTYPES, Case, Provider, chosen
from .worker import environment

STEPS = 2  # of the chain that is drawn: the first step with all that it brings, and one more to subtract
TIME_LIMIT_S = 1800.0
# Where torch, Triton and we keep compiled code.
CACHES = {"XDG_CACHE_HOME": "cache", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def startup(
    provider: Provider,
    dtype: str,
    model: Path,
    batch: int,
    device: torch.device,
    time_limit_s: float = TIME_LIMIT_S,
) -> dict[str, Any]:
    """Seconds and MiB, JSON-ready. ``model``: the folder of the model and its schedule.

    ``load_s``: the weights, from disk. ``first_step_s``: from there to the end of the first step, imports of other
    software included. ``peak_mib``: of the process, or of a GPU's memory. ``cached_first_step_s``: of a second
    process, where the first left compiled code. ``failed``: why, where a process ended without an answer.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-fast-bench-") as folder:
        request = {
            "folder": str(model),
            "provider": provider.name,
            "dtype": dtype,
            "batch": batch,
            "device": str(device),
            "threads": torch.get_num_threads(),
        }
        fresh = _without_caches(Path(folder))
        until = time.monotonic() + time_limit_s
        first = _ask(request, fresh, time_limit_s)
        if provider.compiles and "failed" not in first:
            again = _ask(request, fresh, max(1.0, until - time.monotonic()))
            first["cached_first_step_s"] = again.get("first_step_s")
    return first


def _without_caches(folder: Path) -> dict[str, str]:
    # The Hub's cache lies below XDG_CACHE_HOME unless it is named.
    hub = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "huggingface"
    return {"HF_HOME": str(hub)} | environment() | {name: str(folder / below) for name, below in CACHES.items()}


def _ask(request: dict[str, Any], variables: dict[str, str], time_limit_s: float) -> dict[str, Any]:
    words = [sys.executable, "-m", "ddpm_fast.benchmarking.startup", json.dumps(request)]
    threads = {"OMP_NUM_THREADS": str(request["threads"])}
    try:
        done = subprocess.run(
            words, env=variables | threads, capture_output=True, text=True, timeout=time_limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no first step within {time_limit_s:.4g} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failed": reason}
    return json.loads(lines[-1])


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """What `startup` asks a fresh process."""
    torch.set_num_threads(request["threads"])
    device = torch.device(request["device"])
    (provider,) = chosen([request["provider"]])
    if device.type == "cuda":
        torch.cuda.init()
    began = time.perf_counter()
    checkpoint = load(request["folder"])
    loaded = time.perf_counter()
    case = Case(checkpoint.model, checkpoint.schedule, request["batch"], STEPS, device)
    sampling = provider.make(case, DTYPES[request["dtype"]])
    drawn = time.perf_counter()
    sampling.chain(0).cpu()
    first = time.perf_counter()
    sampling.chain(0).cpu()
    step_s = (time.perf_counter() - first) / STEPS
    return {
        "load_s": loaded - began,
        "prepare_s": drawn - loaded,
        "first_step_s": max(first - loaded - (STEPS - 1) * step_s, 0.0),
        "peak_mib": peak_mib(device),
        "threads": request["threads"],
    }


def peak_mib(device: torch.device) -> float | None:
    """The most memory that this process held: of the GPU by torch's allocator, else resident. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10  # KiB
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:
        return None
    # Not on Linux, where it begins with what the process that started this one held.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
