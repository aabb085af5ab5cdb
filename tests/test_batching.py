"""Batches: how large they are chosen; memory's end and numbers' end are found, and the images stay the same."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDPMScheduler
from models import TINY, diffusers_unet, unet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ddpm_fast as df
from ddpm_fast import ops
from ddpm_fast.engine import Program, StepProgram, batching
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.graphs.capture import GraphCaptureError
from ddpm_fast.inspection import model_cost
from ddpm_fast.step_table import step_table

SHAPE, STEPS = (3, 4, 4), 12
SCHEDULE = df.Schedule(num_train_timesteps=STEPS, beta_start=4e-3, beta_end=0.3)
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {**TINY, "block_out_channels": (4, 8), "norm_num_groups": 2}
# As torch says it on a CPU, c10/core/impl/alloc_cpu.cpp.
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"
)


def half(x: Tensor, t: Tensor) -> Tensor:
    """Elementwise: exactly the same in any batch."""
    return 0.5 * x + 0.01 * t.to(x.dtype)[:, None, None, None]


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


def sampler(model: Any = half, **kwargs: Any) -> df.Sampler:
    return df.Sampler(model, SCHEDULE, **{"image_shape": SHAPE, **kwargs})


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


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
    pipeline = mock.Mock(
        unet=diffusers_unet(SMALL),
        scheduler=DDPMScheduler(num_train_timesteps=STEPS),
        _progress_bar_config={"disable": True},
    )
    want = df.accelerate(pipeline)(5, generators(1)[0], STEPS, output_type="pt").images
    step, sizes = StepProgram.step, []

    def limited(self: StepProgram) -> None:
        sizes.append(self.batch_size)
        if self.batch_size > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step(self)

    monkeypatch.setattr(StepProgram, "step", limited)
    with pytest.warns(RuntimeWarning, match="out of memory with 5 images at a time; going on with 2"):
        got = df.accelerate(pipeline)(5, generators(1)[0], STEPS, output_type="pt").images
    assert sizes == [5] + [2] * 2 * STEPS + [1] * STEPS
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)  # a library may round another way in another batch


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

    monkeypatch.setattr("ddpm_fast.sampler.tqdm", Bar)
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


# --- numbers end ---


def poisoned(value: float, at: int, above: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A model whose output is ``value`` somewhere in the images whose first element is ``above`` something, at t."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        out = half(x, t)
        bad = (x[:, 0, 0, 0] > above) & (t == at)
        out[:, 1, 2, 3] = torch.where(bad, torch.full_like(out[:, 1, 2, 3], value), out[:, 1, 2, 3])
        return out

    return model


@pytest.mark.parametrize("batch_size", [4, 64])
def test_ids_and_steps_of_nan_are_named(batch_size: int):
    at, done = 7, STEPS - 7  # t = 7 is the step after which `done` are done
    before: list[Tensor] = []
    sampler().sample(20, first_id=30, callback=lambda k, x: before.append(x.clone()) if k == done - 1 else None)
    firsts = before[0][:, 0, 0, 0]
    above = float(firsts.sort().values[-4:-2].mean())  # between the third and the second largest
    bad = (firsts > above).nonzero().flatten().tolist()
    assert len(bad) == 3
    with pytest.raises(RuntimeError) as caught:
        sampler(poisoned(float("nan"), at, above), batch_size=batch_size).sample(20, first_id=30)
    named = ", ".join(f"id {30 + i} from step {done} of {STEPS} (t = 7)" for i in bad)
    assert str(caught.value) == f"images must be finite; in float32 these are not: {named}; look at the model's weights"


def test_unchecked_images_come_as_they_are():
    x = sampler(lambda x, t: x * float("nan")).sample(2, check_finite=False)
    assert x.isnan().all()


def test_many_ids_are_counted():
    with pytest.raises(RuntimeError, match=r"id 0 from step 1 of 12 \(t = 11\), .*id 7 from .* and 12 more; look"):
        sampler(lambda x, t: x * float("nan")).sample(20)


@pytest.mark.parametrize("kind", ["philox", "torch", "one", "list"])
def test_a_fault_that_does_not_come_again_is_only_warned_of(kind: str):
    """As of a bit that flipped: the image is drawn again, from the same noise, and is right."""
    noise = {"philox": "philox", "torch": "torch", "one": generators(1)[0], "list": generators(7)}
    same = {**noise, "one": generators(1)[0], "list": generators(7)}[kind]
    calls = []

    def once(x: Tensor, t: Tensor) -> Tensor:
        out = half(x, t)
        calls.append(0)
        if len(calls) == STEPS + 4:  # of the second batch
            out[1] = float("inf")
            out[1, 0, 0, 0] = float("nan")
        return out

    want = sampler(batch_size=3, noise=noise[kind]).sample(7, seed=1)
    with pytest.warns(RuntimeWarning, match="finite when drawn once more in the same way: 1 images, id 4 the first"):
        got = sampler(once, batch_size=3, noise=same).sample(7, seed=1)
    assert torch.equal(got, want)
    if isinstance(same, torch.Generator):
        assert torch.equal(same.get_state(), noise[kind].get_state())


def overflowing(n: int, keep: int, seed: int) -> tuple[df.UNet, list[int]]:
    """A U-Net whose first convolution passes float16's largest number for all but ``keep`` of n images, and which."""
    model = unet(SMALL)
    most = torch.zeros(n)

    def look(done: int, x: Tensor) -> None:
        if done < STEPS:
            torch.maximum(most, model.conv_in(x).abs().amax((1, 2, 3)), out=most)

    with torch.no_grad():
        model.conv_in.bias.zero_()
        df.Sampler(model, SCHEDULE, batch_size=n).sample(n, seed, callback=look)
        order = most.argsort()
        model.conv_in.weight.mul_(65504 / float(most[order[keep - 1 : keep + 1]].mean()))
    return model, sorted(order[keep:].tolist())


@pytest.mark.parametrize("batch_size", [2, 6])
def test_what_float16_cannot_hold_is_drawn_in_float32(batch_size: int):
    model, _ = overflowing(6, 4, seed=1)
    first: dict[int, int] = {}
    calls = []

    def look(done: int, x: Tensor) -> None:
        start = batch_size * (len(calls) // (STEPS + 1))
        calls.append(done)
        if start < 6 and len(calls) <= (STEPS + 1) * 6 // batch_size:
            for i in (~x.isfinite()).flatten(1).any(1).nonzero().flatten().tolist():
                first.setdefault(start + i, done)

    low = df.Sampler(model, SCHEDULE, batch_size=batch_size, dtype=torch.float16)
    with pytest.warns(RuntimeWarning) as caught:
        got = low.sample(6, seed=1, callback=look)
    assert 0 < len(first) < 6
    named = ", ".join(f"id {i} from step {k} of {STEPS} (t = {STEPS - k})" for i, k in first.items())
    assert [str(w.message) for w in caught] == [f"not finite in float16, so drawn in float32: {named}"]
    exact = df.Sampler(model, SCHEDULE).sample(6, seed=1)
    bad = sorted(first)
    torch.testing.assert_close(got[bad], exact[bad], rtol=0, atol=2e-5)
    good = [i for i in range(6) if i not in first]
    assert got.isfinite().all() and not torch.equal(got[good], exact[good]), "these stay as float16 drew them"
    torch.testing.assert_close(got[good], exact[good], rtol=0, atol=0.2)


def test_noise_in_float32_is_that_of_the_run():
    """A generator draws other numbers in float16: the images are of those, by a network in float32."""
    model = unet(SMALL)
    with torch.no_grad():
        model.conv_in.weight.mul_(1e6)
    low = df.Sampler(model, SCHEDULE, batch_size=2, dtype=torch.float16, noise=generators(3))
    with pytest.warns(RuntimeWarning, match="so drawn in float32: id 0 .* id 1 .* id 2 from step 1 "):
        got = low.sample(3)
    exact = copy.deepcopy(model).double()
    for i, g in enumerate(generators(3)):
        x = torch.randn(1, 3, 8, 8, generator=g, dtype=torch.float16).double()
        for t in SCHEDULE.timesteps():
            z = torch.randn(1, 3, 8, 8, generator=g, dtype=torch.float16).double() if t else None
            with torch.no_grad():
                x = SCHEDULE.step(exact(x, t), t, x, z)
        torch.testing.assert_close(got[i : i + 1].double(), x, rtol=0, atol=1e-4)


def test_what_float32_cannot_hold_either_is_an_error():
    model = unet(SMALL)
    with torch.no_grad():
        model.conv_in.weight.mul_(1e39)
    low = df.Sampler(model, SCHEDULE, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"in bfloat16 and again in float32 these are not: id 0 from step 1 of 12"):
        low.sample(2)


def test_a_model_that_was_changed_since_is_no_way_out():
    model, _ = overflowing(6, 4, seed=1)
    low = df.Sampler(model, SCHEDULE, dtype=torch.float16)
    with torch.no_grad():
        model.conv_out.bias += 1
    with pytest.raises(RuntimeError, match="in float16 these are not: id "):
        low.sample(6, seed=1)


def test_a_call_waits_once_and_not_in_its_loop():
    """Whether all is finite is asked at the end of the call, however many batches and steps it has."""

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked[-1] += any(w in func.name() for w in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"))
            return func(*args, **(kwargs or {}))

    asked: list[int] = []
    for n, steps in ((2, 3), (2, 12), (9, 12)):
        asked.append(0)
        drawing = sampler(batch_size=2, steps=steps)
        drawing.sample(n)  # makes its programs
        with Asked():
            drawing.sample(n)
    assert asked == [1, 1, 1]
