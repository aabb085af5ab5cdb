"""What a speed is reported with: device, clocks, threads, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..ops.cpu_set import normalises_by

PACKAGES = ("triton", "diffusers", "openvino", "onnxruntime", "numpy")
_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def environment(device: torch.device, command: Sequence[str] | None = None) -> dict[str, Any]:
    """JSON-ready facts about this machine and moment. What cannot be read is None."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": load_average(),
        "clocks": clocks(device),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "commit": commit(),
        "command": " ".join(sys.orig_argv if command is None else command),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cpu":  # what the set cpu has here, in every precision that it compiles for
        facts["cpu_normalises_by"] = normalises_by(torch.float32)
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= {"capability": f"sm_{p.major}{p.minor}", "cuda": torch.version.cuda}
    return facts


def load_average() -> float | None:
    """Processes that wanted a core over the last minute: above the number of cores, times are of a busy machine."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", _read(_CPUINFO), re.MULTILINE)
    name = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def clocks(device: torch.device) -> dict[str, Any]:
    """The processor's MHz now, and of a GPU its clocks and power limit by NVML, where there is one."""
    mhz = [float(m) for m in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read(_CPUINFO), re.MULTILINE)]
    facts: dict[str, Any] = {"cpu_mhz": [min(mhz), max(mhz)] if mhz else None}
    return facts | (_nvml(device) if device.type == "cuda" else {})


def _nvml(device: torch.device) -> dict[str, Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = "GPU-" + str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception as error:  # no library, no driver, no permission: each has its own class
        return {"nvml": str(error) or type(error).__name__}
    reads = {
        "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "most_sm_mhz": lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "power_limit_w": lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "temperature_c": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "driver": lambda: pynvml.nvmlSystemGetDriverVersion(),
    }
    facts: dict[str, Any] = {}
    for name, read in reads.items():
        try:
            facts[name] = read()
        except pynvml.NVMLError:
            facts[name] = None
    return facts


def versions() -> dict[str, str | None]:
    """Of what takes part; None for what is not installed. Of torch the build too, which its package does not tell."""
    found: dict[str, str | None] = {"ddpm-fast": __version__, "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """Of the repository that this package is run from, with "+changes" where files differ; None elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except OSError:  # no git
        return None


def cache_bytes(device: torch.device) -> int:
    """The largest cache of the device, in bytes: the L2 of a GPU, the last level of a processor."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [re.fullmatch(r"(\d+)([KM])", _read(p).strip()) for p in _CACHES.glob("index*/size")]
    unit = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s.group(1)) * unit[s.group(2)] for s in sizes if s), default=32 << 20)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
