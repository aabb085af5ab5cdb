"""The arena: no two results that live at once share a byte, the plan fits what runs, and it is small."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_fast import ops
from ddpm_fast.config import UNetConfig
from ddpm_fast.engine import StepProgram
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.inspection import _PeakMemory
from ddpm_fast.ops.buffers import ALIGNMENT, ENOUGH, Arena, Fresh, Memory, Request, place, plan
from ddpm_fast.presets import PRESETS
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table
from ddpm_fast.unet import UNet

CPU = torch.device("cpu")
SPANS = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(1, 8)), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(SPANS)
def test_results_that_live_at_once_share_no_byte(spans: list[tuple[int, int, int]]):
    requests = [Request((size,), torch.uint8, False, birth, birth + life) for size, birth, life in spans]
    total = place(requests)
    for i, a in enumerate(requests):
        assert a.offset % ALIGNMENT == 0 and a.offset + a.size <= total
        for b in requests[:i]:
            if a.birth < b.death and b.birth < a.death:
                assert a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
    alive = max(sum(r.size for r in requests if r.birth <= t < r.death) for t in range(30))
    assert alive <= total <= sum(r.size for r in requests)


def chain(memory: Memory, lengths: list[int]) -> None:
    """Each result made while the one before is still there, as in a network without skips."""
    before = None
    for n in lengths:
        before = memory.floats((n,), CPU)
    del before


def test_two_places_serve_a_chain():
    found = plan(lambda memory: chain(memory, [64] * 10))
    assert found.size == 2 * 256 and found.largest == found.size
    assert [(r.birth, r.death) for r in found.requests] == [(i, i + 2) for i in range(9)] + [(9, 10)]


def test_a_result_written_as_another_is_read_takes_its_place():
    """Only where nobody holds the older one at the next request: else both have a place."""

    def run(memory: Memory, hold: bool) -> None:
        old = memory.floats((64,), CPU)
        new = memory.floats((64,), CPU)
        memory.replaced(old, new)
        if not hold:
            del old
        memory.floats((1,), CPU)
        del new

    replaced, held = (plan(lambda memory, hold=hold: run(memory, hold)) for hold in (False, True))
    assert [r.offset for r in replaced.requests] == [0, 0, 256] and replaced.size == replaced.largest == 512
    assert len({r.offset for r in held.requests}) == 3 and held.size == 768


def test_a_view_keeps_its_result_alive():
    def run(memory: Memory) -> None:
        part = memory.floats((64,), CPU)[:8]
        memory.floats((64,), CPU)
        memory.floats((64,), CPU)
        del part

    assert [r.death for r in plan(run).requests] == [3, 2, 3]


def test_an_arena_serves_its_plan_and_nothing_else():
    found = plan(lambda memory: chain(memory, [64, 32]))
    arena = Arena(found, CPU)
    a, b = arena.floats((64,), CPU), arena.floats((32,), CPU)
    assert a.is_contiguous() and {t.untyped_storage().data_ptr() for t in (a, b)} == {arena.storage.data_ptr()}
    with pytest.raises(RuntimeError, match="another was asked for"):
        arena.floats((8,), CPU)
    arena.start()
    assert arena.floats((64,), CPU).data_ptr() == a.data_ptr()
    with pytest.raises(RuntimeError, match="plan again"):
        arena.floats((33,), CPU)


def test_maps_are_channels_last():
    found = plan(lambda memory: memory.map((2, 6, 5, 7), torch.bfloat16, CPU))
    y = Arena(found, CPU).map((2, 6, 5, 7), torch.bfloat16, CPU)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.bfloat16
    assert Fresh().map((2, 6, 5, 7), torch.bfloat16, CPU).stride() == y.stride()


# --- the size, against diffusers ---


def diffusers_peak(config: dict[str, Any], x: torch.Tensor) -> int:
    """The most bytes of activations that diffusers' U-Net holds at one moment of a forward pass."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device(x.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = diffusers.UNet2DModel(**config).to(x.dtype).eval()
        t = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad(), _PeakMemory() as memory:
        model(x, t)
    return memory.peak


def program(config: dict[str, Any], dtype: torch.dtype, device: str, batch: int, size: int) -> StepProgram:
    pytest.importorskip("triton", reason="the fused operations need Triton")
    with torch.device(device):
        model = UNet(UNetConfig(**config)).eval()
    table = step_table(Schedule(), steps=2)
    return StepProgram(prepare(model, dtype, device, ops.triton()), table, batch, (3, size, size))


CIFAR10 = [("cifar10", batch, 32) for batch in (1, 2, 3, 4, 8, 16, 64)]
LSUN256 = [("lsun256", batch, 256) for batch in (1, 2, 4, 16)]


@pytest.mark.parametrize("name, batch, size", CIFAR10 + LSUN256)
def test_activations_need_at_most_60_percent_of_diffusers(name: str, batch: int, size: int):
    """The google models in bfloat16, by allocation tracking on the meta device; weights on neither side."""
    config = dict(PRESETS[name].model)
    theirs = diffusers_peak(config, torch.empty(batch, 3, size, size, dtype=torch.bfloat16, device="meta"))
    memory = program(config, torch.bfloat16, "meta", batch, size).memory
    assert memory.activations <= 0.60 * theirs
    # With weights on both sides; ours have the upsampling phases and a float32 time embedding besides.
    parameters = {"cifar10": 35_746_307, "lsun256": 113_673_219}[name] * 2
    assert memory.weights <= 1.15 * parameters
    if batch * size**2 >= 8 * 32**2:
        assert memory.activations + memory.weights < theirs + parameters


def test_on_a_cpu_for_real_too():
    """A small model with memory behind it: what is allocated is what the plan says."""
    config = {**PRESETS["cifar10"].model, "block_out_channels": (32, 64), "norm_num_groups": 8, "sample_size": 64}
    config |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    theirs = diffusers_peak(config, torch.zeros(8, 3, 64, 64))
    with _PeakMemory() as made:
        ours = program(config, torch.float32, "cpu", 8, 64)
    memory = ours.memory
    assert ours._arena is not None
    assert ours._arena.storage.numel() == memory.arena == ours.plan.size
    assert memory.activations <= made.live, "the tracker saw the arena being made"
    assert memory.activations <= 0.60 * theirs


def test_parts_and_a_second_conv_in_save_what_they_are_for():
    """A batch is cut into images, a single image into rows; conv_in runs again only where that is not enough."""
    config = dict(PRESETS["cifar10"].model)
    alone, many = (program(config, torch.bfloat16, "meta", n, 32) for n in (1, 64))
    whole = plan(alone._dry_run, most_launches=0)
    assert not whole.parts and not whole.again
    assert alone.plan.parts and alone.plan.again and alone.plan.size <= 0.75 * whole.size
    assert any(r.shape == (1, 384, 17, 32) for r in alone.plan.requests), "half of the rows, and one beside them"
    assert many.plan.parts and not many.plan.again and many.plan.size <= ENOUGH * 64 * whole.size
    for launches, few in ((2, 2), (3, 3), (4, 3)):
        found = plan(alone._dry_run, most_launches=launches)
        assert 2 * sum(p - 1 for p in found.parts.values()) + found.again <= few


def test_a_result_that_is_made_anew_is_not_kept():
    """Three maps stand at once, or two of them and the first again."""

    def run(memory: Memory) -> None:
        first = memory.floats((64,), CPU)
        again = memory.again(first)
        kept = None if again else first
        second = memory.floats((64,), CPU)
        del first
        third = memory.floats((64,), CPU)
        del second, third
        memory.floats((64,), CPU) if again else kept

    found = plan(run)
    assert found.again and found.size == 2 * 256 and len(found.requests) == 4
    assert not plan(run, most_launches=0).again
