"""Triton's interpreter where there is no GPU, a ``device`` fixture, and the marker ``gpu``."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

# The suite is many tiny problems in several workers: threads beyond the cores only wait for each other.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_threads = max(1, min(4, torch.get_num_threads(), (os.cpu_count() or 1) // _workers))
torch.set_num_threads(_threads)
os.environ["OMP_NUM_THREADS"] = str(_threads)  # of the processes that tests start
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def _round_bfloat16_to_nearest() -> None:
    """Triton 3.7's interpreter truncates float32 to bfloat16, where every GPU rounds to nearest even."""
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    convert = interpreter._convert_float

    def convert_float(data, from_type, to_type, rounding):  # numpy in, numpy out; bfloat16 travels as uint16
        if (from_type, to_type) == (tl.float32, tl.bfloat16):
            return torch.tensor(data.astype("float32")).bfloat16().view(torch.uint16).numpy()
        return convert(data, from_type, to_type, rounding)

    interpreter._convert_float = convert_float


if not HAS_GPU:
    _round_bfloat16_to_nearest()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; skipped, with a line in the summary, without one")
    # The sigmoid's exp(-y) may overflow to infinity, as on a GPU; numpy, behind the interpreter, says so.
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered in exp:RuntimeWarning")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", ()) if "gpu" in r.keywords]
    if skipped:
        terminalreporter.write_line(
            f"NOT PROVEN HERE: {len(skipped)} gpu tests skipped, torch finds no CUDA GPU; run `make gpu` on one",
            yellow=True,
            bold=True,
        )


# Without a GPU each test of a kernel runs in the interpreter, and is listed once more as a skipped gpu test.
_DEVICES = ["cuda"] if HAS_GPU else ["cpu", "cuda"]


@pytest.fixture(
    scope="session", params=[pytest.param(d, marks=pytest.mark.gpu) if d == "cuda" else d for d in _DEVICES]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: the GPU, or the CPU in Triton's interpreter."""
    return torch.device(request.param)
