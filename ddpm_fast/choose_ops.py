"""Which set of operations serves a sampler: that which was named, or by the device."""

from __future__ import annotations

import importlib.util

import torch

from . import ops as ops_module
from .ops import Ops

NAMES = ("auto", "reference", "cpu", "winograd", "triton")


def choose_ops(ops: str | Ops, device: torch.device) -> Ops:
    """The set called ``ops``, or an `Ops` value as it is.

    "auto": the fused kernels on a GPU where Triton is installed, `cpu` on a CPU, else `reference`.
    Raises ValueError for an unknown name.
    """
    if isinstance(ops, Ops):
        return ops
    if ops == "auto":
        ops = _by_device(device)
    if ops not in NAMES:
        raise ValueError(f"ops must be one of {', '.join(NAMES)}, or an Ops value; got {ops!r}")
    chosen: Ops = getattr(ops_module, ops)()
    return chosen


def _by_device(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "reference"
