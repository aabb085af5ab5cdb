"""The last convolution fused with the sampler step, against the float64 reference of the two in a row."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from tensors import fresh, normal64, poison
from torch import Tensor

from ddpm_fast.house_rule import check
from ddpm_fast.kernels import conv, conv_step, reference, sampler_step

pytest.importorskip("triton")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
T = 6


class Case(NamedTuple):
    n: int
    inner: int  # channels of x
    hw: tuple[int, int]
    image: int = 3  # channels of the image
    variance: str = "fixed"
    dtype: torch.dtype = BF16
    nhwc: bool = False  # x_t and x_prev in channels_last
    low_channels: int = 16  # 0: no low-precision copy
    packed: bool = False
    bias: bool = True
    size: int = 3
    row: int = 2
    seed: int = -(2**40) + 3
    first_id: int = 2**33 - 1


GRID = [
    (Case(3, 32, (8, 8), dtype=F32), 90),
    (Case(2, 32, (8, 8), packed=True), 90),
    (Case(2, 32, (8, 8), variance="learned_range", nhwc=True), 90),
    (Case(2, 32, (8, 16), variance="learned_range", dtype=F32, packed=True), 90),  # two tiles an image
    (Case(1, 16, (8, 8), variance="learned", dtype=F32, bias=False), 80),
    (Case(2, 24, (7, 7), dtype=F16), 80),  # 49 pixels: Philox blocks straddle channels, M is padded
    (Case(5, 16, (4, 4), image=1, low_channels=0), 90),
    (Case(2, 16, (5, 3), image=4, size=1, low_channels=8, first_id=-5), 90),
    (Case(1, 16, (4, 4), image=20, low_channels=24, variance="learned_range"), 80),
]


def make_inputs(case: Case, device: torch.device) -> dict[str, Tensor | None]:
    """What `conv_step` takes; the table has coefficients of plausible size, each row its own."""
    n, (h, w) = case.n, case.hw
    outputs = case.image * (1 if case.variance == "fixed" else 2)
    fan_in = case.inner * case.size**2
    weight = fresh((outputs, case.inner, case.size, case.size), case.dtype, device, seed=2, std=fan_in**-0.5)
    bias = fresh((outputs,), case.dtype, device, seed=3) if case.bias else None
    if case.variance == "learned":  # a variance: positive
        weight[case.image :] *= 0.05
        weight[case.image :, 0] = weight[case.image :, 0].abs() + 0.2
    x = fresh((n, case.inner, h, w), case.dtype, device, seed=1)
    if case.variance == "learned":
        x[:, 0] = x[:, 0].abs() + 1
    table = torch.rand(T, reference.TABLE_WIDTH, generator=torch.Generator().manual_seed(4)) + 0.25
    return {
        "x": x, "weight": weight, "bias": bias,
        "x_t": fresh((n, case.image, h, w), F32, device, seed=5, channels_last=case.nhwc),
        "table": table.to(device),
        "counter": torch.tensor([case.row, 0], dtype=torch.int32, device=device),
        "seed": torch.tensor([case.seed], device=device),
        "ids": torch.arange(n, device=device) + case.first_id,
    }  # fmt: skip


def in_a_row(inputs: dict[str, Tensor | None], variance: str, noise: Tensor | None = None) -> Tensor:
    """reference.conv, then reference.sampler_step; in float64 throughout where the inputs are."""
    i = dict(inputs)
    out = reference.conv(i["x"], i["weight"], i["bias"])
    counter = i["counter"].clone()
    return reference.sampler_step(
        i["x_t"], out, i["table"], counter, i["seed"], i["ids"], variance=variance, noise=noise
    )  # fmt: skip


def check_conv_step(module: ModuleType, case: Case, device: torch.device, arch: int | None) -> Tensor:
    """One step into poisoned buffers: x_prev by the house rule, low its exact rounding, the counter advanced."""
    inputs = make_inputs(case, device)
    same = in_a_row(inputs, case.variance)
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    z = normal64(inputs["seed"], inputs["ids"], case.row, inputs["x_t"].shape[1:]).to(device)
    truth = in_a_row(wide, case.variance, z)
    layout = torch.channels_last if case.nhwc else torch.contiguous_format
    x_prev = poison(same.shape, F32, device, layout)
    low = None
    if case.low_channels:
        low = poison((case.n, case.low_channels, *case.hw), case.dtype, device, torch.channels_last)
    if case.packed:
        inputs["weight"] = module.pack_step_conv(inputs["weight"], case.image)
    got = module.conv_step(**inputs, variance=case.variance, x_prev=x_prev, low=low, arch=arch)
    assert got is x_prev
    check(got, same, truth, name="x_prev")
    assert inputs["counter"].tolist() == [case.row + 1, 0]
    if low is not None:
        assert torch.equal(low[:, : case.image], got.to(low.dtype))
        assert not low[:, case.image :].any(), "padding channels are not zero"
    return got


@pytest.mark.parametrize(("case", "arch"), GRID, ids=str)
def test_conv_step(case: Case, arch: int, device: torch.device) -> None:
    check_conv_step(conv_step, case, device, None if device.type == "cuda" and arch == 90 else arch)


def test_equals_the_two_kernels_in_a_row(device: torch.device) -> None:
    """In float32, where nothing is rounded between them, the fused step is the two launches to a few ulp."""
    inputs = make_inputs(Case(2, 32, (8, 8), dtype=F32), device)
    apart = {k: inputs[k] for k in ("table", "seed", "ids")} | {"counter": inputs["counter"].clone()}
    out = conv.conv(inputs["x"], inputs["weight"], inputs["bias"])
    two = sampler_step.sampler_step(inputs["x_t"], out, **apart)
    one = conv_step.conv_step(**inputs)
    assert float((one - two).abs().max()) <= 2.0**-20 * float(two.abs().max())


def test_loop_in_place(device: torch.device) -> None:
    """A trajectory that overwrites x_t, as a captured step replays it: only device values change."""
    case = Case(2, 16, (8, 8), dtype=F32)
    inputs = make_inputs(case, device)
    inputs["counter"].zero_()
    for i in range(3):
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        z = normal64(inputs["seed"], inputs["ids"], i, inputs["x_t"].shape[1:]).to(device)
        same, truth = in_a_row(inputs, "fixed"), in_a_row(wide, "fixed", z)
        conv_step.conv_step(**inputs, x_prev=inputs["x_t"])
        check(inputs["x_t"], same, truth, name=f"step {i}")
        assert inputs["counter"].tolist() == [i + 1, 0]


def test_sample_does_not_depend_on_its_batch(device: torch.device) -> None:
    """Bit for bit in batches of 1, 3 and 8: a program holds pixels of one image, whatever the batch."""
    inputs = make_inputs(Case(8, 32, (8, 8)), device)
    whole = conv_step.conv_step(**{**inputs, "counter": inputs["counter"].clone()})
    for first, n in ((7, 1), (2, 3)):
        cut = {k: inputs[k][first : first + n] for k in ("x", "x_t", "ids")}
        some = conv_step.conv_step(**{**inputs, **cut, "counter": inputs["counter"].clone()})
        assert torch.equal(whole[first : first + n], some), f"images {first}.. change in a batch of {n}"


def test_errors_say_what_to_do(device: torch.device) -> None:
    inputs = make_inputs(Case(2, 16, (8, 8)), device)
    with pytest.raises(ValueError, match="weights from pack_step_conv for 3 channels"):
        conv_step.conv_step(**{**inputs, "weight": conv.pack_conv(inputs["weight"])})
    with pytest.raises(ValueError, match="variance='learned' needs the network's output"):
        conv_step.conv_step(**inputs, variance="learned")
    with pytest.raises(ValueError, match=r"conv_step needs bias as contiguous \[3\]"):
        conv_step.conv_step(**{**inputs, "bias": torch.zeros(4, device=device)})
