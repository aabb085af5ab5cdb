"""The fused attention against float64, by the house rule, and its promise that no image depends on its neighbours."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutation import assert_turns_red, mutant
from tensors import fresh, poison
from torch import Tensor

from ddpm_fast.house_rule import check
from ddpm_fast.kernels import attention, reference

pytest.importorskip("triton")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


class Case(NamedTuple):
    images: int
    heads: int
    channels: int  # a head
    height: int
    width: int
    dtype: torch.dtype = F32
    std: float = 1.5

    @property
    def qkv(self) -> tuple[int, int, int, int]:
        return self.images, 3 * self.heads * self.channels, self.height, self.width

    @property
    def out(self) -> tuple[int, int, int, int]:
        return self.images, self.heads * self.channels, self.height, self.width


GRID = [
    Case(2, 1, 256, 8, 8, BF16),  # google/ddpm-cifar10-32, at another size
    Case(1, 1, 256, 16, 16, BF16),  # and at its own: several blocks of keys
    Case(1, 1, 512, 5, 7, BF16),  # google/ddpm-*-256: slices of a head
    Case(1, 1, 320, 9, 9, F16),  # the last slice half empty
    Case(2, 4, 64, 8, 9, F16),  # heads of 64, 72 pixels
    Case(2, 3, 24, 5, 7, BF16),  # 24 of 32 channels
    Case(1, 2, 160, 6, 7, F32),  # float32's slices
    Case(3, 2, 8, 1, 1, F32),  # one pixel: the value itself
    Case(2, 3, 40, 9, 11, F32),
    Case(1, 1, 16, 40, 1, BF16, 6.0),  # a softmax with one weight near 1
    Case(1, 2, 32, 7, 6, F32, 30.0),  # scores in the thousands
]


def run(module: ModuleType, case: Case, qkv: Tensor) -> Tensor:
    out = poison(case.out, case.dtype, qkv.device, torch.channels_last)
    got = module.attention(qkv, case.heads, out=out)
    assert got is out
    return got


def check_attention(module: ModuleType, case: Case, device: torch.device) -> None:
    qkv = fresh(case.qkv, case.dtype, device, seed=sum(case.qkv), std=case.std)
    same, truth = reference.attention(qkv, case.heads), softmax64(qkv, case.heads)
    check(run(module, case, qkv), same, truth, name=str(case))


def softmax64(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v in float64, written out."""
    n, width, h, w = qkv.shape
    d = width // 3 // heads
    q, k, v = qkv.double().reshape(n, 3, heads, d, h * w).unbind(1)
    scores = torch.einsum("nhcq,nhck->nhqk", q, k) / d**0.5
    return torch.einsum("nhqk,nhck->nhcq", scores.softmax(dim=-1), v).reshape(n, width // 3, h, w)


@pytest.mark.parametrize("case", GRID, ids=lambda c: f"{c.heads}x{c.channels}-{c.height}x{c.width}-{c.dtype}")
def test_grid(device, case):
    check_attention(attention, case, device)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape(device, data):
    images, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    channels = data.draw(st.sampled_from([1, 3, 8, 12, 48, 96]))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    dtype = data.draw(st.sampled_from([F32, BF16, F16]))
    check_attention(attention, Case(images, heads, channels, height, width, dtype), device)


@pytest.mark.parametrize(
    "case", [GRID[0], GRID[5]._replace(images=5), Case(4, 1, 512, 4, 4, BF16), Case(4, 2, 24, 9, 9)]
)
def test_an_image_does_not_depend_on_its_batch(device, case):
    """Bit for bit, in a batch and alone: torch's own kernels cut the keys where a batch is small."""
    qkv = fresh(case.qkv, case.dtype, device, seed=3)
    whole = run(attention, case, qkv)
    for n in range(case.images):
        assert torch.equal(run(attention, case._replace(images=1), qkv[n : n + 1]), whole[n : n + 1])


def test_the_launch_does_not_know_the_batch():
    """Tiles follow from an image's pixels, a head's channels and the dtype, by signature."""
    assert attention.attention_launch(256, 256, BF16).meta == {"BM": 64, "BN": 32, "BD": 256}
    assert attention.attention_launch(1, 1, F32).meta == {"BM": 16, "BN": 16, "BD": 16}
    assert attention.attention_launch(1024, 512, BF16).meta == {"BM": 64, "BN": 64, "BD": 128}


def test_it_reads_and_writes_inside_larger_maps(device):
    """Neighbouring images of a larger batch, and channels between others."""
    case = Case(2, 2, 8, 3, 3)
    big = fresh((6, 60, 3, 3), F32, device, seed=4)
    qkv = big[2:4, 6:54]
    room = poison((5, 20, 3, 3), F32, device, torch.channels_last)
    attention.attention(qkv, case.heads, out=room[1:3, 2:18])
    same = reference.attention(qkv.contiguous(), case.heads)
    check(room[1:3, 2:18].clone(), same, softmax64(qkv, case.heads))
    assert room[0].isnan().all() and room[3:].isnan().all() and room[1:3, :2].isnan().all()
    assert room[1:3, 18:].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_stays_so(device):
    """A NaN in one query's row stays in that row; a NaN among the values reaches every pixel of that channel."""
    case = Case(1, 1, 16, 5, 5)
    qkv = fresh(case.qkv, F32, device, seed=5)
    qkv[0, 3, 2, 2] = float("nan")
    bad = run(attention, case, qkv).isnan()
    assert bad[0, :, 2, 2].all() and bad.sum() == 16
    qkv = fresh(case.qkv, F32, device, seed=5)
    qkv[0, 32 + 7, 1, 1] = float("nan")
    bad = run(attention, case, qkv).isnan()
    assert bad[0, 7].all() and bad.sum() == 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: (q.double(), 2, None), r"fused for bf16, fp16 and fp32; got torch.float64"),
        (lambda q: (q, 5, None), r"q, k and v of 5 equal heads; got 48 channels"),
        (lambda q: (q, 0, None), r"q, k and v of 0 equal heads"),
        (lambda q: (q, 2, q), r"out must be \[1, 16, 4, 4\] in torch.float32; got \[1, 48, 4, 4\]"),
        (lambda q: (q, 2, q[:, :16].half()), r"out must be .* in torch.float32; got .* in torch.float16"),
        (lambda q: (q.contiguous(), 2, None), r"channels_last"),
    ],
)
def test_bad_arguments(change, message):
    qkv, heads, out = change(fresh((1, 48, 4, 4), F32, seed=6))
    with pytest.raises(ValueError, match=message):
        attention.attention(qkv, heads, out=out)


WIDE = Case(1, 2, 160, 6, 7)
ODD = Case(2, 3, 24, 5, 7)
LONG = Case(1, 1, 8, 9, 8)  # several blocks of 32 keys, several tiles of 32 queries
BUGS = [
    ("scale", "math.sqrt(d)", "d", ODD),
    ("natural exponent", "math.log2(math.e) / ", "1.0 / ", ODD),
    ("keys beyond the image", "(key < T)[None, :], scores", "(key < 64)[None, :], scores", ODD),
    ("sum not rescaled", "total * shrink", "total", LONG),
    ("result not rescaled", "acc * shrink[:, None]", "acc", LONG),
    ("largest not kept", "largest = above", "largest = above * 1.001", LONG),
    ("one head for all", "pid // TILES % HEADS", "0", ODD),
    ("one image for all", "(pid // TILES // HEADS)", "(pid // TILES // HEADS * 0)", ODD),
    ("one tile of queries", "pid % TILES * BM", "0 * BM", LONG),
    ("values of the keys", "v_ptr = k_ptr + HEADS * D", "v_ptr = k_ptr", ODD),
    ("one slice of the scores", "key, i * BD + c", "key, c", WIDE),
    ("one slice of the result", "own = tl.program_id(1) * BD + c", "own = c", WIDE),
    ("first block only", "tl.range(0, T, BN)", "tl.range(0, BN, BN)", LONG),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("old", "new", "case"), [b[1:] for b in BUGS], ids=[b[0] for b in BUGS])
def test_planted_bug_turns_red(old, new, case, interpreted, tmp_path):
    module = mutant(tmp_path, "attention", "attention.py", old, new)
    assert_turns_red(lambda m: check_attention(m, case, interpreted), module)


@pytest.mark.parametrize("case", [WIDE, ODD, LONG], ids=["wide", "odd", "long"])
def test_a_faithful_copy_stays_green(case, interpreted, tmp_path):
    check_attention(mutant(tmp_path, "attention", "attention.py", "math", "math"), case, interpreted)
