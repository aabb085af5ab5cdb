"""Kernels of a step as a profiler lists them, laid over the plan; and the cache that `benchmarks.warm` fills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("benchmarks.kernel_times", reason="benchmarks/ is not part of the installed package")

from benchmarks import kernel_times
from ddpm_fast.config import UNetConfig
from ddpm_fast.ops.records import Record
from ddpm_fast.planning import records
from ddpm_fast.roofline import Roofs
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table

ROOT = Path(__file__).parent.parent
SMALL = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 32,
}


def event(name: str, start: float, end: float, device: str = "DeviceType.CUDA") -> Any:
    return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end))


def test_events_become_the_kernels_of_one_step() -> None:
    """Three steps, listed in no order: medians, and the gap since the kernel before; copies and host calls are none."""
    events = [event("cudaLaunchKernel", 0, 500, "DeviceType.CPU"), event("Memset (Device)", 1, 2)]
    for at, a, b in ((0, 10, 4), (1000, 12, 6), (2000, 50, 5)):
        events += [event("norm", at + a + 3, at + a + 3 + b), event("conv", at, at + a)]
    found = kernel_times.of_events(events, 3)
    assert [(k.name, k.us, k.gap_us) for k in found] == [("conv", 12, 0), ("norm", 5, 3)]
    with pytest.raises(RuntimeError, match="3 equal steps ran 5 kernels"):
        kernel_times.of_events(events[:-1], 3)
    with pytest.raises(RuntimeError, match="not the same in each"):
        kernel_times.of_events([event("a", 0, 1), event("b", 2, 3)], 2)


def plan() -> list[Record]:
    return records(UNetConfig(**SMALL), step_table(Schedule()), 2, torch.bfloat16)


OURS = {"ours"}


def one(name: str, us: float = 1.0) -> Any:
    return kernel_times.Kernel(name, us, 0.0)


def test_kernels_are_laid_over_the_plan() -> None:
    """Attention by two kernels of torch's or by one of ours, and a stray kernel of torch's before a convolution."""
    planned = plan()
    names = [r.operation for r in planned]
    assert names.count("attention") == 4 and planned[-1].operation == "conv_step"
    ran, by_torch = [one("stray", 7.0)], 0
    for i, r in enumerate(planned):
        if r.operation == "attention" and by_torch < 2:
            ran, by_torch = [*ran, one("flash", 10.0), one("combine", 5.0)], by_torch + 1
        else:
            ran += [one("ours", float(i))] * r.cost.launches
    laid = kernel_times.by_launch(planned, ran, OURS)
    assert laid is not None
    launches, beside = laid
    assert [k.name for k in beside] == ["stray"]
    assert [launch.record for launch in launches] == planned
    for i, launch in enumerate(launches):
        first = launch.record.operation == "attention" and launch.kernels[0].name == "flash"
        assert launch.us == (15.0 if first else i * launch.record.cost.launches)
    assert kernel_times.by_launch(planned, ran[:-1], OURS) is None  # one too few
    assert kernel_times.by_launch(planned, [*ran, one("ours")], OURS) is None  # one too many


def test_rows_are_sums_against_the_roofs() -> None:
    planned = plan()
    launches = [kernel_times.Launch(r, (one("ours", 100.0),)) for r in planned]
    roofs = Roofs("made up", "bfloat16", None, "2", 1e9, 1e12, 2e12)
    rows = kernel_times.facts(launches, roofs)
    assert sum(r["count"] for r in rows) == len(planned)
    assert sum(r["us"] for r in rows) == 100.0 * len(planned)
    assert sum(r["flops"] for r in rows) == sum(r.cost.flops for r in planned)
    for r in rows:
        peak = 2e12 if "conv" in r["operation"] else 1e12
        by_compute, by_memory = 1e6 * r["flops"] / peak, 1e6 * r["bytes"] / 1e9
        assert r["roof_us"] == pytest.approx(max(by_compute, by_memory))
        assert r["bound"] == ("compute" if by_compute > by_memory else "memory")
        assert r["gap_us"] == pytest.approx(r["us"] - r["roof_us"])
    assert [r["gap_us"] for r in rows] == sorted((r["gap_us"] for r in rows), reverse=True)


# What the compiler is asked for, by walking shapes and by walking tensors that are there. Nothing is compiled.
KEYS = """
import json, sys
from types import SimpleNamespace
from unittest import mock
import torch, triton
from benchmarks import aot, warm
from ddpm_fast.config import UNetConfig
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import UNet

asked = set()
def compile(src, target=None, options=None):
    asked.add(f"{src.fn.__name__} {src.hash()} {target} {sorted(map(str, options.items()))}")
    return SimpleNamespace(metadata=SimpleNamespace(num_warps=4, num_stages=1), asm={})

found = {}
for name in ("meta", "cpu"):
    asked.clear()
    device = torch.device(name)
    with device:
        model = UNet(UNetConfig(**json.loads(sys.argv[1]))).eval()
    with mock.patch("triton.compiler.compiler.compile", compile), mock.patch("triton.compiler.compile", compile):
        with aot.compiling(90):
            warm.launch_step(model, Schedule(), torch.bfloat16, 3, device)
    for f in [f for m in list(sys.modules.values()) if getattr(m, "__name__", "").startswith("ddpm_fast.kernels.")
              for f in vars(m).values() if hasattr(f, "device_caches")]:
        f.device_caches.clear()
    found[name] = sorted(asked)
print(json.dumps(found))
"""


def test_shapes_alone_ask_for_the_kernels_that_tensors_need() -> None:
    """The keys under which `benchmarks.warm` leaves a kernel are those under which a launch looks for it."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", KEYS, json.dumps(SMALL)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["meta"]) > 15 and {key.split()[0] for key in found["meta"]} >= {"conv_kernel", "conv_step_kernel"}
    assert found["cpu"] == found["meta"]
