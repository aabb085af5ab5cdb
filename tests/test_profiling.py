"""Profiles against a clock that only the operations move: every number of the table is known beforehand."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TINY, unet
from profiling_stand_in import (
    BEFORE,
    SCHEDULE,
    SECONDS,
    FakeClock,
    FakeWatch,
    Timed,
    made_up_profile,
    roofs,
    with_gpus,
)
from torch.utils.flop_counter import FlopCounterMode

import ddpm_fast as df
from ddpm_fast import cli, ops
from ddpm_fast.planning import records
from ddpm_fast.profiling import Profile, limits, profile, step_cost
from ddpm_fast.profiling.nvml import Sample, Series
from ddpm_fast.profiling.probe import CudaClock, HostClock, Step
from ddpm_fast.profiling.run import measure, watched_run
from ddpm_fast.profiling.text import HEADER, cells, profile_text
from ddpm_fast.report.files import facts
from ddpm_fast.report.page import page
from ddpm_fast.sampler import Sampler
from ddpm_fast.step_table import step_table

# One step of the tiny model: two levels of one layer, attention in the lower one and the middle.
CALLS = {"norm_act": 2 * 8 + 5, "conv": 2 * 8 + 2 * 4 + 1 + 2}


@pytest.fixture(scope="module")
def found() -> Profile:
    return made_up_profile()


# --- the table ---


def test_every_operation_has_its_time(found: Profile):
    for row in found.rows:
        assert row.seconds == pytest.approx(row.calls * SECONDS[row.line.operation])
    kinds = {k.operation: k for k in found.kinds()}
    for operation, kind in kinds.items():
        assert kind.seconds == pytest.approx(kind.calls * SECONDS[operation])
    assert kinds["sampler_step"].calls == kinds["upsample_conv"].calls == 1
    assert kinds["attention"].calls == sum(".attentions." in n and n.endswith("to_q.weight") for n in weights())
    norms = sum("norm" in name and name.endswith(".weight") for name in weights())
    assert kinds["norm_act"].calls == norms
    # Convolutions: all 4-d weights but the upsampler's and the shortcuts, which ride along; two for each attention.
    shapes = unet(TINY).state_dict()
    plain = sum(v.ndim == 4 for v in shapes.values()) - 1 - sum("conv_shortcut.weight" in n for n in shapes)
    assert kinds["conv"].calls == plain + 2 * kinds["attention"].calls


def weights() -> list[str]:
    return [name for name in unet(TINY).state_dict() if name.endswith("weight")]


def test_shares_are_of_the_step_and_sum_to_one(found: Profile):
    assert sum(r.share for r in found.rows) + found.other_s / found.step_s == pytest.approx(1, abs=1e-12)
    work = sum(r.calls * SECONDS[r.line.operation] for r in found.rows)
    assert found.step_s == pytest.approx(work + BEFORE) and found.gaps_s == pytest.approx((BEFORE, 0, 0))
    assert found.plain_s == pytest.approx(found.step_s) and found.instrumented_ratio == pytest.approx(1)
    assert len(found.steps) == 5 and all(s.seconds == pytest.approx(found.step_s) for s in found.steps)


def test_roofs_by_hand(found: Profile):
    """conv_in: 2 images of 8x8 pixels, 3 to 8 channels, 9 taps. sampler_step: x, noise and output in, x out."""
    (first,) = (r for r in found.rows if r.layers == ("conv_in",))
    flops = 2 * (2 * 8 * 8) * 9 * 3 * 8
    assert first.flops == flops and first.bound == "compute" and first.roof_s == pytest.approx(flops / 8e6)
    (step,) = (r for r in found.rows if r.line.operation == "sampler_step")
    values = 2 * 3 * 8 * 8
    moved = 4 * values * 4 + 8 * 2 + 16 + 48  # ids; seed and counter; the table's row
    assert step.bytes == moved and step.bound == "memory" and step.roof_s == pytest.approx(moved / 4e6)
    assert step.bytes_per_s == pytest.approx(moved / 0.001) and step.roof_share == pytest.approx(moved / 4e6 / 0.001)
    for row in found.rows:  # attention and the 1x1 products too: the operation chooses the roof
        peak = 2e6 if row.line.operation == "attention" else 8e6
        assert row.roof_s == pytest.approx(max(row.flops / peak, row.bytes / 4e6))
        assert row.gap_s == pytest.approx(row.seconds - row.roof_s)
        assert row.flops_per_s == pytest.approx(row.flops / row.seconds)


def test_the_largest_gap_comes_first(found: Profile):
    gaps = [r.gap_s for r in found.rows]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 0 > gaps[-1]
    above = sum(c.seconds < c.roof_s for c in found.calls)
    assert found.notes[0].startswith(f"{above} of {len(found.calls)} calls are above a roof") and above


def test_flops_are_those_that_torch_counts_but_for_the_cheaper_upsampling(found: Profile):
    model = unet(TINY).to("meta")  # where torch takes no attention kernel whose products it does not count
    x, time = torch.empty(2, 3, 8, 8, device="meta"), model_time(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.run(x, time)
    upsampling = 2 * (2 * 8 * 8) * 9 * 16 * 16  # of the plain form, at the higher resolution
    assert step_cost(found)[0] == counter.get_total_flops() - upsampling * (1 - 4 / 9)


def model_time(model: df.UNet) -> Any:
    from ddpm_fast.unet import TimeRows

    return TimeRows(table=model.time_table(torch.arange(2.0, device=model.device)))


def test_layers_are_those_of_the_state_dict(found: Profile):
    named = [layer for row in found.rows for layer in row.layers]
    expected = {n.removesuffix(".weight") for n in weights() if "time_emb" not in n and "conv_shortcut" not in n}
    attention = {n for n in expected if n.endswith("to_q")}
    expected -= {n for n in expected if n.rpartition(".")[2] in ("to_q", "to_k", "to_v") or n.endswith("to_out.0")}
    expected -= {n for n in expected if n.startswith("time_embedding")}
    for n in attention:
        block = n.removesuffix(".to_q")
        expected |= {block, f"{block}.to_qkv", f"{block}.to_out"}
    assert len(named) == len(set(named)) and set(named) == expected


def test_an_odd_step_does_not_move_the_medians(found: Profile):
    slow = made_up_profile(Timed(factor=lambda step: 10.0 if step % 6 == 5 else 1.0), steps=9)
    assert any(s.seconds > 5 * found.step_s for s in slow.steps)
    assert [r.seconds for r in slow.rows] == pytest.approx([r.seconds for r in found.rows])
    assert slow.plain_s == pytest.approx(found.plain_s) and slow.instrumented_ratio == pytest.approx(1)
    assert slow.gaps_s == pytest.approx(found.gaps_s)


def test_work_beside_the_steps_is_noted(found: Profile):
    """Another process takes 0.3 s of each step, at a call that is another one every time."""
    slow, timed = [0], Timed()
    original = timed.ops

    def around(name: str, operation: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            slow[0] += 1
            timed.clock.now += 0.3 if slow[0] % len(found.calls) == timed.step * 7 % len(found.calls) else 0
            return operation(*args, **kwargs)

        return call

    noisy = replace(original, **{name: around(name, getattr(original, name)) for name in SECONDS})
    p = made_up_profile(timed, steps=10, ops=noisy)
    assert p.timed_s == pytest.approx(found.timed_s + 0.3) and p.step_s == pytest.approx(found.step_s)
    said = f"sum to {p.step_s / p.timed_s:.0%} of the median step"
    lines = profile_text(p).splitlines()
    (step,) = (i for i, line in enumerate(lines) if line.startswith("step "))
    assert said in lines[step + 1] and said in page(p).partition("<main>")[0]  # where the step's time is
    assert found.busy is None and said in facts(p)["notes"][0]


def test_what_limits_is_said_in_the_order_of_what_is_lost(found: Profile):
    lost = {k.operation: max(0.0, k.seconds - k.roof_s) for k in found.kinds()}
    lost["no operation"] = BEFORE
    said = limits(found)
    order = sorted(lost, key=lambda name: -lost[name])
    assert [next(n for n in lost if s.startswith(n + " ")) for s in said] == order
    whole = sum(lost.values())
    assert said[0].endswith(f": {lost[order[0]] / whole:.0%} of what is lost")
    conv = next(k for k in found.kinds() if k.operation == "conv")
    assert f"conv takes {conv.share:.0%} of the step, at {conv.roof_s / conv.seconds:.0%} of its roof" in " ".join(said)


def test_gaps_between_operations():
    step = Step(0.0, 10.0, ((1.0, 2.0), (2.5, 4.0), (6.0, 9.0)))
    assert step.gaps == (1.0, 0.5 + 2.0, 1.0)
    assert Step(0.0, 10.0).gaps == (10.0, 0.0, 0.0)


# --- the run ---


def test_images_are_those_without_a_profile():
    """Neither instruments nor a stand-in for the set change a pixel, and the sampler's own set stays as it was."""
    model, timed = unet(TINY), Timed()
    sampler = Sampler(model, SCHEDULE, 2, ops=ops.reference(), graph="none")
    expected = sampler.sample(2, seed=3)
    set_before = sampler.ops
    probe, plain = measure(sampler, 6, timed.clock, None)
    assert len(plain) == len(probe.steps) == 6 and sampler.ops is set_before
    assert torch.equal(sampler.sample(2, seed=3), expected)
    from ddpm_fast.profiling.run import with_ops

    assert torch.equal(with_ops(sampler, probe.instrument(sampler.ops)).sample(2, seed=3), expected)


@pytest.mark.parametrize("steps", [1, 4, 7, 12])
def test_as_many_steps_are_timed_as_asked_for(steps: int):
    """Of a chain of 12, which turns of the steps with and without instruments never pass."""
    assert len(made_up_profile(steps=steps).steps) == steps


def test_a_set_that_places_its_results_is_timed_too(found: Profile):
    timed = Timed()
    placed = replace(timed.ops, placed=lambda memory: timed.ops)
    p = made_up_profile(timed, ops=placed)
    assert [(r.line, r.seconds) for r in p.rows] == [(r.line, pytest.approx(r.seconds)) for r in found.rows]


def test_classes_and_their_time_rows():
    p = profile(
        unet({**TINY, "num_class_embeds": 3}),
        SCHEDULE,
        batch_size=2,
        steps=2,
        ops="reference",
        find_roofs=roofs,
    )
    rows = [r for r in p.rows if r.line.input == "32x1x1"]  # the projection for all blocks, each step
    assert sum(r.calls for r in rows) == 1 and rows[0].flops == 2 * 2 * 32 * rows[0].line.cost.bytes_written // 8
    assert p.step_s > 0 and p.plain_s > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 13}, "steps must be in 1..12, the steps of the chain; got 13"),
        ({"steps": 0}, "steps must be in 1..12"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"graph": "pieces"}, "graph must be one of"),
    ],
)
def test_what_does_not_fit(changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        made_up_profile(**changed)
    with pytest.raises(ValueError, match="image_shape"):
        profile(lambda x, t: x, SCHEDULE)


def test_a_model_of_other_code_is_one_operation():
    """2 x 8 x 8 pixels, 3 to 4 to 3 channels, 9 taps; 5 s a call. Its output comes as diffusers' does."""
    timed = Timed()

    class Foreign(torch.nn.Sequential):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:  # type: ignore[override]
            timed.clock.now += 5
            return SimpleNamespace(sample=super().forward(x))

    model = Foreign(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(4, 3, 3, padding=1))
    p = made_up_profile(timed, model=model, steps=3, image_shape=(3, 8, 8))
    rows = {r.line.operation: r for r in p.rows}
    whole = rows["model"]
    assert set(rows) == {"model", "sampler_step"} and whole.seconds == pytest.approx(5)
    assert whole.flops == 2 * 2 * (2 * 8 * 8) * 9 * 3 * 4 and whole.roof_s == pytest.approx(whole.flops / 8e6)
    assert whole.bytes == 4 * (2 * 9 * 12 + 7 + 2 * 2 * 3 * 64) and whole.line.detail == "Foreign"
    assert whole.share == pytest.approx(5 / 5.001) and p.plain_s == pytest.approx(5.001)


def test_a_watched_run_counts_whole_chains_and_parts(monkeypatch: pytest.MonkeyPatch):
    sampler = Sampler(unet(TINY), df.Schedule(num_train_timesteps=70), 2, ops="reference", graph="none")
    counted: list[int] = []
    original = sampler.ops.sampler_step

    def counting(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return original(*args, **kwargs)

    sampler.ops = replace(sampler.ops, sampler_step=counting)
    sampler.model.ops = sampler.ops
    watch, waits = FakeWatch(), []
    run = watched_run(sampler, "none", 0.0, None, watch, lambda: waits.append(len(counted)))
    assert run.steps == 50 and len(counted) == 100 and watch.on == 2  # as many unwatched, before
    assert run.seconds > 0 and run.began == 7.0 and waits == [0, 50, 50, 100]
    ticks = iter(range(1000))
    monkeypatch.setattr("ddpm_fast.profiling.run.time.perf_counter", lambda: float(next(ticks)))
    longer = watched_run(sampler, "none", 3.0, None, FakeWatch(), lambda: None)
    assert longer.steps == 70 + 50 and longer.seconds == 4 and len(counted) == 100 + 50 + longer.steps


def test_energy_an_image(found: Profile):
    """60 J in 10 steps; 12 steps make 2 images: 36 J each."""
    gpu = Series("cuda:0", "a GPU", None, False, (Sample(0.0),), 0.5, {}, 60.0, "energy counter")
    p = with_gpus(found, gpu)
    assert p.joules_per_image(gpu) == pytest.approx(36) and p.work_s == 0.05
    assert p.images_per_s == pytest.approx(2 / (12 * 0.05))
    assert p.joules_per_image(replace(gpu, energy_j=None)) is None
    assert p.joules_per_image(replace(gpu, lost="cuda:0 was lost")) is None
    text = profile_text(p)
    assert "36 J an image" in text and "50.000 ms a step with graph=loop" in text
    assert "NVML is not available: x" in profile_text(with_gpus(found, note="NVML is not available: x"))


# --- clocks ---


class FakeCuda:
    """A stream whose work takes 5 ms an event, and which may be kept waiting."""

    def __init__(self) -> None:
        self.at_ms, self.syncs = 0.0, 0
        self.slept: list[int] = []

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(at=None)

        def record(stream: Any) -> None:
            assert stream == "stream"
            self.at_ms += 5
            event.at = self.at_ms

        event.record, event.elapsed_time = record, lambda other: other.at - event.at
        return event

    def current_stream(self, device: Any) -> str:
        return "stream"

    def synchronize(self, device: Any) -> None:
        self.syncs += 1

    def _sleep(self, cycles: int) -> None:
        self.slept.append(cycles)


def test_cuda_events_give_seconds_and_launches_run_ahead(monkeypatch: pytest.MonkeyPatch):
    cuda, now = FakeCuda(), [50.0]
    monkeypatch.setattr("ddpm_fast.profiling.probe.time.perf_counter", lambda: now[0])
    clock = CudaClock(torch.device("cuda"), cuda)
    for host_s in (7.0, 0.25, 3.0, 0.01):  # with compilation, without, and where the host waits for the stream
        clock.ready()
        start, a, b = clock.mark(), clock.mark(), clock.mark()
        now[0] += host_s
        assert clock.since(start, [a, b]) == pytest.approx([0.005, 0.010])
    assert cuda.slept == [int(1.2 * 0.25 * CudaClock.CYCLES_A_SECOND)] * 2 and cuda.syncs >= 8
    assert clock.when(start) == pytest.approx(50 + 0.005 * 10)  # the tenth event after the clock's own


def test_the_host_s_clock_waits_for_the_device():
    waited: list[int] = []
    clock = HostClock(lambda: waited.append(1))
    a, b = clock.mark(), clock.mark()
    assert len(waited) == 2 and 0 <= clock.since(a, [b])[0] < 1 and clock.when(b) == b / 1e9


def test_the_fake_clock_is_asked_to_be_ready_before_each_step():
    clock = FakeClock()
    made_up_profile(Timed(clock), steps=4)
    assert clock.prepared == 2 * (2 + 4 * 2)  # two to warm up, then four turns of one and one that does not count


# --- the text and the command ---


def test_the_table_shows_the_numbers(found: Profile):
    text = profile_text(found)
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("n "))
    assert len(lines) == head + 1 + len(found.rows) + 1 and lines[-1].split()[:3] == ["in", "no", "operation"]
    (step,) = (r for r in found.rows if r.line.operation == "sampler_step")
    by_name = dict(zip(HEADER, cells(step)))
    assert (by_name["n"], by_name["ms"], by_name["TFLOP/s"], by_name["roof"]) == ("1", "1.000", "-", "memory")
    assert by_name["of it"] == f"{step.roof_s / 0.001:.0%}" and by_name["gap ms"] == f"{1 - step.roof_s * 1e3:.3f}"
    assert f"step          {found.step_s * 1e3:.3f} ms plain" in text and "(1.000 times)" in text
    assert "none took part, so there is no utilisation" in text
    assert f"limits        {limits(found)[0]}" in text


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", "profile", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), *capsys.readouterr()


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("ddpm_fast.roofline.roofs", lambda device, dtype, refresh: roofs(device, dtype))
    df.save(tmp_path / "model", unet(TINY), SCHEDULE)
    return tmp_path / "model"


def test_a_short_chain_is_timed_whole(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    code, out, _ = run(monkeypatch, capsys, saved, "--batch-size", 1, "--device", "cpu", "--ops", "reference")
    assert code == 0 and "12 of 12 steps timed" in out


@pytest.mark.parametrize("source", ["tiny", "config.json"])
def test_a_network_without_weights_is_timed_with_random_ones(
    source: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    """As bench takes it: a preset's name, or a configuration, here a pipeline's, beside which its chain lies."""
    given = saved / "unet" / source if source.endswith(".json") else source
    words = (given, "--set", "sample_size=8", "--batch-size", 1, "--steps", 2, "--device", "cpu", "--ops", "reference")
    code, out, _ = run(monkeypatch, capsys, *words)
    chain = 12 if source.endswith(".json") else 1000
    assert code == 0
    assert f"{given} (random weights), batch 1, float32, reference operations, 2 of {chain} steps timed" in out


def test_roofs_are_measured_anew_when_asked(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    asked: list[bool] = []

    def find(device: torch.device, dtype: torch.dtype, refresh: bool) -> Any:
        asked.append(refresh)
        return roofs(device, dtype)

    monkeypatch.setattr("ddpm_fast.roofline.roofs", find)
    for words in ((), ("--refresh",)):
        assert run(monkeypatch, capsys, saved, "--batch-size", 1, "--steps", 1, "--device", "cpu", *words)[0] == 0
    assert asked == [False, True]


def test_the_command(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    files = [saved.parent / "out" / name for name in ("p.html", "p.json", "p.trace")]
    words = ["--batch-size", 1, "--steps", 2, "--device", "cpu", "--ops", "reference"]
    words += [x for pair in zip(("--html", "--out", "--trace"), files) for x in pair]
    code, out, err = run(monkeypatch, capsys, saved, *words)
    assert (code, err) == (0, "") and f"{saved}, batch 1, float32, reference operations, 2 of 12 steps timed" in out
    assert "conv_in" not in out and "sampler_step" in out
    for file in files:
        assert f"written to {file}" in out and file.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", "13"), "steps must be in 1..12"),
        (("--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16; got int8"),
        (("--batch-size", "0"), "batch_size must be a positive integer"),
        (("--ops", "magic"), "ops must be"),
        (("--seconds", "0"), "--seconds must be above 0"),
        (("--html", "."), "is a folder; give a file"),
        (("--device", "cuda:99"), "torch sees"),
    ],
)
def test_a_mistake_is_one_line(
    words: tuple[str, ...], message: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    code, out, err = run(monkeypatch, capsys, saved, *words)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.gpu
def test_on_a_gpu():
    p = profile(unet(TINY), SCHEDULE, batch_size=2, steps=6, device="cuda", dtype=torch.bfloat16, seconds=0.5)
    assert p.run is not None and p.run.steps > 0 and (p.gpus or p.run.note)
    assert all(r.seconds > 0 for r in p.rows) and 0 < p.roof_s < p.step_s
    assert min(s.seconds for s in p.steps) > 0 and min(p.gaps_s) >= 0
    assert [c.record for c in p.calls] == records(unet(TINY).config, step_table(SCHEDULE), 2, torch.bfloat16)
