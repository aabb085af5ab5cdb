"""A Sampler in a server: called from many threads, copied and sent to other processes, looked at, leaving nothing."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TINY, unet
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.engine.turns import Turns
from ddpm_fast.ops import compiled

SCHEDULE = df.Schedule(num_train_timesteps=20, beta_start=4e-3, beta_end=0.3)
# Wide enough for the Winograd set's own convolutions, and for weights that oneDNN arranges.
WIDE: dict[str, Any] = {**TINY, "block_out_channels": (16, 96), "num_class_embeds": 3}


def _compiler() -> bool:
    try:
        return bool(compiled.compiler())
    except RuntimeError:
        return False


SETS = ["reference", "cpu", pytest.param("winograd", marks=pytest.mark.skipif(not _compiler(), reason="no compiler"))]


def sampler(ops: str = "reference", **options: Any) -> df.Sampler:
    return df.Sampler(unet(WIDE), SCHEDULE, **{"batch_size": 2, "steps": 6, "ops": ops, **options})


def draw(sampler: df.Sampler, k: int) -> Tensor:
    return sampler.sample(1 + k % 3, seed=k, labels=k % 3, first_id=10 * k)


def in_threads(work: Callable[[int], Tensor], calls: int, threads: int = 4) -> list[Tensor]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(calls)))


@pytest.mark.parametrize("ops", SETS)
def test_one_sampler_serves_many_threads(ops: str):
    alone = sampler(ops)
    expected = [draw(alone, k) for k in range(12)]
    shared = sampler(ops)
    assert all(map(torch.equal, in_threads(lambda k: draw(shared, k), 12), expected))


def test_any_callable_from_many_threads():
    """Its labels lie in a static buffer too."""

    def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        time.sleep(1e-4)  # another thread's turn, were there no lock
        return 0.1 * x + 0.01 * t.view(-1, 1, 1, 1) + labels.view(-1, 1, 1, 1)

    made = [df.Sampler(model, SCHEDULE, batch_size=2, steps=8, image_shape=(1, 4, 4)) for _ in range(2)]
    expected = [draw(made[0], k) for k in range(8)]
    assert all(map(torch.equal, in_threads(lambda k: draw(made[1], k), 8), expected))


def test_a_generator_is_drawn_from_by_one_call_at_a_time():
    """Which call comes first is open; that each is drawn from one place of the stream on is not."""
    expected = sampler(noise=torch.Generator().manual_seed(5))
    in_turn = [expected.sample(2, labels=0) for _ in range(4)]
    shared = sampler(noise=torch.Generator().manual_seed(5))
    got = in_threads(lambda k: shared.sample(2, labels=0), 4)
    assert sorted(x.sum().item() for x in got) == sorted(x.sum().item() for x in in_turn)
    assert all(any(torch.equal(x, y) for y in in_turn) for x in got)


def test_two_samplers_in_two_threads():
    one, other = sampler(), sampler(steps=5)
    expected = [draw(one, k) for k in range(4)], [draw(other, k) for k in range(4)]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(lambda: [draw(one, k) for k in range(4)])
        second = pool.submit(lambda: [draw(other, k) for k in range(4)])
    assert all(map(torch.equal, first.result(), expected[0]))
    assert all(map(torch.equal, second.result(), expected[1]))


def test_a_call_within_a_call_is_one_error_and_does_no_harm():
    shared, seen = sampler(), []
    expected = draw(sampler(), 1)

    def callback(step: int, x: Tensor) -> None:
        if step == 3:
            with pytest.raises(RuntimeError, match="a callback cannot call the Sampler that calls it") as raised:
                shared.sample(1, labels=0)
            assert "\n" not in str(raised.value)
            seen.append(draw(sampler(), 2))  # another one may be called

    got = shared.sample(2, seed=1, labels=1, first_id=10, callback=callback)
    assert torch.equal(got, expected) and torch.equal(seen[0], draw(shared, 2))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, StopIteration])
def test_a_call_that_ends_in_an_error_leaves_the_next_one_its_turn(error: type[BaseException]):
    shared = sampler()

    def callback(step: int, x: Tensor) -> None:
        if step == 3:
            raise error

    with pytest.raises((error, RuntimeError)):
        shared.sample(2, labels=0, callback=callback)
    assert all(map(torch.equal, in_threads(lambda k: draw(shared, k), 2), [draw(sampler(), k) for k in range(2)]))


def test_a_thread_that_waits_can_be_interrupted():
    """Ctrl-C ends the wait for another thread's call, and that call is right."""
    shared, inside, go_on = sampler(), threading.Event(), threading.Event()

    def hold(step: int, x: Tensor) -> None:
        inside.set()
        go_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(shared.sample, 2, 1, 1, 10, callback=hold, interval=6)
        assert inside.wait(30)
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                shared.sample(1, labels=0)
        finally:
            signal.signal(signal.SIGINT, before)
            go_on.set()
        assert torch.equal(other.result(), draw(sampler(), 1))


def test_noise_that_is_set_is_checked():
    shared = sampler()
    with pytest.raises(ValueError, match=r"noise must be 'philox', .*; got 'pink'"):
        shared.noise = "pink"
    with pytest.raises(ValueError, match="batch_size='auto' needs noise that does not depend on the batch"):
        sampler(batch_size="auto").noise = torch.Generator()
    assert torch.equal(draw(shared, 0), draw(sampler(), 0)), "what was refused changed nothing"


# --- copies ---


def pickled(sampler: df.Sampler) -> df.Sampler:
    return pickle.loads(pickle.dumps(sampler))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ops", SETS)
def test_a_copy_draws_the_same_bits(ops: str, dtype: str):
    original = sampler(ops, dtype=dtype, guidance_scale=1.5, steps=3)
    copies = [pickled(original)]  # and after a call, which arranges weights
    expected = original.sample(3, seed=4, labels=1)  # in two batches, with programs of two shapes on a CPU
    for other in [*copies, pickled(original), copy.deepcopy(original), copy.copy(original)]:
        assert not other._programs and repr(other) == repr(original)
        assert torch.equal(other.sample(3, seed=4, labels=1), expected)
    assert original._programs and torch.equal(original.sample(3, seed=4, labels=1), expected)


def test_a_copy_has_a_lock_of_its_own():
    """Within a call of the original it can be called."""
    original = sampler()
    drawn: list[Tensor] = []
    original.sample(1, labels=0, interval=6, callback=lambda step, x: drawn.append(draw(copy.deepcopy(original), 1)))
    assert len(drawn) == 2 and all(torch.equal(x, draw(sampler(), 1)) for x in drawn)


def _model(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


def test_generators_and_callables_are_copied():
    original = df.Sampler(_model, SCHEDULE, noise=torch.Generator().manual_seed(3), image_shape=(1, 4, 4))
    others = pickle.loads(pickle.dumps(original)), copy.deepcopy(original)
    expected = original.sample(2)
    assert all(torch.equal(other.sample(2), expected) for other in others), "each from where the generator was"


@pytest.mark.parametrize("changed", [False, True])
def test_a_copy_draws_in_float32_what_half_precision_cannot_hold(changed: bool):
    """As the original does: over the weights it was made from, where they are still those."""
    model = unet(TINY)
    with torch.no_grad():
        model.conv_in.weight.mul_(1e5)
    original = df.Sampler(model, SCHEDULE, steps=4, dtype="float16", ops="reference")
    if changed:
        with torch.no_grad():
            model.conv_in.weight.mul_(1.0)
    for other in (pickled(original), copy.deepcopy(original)):
        if changed:
            with pytest.raises(RuntimeError, match="images must be finite; in float16 these are not"):
                other.sample(1)
        else:
            with pytest.warns(RuntimeWarning, match="not finite in float16, so drawn in float32"):
                drawn = other.sample(1)
            assert torch.equal(drawn, df.Sampler(model, SCHEDULE, steps=4, ops="reference").sample(1))


def _child(sampler: df.Sampler, answers: Any) -> None:
    torch.set_num_threads(1)  # as the parent: sums are cut by threads, and so round by them
    answers.put(draw(sampler, 1).numpy())


@pytest.mark.parametrize("start", ["spawn", "fork"])
@pytest.mark.parametrize("ops", SETS[1:])
def test_another_process_draws_the_same(start: str, ops: str):
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {start}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    try:
        original = sampler(ops)
        expected = draw(original, 1)
        context = multiprocessing.get_context(start)
        answers = context.Queue()
        with ThreadPoolExecutor(1) as pool:  # another thread is in the middle of a call meanwhile
            inside, go_on = threading.Event(), threading.Event()

            def hold(step: int, x: Tensor) -> None:
                inside.set()
                go_on.wait(60)

            other = pool.submit(original.sample, 1, labels=0, callback=hold, interval=6)
            assert inside.wait(60)
            process = context.Process(target=_child, args=(original, answers))
            try:
                process.start()
                assert torch.equal(torch.from_numpy(answers.get(timeout=120)), expected)
            finally:
                go_on.set()
            other.result()
            process.join(60)
    finally:
        torch.set_num_threads(threads)
    assert process.exitcode == 0


def test_an_ops_value_of_one_s_own_is_pickled_field_by_field():
    import dataclasses

    from ddpm_fast import ops

    assert pickle.loads(pickle.dumps(ops.cpu(keep_memory=False))).name == "cpu"
    changed = dataclasses.replace(ops.reference(), name="mine")
    with pytest.raises((pickle.PicklingError, AttributeError)):  # its fields hold functions without a name
        pickle.dumps(changed)
    assert copy.deepcopy(changed) is changed


# --- on a GPU, by stand-ins ---


def test_a_turn_on_a_gpu_begins_behind_the_last_one(monkeypatch: pytest.MonkeyPatch):
    log: list[tuple[str, str]] = []

    class Stream:
        def __init__(self, name: str):
            self.name = name

        def wait_event(self, event: str) -> None:
            log.append((self.name, f"waits for {event}"))

        def record_event(self) -> str:
            return f"the end on {self.name}"

    now = SimpleNamespace(stream=Stream("a"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now.stream)
    turns = Turns("Sampler", torch.device("cuda", 0))
    with turns.taken():
        log.append(("a", "works"))
    now.stream = Stream("b")
    with pytest.raises(ZeroDivisionError), turns.taken():
        raise ZeroDivisionError
    with turns.taken():
        log.append(("b", "works"))
    assert log == [("a", "works"), ("b", "waits for the end on a"), ("b", "waits for the end on b"), ("b", "works")]
    assert pickle.loads(pickle.dumps(turns))._end is None


# --- what is seen ---


def test_the_repr_says_what_draws_and_why():
    lines = repr(sampler("cpu", method="ddim", dtype=torch.bfloat16, guidance_scale=2)).splitlines()
    assert lines == [
        "Sampler(",
        "  model: UNet",
        "  images: 3 x 8 x 8",
        "  steps: 6 of 20",
        "  method: ddim",
        "  batch_size: 2",
        "  dtype: bfloat16",
        "  device: cpu",
        "  ops: cpu (named)",
        "  graph: none",
        "  noise: philox",
        "  guidance_scale: 2",
        ")",
    ]
    automatic = df.Sampler(_model, SCHEDULE, image_shape=(1, 4, 4), noise=[torch.Generator()])
    assert "  model: _model\n" in repr(automatic) and "  noise: by generator\n" in repr(automatic)
    assert f"  ops: cpu ({automatic.ops_reason})\n" in repr(automatic) and "a batch is only" in automatic.ops_reason


@pytest.mark.parametrize("progress", [False, True])
def test_no_thread_is_left(progress: bool):
    """In a process of its own: any other test's bar may have left tqdm's monitor."""
    import subprocess
    import sys

    code = f"""
import sys, threading, ddpm_fast as df
from diffusers import DDPMPipeline, DDPMScheduler
sys.path.insert(0, {str(Path(__file__).parent)!r})
from models import TINY, diffusers_unet
sampler = df.Sampler(lambda x, t: 0.1 * x, df.Schedule(num_train_timesteps=3), image_shape=(1, 4, 4))
sampler.sample(2, progress={progress})
pipeline = DDPMPipeline(diffusers_unet(TINY), DDPMScheduler())
pipeline.set_progress_bar_config(disable={not progress})
df.accelerate(pipeline)(num_inference_steps=2)
print([thread.name for thread in threading.enumerate()])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['MainThread']"
    assert ("2 images: 100%" in done.stderr) == progress


# --- the object that accelerate makes ---


def accelerated(**options: Any) -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler
    from models import diffusers_unet

    scheduler = DDPMScheduler(num_train_timesteps=20, beta_start=4e-3, beta_end=0.3)
    pipeline = DDPMPipeline(diffusers_unet(TINY), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return df.accelerate(pipeline, **options)


def accelerated_images(fast: Any, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(k)
    return fast(1 + k % 2, generator, num_inference_steps=4 + k % 2, output_type="pt").images


def test_an_accelerated_pipeline_serves_many_threads():
    """Each call has its own generator, number of images and number of steps."""
    alone = accelerated()
    expected = [accelerated_images(alone, k) for k in range(8)]
    shared = accelerated()
    assert all(map(torch.equal, in_threads(lambda k: accelerated_images(shared, k), 8), expected))
    assert torch.equal(accelerated_images(copy.deepcopy(shared), 3), expected[3])


def test_an_accelerated_pipeline_takes_the_name_of_a_dtype():
    assert accelerated(dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="accelerate computes in float32, bfloat16, float16; got 'bf16'"):
        accelerated(dtype="bf16")


# --- names of dtypes ---


def test_a_dtype_may_be_named(tmp_path: Any):
    from ddpm_fast.checkpoints import Checkpoint
    from ddpm_fast.planning import plan
    from ddpm_fast.roofline import Roofs, roofs
    from ddpm_fast.verification import verify

    assert sampler(dtype="bfloat16").dtype == torch.bfloat16
    assert torch.equal(draw(sampler(dtype="bfloat16"), 1), draw(sampler(dtype=torch.bfloat16), 1))
    for wrong in ("bf16", "int8", "", 16, None, torch.int8, [torch.float32]):
        with pytest.raises(ValueError, match=r"^dtype must be one of float32, bfloat16, float16; got "):
            sampler(dtype=wrong)
    model = unet(TINY)
    checkpoint = Checkpoint(model, SCHEDULE, "here", "diffusers", [])
    assert verify(checkpoint, dtype="bfloat16", steps=2, probes=1, n=1).dtype == "bfloat16"
    assert plan(model.config, SCHEDULE, 1, dtype="float16").dtype == torch.float16
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16; got 'half'"):
        plan(model.config, SCHEDULE, 1, dtype="half")
    found = roofs("cpu", "float32", cache=tmp_path / "roofs.json", budget_s=1e-3)
    assert isinstance(found, Roofs) and found.dtype == "float32"
    df.save(tmp_path / "half", model, SCHEDULE, dtype="float16")
    df.save(tmp_path / "same", model, SCHEDULE, dtype=torch.float16)
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "half" / file).read_bytes() == (tmp_path / "same" / file).read_bytes()
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, float64; got 'fp8'"):
        df.save(tmp_path / "wrong", model, SCHEDULE, dtype="fp8")
