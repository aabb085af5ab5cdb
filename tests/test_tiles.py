"""The tournament of the convolution's tiles: what it compares, and that a tile which changes a bit is out."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import sass, tiles
from ddpm_fast.kernels.conv_plan import ConvShape
from ddpm_fast.kernels.cost import CHANNEL_PAD
from ddpm_fast.kernels.launch import Launch

pytest.importorskip("triton")
BF16, F32 = torch.bfloat16, torch.float32
ROOT = Path(__file__).parent.parent


def flat(n: int, size: int, c: int, k: int, **more) -> ConvShape:
    return ConvShape(n, size, size, (c,), k, with_stats=True, **more)


def test_the_shapes_are_those_of_a_step():
    """Counts and FLOPs of google/ddpm-cifar10-32 against the plan's records of the same step."""
    code = (
        "import json, torch\n"
        "from benchmarks import tiles\n"
        "found = tiles.shapes('cifar10', torch.bfloat16, 4, 90)\n"
        "print(json.dumps([sum(found.values()), sum(tiles.flops(s) * n for s, n in found.items())]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    launches, flops = json.loads(done.stdout)
    # 22 blocks of 2, 6 attentions of 2, 3 down, 3 up, conv_in, and conv_out, which `step` also runs by itself.
    assert launches == 44 + 12 + 6 + 1 + 1
    # The page's table: 2958.6 GFLOP at batch 256, less attention, plus the padding of conv_in's 3 channels.
    attention = 5 * 4 * 256**2 * 256 + 4 * 16**2 * 256
    padding = 2 * 1024 * 128 * 9 * (CHANNEL_PAD - 3)
    assert flops / 4 == pytest.approx(2958.6e9 / 256 - attention + padding, rel=2e-4)


def test_candidates_begin_with_the_choice_and_fit():
    shape = flat(256, 16, 256, 256, dtype=BF16)
    found = tiles.candidates(shape, 90)
    assert found[0] == tiles.specialization(shape, 90).launch
    names = [tiles.name(launch) for launch in found]
    assert len(set(names)) == len(names) and "128x256 8 warps 4 stages" in names and "64x32 4 warps 5 stages" in names
    for launch in found:
        held = launch.num_stages * (launch.meta["BN"] + launch.meta["BM"]) * 64 * 2
        assert held <= sass.LIMITS[90].shared_bytes and launch.meta["BM"] % shape.part == 0
    few = tiles.candidates(flat(256, 32, 128, 3, dtype=BF16), 90)
    assert {launch.meta["BN"] for launch in few} == {16}
    assert {launch.num_warps for launch in tiles.candidates(shape, 90) if launch.meta["BN"] == 256} == {16}


SHAPES = [
    ConvShape(2, 8, 8, (16, 8), 32, with_stats=True, dtype=F32, bias="fp32", time="fp32", time_rows="row"),
    ConvShape(1, 8, 8, (16,), 32, with_stats=True, dtype=BF16, bias="bf16", shortcut=(8, 8), shortcut_bias="bf16"),
    ConvShape(1, 4, 4, (16,), 16, padding=(1, 1), upsample=True, with_stats=True, dtype=BF16, residual=True),
    ConvShape(2, 8, 8, (16,), 48, size=1, padding=(0, 0), dtype=BF16, scaled=True, time="fp32", time_rows="image"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=tiles.describe)
def test_operands_fit_their_shape(shape, interpreted):
    """What runs is the shape asked for, to the last field."""
    seen = []

    def note(found, *args):
        seen.append(found)
        return tiles.specialization(found, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles.conv, "specialization", note)
        result = tiles.operands(shape, interpreted)(tiles.candidates(shape, 90)[0])
    assert replace(seen[0], padding=shape.padding) == shape and all(bool(t.isfinite().all()) for t in result)
    assert float(result[0].float().std()) > 0.1


def test_a_tile_that_changes_bits_is_named_and_not_timed(interpreted):
    """Statistics summed in another order are another result; an impossible tile is one more line."""
    shape = flat(2, 16, 16, 32, dtype=F32)
    good = [launch for launch in tiles.candidates(shape, 90) if launch.meta["BM"] <= 64][:2]
    other = Launch(4, 2, {**good[0].meta, "BM": 128, "RUN": 32}, "sums 32 pixels at once")
    odd = Launch(4, 2, {**good[0].meta, "BM": 48}, "not whole parts")
    ticks = itertools.cycle([1.0])

    def clock(run, calls=1):
        run()
        return next(ticks) * calls

    row = tiles.tournament(shape, [*good, other, odd], interpreted, clock, rounds=(1, 1))
    assert row["chosen"] == tiles.name(good[0]) and set(row["us"]) == set(map(tiles.name, good))
    assert row["without"][tiles.name(other)] == "other bits than the launcher's choice"
    assert "must hold whole parts of 32 pixels; got BM=48" in row["without"][tiles.name(odd)]
    assert row["chosen_tflop_per_s"] == pytest.approx(2 * 512 * 32 * 9 * 16 / 1e-3 / 1e12)
    text = tiles.summary([row | {"count": 3}])
    assert text.startswith("3 x 3x3 16>32 at 16x16: 1000.0 us at 0 TFLOP/s") and "other bits" in text
    assert text.endswith("these convolutions take 3000 us of a step, 3000 by the best tiles")


def test_without_a_gpu_it_says_what_to_name(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        tiles.main([])
    assert "as in --arch 90" in capsys.readouterr().err
