"""`pytest benchmarks --benchmark-only`: one process, for timings that run beside each other are worth nothing."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The project's own options spread tests over processes; pytest-benchmark then times nothing."""
    if hasattr(config.option, "numprocesses"):
        config.option.numprocesses = 0
        config.option.dist = "no"
        config.option.tx = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("operations")
    group.addoption("--batch", type=int, default=None, help="images; default: 4 on a CPU, 256 on a GPU")
    group.addoption("--dtype", default=None, help="float32, bfloat16 or float16; default: what this device is run in")
