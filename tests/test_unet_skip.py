"""NCSN++'s Skip blocks: FIR resampling against upstream's, on the fused set, under the Sampler, priced and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.downsampling import downsample_2d
from diffusers.models.upsampling import upsample_2d
from models import diffusers_unet, normal, unet
from tensors import fresh
from test_unet import NCSNPP, in_float64, relative_error

from ddpm_fast import ops
from ddpm_fast.benchmarking.checks import FLOAT32_LIMITS
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.house_rule import FLOOR, check
from ddpm_fast.kernels import reference
from ddpm_fast.ops import compiled
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import TimeRows, UNet

# One level of each kind; the others are in test_unet.py.
SMALL: dict[str, Any] = {
    **NCSNPP,
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
}
CHAIN = [900, 500, 100]


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 5, 2, 6), (1, 1, 14, 4)])
def test_fir_resampling_is_upstream_s(shape: tuple[int, ...]):
    """The truth: upstream's own in float64, by zeros put between pixels and a 4x4 convolution."""
    x, kernel = normal(*shape, seed=1, dtype=torch.float64), (1, 3, 3, 1)
    for ours, theirs in (
        (reference.fir_upsample, upsample_2d(x, kernel)),
        (reference.fir_downsample, downsample_2d(x, kernel)),
    ):
        torch.testing.assert_close(ours(x), theirs, rtol=0, atol=1e-14)
        check(ours(x.bfloat16()), theirs.bfloat16(), ours(x.bfloat16().double()))
        lying = x.float().contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours(lying), theirs.float(), rtol=0, atol=1e-6)


def test_fir_resampling_of_the_fused_set_is_the_reference_s(device: torch.device):
    fused, x = ops.triton(), fresh((2, 5, 6, 4), torch.float32, device, seed=2)
    for name in ("fir_upsample", "fir_downsample"):
        got = fused.leave(getattr(fused, name)(fused.enter(x)))
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got[:, :5], getattr(reference, name)(x), rtol=0, atol=1e-6)
        assert not got[:, 5:].any()  # padded on the way in
        assert fused.falls_back(name, {"x": x}) == "FIR resampling has no kernel"


def test_a_network_on_fused_operations_keeps_the_house_rule(device: torch.device):
    """In bfloat16; float32 is the next test's."""
    dtype = torch.bfloat16
    model = unet(SMALL).to(device).requires_grad_(False)
    rows = {"row": torch.tensor([1], dtype=torch.int32, device=device), "t": torch.tensor([9.0, 3.0], device=device)}
    x = fresh((1, 3, 4, 4), dtype, device, seed=3)
    truth = _at_row(model.double(), x.double(), ops.reference(), rows)
    same = _at_row(model.to(dtype), x, ops.reference(), rows)
    check(_at_row(model, x, ops.triton(), rows), same, truth)


def _at_row(model: UNet, x: torch.Tensor, which: ops.Ops, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.run(x, TimeRows(table=model.time_table(rows["t"]), **rows), which)


def test_samples_on_fused_operations_are_those_of_the_reference(device: torch.device):
    model = unet({**SMALL, "sample_size": 4})
    kwargs: dict[str, Any] = {"steps": CHAIN[:1], "device": device, "graph": "none"}
    plain = Sampler(model, Schedule(), ops="reference", **kwargs).sample(2, seed=3)
    fused = Sampler(model, Schedule(), ops="triton", **kwargs).sample(2, seed=3)
    assert relative_error(fused, plain) <= 1e-5
    alone = Sampler(model, Schedule(), ops="triton", **kwargs).sample(1, seed=3, first_id=1)
    assert torch.equal(alone, fused[1:])


@pytest.mark.parametrize("name", ["cpu", "winograd"])
@torch.no_grad()
def test_samples_are_those_of_a_loop_over_upstream_s_network(name: str):
    if name == "winograd":
        try:
            compiled.compiler()
        except RuntimeError as error:
            pytest.skip(str(error))
    theirs, schedule = diffusers_unet(SMALL), Schedule()
    exact = in_float64(theirs)
    sampler, seen = Sampler(unet(SMALL), schedule, steps=CHAIN, noise="torch", ops=name), []
    sampler.sample(2, seed=5, callback=lambda done, x: seen.append(x.clone()))
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(seen[0], torch.randn(2, 3, 8, 8, generator=generator))
    # Each step from our own x_t: along the chain rounding would compound.
    for i, (t, prev_t) in enumerate(zip(CHAIN, [*CHAIN[1:], -1])):
        z, x = torch.randn(2, 3, 8, 8, generator=generator), seen[i]
        truth = schedule.step(exact(x.double(), t).sample, t, x.double(), z.double(), prev_t)
        same = schedule.step(theirs(x, t).sample, t, x, z, prev_t)
        # Winograd's sums are of another form, and ten times as far from float64 as a direct sum (benchmarking/checks).
        floor = FLOAT32_LIMITS[0] if name == "winograd" else 4 * FLOOR
        check(seen[i + 1], same, truth, floor=floor, name=f"step {i}")


def test_prepared_copies_compute_what_the_model_does():
    model = unet(SMALL).double()
    x, t = normal(2, 3, 8, 8, dtype=torch.float64), torch.tensor([40])
    copy = prepare(model, torch.float64, "cpu", ops.reference())
    with torch.no_grad():
        got = copy.run(x, TimeRows(table=copy.time_table(t), row=torch.tensor([0], dtype=torch.int32), t=t))
        assert relative_error(got, model(x, t)) <= 1e-12


def test_a_plan_prices_them_as_torch_s_operations():
    from ddpm_fast.planning import plan

    planned = plan(unet({**SMALL, "time_embedding_type": "positional"}).config, Schedule(), batch=2)
    names = [r.operation for r in planned.records]
    assert names.count("fir_downsample") == 3 and names.count("fir_upsample") == 3  # h, its input, the image
    assert names[-1] == "sampler_step" and "conv_step" not in names  # the image is added between them
    assert any("6 x FIR resampling has no kernel" in note for note in planned.notes)
    first = next(r for r in planned.records if r.operation == "fir_downsample")
    n, c, h, w = 2, 32, 8, 8
    assert first.shapes == (("x", (n, c, h, w)), ("out", (n, c, h // 2, w // 2)))
    assert first.cost.bytes == 2 * n * c * h * w * (2 + 1 + 1 / 4)
