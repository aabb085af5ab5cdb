"""Triton's interpreter where there is no GPU, a ``device`` fixture, and the marker ``gpu``."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch

OPTIONAL = {
    "diffusers",
    "dicebear",
    "resvg_py",
    "efficientnet_lite_pytorch",
    "hypothesis",
    "playwright",
    "torchmetrics",
}
HAS_GPU = torch.cuda.is_available()
# Beginnings of the files whose results are a processor's own floating point: they get the marker ``numeric``, and CI
# runs them once more with AVX2 alone. What Triton's interpreter computes is numpy's, and not among them.
NUMERIC = (
    *("test_batching", "test_bundled", "test_checkpoints_", "test_convert", "test_diffusion", "test_dropin"),
    *("test_engine.py", "test_nonfinite", "test_ops_", "test_prepared", "test_sampler.py", "test_schedule"),
    *("test_step_table", "test_train_step", "test_unet", "test_verify", "test_winograd"),
)
INTERPRETED = {"device", "interpreted"}  # fixtures
NOT_NUMERIC = ("interpreter", "triton]", "damaged", "command_line")  # in a test's name: interpreted, or about messages
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

# The suite is many tiny problems in several workers: threads beyond the cores only wait for each other.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_threads = max(1, min(4, torch.get_num_threads(), (os.cpu_count() or 1) // _workers))
torch.set_num_threads(_threads)
os.environ["OMP_NUM_THREADS"] = str(_threads)  # of the processes that tests start
os.environ["DDPM_FAST_STAGES"] = "0"  # which lines of progress a command writes depends on how busy the machine is
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
    for item in items:
        other = INTERPRETED & set(getattr(item, "fixturenames", ())) or any(word in item.name for word in NOT_NUMERIC)
        if item.path.name.startswith(NUMERIC) and not other:
            item.add_marker("numeric")
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="no CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With ``-m gpu``, a file that imports a package which is not installed is left out, and named.

    A machine with a GPU may hold little else; most files import diffusers and hold no test for a GPU.
    """
    report = yield
    if report.outcome != "failed" or collector.config.option.markexpr != "gpu":
        return report
    error: BaseException | None = report.call.excinfo.value if report.call.excinfo else None  # type: ignore[attr-defined]
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if package in OPTIONAL:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {package} is not installed, which this file imports")
    return report


_lost: list[str] = []  # the test after which CUDA answered nothing but errors


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notice that a kernel has ended the process' CUDA context: every later test would fail of it."""
    report = yield
    if HAS_GPU and report.failed and not _lost:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            _lost.append(item.nodeid)
            report.sections.append(("CUDA context", f"lost in this test: {error}"))
    return report


def pytest_runtest_logfinish(nodeid: str) -> None:
    """A worker of pytest-xdist that has lost its context ends, and another one takes its place."""
    if _lost and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _lost:
        pytest.fail(f"not run: the CUDA context was lost in {_lost[0]}", pytrace=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    all_skipped = terminalreporter.stats.get("skipped", ())
    skipped = [r for r in all_skipped if "gpu" in getattr(r, "keywords", ())]  # a file that is left out has none
    if skipped and not HAS_GPU:
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


@pytest.fixture(scope="session")
def interpreted() -> torch.device:
    """The CPU, in Triton's interpreter: for kernels with a planted bug, which on a GPU may write anywhere."""
    if HAS_GPU:
        pytest.skip("planted bugs are for Triton's interpreter: on a GPU one may end the process that all tests share")
    return torch.device("cpu")
