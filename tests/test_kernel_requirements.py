"""Where the fused kernels cannot run, they import all the same and say in one line what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CALL = """
import torch
from ddpm_fast.kernels import norm_act
x = torch.ones(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
try:
    norm_act.norm_act(x, None, None, 2, 1e-5)
except RuntimeError as e:
    print(e)
"""
PREPARE = {
    "no Triton": ("import sys; sys.modules['triton'] = None", "need Triton, which is not installed"),
    "no GPU": ("", "need CUDA tensors; got cpu"),
}


@pytest.mark.parametrize("missing", PREPARE)
def test_one_clear_error(missing):
    prepare, message = PREPARE[missing]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", prepare + CALL],
        env=env,
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert message in done.stdout
    assert 'ops="reference"' in done.stdout and len(done.stdout.strip().splitlines()) == 1
