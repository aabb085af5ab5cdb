"""Kernels compiled for GPUs that are not here: no spills, the right matrix units, whole vectors. And their reader.

A small selection, in processes without Triton's interpreter; `make kernels` compiles everything.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sass
from benchmarks.compile_kernels import ARCHITECTURES

ROOT = Path(__file__).parent.parent

try:
    sass.binaries()
except (ImportError, FileNotFoundError) as e:
    pytest.skip(f"KERNELS NOT COMPILED HERE: {e}", allow_module_level=True)


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """Rows of `python -m benchmarks.compile_kernels --quick --json`; its exit code says whether any kernel spills."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.compile_kernels",
        "--quick",
        "--json",
        "--model",
        "cifar10",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads(done.stdout)
    assert done.returncode == any(r["binary"]["spills"] for r in rows)
    return rows


@pytest.fixture(scope="module")
def convolutions() -> list[dict[str, Any]]:
    return compiled("--batch", "256", "--kernel", "conv", "--arch", "90", "--arch", "100")


@pytest.fixture(scope="module")
def elementwise() -> list[dict[str, Any]]:
    archs = [part for arch in ARCHITECTURES for part in ("--arch", str(arch))]
    names = [part for name in ("norm", "sampler", "noise") for part in ("--kernel", name)]
    return compiled("--batch", "256", *names, "--kinds", "3", *archs)


@pytest.fixture(scope="module")
def older() -> list[dict[str, Any]]:
    """One convolution each for the architectures without warpgroup or tensor-memory products."""
    return compiled("--batch", "256", "--kernel", "conv_kernel", "--kinds", "1", "--arch", "80", "--arch", "120")


@pytest.fixture(scope="module")
def attentions() -> list[dict[str, Any]]:
    return compiled("--batch", "256", "--kernel", "attention", "--arch", "80", "--arch", "90", "--arch", "120")


def spilling(rows: list[dict[str, Any]]) -> list[str]:
    return [f"sm_{r['arch']} {r['kernel']} {r['specialization']}" for r in rows if r["binary"]["spills"]]


def test_convolutions_do_not_spill(convolutions: list[dict[str, Any]], older: list[dict[str, Any]]):
    assert {r["arch"] for r in convolutions} == {90, 100} and {r["arch"] for r in older} == {80, 120}
    assert len(convolutions) > 2 * 6, "3x3, stride 2, shortcut, 1x1, upsampling, narrow, and the fused last step"
    assert spilling(convolutions + older) == []


def test_elementwise_kernels_do_not_spill(elementwise: list[dict[str, Any]]):
    assert {r["arch"] for r in elementwise} == set(ARCHITECTURES)
    assert len(elementwise) >= 5 * len(ARCHITECTURES)
    assert spilling(elementwise) == []


def test_attention_does_not_spill_and_fits_the_smallest_shared_memory(attentions: list[dict[str, Any]]):
    assert {r["arch"] for r in attentions} == {80, 90, 120} and len(attentions) == 6, "at 16x16 and at 4x4 pixels"
    assert spilling(attentions) == []
    assert all(r["blocks"] >= 1 for r in attentions)
    for r in attentions:
        wide = "256 pixels" in r["specialization"]
        assert set(r["binary"]["matrix"]) == {"HGMMA" if wide and r["arch"] == 90 else "HMMA"}, r
        assert set(r["binary"]["stores"]) == {"16"}, r


def narrow(row: dict[str, Any]) -> bool:
    """Three output channels: bound by reading the image, and smaller than a warpgroup's product."""
    return ">3 " in row["specialization"]


def test_convolutions_use_the_matrix_units_of_their_time(
    convolutions: list[dict[str, Any]], older: list[dict[str, Any]]
):
    wide = [r for r in convolutions if not narrow(r)]
    assert len(wide) >= 2 * 5
    for r in wide:
        assert set(r["binary"]["matrix"]) == {"HGMMA" if r["arch"] == 90 else "tcgen05"}, r
    for r in [*older, *(r for r in convolutions if narrow(r))]:
        assert sum(r["binary"]["matrix"].values()) > 0, r


def test_convolutions_load_by_bulk_tensor_copies(convolutions: list[dict[str, Any]]):
    for r in convolutions:
        assert r["binary"]["bulk_loads"] > 0, r


def test_a_convolution_without_bulk_copies_loads_16_bytes(older: list[dict[str, Any]]):
    (r,) = (r for r in older if r["arch"] == 80)
    assert r["binary"]["bulk_loads"] == 0
    assert set(r["binary"]["async_copies"]) == {"16"}, r


def test_norm_act_moves_16_bytes_a_thread(elementwise: list[dict[str, Any]]):
    rows = [r for r in elementwise if r["kernel"].startswith("norm_")]
    assert rows
    for r in rows:
        loads, stores = r["binary"]["loads"], r["binary"]["stores"]
        assert set(stores) == {"16"}, r
        assert loads.get("16", 0) >= 4, r


def test_sampler_step_moves_16_bytes_a_thread(elementwise: list[dict[str, Any]]):
    """x_t, x_{t-1} and the padded copy; the network's output has three channels, 6 bytes a pixel."""
    rows = [r for r in elementwise if r["kernel"].startswith("sampler_step")]
    assert len(rows) >= len(ARCHITECTURES)
    for r in rows:
        assert r["binary"]["loads"].get("16", 0) >= 1, r
        assert r["binary"]["stores"].get("16", 0) >= 2, r


def test_every_kernel_can_be_resident(convolutions: list[dict[str, Any]], elementwise: list[dict[str, Any]]):
    for r in convolutions + elementwise:
        assert r["blocks"] >= 1, r
        assert r["binary"]["registers"] <= 255
    assert all(r["occupancy"] >= 0.25 for r in elementwise)


ROWS = """
import json, torch
from benchmarks import aot, sass
from ddpm_fast import ops
from ddpm_fast.ops.buffers import Fresh

class InTwo(Fresh):
    def parts(self, shape):
        return 2

def empty(*shape, dtype=torch.float32):
    layout = torch.channels_last if len(shape) == 4 and dtype == torch.bfloat16 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)

def lower(kernel, values):
    return values.get("HW") == 17 * 32 or (values.get("H"), values.get("TOP")) == (17, 0)

with torch.no_grad(), aot.compiling(90, lower) as found:
    o = ops.triton().placed(InTwo())
    image = o.enter(empty(1, 384, 32, 32, dtype=torch.bfloat16))
    x = o.conv(image, empty(384, 384, 1, 1, dtype=torch.bfloat16), with_stats=True)
    h = o.norm_act(x, empty(384), empty(384), 32, 1e-6)
    o.conv(h, empty(128, 384, 3, 3, dtype=torch.bfloat16), time=empty(1, 128), with_stats=True)
kernels = {c.kernel: sass.read(c.binary.asm["cubin"], c.binary.asm["ptx"], 90) for c in found}
print(json.dumps({name: [b.spills, b.matrix, b.bulk_loads] for name, b in kernels.items()}))
"""


def test_rows_of_one_image_compile_as_whole_images_do(tmp_path: Path):
    """The lower half of 32 rows, and the one above it: 17 by 32 pixels. Bulk copies, wgmma, no spills."""
    script = tmp_path / "rows.py"
    script.write_text(ROWS)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert kernels.keys() == {"conv_kernel", "_norm_apply_kernel"}
    assert {name: spills for name, (spills, _, _) in kernels.items() if spills} == {}
    _, matrix, bulk_loads = kernels["conv_kernel"]
    assert matrix.keys() == {"HGMMA"} and bulk_loads > 0


# --- the reader itself, on what is known ---


def test_occupancy_by_hand():
    # 128 registers x 32 threads = 4096 a warp: 4 warps a scheduler, 16 a multiprocessor, 4 blocks of 4 warps.
    assert sass.blocks_per_multiprocessor(90, registers=128, shared=0, warps=4) == 4
    # 227 KB of 228 fit once (1 KB of each block is the system's); 100 KB twice.
    assert sass.blocks_per_multiprocessor(90, registers=32, shared=227 * 1024, warps=4) == 1
    assert sass.blocks_per_multiprocessor(90, registers=32, shared=100 * 1024, warps=4) == 2
    assert sass.blocks_per_multiprocessor(86, registers=32, shared=100 * 1024, warps=4) == 0
    # Slots: 64 warps, or 48 on sm_86; at most 16 blocks there.
    assert sass.blocks_per_multiprocessor(90, registers=32, shared=0, warps=8) == 8
    assert sass.blocks_per_multiprocessor(86, registers=16, shared=0, warps=1) == 16
    # 256 of 512 columns of tensor memory: two blocks.
    assert sass.blocks_per_multiprocessor(100, registers=32, shared=0, warps=4, tensor_columns=256) == 2


SPILLING = """
import triton, triton.language as tl
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from benchmarks import sass

@triton.jit
def sums(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(x + N + i)
    c = tl.cumsum(a, 0) * b
    tl.store(y + i, tl.cumsum(c, 0) + a)

def build(n, warps, **options):
    kinds = {"x": "*fp32", "y": "*fp32", "N": "constexpr"}
    attrs = {(i,): [["tt.divisibility", 16]] for i in (0, 1)}
    k = triton.compile(ASTSource(sums, kinds, {"N": n}, attrs), target=GPUTarget("cuda", 90, 32),
                       options={"num_warps": warps, "enable_fp_fusion": True, **options})
    return sass.read(k.asm["cubin"], k.asm["ptx"], 90)

calm, crowded = build(512, 4), build(8192, 1)
print(calm.spills, crowded.spills, calm.loads, calm.stores, calm.matrix, calm.bulk_loads)
"""


def test_the_reader_sees_spills_where_there_are_some(tmp_path: Path):
    """8192 values in one warp are 256 a thread, several times over: they cannot stay in 255 registers."""
    script = tmp_path / "spilling.py"
    script.write_text(SPILLING)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calm, crowded, rest = done.stdout.split(maxsplit=2)
    assert int(calm) == 0 and int(crowded) > 0
    # Two loads and one store of 512 values by 128 threads: 16 bytes each.
    assert rest.strip() == "{16: 2} {16: 1} {} 0"


def test_an_interpreting_process_says_why_it_cannot_compile():
    done = subprocess.run(
        [sys.executable, "-c", "from benchmarks.aot import compiling\nwith compiling(90): pass"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "unset TRITON_INTERPRET" in done.stderr
