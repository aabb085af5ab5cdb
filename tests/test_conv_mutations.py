"""One planted bug at a time in the convolution: each must turn its check red."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import test_conv_kernel as plain
import test_conv_step as step
import torch
from mutation import assert_turns_red, mutant

pytest.importorskip("triton")
Check = Callable[[ModuleType, torch.device], None]
F32 = torch.float32


def conv(n: int, channels: tuple[int, ...], hw: tuple[int, int], k: int, arch: int = 90, **kwargs) -> Check:
    case = plain.Case(n, channels, hw, k, **kwargs)

    def check(module: ModuleType, device: torch.device) -> None:
        plain.check_conv(module, case, device, arch=None if device.type == "cuda" and arch == 90 else arch)

    return check


def conv_step(*args, **kwargs) -> Check:
    case = step.Case(*args, dtype=F32, **kwargs)

    def check(module: ModuleType, device: torch.device) -> None:
        step.check_conv_step(module, case, device, None)

    return check


BOX = conv(2, (16,), (4, 4), 16, time="row", residual=True, scale=0.5)
GATHER = conv(2, (12,), (5, 5), 8, stats=False)
IMAGES = conv(3, (16,), (4, 4), 16, time="image", arch=80)
CONCAT = conv(1, (16, 32), (4, 4), 16, shortcut=(16, 32))
HALVES = conv(1, (32,), (8, 8), 16, stride=2, padding=(0, 1), stats=False)
STRIDED = conv(1, (12,), (6, 6), 16, stride=2, padding=(0, 1), stats=False)
STRIP = conv(1, (16,), (6, 8), 16, padding=(0, 1, 1, 1))
UP = conv(2, (16,), (4, 4), 16, upsample=True)
UP_SHORT = conv(1, (16,), (3, 3), 16, upsample=True, shortcut=(8,), stats=False)
RAGGED = conv(1, (16,), (7, 7), 16)
MANY = conv(1, (16,), (16, 16), 16)
STEP = conv_step(2, 16, (4, 4))
RANGE = conv_step(2, 16, (4, 4), variance="learned_range", packed=True)
TILES = conv_step(2, 16, (8, 8))
KERNEL, PLAN, PACK, STEPS = "conv_kernel.py", "conv_plan.py", "conv_pack.py", "conv_step.py"


class Bug(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    check: Check


BUGS = [
    Bug("taps transposed", KERNEL, "dy + tap // SIZE, dx + tap % SIZE", "dy + tap % SIZE, dx + tap // SIZE", BOX),
    Bug("tap of the weights", KERNEL, "column + tap * PER_TAP + c0", "column + (tap + 1) % 9 * PER_TAP + c0", BOX),
    Bug("box off by a row", KERNEL,
        "source.load([n, h + dy, w + dx, c0])", "source.load([n, h + dy + 1, w + dx, c0])", BOX),
    Bug("last slice dropped", KERNEL,
        "tl.range(0, SIZE * SIZE * SLICES)", "tl.range(0, SIZE * SIZE * SLICES - 1)", BOX),
    Bug("channel slice stands", KERNEL, "c0 = (i % SLICES) * BC", "c0 = 0 * BC", conv(1, (96,), (4, 4), 16)),
    Bug("no padding on top", KERNEL, "& (row >= 0) &", "& (row >= -1) &", conv(1, (12,), (5, 5), 8, stats=False)),
    Bug("wraps at the right", KERNEL, "& (column < W)", "& (column < W + 1)", GATHER),
    Bug("channel mask", KERNEL, "mask = mask & (channel < C)[None, :]", "mask = mask", conv(2, (12,), (1, 1), 8)),
    Bug("bias dropped", KERNEL, "acc += tl.load(bias + k,", "acc += 0.0 * tl.load(bias + k,", BOX),
    Bug("shortcut bias dropped", KERNEL,
        "acc += tl.load(short_bias + k,", "acc += 0.0 * tl.load(short_bias + k,", CONCAT),
    Bug("off-by-one row", KERNEL, "r = tl.load(row)", "r = 1 + tl.load(row)", BOX),
    Bug("time of image 0", KERNEL, "time + n[None, :] * K", "time + 0 * n[None, :] * K", IMAGES),
    Bug("residual dropped", KERNEL, "if residual is not None:", "if residual is None and BM < 0:", BOX),
    Bug("not scaled", KERNEL, "acc *= scale", "acc *= 1.0", BOX),
    Bug("skip reads x's weights", KERNEL, "skip, weight, column + R1,", "skip, weight, column,", CONCAT),
    Bug("skip dropped", KERNEL, "if C2 > 0:", "if C2 < 0:", CONCAT),
    Bug("shortcut dropped", KERNEL, "if S1 > 0:", "if S1 < 0:", CONCAT),
    Bug("shortcut's skip dropped", KERNEL, "if S2 > 0:", "if S2 < 0:", CONCAT),
    Bug("stride-2 pair", KERNEL, "((w + dx) & 1) * C", "((w + dx + 1) & 1) * C", HALVES),
    Bug("stride-2 half", KERNEL, "(h + dy) >> 1,", "(h + dy + 1) >> 1,", HALVES),
    Bug("stride ignored", KERNEL, "h * STRIDE, w * STRIDE", "h * STRIDE, w", STRIDED),
    Bug("padding of the other side", PLAN, "top, _, left, _ = sides", "_, top, _, left = sides", STRIDED),
    Bug("rows padded as columns", PLAN, '"TOP": top,', '"TOP": left,', STRIP),
    Bug("phases swapped", KERNEL, "phase // 2 - TOP, phase % 2 - LEFT", "phase % 2 - TOP, phase // 2 - LEFT", UP),
    Bug("phase of the weights", KERNEL, "column = phase *", "column = (phase ^ 1) *", UP),
    Bug("phase written elsewhere", KERNEL, "UP * w + phase % 2", "UP * w + (phase + 1) % 2", UP),
    Bug("phase of the shortcut", KERNEL,
        "m0, phase // 2, phase % 2, images,", "m0, phase // 2, 0 * phase, images,", UP_SHORT),
    Bug("taps folded wrong", PACK,
        "(first, middle + last), axis), torch.stack((first + middle, last)",
        "(first + middle, last), axis), torch.stack((first, middle + last)", UP),
    Bug("fold forgets a tap", PACK, "(first, middle + last)", "(first, middle)", UP),
    Bug("packing order", PACK, "permute(0, 2, 3, 1)", "permute(0, 3, 2, 1)", BOX),
    Bug("mean of too many", KERNEL, "/ count[None, :]", "/ PART", RAGGED),
    Bug("count of whole parts", KERNEL,
        "tl.minimum(PIXELS - part * PART, PART)", "tl.minimum(PIXELS - 0 * part, PART)", RAGGED),
    Bug("M2 not centred", KERNEL, "PART]) - mean[:, :, None]", "PART]) - 0 * mean[:, :, None]", BOX),
    Bug("M2 of the padding", KERNEL, "centred = tl.where(valid[None, :], centred, 0.0)", "centred = centred", RAGGED),
    Bug("parts swapped", KERNEL, "phase * PARTS + part)", "phase * PARTS + (part ^ 1))", MANY),
    Bug("phases share parts", KERNEL, "+ phase * PARTS + part", "+ part", UP),
    Bug("statistics before rounding", KERNEL,
        "stats, stored.to(tl.float32),", "stats, acc,", conv(1, (16,), (4, 4), 16, dtype=torch.bfloat16)),
    Bug("step: bias dropped", STEPS, "out += tl.load(bias + c,", "out += 0.0 * tl.load(bias + c,", STEP),
    Bug("step: variance from the output", STEPS, "v = _half(acc, 1,", "v = _half(acc, 0,", RANGE),
    Bug("step: variance's bias", STEPS, "bias + C + c", "bias + c", RANGE),
    Bug("step: halves swapped", PACK,
        "in weight.split(image_channels)]", "in weight.split(image_channels)[::-1]]", RANGE),
    Bug("step: noise of the next row", STEPS, "image, row, 0, p0", "image, row + 1, 0, p0", STEP),
    Bug("step: one id for all", STEPS, "seed, ids + image,", "seed, ids,", STEP),
    Bug("step: noise of the first tile", STEPS,
        "row, 0, p0, H * W, CP, BM, ALIGNED", "row, 0, 0 * p0, H * W, CP, BM, ALIGNED", TILES),
    Bug("step: counter stands", STEPS, "advance(counter, row, programs)", "advance(counter, row - 1, programs)", STEP),
    Bug("step: image 0 for all", STEPS, "x_t + image * x_n", "x_t + 0 * image * x_n", STEP),
    Bug("step: low unwritten", STEPS,
        "    if low is not None:\n        store_low", "    if low is None:\n        store_low", STEP),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.name)
def test_planted_bug_is_found(bug: Bug, interpreted: torch.device, tmp_path: Path) -> None:
    module = "conv_step" if bug.name.startswith("step:") else "conv"
    assert_turns_red(lambda m: bug.check(m, interpreted), mutant(tmp_path, module, bug.file, bug.old, bug.new))


CHECKS = (BOX, GATHER, IMAGES, CONCAT, HALVES, STRIDED, STRIP, UP, UP_SHORT, RAGGED, MANY)


@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_checks_are_green_without_a_bug(number: int, device: torch.device) -> None:
    from ddpm_fast.kernels import conv as module

    CHECKS[number](module, device)


@pytest.mark.parametrize("check", [STEP, RANGE, TILES], ids=["fixed", "learned_range", "tiles"])
def test_step_checks_are_green_without_a_bug(check: Check, device: torch.device) -> None:
    from ddpm_fast.kernels import conv_step as module

    check(module, device)
