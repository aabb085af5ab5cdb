"""Step programs and the sampler's loop: against a plain float64 loop, bit for bit across batches, and from static
buffers alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from tensors import normal64
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ddpm_fast import ops
from ddpm_fast.config import UNetConfig
from ddpm_fast.engine import CallableProgram, EagerRunner, StepProgram
from ddpm_fast.engine import program as engine
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.house_rule import check, error, within, worst
from ddpm_fast.kernels.reference import INITIAL_STEP
from ddpm_fast.ops import buffers
from ddpm_fast.ops.buffers import Memory, Plan
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import sections, step_table
from ddpm_fast.unet import UNet

pytest.importorskip("triton", reason="the fused operations need Triton")

SHAPE = (3, 8, 8)
SMALL: dict[str, Any] = {
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "sample_size": 8,
}
ONE_LEVEL = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
CLASSES = {"num_class_embeds": 3, **ONE_LEVEL}
SCHEDULE = Schedule()


@cache
def network(**changes: Any) -> UNet:
    torch.manual_seed(1)
    model = UNet(UNetConfig(**{**SMALL, **changes})).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.0))
    return model


def oracle(
    model: UNet,
    chain: list[int],
    ids: list[int],
    seed: int,
    dtype: torch.dtype = torch.float64,
    labels: Tensor | None = None,
    guidance: float | None = None,
    schedule: Schedule = SCHEDULE,
) -> Tensor:
    """Algorithm 2 by `Schedule.step`, over `UNet.forward` in ``dtype``; x_t in float64, or float32 below."""
    model = copy.deepcopy(model).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    key, id_tensor = torch.tensor([seed]), torch.tensor(ids)
    x = normal64(key, id_tensor, INITIAL_STEP, SHAPE).to(wide)
    for i, (t, prev_t) in enumerate(zip(chain, [*chain[1:], -1])):
        out = model(x.to(dtype), t, labels).to(wide)
        if guidance is not None:
            null = model(x.to(dtype), t, torch.full_like(labels, model.config.num_class_embeds - 1)).to(wide)
            c = SHAPE[0]
            guided = null[:, :c] + guidance * (out[:, :c] - null[:, :c])
            out = torch.cat((guided, out[:, c:]), 1)
        x = schedule.step(out, t, x, normal64(key, id_tensor, i, SHAPE).to(wide), prev_t)
    return x


# --- against the plain loop ---


def predict(model: UNet, x: Tensor, t: int, labels: Tensor | None, guidance: float | None) -> Tensor:
    """The network's output for x, in float32 at least; guided where that is wanted."""
    x = x.to(model.dtype)
    out = model(x, t, labels)
    if guidance is not None:
        null, c = model(x, t, torch.full_like(labels, model.config.num_class_embeds - 1)), SHAPE[0]
        out = torch.cat((null[:, :c] + guidance * (out[:, :c] - null[:, :c]), out[:, c:]), 1)
    return out


def rounding(schedule: Schedule, t: int, prev_t: int, x: Tensor, out: Tensor, z: Tensor) -> Tensor:
    """How far one float32 step may be from float64 on the same x, output and noise: a bound for each element.

    With u = 2^-24: x_0 = kx x + ko out rounds each of its terms three times (coefficient, product, sum), and clipping
    costs nothing; x_{t-1} = c0 x_0 + cx x + sigma z rounds each of its terms four times more. z itself is off by 64 u
    = 2^-18: its angle 2 pi u is rounded at 2^-22, and multiplied by a radius below 7. A learned sigma is the
    exponential of a logarithm of up to 20 that is rounded three times: 60 u. Thresholding divides by a quantile of
    x_0, which is off by as much as the image's worst x_0.
    """
    u, alpha = 2.0**-24, float(schedule.alphas_cumprod[t])
    alpha_prev = float(schedule.alphas_cumprod[prev_t]) if prev_t >= 0 else 1.0
    a = alpha / alpha_prev
    if schedule.prediction_type == "epsilon":
        kx, ko = alpha**-0.5, (1 / alpha - 1) ** 0.5
    else:
        kx, ko = alpha**0.5, (1 - alpha) ** 0.5
    c0, cx = alpha_prev**0.5 * (1 - a) / (1 - alpha), a**0.5 * (1 - alpha_prev) / (1 - alpha)
    x0 = kx * x.abs() + ko * out[:, : x.shape[1]].abs()
    if schedule.thresholding:
        x0 = 2 * x0.amax((1, 2, 3), keepdim=True)
    return u * (7 * c0 * x0 + 4 * cx * x.abs() + 64 * z.abs() + 64)


@pytest.mark.parametrize(
    ("changes", "schedule", "kwargs"),
    [
        ({}, SCHEDULE, {}),
        ({"out_channels": 6, "resnet_time_scale_shift": "scale_shift"}, Schedule(variance_type="learned_range"), {}),
        ({"num_class_embeds": 3, "block_out_channels": (64, 32)}, SCHEDULE, {"labels": [2, 0]}),  # of two widths
        ({**CLASSES, "out_channels": 6}, Schedule(variance_type="learned_range"), {"labels": [0, 1], "guidance": 3.0}),
        ({"time_embedding_type": "fourier"}, SCHEDULE, {}),
        ({}, Schedule(thresholding=True, sample_max_value=1.5), {}),
        ({"center_input_sample": True}, Schedule(prediction_type="v_prediction", variance_type="fixed_large"), {}),
    ],
)
@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_the_sampler_is_the_plain_loop(which: str, changes: dict[str, Any], schedule: Schedule, kwargs: dict[str, Any]):
    """Seven steps, both of a batch of two and of two batches of one.

    Each step is judged from float64's own x_t: the network's output by the house rule, and what the step makes of it
    by float32's rounding. What is drawn is then these very steps one after the other, bit for bit. A bound over the
    free-running chain would have to allow what guidance and 1 / sqrt(alphas_cumprod) make of each step's rounding.
    """
    model, chain = network(**changes), schedule.timesteps(7)
    if changes.get("time_embedding_type") == "fourier":
        chain = [t + 1 for t in chain]  # it takes the logarithm of t
    labels, guidance = kwargs.get("labels"), kwargs.get("guidance")
    given = None if labels is None else torch.tensor(labels)
    seed, ids = 11, torch.tensor([4, 5])
    key, times = torch.tensor([seed]), list(zip(chain, [*chain[1:], -1]))
    exact, channels_last = copy.deepcopy(model).double(), copy.deepcopy(model).to(memory_format=torch.channels_last)

    # Float64's chain: x_t, rounded to the float32 that a program holds, and the output and noise there.
    states: list[tuple[Tensor, Tensor, Tensor]] = []
    first = x = normal64(key, ids, INITIAL_STEP, SHAPE).float()
    for i, (t, prev_t) in enumerate(times):
        out, z = predict(exact, x, t, given, guidance), normal64(key, ids, i, SHAPE)
        states.append((x, out, z))
        x = schedule.step(out, t, x.double(), z, prev_t).float()

    for batch_size in (1, 2):
        sampler = Sampler(model, schedule, batch_size, steps=chain, guidance_scale=guidance, ops=which)
        drawn = sampler.sample(2, seed=seed, labels=labels, first_id=4)
        program, _ = sampler._program(batch_size, False)
        assert isinstance(program, StepProgram)
        for rows in (slice(0, 1), slice(1, 2)) if batch_size == 1 else (slice(0, 2),):
            own = None if given is None else given[rows]

            def step(i: int, x: Tensor, rows: slice = rows, own: Tensor | None = own) -> tuple[Tensor, Tensor]:
                """(output, x_{t-1}) of the program's step i from x."""
                seen: list[Tensor] = []
                program.begin(seed, ids[rows], own, x)
                program.counter[0] = i
                advance = program.advance
                with mock.patch.object(program, "advance", lambda out: (seen.append(out.clone()), advance(out))):
                    program.step()
                return seen[0], program.x.clone()

            for i, ((t, prev_t), (x, out, z)) in enumerate(zip(times, states)):
                x, out, z = x[rows], out[rows], z[rows]
                got, after = step(i, x)
                same = [predict(model, x, t, own, guidance)]
                same += [predict(channels_last, x.to(memory_format=torch.channels_last), t, own, guidance)]
                ours, torchs = error(got, out), worst(error(y, out) for y in same)
                assert within(ours, torchs), f"output of step {i}, batch {batch_size}: {ours}, torch {torchs}"
                right = schedule.step(got.double(), t, x.double(), z, prev_t)
                over = ((after - right).abs() / rounding(schedule, t, prev_t, x.double(), got.double(), z)).max()
                assert over <= 1, f"x after step {i}, batch {batch_size}: {over:.1f} times what rounding may do"

            program.begin(seed, ids[rows], own)
            x = program.x.clone()
            assert (x - first[rows]).abs().max() <= 2.0**-18  # as `rounding` says of z
            for i in range(len(chain)):
                x = step(i, x)[1]
            assert torch.equal(x, drawn[rows]), "the steps that were judged are those that are drawn"


# --- the fused set, in the interpreter or on a GPU ---

STEPS = [600, 300]


def fused(device: torch.device, batch_size: int, **kwargs: Any) -> Sampler:
    options = {"steps": STEPS, "dtype": torch.bfloat16, **kwargs}
    return Sampler(network(), SCHEDULE, batch_size, device=device, ops="triton", graph="none", **options)


@pytest.fixture(scope="module")
def three(device: torch.device) -> Tensor:
    """Samples 7, 8 and 9 of seed 3, from one batch."""
    return fused(device, 3).sample(3, seed=3, first_id=7)


@pytest.mark.parametrize("t", STEPS)
def test_fused_samples_keep_the_house_rule(t: int, device: torch.device):
    """One step; of more, the rounding compounds. That they follow one another is held below, bit for bit."""
    got = fused(device, 2, steps=[t]).sample(2, seed=3, first_id=7)
    same = Sampler(network(), SCHEDULE, 2, steps=[t], dtype=torch.bfloat16).sample(2, seed=3, first_id=7)
    check(got.cpu(), same, oracle(network(), [t], [7, 8], 3))


def test_fused_steps_follow_one_another(three: Tensor, device: torch.device):
    """The second step starts from what the first one left: the low-precision copy is x_t's, and the row the next."""
    sampler = fused(device, 3)
    seen: list[Tensor] = []
    sampler.sample(3, seed=3, first_id=7, callback=lambda done, x: seen.append(x.clone()))
    program, _ = sampler._program(3, False)
    program.begin(3, [7, 8, 9], x=seen[1])
    program.counter[0] = 1
    program.step()
    assert torch.equal(program.x, three) and torch.equal(seen[2], three)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_set_is_bit_identical_in_any_batch_size(batch_size: int, three: Tensor, device: torch.device):
    """The second batch of two is partial: it runs in the shape of two and is cut."""
    sampler = fused(device, batch_size)
    first = sampler.sample(2, seed=3, first_id=7) if batch_size == 2 else sampler.sample(1, seed=3, first_id=7)
    assert torch.equal(first, three[: len(first)])
    rest = sampler.sample(1, seed=3, first_id=9)
    assert torch.equal(rest, three[2:]), "first_id continues the set"


def test_embedded_labels_do_not_depend_on_the_batch(device: torch.device):
    """Labels that are embedded as timesteps go through torch's own products."""
    changes = {"class_embed_type": "timestep", **ONE_LEVEL}
    labels = torch.tensor([3.0, 700.0, 41.5, 8.0, 0.0])
    program = make(device, 5, changes)
    program.begin(seed=0, labels=labels)
    together = program.time.classes.clone()
    model = copy.deepcopy(network(**changes)).double()
    truth = model.class_embedding(model._time_features(labels.double()))
    assert float((together.double().cpu() - truth).abs().max()) < 1e-5 < float(truth.std())
    alone = make(device, 1, changes)
    for i in range(5):
        alone.begin(seed=0, labels=labels[i : i + 1])
        assert torch.equal(alone.time.classes[0], together[i])


def test_class_conditional_and_guided_on_the_fused_set(device: torch.device):
    """Labels of a batch are projected in one launch a step, and an image's bits do not depend on its neighbours."""
    model, chain = network(**CLASSES), [500]
    labels, same_kwargs = torch.tensor([2, 0]), {"labels": torch.tensor([2, 0])}
    plain = Sampler(model, SCHEDULE, 2, chain, dtype=torch.bfloat16)
    got = Sampler(model, SCHEDULE, 2, chain, dtype=torch.bfloat16, device=device, ops="triton", graph="none")
    together = got.sample(2, seed=5, labels=labels)
    check(together.cpu(), plain.sample(2, seed=5, labels=labels), oracle(model, chain, [0, 1], 5, **same_kwargs))
    alone = Sampler(model, SCHEDULE, 1, chain, dtype=torch.bfloat16, device=device, ops="triton", graph="none")
    assert torch.equal(alone.sample(1, seed=5, labels=[0], first_id=1), together[1:])

    options = {"guidance_scale": 2.0, "dtype": torch.bfloat16}
    guided = Sampler(model, SCHEDULE, 1, chain, device=device, ops="triton", graph="none", **options)
    check(
        guided.sample(1, seed=5, labels=[1]).cpu(),
        Sampler(model, SCHEDULE, 1, chain, **options).sample(1, seed=5, labels=[1]),
        oracle(model, chain, [0], 5, labels=torch.tensor([1]), guidance=2.0),
    )


def make(
    device: torch.device,
    batch: int = 2,
    changes: dict[str, Any] | None = None,
    shape: tuple[int, int, int] = SHAPE,
    **kwargs: Any,
) -> StepProgram:
    model = prepare(network(**(changes or {})), torch.bfloat16, device, ops.triton())
    return StepProgram(model, step_table(SCHEDULE, STEPS), batch, shape, **kwargs)


def everything_in_parts(run: Callable[[Memory], object]) -> Plan:
    """Each normalisation and the convolution behind it cut in two, and conv_in made anew, whatever it saves."""
    return buffers._dry_run(run, dict.fromkeys(range(len(buffers._dry_run(run, {}).norms)), 2), again=True)


def test_the_arena_changes_no_bit_and_hides_no_stale_value(device: torch.device):
    """Poisoned before each step; split into parts of one image, conv_in twice; and with every result a new tensor."""
    programs = [make(device, arena=False), make(device)]
    with mock.patch.object(engine, "plan", everything_in_parts):
        programs.append(make(device))
    assert programs[0]._arena is None and programs[1]._arena is not None
    assert len(programs[1].plan.parts) < len(programs[2].plan.parts)
    assert any(r.successor for r in programs[2].plan.requests), "some results lie where their input did"
    for program in programs:
        program.begin(seed=3, ids=[7, 8])
        if program._arena is not None:
            program._arena.storage.fill_(255)  # NaN in every dtype
        program.step()
    assert programs[0].x.isfinite().all()
    for program in programs[1:]:
        assert torch.equal(program.x, programs[0].x)
        assert torch.equal(program.low, programs[0].low)


def test_rows_of_a_single_image_change_no_bit(device: torch.device):
    wanted: Any = {"batch": 1, "changes": {**ONE_LEVEL, "mid_block_type": None}, "shape": (3, 16, 16)}
    programs = [make(device, **wanted, arena=False)]
    with mock.patch.object(engine, "plan", everything_in_parts):
        programs.append(make(device, **wanted))
    for program in programs:
        program.begin(seed=3, ids=[7])
        if program._arena is not None:
            program._arena.storage.fill_(255)
        program.step()
    assert any(r.shape[2:] == (9, 16) for r in programs[1].plan.requests), "8 rows and the one below or above them"
    assert programs[0].x.isfinite().all() and torch.equal(programs[1].x, programs[0].x)


class Watch(TorchDispatchMode):
    """Fails on whatever allocates or waits for the device, but in attention, whose result torch allocates."""

    ALLOCATES = ("empty", "zeros", "ones", "full", "arange", "rand", "scalar", "clone", "cat", "pad")
    WAITS = ("_local_scalar_dense", "_to_copy", "nonzero", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        self.seen.append(name)
        shapes_only = (kwargs or {}).get("device") == torch.device("meta")
        allocates = any(f in name.split(".")[0].split("_") for f in self.ALLOCATES) and not name.endswith("out")
        if (allocates and not shapes_only) or any(h in name for h in self.WAITS):
            raise AssertionError(f"a step calls {name}")
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch torch's operations, not the interpreter's own nor attention's."""
    from triton.runtime.interpreter import InterpretedFunction

    from ddpm_fast.ops import triton_set as ops_triton

    def unwatched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call

    getitem = InterpretedFunction.__getitem__
    with (
        mock.patch.object(InterpretedFunction, "__getitem__", lambda self, grid: unwatched(getitem(self, grid))),
        mock.patch.object(ops_triton.reference, "attention", unwatched(ops_triton.reference.attention)),
        Watch() as watch,
    ):
        yield watch


@pytest.mark.parametrize("changes", [{}, CLASSES])
def test_a_step_allocates_nothing_and_waits_for_nothing(changes: dict[str, Any], device: torch.device):
    program = make(device, batch=1, changes=changes)
    program.begin(labels=torch.tensor([1]) if changes else None)
    with watched() as watch:
        program.step()
    assert watch.seen, "views at least pass by"
    assert program.counter.tolist() == [1, 0]
    loose = make(device, batch=1, changes=changes, arena=False)
    loose.begin(labels=torch.tensor([1]) if changes else None)
    with pytest.raises(AssertionError, match="a step calls empty"), watched():
        loose.step()


# --- the loop: a callable for the network, so that only the step's own kernel runs ---


class Shrink(nn.Module):
    """out = x / 2 + t / 1000 + label."""

    def __init__(self, wrap: str = ""):
        super().__init__()
        self.wrap = wrap
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Any:
        self.times.append(t.clone())
        out = x / 2 + (t / 1000)[:, None, None, None]
        if labels is not None:
            out = out + labels[:, None, None, None]
        if self.wrap == "sample":
            return type("Output", (), {"sample": out})()
        return (out, "more") if self.wrap == "tuple" else out


def plain_chain(chain: list[int], ids: list[int], seed: int, scale: float = 1.0, label: float = 0.0) -> Tensor:
    key, id_tensor = torch.tensor([seed]), torch.tensor(ids)
    x = normal64(key, id_tensor, INITIAL_STEP, SHAPE)
    for i, (t, prev_t) in enumerate(zip(chain, [*chain[1:], -1])):
        out = x / 2 + scale * t / 1000 + label
        x = SCHEDULE.step(out, t, x, normal64(key, id_tensor, i, SHAPE), prev_t)
    return x


@pytest.mark.parametrize("which", ["reference", "triton"])
@pytest.mark.parametrize("wrap", ["", "tuple", "sample"])
def test_any_callable_gets_the_step_and_the_noise(wrap: str, which: str, device: torch.device):
    chain = [800, 400, 0]
    options = {"steps": chain, "ops": which, "device": device, "image_shape": SHAPE, "graph": "none"}
    got = Sampler(Shrink(wrap), SCHEDULE, 2, **options).sample(5, seed=2, labels=3, first_id=1)
    expected = plain_chain(chain, [1, 2, 3, 4, 5], 2, label=3.0)
    torch.testing.assert_close(got.cpu().double(), expected, rtol=0, atol=1e-4)


def test_times_are_whole_or_scaled():
    model = Shrink()
    Sampler(model, SCHEDULE, 2, steps=[800, 401], image_shape=SHAPE).sample(2)
    assert [t.tolist() for t in model.times] == [[800, 800], [401, 401]]
    assert model.times[0].dtype == torch.int64
    model = Shrink()
    got = Sampler(model, SCHEDULE, 2, steps=[800, 401], image_shape=SHAPE, time_scale=0.25).sample(2, seed=1)
    assert [t.tolist() for t in model.times] == [[200, 200], [100.25, 100.25]]
    expected = plain_chain([800, 401], [0, 1], 1, scale=0.25)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)


def test_a_wrong_output_is_named():
    sampler = Sampler(lambda x, t: x[:, :1], SCHEDULE, 2, steps=2, image_shape=SHAPE)
    with pytest.raises(ValueError, match=r"\[2, 3, 8, 8\].*got \[2, 1, 8, 8\]"):
        sampler.sample(2)


class Counting(EagerRunner):
    calls: ClassVar[list[int]] = []

    def advance(self, k: int) -> None:
        self.calls.append(k)
        super().advance(k)


@pytest.mark.parametrize(
    ("interval", "watch", "calls"), [(1, False, [7]), (3, True, [3, 3, 1]), (7, True, [7]), (9, True, [7])]
)
def test_the_loop_is_left_alone_between_intervals(interval: int, watch: bool, calls: list[int], device: torch.device):
    sampler = Sampler(Shrink(), SCHEDULE, 2, steps=7, ops="triton", device=device, image_shape=SHAPE, graph="none")
    seen: list[int] = []
    with mock.patch("ddpm_fast.sampler.EagerRunner", Counting):
        Counting.calls.clear()
        sampler.sample(3, interval=interval, callback=(lambda step, x: seen.append(step)) if watch else None)
    assert Counting.calls == calls * 2, "two batches"
    if watch:
        ends = [sum(calls[: i + 1]) for i in range(len(calls))]
        assert seen == [0, *ends] * 2


def test_programs_are_kept_for_their_shape(device: torch.device):
    sampler = Sampler(Shrink(), SCHEDULE, 2, steps=2, ops="triton", device=device, image_shape=SHAPE, graph="none")
    assert sampler.sample(0).shape == (0, *SHAPE)
    a = sampler.sample(5, seed=1)
    assert len(sampler._programs) == 1, "the last, partial batch runs in the shape of the others"
    b = sampler.sample(1, seed=1)
    assert list(sampler._programs) == [(2, False), (1, False)]
    assert torch.equal(a[:1], b)
    assert torch.equal(sampler.sample(2, seed=1, first_id=3), a[3:])


def test_a_program_starts_over_and_counts(device: torch.device):
    model = Shrink()
    program = CallableProgram(model, step_table(SCHEDULE, [800, 400, 0]), 2, SHAPE, device, ops.triton())
    assert program.steps == 3
    results = []
    for _ in range(2):
        program.begin(seed=2, ids=[1, 2])
        assert program.counter.tolist() == [0, 0]
        EagerRunner(program).advance(3)
        assert program.counter.tolist() == [3, 0]
        results.append(program.x.clone())
    assert torch.equal(*results)
    expected = plain_chain([800, 400, 0], [1, 2], 2)
    torch.testing.assert_close(results[0].cpu().double(), expected, rtol=0, atol=1e-4)
    program.begin(x=torch.zeros(2, *SHAPE))
    assert not program.x.any()


def test_guidance_needs_classes_and_sets_need_to_exist():
    with pytest.raises(ValueError, match="num_class_embeds"):
        Sampler(network(), SCHEDULE, guidance_scale=2.0)
    with pytest.raises(ValueError, match="ops must be one of auto"):
        Sampler(network(), SCHEDULE, ops="gpu")
    with pytest.raises(ValueError, match="CUDA"):
        Sampler(network(), SCHEDULE, device="cpu", graph="loop")


# --- OpenAI's respacing ---


def test_sections_of_openai():
    """improved-diffusion's own: 250 of 1000 are 0, 4, 8 ... 995, 999; three sections keep their ends."""
    chain = sections("250", 1000)[::-1]
    assert len(chain) == 250 and chain[:3] == [0, 4, 8] and chain[-2:] == [995, 999]
    three = sections("10,15,20", 300)[::-1]
    assert [three[0], three[9], three[10], three[24], three[25], three[44]] == [0, 99, 100, 199, 200, 299]
    assert sections("1,1", 10) == [5, 0]
    assert sections("3", 10) == [9, 4, 0], "4.5 rounds to even"
    assert sections("2,2", 7) == [6, 4, 3, 0], "the first sections take what is left over"
    assert sections("ddim50", 1000) == list(range(980, -1, -20))


@pytest.mark.parametrize("rule", ["", "0", "5,x", "ddim", "ddim7x", "11", "ddim7"])
def test_a_rule_that_cannot_be_kept_is_named(rule: str):
    with pytest.raises(ValueError, match="steps"):
        sections(rule, 10)


def test_text_reaches_the_table():
    assert step_table(SCHEDULE, "10,15,20").timesteps == tuple(sections("10,15,20", 1000))
