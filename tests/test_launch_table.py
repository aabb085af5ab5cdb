"""The budget of a step, and the table that docs/performance.md shows of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import launch_table
from benchmarks.launch_table import H100, H100_BYTES_PER_S, H100_FLOPS_PER_S, group, record_step, summarize
from ddpm_fast.kernels import cost

DOC = Path(__file__).parent.parent / "docs" / "performance.md"


def test_the_cifar10_step_keeps_its_budget():
    """At most 125 launches; 22 residual blocks of 4, 6 attentions of 4, 6 resamplings, conv_in, the last norm, and
    conv_out with the sampler step."""
    records = record_step("cifar10", 256)
    s = summarize(records, 256)
    assert s.launches == 22 * 4 + 6 * 4 + 6 + 3 == 121 <= 125
    assert 1 - s.convolution_share <= 0.30


def test_the_256_pixel_step_keeps_its_budget():
    """Above 64x64 pixels, one launch for each input of a norm_act merges its statistics first."""
    s = summarize(record_step("lsun256", 16), 16)
    blocks, attentions, resamplings = 32, 6, 10
    single = 8 + 7  # norm_acts of one input at 256x256 and 128x128
    joined = 3 + 3  # of two
    assert s.launches == 4 * blocks + 4 * attentions + resamplings + 3 + single + 2 * joined == 192
    assert 1 - s.convolution_share <= 0.30


@pytest.mark.parametrize(("preset", "batch"), [("cifar10", 256), ("lsun256", 16)])
def test_no_step_beats_the_roofs_and_the_plain_form_is_slower(preset: str, batch: int):
    records = record_step(preset, batch)
    s, plain = summarize(records, batch), summarize(record_step(preset, batch, "plain"), batch)
    whole = cost.total([r.cost for r in records])
    assert s.time_ms * 1e-3 >= max(whole.flops / H100_FLOPS_PER_S, whole.bytes / H100_BYTES_PER_S)
    assert s.gflop < plain.gflop and s.megabytes < 0.6 * plain.megabytes and s.launches < plain.launches / 1.8
    assert s.images_per_s == pytest.approx(batch / s.time_ms)  # 1000 steps of time_ms milliseconds


def test_the_summary_by_hand():
    """Two launches whose times at the roofs are 1 ms (memory) and 3 ms (compute)."""
    shape = (("x", (1, 8, 4, 4)), ("out", (1, 8, 4, 4)))
    norm = launch_table.Record("norm_act", shape, torch.bfloat16, "", cost.Cost(0, 2_350_000_000, 1_000_000_000, 1))
    conv = launch_table.Record("conv", shape, torch.bfloat16, "3x3", cost.Cost(2_968_500_000_000, 8, 8, 1))
    s = summarize([norm, conv], batch=40)
    assert s.time_ms == pytest.approx(4.0)
    assert s.convolution_share == pytest.approx(0.75)
    assert s.images_per_s == pytest.approx(10)
    lines = group([norm, conv, norm])
    assert [(x.count, x.operation, x.bound(H100)) for x in lines] == [(2, "norm_act", "memory"), (1, "conv", "compute")]
    assert lines[0].seconds(H100) == pytest.approx(1e-3)


def test_grouping_loses_nothing():
    records = record_step("cifar10", 4)
    lines = group(records)
    assert len(lines) < len(records) / 2
    assert sum(x.count for x in lines) == len(records)
    assert sum(x.count * x.cost.bytes for x in lines) == cost.total([r.cost for r in records]).bytes


def test_json_holds_every_launch(capsys: pytest.CaptureFixture[str]):
    launch_table.main(["--model", "cifar10", "--batch", "2", "--json"])
    (model,) = json.loads(capsys.readouterr().out)
    assert model["prediction"] is True
    assert len(model["launches"]) == model["summary"]["launches"] == 121
    assert sum(x["flops"] for x in model["launches"]) == pytest.approx(1e9 * model["summary"]["gflop"])


@pytest.mark.parametrize("model", launch_table.MODELS)
def test_the_committed_table_is_what_the_code_says(model: str):
    """Regenerate with `python -m benchmarks.launch_table --markdown`."""
    assert launch_table.describe(model, None, markdown=True) in DOC.read_text(encoding="utf-8")


def test_a_batch_of_none_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        launch_table.main(["--batch", "0"])
    assert "at least 1; got 0" in capsys.readouterr().err
