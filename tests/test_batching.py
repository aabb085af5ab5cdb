"""Batches: how large they are chosen; memory's end is found, and the images stay the same."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batching_setup import CPU, SCHEDULE, SHAPE, SMALL, STEPS, generators, half, sampler
from diffusers import DDPMPipeline, DDPMScheduler
from models import TINY, diffusers_unet, unet
from tensors import rounding
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import ops
from ddpm_fast.engine import Program, StepProgram, batching
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.graphs.capture import GraphCaptureError
from ddpm_fast.inspection import model_cost
from ddpm_fast.step_table import step_table

# As torch says it on a CPU, c10/core/impl/alloc_cpu.cpp.
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"
)


class Memory:
    """A model in a memory that holds ``most`` images; more fail when the timestep is ``at``."""

    def __init__(self, most: int, error: Callable[[], Exception] | None = None, at: int = STEPS - 1):
        self.most, self.at, self.sizes = most, at, []
        self.error = error or (lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if t[0] == self.at:
            self.sizes.append(len(x))
            if len(x) > self.most:
                raise self.error()
        return half(x, t)


def caused(error: Exception) -> Exception:
    wrapper = GraphCaptureError("the step cannot be captured")
    wrapper.__cause__ = error
    return wrapper


# --- memory ends ---


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        lambda: RuntimeError(CPU_SAYS),
        MemoryError,
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        lambda: caused(torch.OutOfMemoryError("CUDA out of memory.")),
    ],
    ids=["cuda", "cpu", "python", "cublas", "captured"],
)
def test_the_batch_is_halved_and_the_images_are_the_same(error: Callable[[], Exception]):
    want = sampler(batch_size=64).sample(70, seed=3, first_id=5)
    memory = Memory(10, error)
    tight = sampler(memory, batch_size=64)
    with pytest.warns(RuntimeWarning) as caught:
        got = tight.sample(70, seed=3, first_id=5)
    assert torch.equal(got, want)
    assert [str(w.message) for w in caught] == [
        "out of memory with 64 images at a time; going on with 8 (the same images)"
    ]
    assert memory.sizes == [64, 32, 16] + [8] * 8 + [6]
    memory.sizes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the size is known by now
        assert torch.equal(tight.sample(20, seed=3, first_id=5), want[:20])
    assert memory.sizes == [8, 8, 4]


def test_memory_that_ends_later_halves_again():
    memory, want = Memory(6), sampler(batch_size=8).sample(16)
    tight = sampler(memory, batch_size=8)

    def shrink(step: int, x: Tensor) -> None:
        if step == STEPS and memory.sizes[-1] == 4:
            memory.most = 1

    with pytest.warns(RuntimeWarning) as caught:
        got = tight.sample(16, callback=shrink)
    assert torch.equal(got, want)
    assert [str(w.message).split("; ")[1].split(" (")[0] for w in caught] == ["going on with 4", "going on with 1"]


def test_one_image_that_does_not_fit_is_one_clear_line():
    with pytest.raises(torch.OutOfMemoryError) as caught:
        sampler(Memory(0), batch_size=4).sample(4)
    message = str(caught.value)
    assert message.startswith("memory must hold one image at a time, and does not; ") and "\n" not in message
    assert message.endswith(": CUDA out of memory. Tried to allocate 2 GiB.")


def test_other_errors_are_not_taken_for_it():
    memory = Memory(1, lambda: RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        sampler(memory, batch_size=4).sample(4)
    assert memory.sizes == [4]


@pytest.mark.parametrize("kind", ["seeded", "one", "list", "shared list"])
@pytest.mark.parametrize("at", [STEPS - 1, 4])  # the first step, and in the middle, when generators have advanced
def test_generators_are_put_back_before_a_smaller_batch(kind: str, at: int):
    def noise() -> Any:
        one = generators(1)[0]
        return {"seeded": "torch", "one": one, "list": generators(7), "shared list": [one] * 7}[kind]

    plain, tight = noise(), noise()
    want = sampler(batch_size=5, noise=plain).sample(7, seed=2)
    with pytest.warns(RuntimeWarning, match="going on with 2"):
        got = sampler(Memory(3, at=at), batch_size=5, noise=tight).sample(7, seed=2)
    assert torch.equal(got, want)
    for a, b in zip([plain] if kind == "one" else plain, [tight] if kind == "one" else tight):
        assert kind == "seeded" or torch.equal(a.get_state(), b.get_state()), "and the next call goes on from there"


def test_an_accelerated_pipeline_draws_its_images_in_parts(monkeypatch: pytest.MonkeyPatch):
    pipeline = DDPMPipeline(diffusers_unet(SMALL), DDPMScheduler(num_train_timesteps=STEPS))
    pipeline.set_progress_bar_config(disable=True)

    def draw(one: Any) -> Tensor:
        return one(5, generators(1)[0], STEPS, output_type="pt").images

    want = draw(df.accelerate(pipeline))
    bound = rounding(pipeline.unet, lambda: draw(pipeline), draw(pipeline))
    step, sizes = StepProgram.step, []

    def limited(self: StepProgram) -> None:
        sizes.append(self.batch_size)
        if self.batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step(self)

    monkeypatch.setattr(StepProgram, "step", limited)
    with pytest.warns(RuntimeWarning, match="out of memory with 5 images at a time; going on with 2"):
        got = draw(df.accelerate(pipeline))
    assert sizes == [5] + [2] * 2 * STEPS + [1] * STEPS
    torch.testing.assert_close(got, want, rtol=0, atol=bound)  # a library may round another way in another batch


def test_the_bar_and_the_callback_begin_the_batch_again(monkeypatch: pytest.MonkeyPatch):
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, **kwargs: Any):
            self.total, self.n, self.most = total, 0, 0
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def update(self, n: int) -> None:
            self.n += n

    monkeypatch.setattr("ddpm_fast.progress.Bar", Bar)
    seen: list[tuple[int, int]] = []
    with pytest.warns(RuntimeWarning):
        tight = sampler(Memory(2, at=5), batch_size=4)
        tight.sample(6, progress=True, interval=6, callback=lambda done, x: seen.append((done, len(x))))
    part = [(0, 2), (6, 2), (12, 2)]
    assert seen == [(0, 4), (6, 4), *part, *part, *part]
    assert (bars[0].n, bars[0].total) == (3 * STEPS, 3 * STEPS)


def test_what_a_failed_batch_held_is_free_before_the_next():
    held: list[weakref.ref[Program]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        if len(x) == 8:
            held.extend(weakref.ref(program) for program, _ in tight._programs.values())
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert [ref() for ref in held] == [None]
        return half(x, t)

    tight = sampler(model, batch_size=8)
    with pytest.warns(RuntimeWarning):
        tight.sample(8)


# --- chosen by the plan ---


@pytest.mark.parametrize(
    ("flops", "parameters", "size"),
    [
        (837_959_680, 1_164_259, 32),
        (12_443_713_536, 35_746_307, 8),
        (497 * 10**9, 113_673_219, 1),
        (133_726_208, 1_164_259, 128),
    ],
    ids=["bundled at 40 pixels", "cifar10", "256 pixels", "bundled"],
)
def test_on_a_cpu_a_batch_is_as_large_as_is_fast(flops: int, parameters: int, size: int):
    assert batching.fast_batch(flops, parameters) == size
    besides = 1e9 + 25 * 4 * parameters  # what it is fitted to: the step's own cost, in FLOPs
    if 1 < size < 128:
        assert besides / (besides + size * flops) <= 0.05 < besides / (besides + size / 2 * flops)


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_on_a_cpu_it_must_fit_too(monkeypatch: pytest.MonkeyPatch, guidance: float | None):
    model = unet({**SMALL, "num_class_embeds": 3} if guidance else SMALL)
    an_image = model_cost(model, 8, 8)["activation_bytes"] * (2 if guidance else 1)
    sizes = {}
    for room in (1, 5 * an_image, 9 * an_image, 2**40):
        monkeypatch.setattr(batching, "free_bytes", lambda device, room=room: int(room / 0.8) + 1)
        sizes[room // an_image] = df.Sampler(model, SCHEDULE, batch_size="auto", guidance_scale=guidance).batch_size
    assert list(sizes.values()) == [1, 4, 8, 128]


def test_on_a_gpu_it_is_the_largest_that_the_arena_s_plan_allows(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton", reason="the fused operations need Triton")
    model, table, fused = unet(TINY), step_table(SCHEDULE), ops.triton()
    ghost = prepare(df.UNet(model.config), torch.bfloat16, "meta", fused)

    def planned(n: int) -> int:
        return StepProgram(ghost, table, n, (3, 8, 8)).memory.activations

    room = planned(48)
    monkeypatch.setattr(batching, "free_bytes", lambda device: int(room / batching.SHARE) + 1)
    chosen = batching.choose(model, table, (3, 8, 8), torch.bfloat16, torch.device("cuda"), fused)
    assert chosen == 32 and planned(32) <= room < planned(64)
    monkeypatch.setattr(batching, "free_bytes", lambda device: 2**40)
    assert batching.choose(model, table, (3, 8, 8), torch.bfloat16, torch.device("cuda"), fused) == 2048


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "meminfo").write_text("MemTotal:  90 kB\nMemAvailable:    70 kB\n")
    assert batching._available(tmp_path / "meminfo") == 70 * 1024
    assert batching._available(tmp_path / "none") > 2**20
    assert batching._container_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("30\n")
    assert batching._container_left(tmp_path) is None
    (tmp_path / "memory.max").write_text("100\n")
    assert batching._container_left(tmp_path) == 70
    assert 2**20 < batching.free_bytes(CPU) < 2**50
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert batching.free_bytes(torch.device("cuda")) == 1100


def test_automatic_batches():
    memory = Memory(1000)
    auto = sampler(memory, batch_size="auto")
    assert auto.batch_size == batching.DEFAULT_BATCH == 64
    assert torch.equal(auto.sample(130), sampler(batch_size=7).sample(130))
    assert memory.sizes == [64, 64, 2]
    assert sampler(batch_size="auto", noise=generators(2)).sample(2).shape == (2, *SHAPE)
    assert auto.sample(0).shape == (0, *SHAPE)
    for noise in ("torch", generators(1)[0]):
        with pytest.raises(ValueError, match="'auto' needs noise that does not depend on the batch"):
            sampler(batch_size="auto", noise=noise)


def test_automatic_batches_of_the_fused_step_are_even():
    """There a partial batch costs as much as a whole one, and the bits are the same."""
    pytest.importorskip("triton", reason="the fused operations need Triton")
    memory, options = Memory(1000), {"ops": "triton", "steps": [11, 3], "graph": "none"}
    got = sampler(memory, batch_size="auto", **options).sample(70)
    assert memory.sizes == [35, 35]
    assert torch.equal(got, sampler(batch_size=64, **options).sample(70))
