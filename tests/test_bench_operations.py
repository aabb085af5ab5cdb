"""The calls that `pytest benchmarks` times: each set computes the operation, and what does not is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("benchmarks.operations", reason="benchmarks/ is not part of the installed package")

from benchmarks import operations
from benchmarks.operations import OPERATIONS, Operation, prepared, weights
from ddpm_fast import ops

CPU = torch.device("cpu")
# As `OPERATIONS`, of a size for tests: 64 + 32 channels make groups of 3 that straddle the seam.
SMALL = [
    replace(op, channels=min(op.channels, 64), height=8, out_channels=min(op.out_channels, 96), skip_channels=skip)
    for op in OPERATIONS
    for skip in [32 if op.skip_channels else 0]
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", SMALL, ids=lambda op: op.label)
def test_sets_compute_what_is_timed(op: Operation, dtype: torch.dtype) -> None:
    for who in ("reference", "cpu", "torch"):
        run, wrong = prepared(op, who, 2, dtype, CPU, cache_bytes=10_000)
        assert wrong is None, f"{who}: {wrong}"
        shape = run().shape  # type: ignore[attr-defined]
        if op.name in operations.STEPS:
            assert shape == (2, 3, 8, 8)
        else:
            side = 16 if op.name == "upsample_conv" else 8
            assert shape == (2, op.out_channels or op.channels + op.skip_channels, side, side)


def test_torch_s_own_is_the_same_operation() -> None:
    for op in SMALL:
        if op.name in operations.STEPS:  # with noise of its own
            continue
        tensors, w = operations.inputs(op, 2, torch.float32, CPU), weights(op, CPU)
        enter, call = operations.by_set(op, ops.reference(), w, torch.float32)
        ours, torchs = call(*enter(*tensors)), operations.by_torch(op, w, torch.float32)(*tensors)
        assert torch.allclose(ours, torchs, rtol=1e-4, atol=1e-4), op.label
        assert float(ours.std()) > 0.1


@pytest.mark.parametrize("name", ["conv", "norm_act", "attention", "upsample_conv", "sampler_step"])
def test_what_is_wrong_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.cpu()

    def wrong(*args, **kwargs):
        return getattr(right, name)(*args, **kwargs) * 1.05

    monkeypatch.setattr(ops, "cpu", lambda: replace(right, **{name: wrong}))
    (op,) = [o for o in SMALL if o.name == {"conv": "conv1x1"}.get(name, name)][:1]
    for dtype in (torch.float32, torch.bfloat16):
        _, said = prepared(op, "cpu", 2, dtype, CPU, 0)
        assert said is not None and "largest error" in said


def test_costs_are_those_of_the_shapes() -> None:
    conv = Operation("conv3x3", 128, 32, 128).cost(4, torch.float32)
    assert conv.flops == 2 * 4 * 1024 * 128 * 128 * 9
    # Input, output, weights and bias.
    assert conv.bytes == 4 * (2 * 4 * 1024 * 128 + 9 * 128 * 128 + 128)
    pair = Operation("norm_conv", 256, 16, 256, 256).cost(4, torch.bfloat16)
    assert pair.flops == 2 * 4 * 256 * 512 * 256 * 9 and pair.launches == 2
    assert Operation("norm_act", 256, 32, 0, 128).cost(1, torch.bfloat16).flops == 0
    assert [op.roof for op in OPERATIONS if op.name in ("conv3x3", "norm_conv", "attention")][-1] == "attention"
    assert len({op.label for op in OPERATIONS}) == len(OPERATIONS)
