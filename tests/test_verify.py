"""`verify`: its rule against the tests' own, its numbers against float64 by hand, and bugs that it must not pass."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY, normal, unet
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import cli, ops
from ddpm_fast.checkpoints import Checkpoint
from ddpm_fast.house_rule import check, error, within, worst
from ddpm_fast.kernels.reference import INITIAL_STEP, SIGMA, TABLE_WIDTH, Shortcut, philox_normal
from ddpm_fast.verification import Report, report_text, same_in_any_batch, verify

SMALL: dict[str, Any] = {**TINY, "block_out_channels": (4, 8), "norm_num_groups": 2}
SCHEDULE: dict[str, Any] = {"num_train_timesteps": 50, "beta_start": 2e-3, "beta_end": 0.15}


def checkpoint(config: dict[str, Any] | None = None, **schedule: Any) -> Checkpoint:
    model = unet({**SMALL, **(config or {})})
    return Checkpoint(model, df.Schedule(**{**SCHEDULE, **schedule}), "small", "ours", [])


def small_verify(c: Checkpoint | None = None, **options: Any) -> Report:
    return verify(c or checkpoint(), **{"n": 2, "steps": 5, "probes": 3, **options})


# --- the rule ---


def test_errors_by_hand():
    """Over max(RMS, |truth|), the RMS here being 2: 0.25 / 2 of a zero, 0.5 / 4 of the 4, and 1 / 2 of the others."""
    truth = torch.tensor([0.0, 4.0, 0.0, 0.0], dtype=torch.float64)
    got = truth + torch.tensor([0.25, 0.5, -1.0, 0.0])
    e = error(got.bfloat16(), truth)
    assert e.largest == 0.5 and e.rms == pytest.approx(math.sqrt((0.125**2 + 0.125**2 + 0.5**2) / 4), rel=1e-12)
    assert worst([e, error(truth, truth)]) == e


@pytest.mark.parametrize(("kind", "theirs"), [("largest", 0.0), ("largest", 1e-6), ("RMS", 1e-6), ("RMS", 3e-3)])
def test_the_rule_at_its_limit(kind: str, theirs: float):
    """Twice torch's error and 2^-20 are allowed, and a thousandth more is not: where one error alone decides."""
    truth = torch.full((64,), -1.0, dtype=torch.float64)
    one, all_, half = torch.zeros(64), torch.ones(64), torch.ones(64)
    one[9], half[::2] = 1.0, 0.0
    # RMS: torch's error lies in every other value, so its largest is sqrt(2) times that and leaves room for ours.
    same = truth + theirs * (one if kind == "largest" else math.sqrt(2) * half)
    for factor, holds in ((0.999, True), (1.001, False)):
        ours = truth + factor * (2 * theirs + 2.0**-20) * (one if kind == "largest" else all_)
        assert within(error(ours, truth), error(same, truth)) == holds
        if holds:
            check(ours, same, truth)
        else:
            with pytest.raises(AssertionError, match=f"result: {kind} error .* exceeds 2 x"):
                check(ours, same, truth)


@pytest.mark.parametrize(
    ("ours", "theirs", "truth", "message"),
    [
        ((4,), (4,), (5,), "must have one shape; got"),
        ((0,), (0,), (0,), "an empty result proves nothing"),
    ],
)
def test_what_could_prove_nothing_is_no_verdict(ours: Any, theirs: Any, truth: Any, message: str):
    with pytest.raises(ValueError, match=message):
        check(torch.zeros(ours), torch.zeros(theirs), torch.zeros(truth, dtype=torch.float64))
    zeros = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"must be float64; got torch\.float32"):
        check(zeros, zeros, zeros.float())
    with pytest.raises(ValueError, match=r"one dtype; got torch\.float16 and torch\.float32"):
        check(zeros.half(), zeros.float(), zeros)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_infinitely_wrong(value: float):
    """Whatever torch in the same dtype gives there: it overflows too, and allows nothing by that."""
    truth = normal(2, 8, dtype=torch.float64)
    got = truth.float()
    got[1, 3] = value
    e = error(got, truth)
    assert e.largest == e.rms == math.inf and e.psnr == -math.inf
    assert not within(e, error(truth.float(), truth))
    assert not within(e, e)
    with pytest.raises(AssertionError, match=r"are NaN|largest error inf"):
        check(got, truth.float(), truth)
    with pytest.raises(ValueError, match=r"torch in torch\.float32 is not finite: choose other inputs"):
        check(got, got, truth)


def test_what_torch_cannot_hold_allows_only_the_floor():
    truth = normal(4, 8, dtype=torch.float64)
    theirs = truth.half()
    theirs[0, 0] = math.inf
    assert not within(error(truth.half(), truth), error(theirs, truth)), "finite, and measured by nothing"
    assert within(error(truth.float(), truth), error(theirs, truth)), "exact to float32"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_truth_that_is_not_finite_judges_nobody(value: float):
    """Not what is infinite in the same place and sign, nor what is off elsewhere, which an infinite RMS would hide."""
    truth = normal(2, 8, dtype=torch.float64)
    truth[0, 5] = value
    for got in (truth, truth.float(), truth + 1):
        for fails in (lambda got=got: error(got, truth), lambda got=got: check(got, normal(2, 8).to(got.dtype), truth)):
            with pytest.raises(ValueError, match="not finite"):
                fails()


def test_large_truths_have_their_own_scale():
    """1e200 squared is more than float64 holds: an RMS by squares alone would be infinite, and all errors nothing."""
    truth = 1e200 * (1 + normal(2, 8, dtype=torch.float64).abs())
    assert error(truth * 1.125, truth).largest == pytest.approx(0.125)  # the largest element's
    assert error(torch.zeros(4), torch.zeros(4)).largest == 0 < error(torch.full((4,), 1e-31), torch.zeros(4)).largest


def test_equality_has_no_noise():
    truth = normal(2, 8, dtype=torch.float64)
    assert error(truth, truth).psnr == math.inf


def test_psnr_by_hand():
    truth = torch.zeros(10, dtype=torch.float64)
    assert error(truth + 0.02, truth, 2.0).psnr == pytest.approx(40)
    truth[0] = 4.0
    assert error(truth + 0.04, truth).psnr == pytest.approx(40)


# --- right things pass, with the right numbers ---


@pytest.mark.parametrize(
    ("config", "schedule", "options"),
    [
        ({}, {}, {}),
        ({}, {"variance_type": "fixed_large", "timestep_spacing": "trailing"}, {"dtype": torch.bfloat16}),
        ({}, {"prediction_type": "v_prediction", "thresholding": True}, {"dtype": torch.float16, "seed": 3}),
        ({"out_channels": 6}, {"variance_type": "learned_range"}, {}),
        ({"num_class_embeds": 3, "resnet_time_scale_shift": "scale_shift"}, {}, {"dtype": torch.bfloat16}),
        ({"num_class_embeds": 3}, {}, {"label": 2, "n": 1}),
    ],
)
@pytest.mark.parametrize("which", ["reference", "cpu"])
def test_right_operations_are_within(which: str, config: Any, schedule: Any, options: Any):
    report = small_verify(checkpoint(config, **schedule), ops=which, **options)
    assert report.ok and report.exact == {} and report.ops == which
    assert len(report.probes) == 3 and [p.step for p in report.probes] == [0, 2, 4]
    half = options.get("dtype", torch.float32) != torch.float32
    for p in report.probes:  # nothing is judged against itself
        assert (1e-4 if half else 1e-8) < p.output.ours.rms < (1e-1 if half else 1e-5)
        assert 0 < p.x.ours.rms < (1e-1 if half else 1e-5)
    assert report.final.ours.psnr > (25 if half else 100)


def test_the_numbers_of_the_first_step_by_hand():
    c = checkpoint()
    report = small_verify(c, dtype=torch.bfloat16, seed=5, ops="reference")
    x = philox_normal(torch.tensor([5]), torch.arange(2), torch.tensor([INITIAL_STEP]), (3, 8, 8))
    t = report.probes[0].timestep
    assert t == c.schedule.timesteps(5)[0]
    with torch.no_grad():
        model = unet(SMALL)
        truth = model.double()(x.double(), torch.tensor(float(t), dtype=torch.float64))
        low = unet(SMALL).bfloat16()
        same = [low(x.bfloat16(), t), low.to(memory_format=torch.channels_last)(x.bfloat16(), t)]
    expected = max(error(y, truth).largest for y in same)
    assert report.probes[0].output.torch.largest == pytest.approx(expected, rel=1e-9)
    # the step after it, in float64 from the schedule's own equations
    z = philox_normal(torch.tensor([5]), torch.arange(2), torch.tensor([0]), (3, 8, 8)).double()
    respaced = c.schedule.timesteps(5)
    sampler = df.Sampler(unet(SMALL), c.schedule, 2, steps=5, dtype=torch.bfloat16, ops="reference")
    seen: dict[int, Tensor] = {}
    sampler.sample(2, 5, callback=lambda done, x: seen.__setitem__(done, x.clone()))
    after = c.schedule.step(truth, respaced[0], x.double(), z, prev_t=respaced[1])
    assert report.probes[0].x.ours.largest == pytest.approx(error(seen[1], after).largest, rel=1e-4)


def test_all_steps_and_few():
    full = small_verify(steps=None, probes=None, n=1)
    assert [p.timestep for p in full.probes] == list(range(49, -1, -1)) and full.steps == 50
    one = small_verify(probes=1)
    assert [p.step for p in one.probes] == [4]
    short = small_verify(checkpoint(num_train_timesteps=4), steps=20, probes=8)
    assert [p.step for p in short.probes] == [0, 1, 2, 3]


def test_the_model_is_left_as_it_was():
    c = checkpoint()
    before = {k: v.clone() for k, v in c.model.state_dict().items()}
    small_verify(c, dtype=torch.bfloat16)
    assert c.model.dtype == torch.float32 and not c.model.training
    assert all(torch.equal(v, before[k]) for k, v in c.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be at least 1; got 0"),
        ({"probes": 0}, "probes must be at least 1; got 0"),
        ({"label": 1}, "no classes"),
        ({"device": "meta"}, "on cpu or cuda; got meta"),
        ({"ops": "fastest"}, "ops must be"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        small_verify(**options)


# --- planted bugs do not pass ---

_RIGHT = ops.reference()


def _changed(name: str, **changes: Callable[[Any], Any]) -> ops.Ops:
    """The reference operations, but for one whose arguments are changed by name."""
    operation = getattr(_RIGHT, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        for key, change in changes.items():
            if kwargs.get(key) is not None:
                kwargs[key] = change(kwargs[key])
        return operation(*args, **kwargs)

    return replace(_RIGHT, **{name: wrong})


def _scaled_shortcut(s: Shortcut) -> Shortcut:
    return Shortcut(s.x, s.skip, 1.001 * s.weight, s.bias)


SIGMA_OFF = 1 + 1e-4 * (torch.arange(TABLE_WIDTH) == SIGMA)  # of one column of the step table
BUGS: dict[str, ops.Ops] = {
    "norm's eps": replace(_RIGHT, norm_act=lambda x, w, b, g, eps, **k: _RIGHT.norm_act(x, w, b, g, 10 * eps, **k)),
    "no activation": _changed("norm_act", act=lambda act: "none"),
    "residual a little off": _changed("conv", residual=lambda r: 1.001 * r),
    "shortcut a little off": _changed("conv", shortcut=_scaled_shortcut),
    "the next row of the time table": _changed("conv", row=lambda row: (row + 1).clamp(max=4)),
    "heads": replace(_RIGHT, attention=lambda qkv, heads: _RIGHT.attention(qkv, 1)),
    "upsampling shifted": replace(
        _RIGHT, upsample_conv=lambda *a, **k: _RIGHT.upsample_conv(*a, **k).roll(1, -1)
    ),
    "noise of other ids": replace(
        _RIGHT, sampler_step=lambda x, o, t, c, s, ids, **k: _RIGHT.sampler_step(x, o, t, c, s, ids + 1, **k)
    ),
    "sigma a little off": replace(
        _RIGHT, sampler_step=lambda x, o, t, *a, **k: _RIGHT.sampler_step(x, o, t * SIGMA_OFF, *a, **k)
    ),
    "not a number at the end": replace(
        _RIGHT, conv=lambda *a, **k: _RIGHT.conv(*a, **k) * torch.tensor(math.nan)
    ),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_not_passed(bug: str):
    # eps is large enough to matter, and the attention has two heads
    c = checkpoint({"norm_eps": 1e-3})
    report = small_verify(c, ops=BUGS[bug], probes=2)
    assert not report.ok
    step = bug.startswith(("noise", "sigma"))
    assert all(p.output.ok for p in report.probes) == step, "blamed on the wrong part"
    assert "TOO LARGE" in report_text(report) and "NOT within" in report_text(report)


def test_a_model_that_diverges_is_said_to():
    """In float64: its own operations would be compared with NaN, and NaN is not judged."""
    c = checkpoint()
    with torch.no_grad():
        c.model.conv_out.bias[1] = math.nan
    with pytest.raises(ValueError, match=r"network's output is not finite in float64, at step 0 \(timestep \d+\)"):
        small_verify(c)
    c = checkpoint()
    with torch.no_grad():
        c.model.conv_in.weight.mul_(1e4)
        c.model.conv_in.bias.add_(7e4)  # above float16's largest, in torch as in ours
    report = small_verify(c, dtype=torch.float16, ops="reference")
    assert not report.ok and report.probes[0].output.torch.largest == math.inf
    assert "TOO LARGE" in report_text(report)


def test_the_same_bits_in_any_batch():
    c = checkpoint()

    def leaky(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * x + 1e-6 * x.mean()

    for model, holds in ((lambda x, t: 0.5 * x, True), (leaky, False)):
        sampler = df.Sampler(model, c.schedule, 3, steps=3, image_shape=(3, 8, 8))
        assert same_in_any_batch(sampler, 3) is holds


def test_inexactness_fails_the_report():
    report = small_verify()
    assert report.ok and not replace(report, exact={"graph equals eager": False}).ok
    assert "NO" in report_text(replace(report, exact={"graph equals eager": False}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the test below runs the kernels themselves")
def test_the_fused_set_in_the_interpreter():
    pytest.importorskip("triton")
    report = small_verify(ops="triton", n=1, steps=2, probes=1, dtype=torch.bfloat16)
    assert report.ops == "triton" and report.ok
    plain = small_verify(ops="reference", n=1, steps=2, probes=1, dtype=torch.bfloat16)
    assert report.probes[0].output.ours != plain.probes[0].output.ours  # other roundings: other operations ran


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_set_on_a_gpu(dtype: torch.dtype):
    report = small_verify(
        checkpoint({"block_out_channels": (32, 64), "norm_num_groups": 8}), dtype=dtype, device="cuda"
    )
    assert report.ops == "triton" and report.ok
    assert len(report.exact) == 2 and all(report.exact.values())


# --- the command ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "small"
    c = checkpoint()
    df.save(folder, c.model, c.schedule)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", "verify", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), *capsys.readouterr()


def test_the_command(saved: Path, monkeypatch: Any, capsys: Any):
    words = (saved, "--device", "cpu", "--steps", 4, "--probes", 2, "-n", 1, "--dtype", "bfloat16")
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 0 and "within the house rule" in out and "cpu in bfloat16 on cpu" in out
    assert [line.partition(":")[0] for line in err.splitlines()] == ["against float64"] * 2 and "4/4" in err
    code, out, _ = run(monkeypatch, capsys, *words, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["ok"] is True and [p["step"] for p in facts["probes"]] == [0, 3]
    assert facts["probes"][0]["output"]["ours"]["rms"] > 1e-4
    code, out, _ = run(monkeypatch, capsys, saved, "--device", "cpu", "-n", 1, "--full", "--json")
    assert code == 0 and len(json.loads(out)["probes"]) == 50


def test_a_planted_bug_exits_with_1(saved: Path, monkeypatch: Any, capsys: Any):
    words = (saved, "--device", "cpu", "--steps", 4, "--probes", 2, "-n", 1)
    for bug in ("residual a little off", "not a number at the end"):
        monkeypatch.setattr(ops, "cpu", lambda bug=bug: BUGS[bug])
        code, out, err = run(monkeypatch, capsys, *words)
        assert code == 1 and "NOT within the house rule" in out and "4/4" in err
        code, out, _ = run(monkeypatch, capsys, *words, "--json")
        assert code == 1 and json.loads(out)["ok"] is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16; got int8"),
        (("--label", "1"), "no classes"),
        (("-n", "0"), "n must be at least 1; got 0"),
        (("--probes", "0"), "probes must be at least 1"),
        (("--ops", "gpu"), "ops must be one of auto, reference, cpu"),
    ],
)
def test_a_mistake_is_one_line(words: Any, message: str, saved: Path, monkeypatch: Any, capsys: Any):
    code, out, err = run(monkeypatch, capsys, saved, "--device", "cpu", *words)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
