"""Compile what `benchmarks.engine` launches, by every core at once, so that nothing on the GPU waits for a compiler.

    python -m benchmarks.warm                                  # for this machine's GPU
    python -m benchmarks.warm --arch 90 --batch 64 --jobs 2    # for one that is not here

Kernels land in Triton's own cache, under the keys that the launches themselves will look for (a test holds that).
The steps are walked on the ``meta`` device: no GPU memory is touched.
"""

from __future__ import annotations

import os
import sys

if __name__ in ("__main__", "__mp_main__"):
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported; the interpreter compiles nothing

import argparse
import multiprocessing
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import aot
from ddpm_fast import ops
from ddpm_fast.config import UNetConfig
from ddpm_fast.engine import StepProgram
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.ops.buffers import Arena
from ddpm_fast.presets import PRESETS
from ddpm_fast.sampler import DTYPES
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table
from ddpm_fast.unet import UNet

CHECKED = (1, 2)  # batches in which `verification` runs the network
STEPS = 2  # of the chain; no kernel depends on it

Work = tuple[str, str, int]  # preset, dtype, batch


def launch_all(preset: str, dtype: torch.dtype, batch: int, device: torch.device | str = "meta") -> None:
    """What drawing a batch launches, once: x_T, a step as the engine runs it, and the network by itself."""
    p = PRESETS[preset]
    device = torch.device(device)
    with device:
        model = UNet(UNetConfig(**{**p.model, "sample_size": p.image_size, "dropout": 0.0})).eval()
    launch_step(model, Schedule(**p.schedule), dtype, batch, device)


def launch_step(model: UNet, schedule: Schedule, dtype: torch.dtype, batch: int, device: torch.device) -> None:
    """`launch_all` of a network that is there, on ``device``."""
    size, fused = model.config.image_size, ops.triton()
    assert size is not None
    prepared = prepare(model, dtype, device, fused)
    program = StepProgram(prepared, step_table(schedule, STEPS), batch, (model.config.in_channels, *size))
    if device.type == "meta" and program.plan is not None and fused.placed is not None:
        # Shapes alone need no arena, but here the launches count, and the plan cuts some of them into parts.
        program._arena = Arena(program.plan, device)
        program._network_ops = fused.placed(program._arena)
    program.begin(0)
    program.step()
    with torch.inference_mode():
        low = program.x.to(dtype) if program.low is None else program.low
        prepared.run(low, program.time.now(fused), fused)


def compile_share(arch: int, work: Sequence[Work], jobs: int, rank: int) -> int:
    """Compile every ``jobs``-th of the kernels that ``work`` launches, from number ``rank`` on; how many."""
    torch.set_num_threads(1)
    numbers: dict[Any, int] = {}

    def select(kernel: str, constexprs: dict[str, Any]) -> bool:
        key = (kernel, tuple(sorted((k, str(v)) for k, v in constexprs.items())))
        return numbers.setdefault(key, len(numbers)) % jobs == rank

    with aot.compiling(arch, select, build_launcher) as found:
        for preset, dtype, batch in work:
            launch_all(preset, DTYPES[dtype], batch)
    return len(found)


def build_launcher(compiled: aot.Compiled) -> None:
    """The C function that launches it, where Triton (before 3.7) compiles one and there is a driver to link with."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher") and torch.cuda.is_available():
        driver.CudaLauncher(compiled.binary.src, compiled.binary.metadata)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset-model", choices=tuple(PRESETS), default="cifar10")
    parser.add_argument("--batch", type=int, action="append", help="repeat for more; default: 1, 16, 64, 256")
    parser.add_argument("--dtype", choices=tuple(DTYPES), action="append", help="repeat for more; default: bfloat16")
    parser.add_argument("--arch", type=int, help="90 for sm_90; default: this machine's GPU")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if args.jobs < 1 or min(args.batch or [1]) < 1:
        parser.error("--batch and --jobs must be at least 1")
    if args.arch is None and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here: name an architecture, as in --arch 90")
    arch = args.arch or 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    batches = sorted({*CHECKED, *(args.batch or (1, 16, 64, 256))})
    work = [(args.preset_model, d, b) for d in args.dtype or ("bfloat16",) for b in batches]
    began = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        counts = pool.map(partial(compile_share, arch, work, args.jobs), range(args.jobs), chunksize=1)
    seconds = time.perf_counter() - began
    print(f"{sum(counts)} kernels for sm_{arch} are in Triton's cache, after {seconds:.0f} s on {args.jobs} processes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
