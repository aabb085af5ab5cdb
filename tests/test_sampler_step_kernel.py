"""The fused sampler step against float64, by the house rule: layouts, variances, counter, noise, batch."""

from __future__ import annotations

import re
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensors import fresh, normal64, poison
from torch import Tensor

from ddpm_fast.house_rule import check
from ddpm_fast.kernels import reference, sampler_step

pytest.importorskip("triton")
T = 6


class Case(NamedTuple):
    shape: tuple[int, int, int, int]  # [N, C, H, W]
    variance: str = "fixed"
    x_last: bool = False  # channels_last
    out_last: bool = True
    out_dtype: torch.dtype = torch.bfloat16
    low_channels: int = 16  # 0: no low-precision copy
    row: int = 2
    seed: int = -(2**40) + 3
    first_id: int = 2**33 - 1


GRID = [
    Case((2, 3, 8, 8)),
    Case((2, 3, 8, 8), "learned_range", x_last=True),
    Case((1, 3, 8, 8), "learned", out_last=False, out_dtype=torch.float32),
    Case((3, 1, 4, 4), out_dtype=torch.float16, low_channels=8, row=0),  # grey images, a Philox block a row
    Case((2, 4, 16, 24), "learned_range", x_last=True, row=T - 1),  # several tiles an image
    Case((2, 3, 7, 7), seed=2**63 - 1, first_id=-5),  # 49 pixels: Philox blocks straddle channels
    Case((1, 3, 5, 3), "learned_range", out_last=False, low_channels=3),
    Case((2, 20, 3, 4), low_channels=24),  # more channels than a tile
    Case((2, 5, 2, 2), x_last=True, low_channels=100),  # padding wider than a tile
    Case((1, 4, 1, 1), low_channels=0),
]


def make_table(seed: int) -> Tensor:
    """[T, TABLE_WIDTH]: coefficients of plausible size, each row its own; row 1 has no noise, row 3 no clip."""
    table = torch.rand(T, reference.TABLE_WIDTH, generator=torch.Generator().manual_seed(seed)) + 0.25
    table[1, reference.SIGMA] = 0.0
    table[3, reference.CLIP] = float("inf")
    return table


def make_inputs(case: Case, device: torch.device, salt: int = 0) -> dict[str, Tensor]:
    n, c, h, w = case.shape
    width = c if case.variance == "fixed" else 2 * c
    x = fresh((n, c, h, w), torch.float32, device, seed=salt + 1, channels_last=case.x_last)
    out = fresh((n, width, h, w), case.out_dtype, device, seed=salt + 2, channels_last=case.out_last)
    if case.variance == "learned":
        out[:, c:] = out[:, c:].abs()
    return {
        "x": x,
        "out": out,
        "table": make_table(salt).to(device),
        "counter": torch.tensor([case.row, 0], dtype=torch.int32, device=device),
        "seed": torch.tensor([case.seed], device=device),
        "ids": torch.arange(n, device=device) + case.first_id,
    }


def make_low(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor | None:
    n, _, h, w = case.shape
    if not case.low_channels:
        return None
    return poison((n, case.low_channels, h, w), dtype, device, torch.channels_last)


def truth_of(inputs: dict[str, Tensor], variance: str, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(float32 reference, float64 truth) with the counter left alone."""
    counter = inputs["counter"]
    same = reference.sampler_step(**{**inputs, "counter": counter.clone()}, variance=variance, noise=noise)
    if noise is None:
        z = normal64(inputs["seed"], inputs["ids"], int(counter[0]), inputs["x"].shape[1:]).to(counter.device)
    else:
        z = noise.double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return same, reference.sampler_step(**{**wide, "counter": counter.clone()}, variance=variance, noise=z)


def check_step(module: ModuleType, case: Case, device: torch.device) -> None:
    """One step into poisoned buffers: x_prev by the house rule, low its exact rounding, the counter advanced."""
    inputs = make_inputs(case, device)
    same, truth = truth_of(inputs, case.variance)
    x_prev = poison(case.shape, torch.float32, device)
    low = make_low(case, device)
    got = module.sampler_step(**inputs, variance=case.variance, x_prev=x_prev, low=low)
    assert got is x_prev
    check(got, same, truth, name="x_prev")
    assert inputs["counter"].tolist() == [case.row + 1, 0]
    if low is not None:
        channels = case.shape[1]
        assert torch.equal(low[:, :channels], got.to(low.dtype))
        assert torch.equal(low[:, channels:], torch.zeros_like(low[:, channels:]))


def check_loop(module: ModuleType, device: torch.device) -> None:
    """A trajectory in place, as a captured step replays it: only device values change between steps and runs."""
    case = Case((2, 3, 8, 20))
    inputs = make_inputs(case, device)
    for seed, first_id in ((1, 0), (2**35 + 1, 10)):
        inputs["x"].copy_(fresh(case.shape, torch.float32, device, seed=seed % 97, channels_last=False))
        inputs["seed"].fill_(seed)
        inputs["ids"].copy_(torch.arange(2) + first_id)
        inputs["counter"].zero_()
        for i in range(T):
            same, truth = truth_of(inputs, "fixed")
            module.sampler_step(**inputs, x_prev=inputs["x"])
            check(inputs["x"], same, truth, name=f"step {i}")
            assert inputs["counter"].tolist() == [i + 1, 0]


def check_initial(module: ModuleType, device: torch.device) -> None:
    for case in (Case((2, 3, 8, 8)), Case((2, 3, 7, 7), x_last=True), Case((1, 20, 2, 2), low_channels=0)):
        seed = torch.tensor([case.seed], device=device)
        ids = torch.arange(case.shape[0], device=device) + case.first_id
        layout = torch.channels_last if case.x_last else torch.contiguous_format
        x, low = poison(case.shape, torch.float32, device, layout), make_low(case, device, torch.float16)
        module.initial_noise(x, seed, ids, low)
        step = torch.tensor([reference.INITIAL_STEP], device=device)
        same = reference.philox_normal(seed, ids, step, case.shape[1:])
        check(x, same, normal64(seed, ids, reference.INITIAL_STEP, case.shape[1:]), name="x_T")
        if low is not None:
            assert torch.equal(low[:, : case.shape[1]], x.half())
            assert not low[:, case.shape[1] :].any()


@pytest.mark.parametrize("case", GRID, ids=lambda c: "-".join(map(str, (*c.shape, c.variance))))
def test_step(device, case):
    check_step(sampler_step, case, device)


def test_loop_in_place(device):
    check_loop(sampler_step, device)


def test_initial_noise(device):
    check_initial(sampler_step, device)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)),
    variance=st.sampled_from(["fixed", "learned", "learned_range"]),
    layouts=st.tuples(st.booleans(), st.booleans()),
    extra=st.integers(0, 13),
    row=st.integers(0, T - 1),
)
def test_any_shape(device, shape, variance, layouts, extra, row):
    check_step(sampler_step, Case(shape, variance, *layouts, low_channels=shape[1] + extra, row=row), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_from_elsewhere(device, dtype):
    case = Case((2, 3, 4, 6))
    inputs = make_inputs(case, device)
    noise = fresh(case.shape, dtype, device, seed=9)
    same, truth = truth_of(inputs, "fixed", noise)
    check(sampler_step.sampler_step(**inputs, noise=noise), same, truth)


def test_rows_do_not_depend_on_the_batch(device):
    """Sample k is bit for bit the same in a batch of 8, of 3, and alone."""
    case = Case((8, 3, 8, 8), "learned_range")
    inputs = make_inputs(case, device)
    whole = sampler_step.sampler_step(**{**inputs, "counter": inputs["counter"].clone()}, variance=case.variance)
    for part in (slice(0, 1), slice(5, 8)):
        some = {**inputs, "counter": inputs["counter"].clone()} | {k: inputs[k][part] for k in ("x", "out", "ids")}
        assert torch.equal(sampler_step.sampler_step(**some, variance=case.variance), whole[part])


def test_views_and_layouts_agree(device):
    """Strided inputs (three channels of a padded output) give the same bits as dense ones."""
    case = Case((2, 3, 6, 6))
    inputs = make_inputs(case, device)
    want = sampler_step.sampler_step(**{**inputs, "counter": inputs["counter"].clone()})
    padded = poison((2, 8, 6, 6), case.out_dtype, device, torch.channels_last)
    padded[:, :3] = inputs["out"]
    got = sampler_step.sampler_step(**{**inputs, "out": padded[:, :3]})
    assert torch.equal(got, want)


def test_nan_is_not_clipped_away(device):
    inputs = make_inputs(Case((1, 3, 4, 4)), device)
    inputs["out"][0, 1, 2, 3] = float("nan")
    got = sampler_step.sampler_step(**inputs)
    assert got.isnan().nonzero().tolist() == [[0, 1, 2, 3]]


BAD = {
    "x in float64": (lambda i: i | {"x": i["x"].double()}, "x_t stays float32"),
    "ids too few": (lambda i: i | {"ids": i["ids"][:1]}, "one id an image"),
    "seed in int32": (lambda i: i | {"seed": i["seed"].int()}, "seed int64"),
    "counter in int64": (lambda i: i | {"counter": i["counter"].long()}, "counter must be int32"),
    "variance unknown": (lambda i: i | {"variance": "fixed_small"}, "variance must be one of"),
    "out too narrow": (lambda i: i | {"variance": "learned"}, "check the model's out_channels"),
    "table too narrow": (lambda i: i | {"table": i["table"][:, :10]}, "step table must be"),
    "low too narrow": (lambda i: i | {"low": i["x"][:, :2].half()}, "low must be"),
    "rows unevenly spaced": (lambda i: i | {"noise": i["x"].repeat(1, 1, 2, 1)[:, :, ::2]}, "evenly spaced pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_to_do(device, name):
    change, message = BAD[name]
    inputs = change(make_inputs(Case((2, 3, 4, 4)), device))
    with pytest.raises(ValueError, match=re.escape(message)):
        sampler_step.sampler_step(**inputs)


@pytest.mark.gpu
def test_counter_survives_a_thousand_racing_launches(device):
    """Many programs, no host synchronisation: every program of launch i must have read row i."""
    n, steps = 64, 1000
    x = torch.zeros(n, 3, 32, 32, device="cuda")
    out = torch.zeros_like(x)
    table = torch.zeros(steps, reference.TABLE_WIDTH, device="cuda")
    table[:, reference.CLIP] = 1.0
    table[:, reference.CX] = 1.0
    table[:, reference.CO] = torch.arange(1, steps + 1, device="cuda") * 2.0**-20  # x gains a row's own number
    out.fill_(1.0)
    counter = torch.zeros(2, dtype=torch.int32, device="cuda")
    seed, ids = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.arange(n, device="cuda")
    for _ in range(steps):
        sampler_step.sampler_step(x, out, table, counter, seed, ids, x_prev=x)
    assert counter.tolist() == [steps, 0]
    assert torch.equal(x, torch.full_like(x, steps * (steps + 1) / 2 * 2.0**-20))
