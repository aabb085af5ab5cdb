"""One planted bug at a time in philox, sampler_step, norm_stats and norm_act: each must turn its check red."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from mutation import assert_turns_red, mutant
from test_norm_act_kernel import Case as NormCase
from test_norm_act_kernel import check_merge, check_norm_act, check_stats
from test_philox import check_normals, check_words
from test_sampler_step_kernel import Case as StepCase
from test_sampler_step_kernel import check_initial, check_loop, check_step

Check = Callable[[ModuleType, torch.device], None]


def step(*args, **kwargs) -> Check:
    return lambda module, device: check_step(module, StepCase(*args, **kwargs), device)


def norm(*args, **kwargs) -> Check:
    return lambda module, device: check_norm_act(module, NormCase(*args, **kwargs), device)


F32 = torch.float32
STEP = step((2, 3, 8, 8), out_dtype=F32)
RANGE = step((2, 3, 8, 8), "learned_range", out_dtype=F32)
TILE = norm((2, 16, 4, 4), 4, c2=8, dtype=F32, time="bias_row scale_shift row", residual=True)
PARTS = norm((2, 16, 6, 6), 2, c2=8, dtype=F32, produced="x skip", time="bias_row row")
TWELVE = norm((1, 24, 5, 5), 3, c2=12, dtype=F32, produced="x skip")  # 12-channel groups
OFFSET_PARTS = norm((1, 16, 6, 6), 4, dtype=F32, produced="x", mean=100.0)
OFFSET = norm((1, 16, 6, 6), 4, dtype=F32, mean=100.0)


class Bug(NamedTuple):
    name: str
    module: str  # whose function the check calls
    file: str  # where the bug is planted
    old: str
    new: str
    check: Check


BUGS = [
    Bug("nine rounds", "philox", "philox.py", "static_range(10)", "static_range(9)", check_words),
    Bug("multipliers swapped", "philox", "philox.py", "umulhi(c0, _M0)", "umulhi(c0, _M1)", check_words),
    Bug("key not bumped", "philox", "philox.py", "k1 = tl.add(k1, _W1", "k1 = tl.add(k1, 0", check_words),
    Bug("key words swapped", "philox", "philox.py", "h1 ^ c1 ^ k0", "h1 ^ c1 ^ k1", check_words),
    Bug("pair swapped", "philox", "philox.py", "return r * c, r * s", "return r * s, r * c", check_normals),
    Bug("uniform not centred", "philox", "philox.py", "1.1641532182693481e-10", "0.0", check_normals),
    Bug("quarter turn lost", "philox", "philox.py", "(q & 1) != 0", "(q & 1) == 2", check_normals),
    Bug("polynomial off", "philox", "philox.py", "81.59235382080078", "81.7", check_normals),
    Bug("pair of the block", "philox", "philox.py", "(element & 2) != 0", "(element & 2) == 0", check_normals),
    Bug("seed's high word", "sampler_step", "philox.py", "(x >> 32) & 0xFFFFFFFF", "(x >> 31) & 0xFFFFFFFF", STEP),
    Bug("block order", "sampler_step", "sampler_step.py", "tl.join(z0, z2)", "tl.join(z2, z0)", STEP),
    Bug("off-by-one row", "sampler_step", "sampler_step.py", "table_ptr + row *", "table_ptr + (row + 1) *", STEP),
    Bug(
        "off-by-one noise", "sampler_step", "sampler_step.py", "ids_ptr + n, row, c0", "ids_ptr + n, row + 1, c0", STEP
    ),
    Bug("counter stands", "sampler_step", "sampler_step.py", "counter_ptr, row + 1)", "counter_ptr, row)", STEP),
    Bug("first advances", "sampler_step", "sampler_step.py", "ticket == programs - 1", "ticket == 0", check_loop),
    Bug("ticket kept", "sampler_step", "sampler_step.py", "counter_ptr + 1, 0)", "counter_ptr + 1, 1)", STEP),
    Bug("one id for all", "sampler_step", "sampler_step.py", "ids_ptr + n, row", "ids_ptr, row", STEP),
    Bug("not clipped below", "sampler_step", "sampler_step.py", "tl.maximum(x0, -clip,", "tl.maximum(x0, -9.0,", STEP),
    Bug("half forgotten", "sampler_step", "sampler_step.py", "tl.exp(0.5 * (", "tl.exp(1.0 * (", RANGE),
    Bug("variance of channel 0", "sampler_step", "sampler_step.py", "(C + c) * out_c", "c * out_c", RANGE),
    Bug("no out term", "sampler_step", "sampler_step.py", "tl.load(c + _CO) * eps", "0.0 * eps", STEP),
    Bug("padding unwritten", "sampler_step", "sampler_step.py", "mask=(c < LOW_C)", "mask=(c < C)", STEP),
    Bug("x_T at step 0", "sampler_step", "sampler_step.py", "_INITIAL_STEP, tl.uint32", "0, tl.uint32", check_initial),
    Bug(
        "uncentred tile",
        "norm_act",
        "norm_act.py",
        "    d = tl.where(mask, shifted",
        "    mean *= 0.0\n    d = tl.where(mask, shifted",
        OFFSET,
    ),
    Bug("uncentred parts", "norm_act", "norm_act.py", "    centred =", "    mean *= 0.0\n    centred =", OFFSET_PARTS),
    Bug(
        "bias row dropped",
        "norm_act",
        "norm_act.py",
        "h + channel_vector(bias_row_ptr, c, valid, 0.0)",
        "h + 0.0 * channel_vector(bias_row_ptr, c, valid, 0.0)",
        TILE,
    ),
    Bug("means not shifted", "norm_act", "norm_act.py", "shift - _spread", "0.0 * shift - _spread", PARTS),
    Bug(
        "shift dropped",
        "norm_act",
        "norm_act.py",
        "scale_shift_ptr + C, c, valid, 0.0)",
        "scale_shift_ptr + C, c, c < 0, 0.0)",
        TILE,
    ),
    Bug(
        "scale without 1",
        "norm_act",
        "norm_act.py",
        "1.0 + channel_vector(scale_shift",
        "0.0 + channel_vector(scale_shift",
        TILE,
    ),
    Bug("row of the image", "norm_act", "norm_act.py", "row = tl.load(row_ptr).to(tl.int64)", "row = n", TILE),
    Bug(
        "residual dropped",
        "norm_act",
        "norm_act.py",
        "y += tl.load(residual_ptr",
        "y += 0.0 * tl.load(residual_ptr",
        TILE,
    ),
    Bug("skip ignored", "norm_act", "norm_act.py", "tl.where(c < C1, h, s)", "h", TILE),
    Bug("boundary off by one", "norm_act", "norm_act.py", "(c - first)[None, :]", "(c - first - 1)[None, :]", TWELVE),
    Bug("group off by one", "norm_act", "norm_act.py", "(c // CG)[None, :]", "((c + 1) // CG)[None, :]", TWELVE),
    Bug(
        "between parts",
        "norm_act",
        "norm_act.py",
        "m2 += tl.sum(s + k * d * d, axis=0)",
        "m2 += tl.sum(s, axis=0)",
        PARTS,
    ),
    Bug(
        "eps outside",
        "norm_act",
        "norm_act.py",
        "tl.rsqrt(variance + eps)",
        "1.0 / (tl.sqrt(variance) + eps)",
        norm((1, 8, 1, 2), 8, dtype=F32, produced="x"),
    ),
    Bug(
        "weight dropped",
        "norm_act",
        "norm_act.py",
        "rstd * channel_vector(weight_ptr",
        "rstd + 0 * channel_vector(weight_ptr",
        TILE,
    ),
    Bug("uncentred part", "norm_stats", "norm_stats.py", "h - tile_mean[None, :], 0.0)", "h, 0.0)", check_stats),
    Bug(
        "tail counted whole",
        "norm_stats",
        "norm_stats.py",
        "tl.maximum(HW - p0, 0), BLOCK_P)",
        "BLOCK_P, BLOCK_P)",
        check_stats,
    ),
    Bug("Chan's cross term", "norm_stats", "norm_stats.py", "k * d * d", "0.0 * d", check_merge),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a bug may well divide by zero on its way
@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.name)
def test_planted_bug_turns_red(bug, interpreted, tmp_path):
    module = mutant(tmp_path, bug.module, bug.file, bug.old, bug.new)
    assert_turns_red(lambda m: bug.check(m, interpreted), module)


@pytest.mark.parametrize("bug", {(b.module, b.check): b for b in BUGS}.values(), ids=lambda b: b.name)
def test_a_faithful_copy_stays_green(bug, interpreted, tmp_path):
    """So that the bugs above are what turns the checks red, and not the copying."""
    bug.check(mutant(tmp_path, bug.module, bug.file, bug.old, bug.old), interpreted)
