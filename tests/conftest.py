"""Triton's interpreter where there is no GPU, a ``device`` fixture, and the marker ``gpu``."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

# The suite is many tiny problems: threads beyond the cores only fight each other.
torch.set_num_threads(min(torch.get_num_threads(), 4))
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; skipped, with a line in the summary, without one")


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


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")
