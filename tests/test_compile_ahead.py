"""Kernels compiled before the first batch, many at a time: all that a batch launches, and nothing launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_engine import ONE_LEVEL, network
from test_ops import launches

from ddpm_fast import ops
from ddpm_fast.engine import StepProgram
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.kernels import launch
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent

COMPILE = """
import json, torch
from unittest import mock
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from benchmarks import aot
from ddpm_fast.kernels import attention, launch, norm_act

def run():
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.empty(2, 48, 4, 4, dtype=dtype, device="meta", memory_format=torch.channels_last)
        norm_act.norm_act(x, None, None, 4, 1e-6)
        attention.attention(x, 1)
    norm_act.norm_act(x, None, None, 4, 1e-6)  # again: one compilation serves both

threads, compiled = set(), []
compile_one = JITFunction._do_compile
def noted(self, *args):
    compiled.append(self.__name__)
    return compile_one(self, *args)

with aot._devices(80), mock.patch.object(JITFunction, "_do_compile", noted):
    driver.set_active(aot._NoDevice(80))
    launch.compile_ahead(run, jobs=2)
    first = sorted(set(compiled)), len(compiled)
    compiled.clear()
    with aot.compiling(80) as found:
        run()
print(json.dumps([first, len(found), compiled]))
"""


def test_what_was_compiled_ahead_is_not_compiled_again():
    """No driver is there to launch anything: a launch would raise."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (names, asked), found, again = json.loads(done.stdout)
    assert names == ["_attention_kernel", "_norm_tile_kernel"] and asked >= 4
    assert found == 4 and again == []


def program(which: ops.Ops) -> StepProgram:
    prepared = prepare(network(**ONE_LEVEL), torch.float32, torch.device("cpu"), which)
    return StepProgram(prepared, step_table(Schedule(), 3), 2, (3, 8, 8))


def test_a_batch_launches_what_was_compiled_and_nothing_else(interpreted):
    p = program(ops.triton())
    with launches() as ahead:
        p._launch_all()
    with launches() as launched:
        p.begin(seed=1)
        p.step()
    assert ahead == launched and len(launched) > 10


def test_it_comes_once_and_before_the_first_launch(interpreted):
    log: list[str] = []
    fused = ops.triton()
    assert fused.initial_noise is not None

    def noise(*args):
        log.append("noise")
        return fused.initial_noise(*args)

    p = program(replace(fused, initial_noise=noise, compile_ahead=lambda run: log.append("compile")))
    with mock.patch.object(p, "device", torch.device("cuda")):
        p.begin(seed=1)
        p.begin(seed=2)
    assert log == ["compile", "noise", "noise"]


def test_the_interpreter_compiles_nothing(interpreted):
    assert launch.compile_ahead(lambda: pytest.fail("it ran")) is None
