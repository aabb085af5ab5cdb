"""What `plan` predicts, against a count of diffusers' own operations, the engine's memory, and sums by hand."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from models import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ddpm_fast as df
from ddpm_fast import cli, ops, planning
from ddpm_fast.engine import StepProgram
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.gpus import GPUS, Gpu, gpu
from ddpm_fast.kernels.cost import Cost, total
from ddpm_fast.planning import group, plan, records
from ddpm_fast.presets import PRESETS
from ddpm_fast.step_table import step_table

BF16 = torch.bfloat16
CIFAR10 = PRESETS["cifar10"]
CONFIG = df.UNetConfig(**CIFAR10.model, sample_size=32)
SCHEDULE = df.Schedule(**CIFAR10.schedule)
BATCH = 256


class Eager(TorchDispatchMode):
    """Launches that torch makes on a GPU, and their bytes: each reads its inputs once, and writes its outputs once.

    Views launch nothing. A convolution's bias is added in a launch of its own: cuDNN's convolution takes none
    (aten/src/ATen/native/Convolution.cpp). A group normalisation counts as one launch, though torch's CUDA kernels
    are three and read the input twice. Copies into another memory layout are also counted by themselves: how many there
    are is for torch's version to decide.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = self.copies = self.copied = 0

    def add(self, *moved: Tensor) -> None:
        self.launches += 1
        self.bytes += sum(t.numel() * t.element_size() for t in moved)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_meta]
        if func.is_view or func is torch.ops.aten._unsafe_view.default or not outputs:
            return result
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_meta]
        if func is torch.ops.aten.convolution.default and args[2] is not None:
            self.add(args[2], *outputs, *outputs)
            inputs = [t for t in inputs if t is not args[2]]
        before = self.bytes
        self.add(*inputs, *outputs)
        if func is torch.ops.aten.clone.default:
            self.copies, self.copied = self.copies + 1, self.copied + self.bytes - before
        return result


@contextmanager
def flash(eager: Eager) -> Iterator[None]:
    """Attention as one launch that reads q, k and v, and writes their mean: on meta torch would expand it."""
    original = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        with _disable_current_modes():
            y = torch.empty_like(q)
        eager.add(q, k, v, y)
        return y

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@pytest.fixture(scope="module")
def theirs() -> Eager:
    """One step of DDPMPipeline's loop with google/ddpm-cifar10-32's configuration."""
    with torch.device("meta"):
        model = diffusers.UNet2DModel(**CIFAR10.model, sample_size=32).eval().to(BF16)
        x = torch.empty(BATCH, 3, 32, 32, dtype=BF16)
    scheduler = diffusers.DDPMScheduler(**CIFAR10.schedule)
    scheduler.set_timesteps(1000)
    eager = Eager()
    with torch.no_grad(), flash(eager), eager:
        t = torch.tensor(500)  # on the CPU, as the scheduler's are
        scheduler.step(model(x, t).sample, t, x)
    return eager


@pytest.fixture(scope="module")
def ours() -> planning.Plan:
    return plan(CONFIG, SCHEDULE, BATCH)


# --- the measures ---


def test_launches_of_a_step(ours: planning.Plan):
    assert ours.fused.launches <= 125
    whole = total([r.cost for r in records(CONFIG, step_table(SCHEDULE), 1, BF16)])
    assert whole.launches == 22 * 4 + 6 * 4 + 6 + 3 == 121


@pytest.mark.parametrize("batch", [1, 3, 12])
def test_what_saves_memory_keeps_the_budget(batch: int):
    """conv_in again, and two launches for each part but the first; every launch is in the plan."""
    p = plan(CONFIG, SCHEDULE, batch)
    assert 121 < p.fused.launches <= 125
    (note,) = p.notes
    assert f"({p.fused.launches - 121} launches more)" in note
    first = [r for r in p.records if r.operation == "conv" and r.shapes[0][1][1] == 3]
    assert ("conv_in runs a second time" in note) == (len(first) == 2) == (batch < 12)
    assert ("parts of the rows" in note) == (batch == 1)


def test_bytes_of_a_step_against_eager_torch(ours: planning.Plan, theirs: Eager):
    assert ours.fused.bytes <= 0.45 * theirs.bytes
    assert ours.fused.bytes <= 0.45 * ours.eager.bytes


def test_what_the_command_calls_eager_is_a_little_less_than_diffusers_does(ours: planning.Plan, theirs: Eager):
    """It leaves out attention's copies, the time embedding, and some of the scheduler's launches."""
    assert 0.93 <= ours.eager.bytes / theirs.bytes <= 1
    assert 0.75 <= ours.eager.launches / theirs.launches <= 1


def test_the_numbers_in_the_document(theirs: Eager):
    """All but the copies is the same in every version of torch; with them, in the versions that the page names."""
    text = (Path(__file__).parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    text = " ".join(text.split())
    whole = total([r.cost for r in records(CONFIG, step_table(SCHEDULE), BATCH, BF16)])
    launches, gigabytes = theirs.launches - theirs.copies, (theirs.bytes - theirs.copied) / 1e9
    assert f"make {launches} launches a step and move {gigabytes:.2f} GB (CIFAR-10), beside copies into other" in text
    version = ".".join(torch.__version__.split(".")[:2])
    if f"PyTorch {version} makes" in text:
        assert f"PyTorch {version} makes {theirs.copies} of those, {theirs.bytes / 1e9:.2f} GB in all" in text
    if f"what PyTorch {version} moves" in text:
        said = f"The fused step moves {100 * whole.bytes / theirs.bytes:.1f}% of what PyTorch {version} moves"
        assert said in text


def test_the_document_names_the_version_that_we_pin():
    text = (Path(__file__).parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    pins = (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8")
    (pinned,) = re.findall(r"^torch==(\d+\.\d+)", pins, re.MULTILINE)
    assert f"PyTorch {pinned} makes" in text and f"PyTorch {pinned} moves" in text


def test_flops_of_a_step(ours: planning.Plan):
    with torch.device("meta"):
        model = diffusers.UNet2DModel(**CIFAR10.model, sample_size=32).eval()
        x = torch.empty(1, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x, 500)
    assert counter.get_total_flops() / 1e9 == pytest.approx(12.44, rel=1e-3)
    assert 0.07 <= 1 - ours.fused.flops / BATCH / counter.get_total_flops() <= 0.075


# --- sums by hand ---

HUNDRED = Gpu("a made-up one", 90, 200.0, 100.0, 10.0, 1000, "nowhere")


def record(cost: Cost, dtype: torch.dtype = BF16, operation: str = "conv") -> Any:
    shape = (1, 8, 4, 4)
    return planning.Record(operation, (("x", shape), ("skip", shape), ("out", shape)), dtype, "3x3", cost)


def test_times_at_the_roofs_by_hand():
    """100 FLOPs at 200 or 100 a second, 20 bytes at 10 a second: 2 s; 600 FLOPs: 3 s, in float32 6 s."""
    log = [
        record(Cost(100, 15, 5, 1)),
        record(Cost(600, 15, 5, 1)),
        record(Cost(600, 15, 5, 2), torch.float32, "norm_act"),
    ]
    t = planning.totals(log, HUNDRED)
    assert (t.launches, t.flops, t.bytes, t.seconds) == (4, 1300, 60, 2 + 3 + 6)
    assert t.convolution_share == pytest.approx(5 / 11)
    lines = group([*log, log[0]])
    assert [(x.count, x.bound(HUNDRED), x.seconds(HUNDRED)) for x in lines] == [
        (2, "memory", 2),
        (1, "compute", 3),
        (1, "compute", 6),
    ]
    assert (lines[0].input, lines[0].output) == ("8x4x4 skip 8x4x4", "8x4x4")
    (cells,) = planning.rows(lines[:1], HUNDRED, 40)
    assert cells[-5:] == ("0.0", "2000000.0", "memory", "4000000.0", "10.0%")


def test_images_a_second_are_a_batch_in_all_its_steps(ours: planning.Plan):
    assert ours.images_per_s == pytest.approx(BATCH / (1000 * ours.fused.seconds))
    few = plan(CONFIG, SCHEDULE, BATCH, steps=50)
    assert few.steps == 50 and few.images_per_s == pytest.approx(20 * ours.images_per_s)
    assert ours.images_per_s < GPUS["h100"].half_flops_per_s / (1000 * ours.fused.flops / BATCH)
    b200 = plan(CONFIG, SCHEDULE, BATCH, "b200")
    assert 2 < b200.images_per_s / ours.images_per_s < 3  # between the ratios of both roofs


def test_groups_lose_nothing(ours: planning.Plan):
    assert sum(x.count for x in ours.lines) == len(ours.records)
    assert sum(x.count * x.cost.bytes for x in ours.lines) == ours.fused.bytes
    assert len(ours.lines) < len(ours.records) / 2


def test_parts_of_a_batch_cost_launches_and_weights_again():
    table = step_table(SCHEDULE)
    whole = records(CONFIG, table, 10, BF16)
    norms = [i for i, r in enumerate(whole) if r.operation == "norm_act"]
    cut = records(CONFIG, table, 10, BF16, parts={44: 3})
    at, more = norms[44], len(cut) - len(whole)
    assert more == 2 * (3 - 1)
    assert cut[:at] == whole[:at] and cut[at + 6 :] == whole[at + 2 :]
    assert [r.shapes[0][1][0] for r in cut[at : at + 6]] == [4, 4, 4, 4, 2, 2]
    a, b = total([r.cost for r in whole]), total([r.cost for r in cut])
    assert a.flops == b.flops
    norm, conv = whole[at], whole[at + 1]
    (_, c, _, _), (_, k, _, _) = conv.shapes[0][1], conv.out
    vectors = 4 * (2 * norm.out[1] + k)  # norm's weight and bias; the time row. conv1's own bias is in it
    assert b.bytes - a.bytes == 2 * (9 * c * k * 2 + vectors)


def test_memory_is_the_engine_s(ours: planning.Plan):
    pytest.importorskip("triton")
    with torch.device("meta"):
        model = df.UNet(CONFIG).eval()
    prepared = prepare(model, BF16, "meta", ops.triton())
    use = StepProgram(prepared, step_table(SCHEDULE), BATCH, (3, 32, 32)).memory
    assert ours.memory == {"weights": use.weights, "activations": use.activations, "tables": use.tables}
    parameters = sum(p.numel() for p in model.parameters())
    # 2 bytes each; upsampling's 16/9 of them and the float32 time embedding make it more
    assert 2 * parameters < ours.memory["weights"] < 2.4 * parameters


def test_without_triton_memory_is_torch_s(monkeypatch: pytest.MonkeyPatch):
    def missing() -> None:
        raise RuntimeError("the fused operations need Triton, which is not installed")

    monkeypatch.setattr(ops, "triton", missing)
    p = plan(CONFIG, SCHEDULE, 4)
    assert p.fused.launches == 121 and p.memory["weights"] == 2 * 35_746_307
    assert any("Triton is not installed" in note for note in p.notes)


# --- other networks ---


def test_class_conditional_rows_are_projected_in_the_step():
    """Two look-ups, an addition, the activation, one product and the split, beside what the network launches."""
    small = {**TINY, "sample_size": 8}
    plain = plan(df.UNetConfig(**small), df.Schedule(), 2)
    classes = plan(df.UNetConfig(**small, num_class_embeds=5), df.Schedule(), 2)
    assert classes.fused.launches == plain.fused.launches + 6


def test_a_learned_variance_ends_in_the_step_too():
    small = {**TINY, "sample_size": 8}
    p = plan(df.UNetConfig(**small, out_channels=6), df.Schedule(variance_type="learned_range"), 2)
    assert p.records[-1].operation == "conv_step" and "learned_range" in p.records[-1].detail


def test_what_no_kernel_covers_is_named_and_priced_as_torch_runs_it():
    small = {**TINY, "sample_size": 8}
    p = plan(df.UNetConfig(**small, act_fn="mish"), df.Schedule(thresholding=True), 2)
    silu = plan(df.UNetConfig(**small), df.Schedule(), 2)
    notes = " ".join(p.notes)
    assert "norm_act has no kernel with mish" in notes and "dynamic thresholding" in notes
    assert p.records[-1].operation == "sampler_step" and p.fused.launches > silu.fused.launches + 10
    assert "torch's operations" not in " ".join(silu.notes)


def test_a_model_too_large_for_the_gpu_is_noted():
    assert any("more memory than" in note for note in plan(CONFIG, SCHEDULE, 20_000, "l4").notes)


# --- GPUs ---


def test_gpus_by_name():
    assert gpu("RTX 4090") is gpu("rtx-4090") is GPUS["rtx4090"]
    with pytest.raises(ValueError, match="no GPU is called 'v100' here; there are: a100, h100"):
        gpu("v100")
    h100 = GPUS["h100"]
    assert (h100.flops_per_s(2), h100.flops_per_s(4), h100.bytes_per_s) == (989.5e12, 67e12, 3.35e12)
    for g in GPUS.values():
        assert g.source and g.memory_bytes >= 24e9 and g.flops_per_s(2) > g.flops_per_s(4)


# --- the command ---


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", "plan", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0), *capsys.readouterr()


def test_the_command_prints_what_the_plan_says(monkeypatch: Any, capsys: Any, ours: planning.Plan):
    code, out, err = run(monkeypatch, capsys, "--preset-model", "cifar10", "--batch-size", BATCH)
    assert (code, err) == (0, "")
    f, e = ours.fused, ours.eager
    assert (
        f"fused   {f.launches:<8}  {f.bytes / 1e9:.2f}" in out
        and f"eager   {e.launches:<8}  {e.bytes / 1e9:.2f}" in out
    )
    assert f"fused moves {100 * f.bytes / e.bytes:.1f}% of the bytes and does 7.1% fewer FLOPs" in out
    assert f"at most {ours.images_per_s:.2f}" in out and "nothing ran" in out
    assert len(out.splitlines()) - out.splitlines().index("") > len(ours.lines)


def test_the_command_as_json(monkeypatch: Any, capsys: Any, ours: planning.Plan):
    words = ("--preset-model", "cifar10", "--json")
    code, out, _ = run(monkeypatch, capsys, *words)
    facts = json.loads(out)
    assert code == 0 and facts["prediction"] is True and facts["gpu"]["name"] == "H100 SXM"
    assert (
        sum(x["count"] * (x["bytes_read"] + x["bytes_written"]) for x in facts["launches"]) == facts["fused"]["bytes"]
    )
    assert facts["bytes_share"] == ours.fused.bytes / ours.eager.bytes
    every = json.loads(run(monkeypatch, capsys, *words, "--all")[1])["launches"]
    assert [x["count"] for x in every] == [1] * len(ours.records)
    assert [x["operation"] for x in every] == [r.operation for r in ours.records]


def test_a_config_needs_no_weights(monkeypatch: Any, capsys: Any, tmp_path: Path):
    """As a pipeline's folder has them: unet/config.json and scheduler/scheduler_config.json."""
    pipeline = diffusers.DDPMScheduler(num_train_timesteps=300)
    pipeline.save_config(tmp_path / "scheduler")
    (tmp_path / "unet").mkdir()
    with torch.device("meta"):
        model = diffusers.UNet2DModel(**{**TINY, "sample_size": 8})
    (tmp_path / "unet" / "config.json").write_text(model.to_json_string())
    code, out, _ = run(
        monkeypatch, capsys, tmp_path / "unet" / "config.json", "--json", "--batch-size", 2, "--dtype", "float32"
    )
    facts = json.loads(out)
    expected = plan(df.UNetConfig(**TINY), df.Schedule(num_train_timesteps=300), 2, dtype=torch.float32)
    assert code == 0 and facts["steps"] == 300
    assert facts["fused"]["seconds"] == pytest.approx(expected.fused.seconds)


def test_a_checkpoint_and_its_settings(monkeypatch: Any, capsys: Any, tmp_path: Path):
    df.save(tmp_path / "model", df.UNet(df.UNetConfig(**TINY)), df.Schedule(num_train_timesteps=30))
    code, out, _ = run(monkeypatch, capsys, tmp_path / "model", "--json", "--steps", 10, "--gpu", "RTX 5090")
    facts = json.loads(out)
    assert code == 0 and facts["steps"] == 10 and facts["gpu"]["name"] == "GeForce RTX 5090"
    for named in (("tiny",), ("--preset-model", "tiny")):  # the first as bench and profile take it
        code, out, _ = run(monkeypatch, capsys, *named, "--set", "sample_size=32", "--json")
        assert json.loads(out)["launches"][0]["in"] == "3x32x32"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset-model", "cifar11"), "no preset is called 'cifar11'; there are: cifar10, lsun256, tiny"),
        (("--preset-model", "tiny", "--gpu", "v100"), "no GPU is called 'v100'"),
        (("--preset-model", "tiny", "--batch-size", "0"), "batch must be at least 1; got 0"),
        (("--preset-model", "tiny", "--steps", "2000"), "2000"),
        (("--preset-model", "tiny", "--dtype", "int8"), "--dtype must be one of float32, bfloat16, float16; got int8"),
        (("--preset-model", "tiny", "--set", "size=3"), "neither UNetConfig nor Schedule has size"),
        (("--preset-model", "tiny", "--set", "sample_size=null"), "does not state its image size"),
        (("--preset-model", "tiny", "--set", "num_train_timesteps=x"), "num_train_timesteps"),
        (("somewhere", "--preset-model", "tiny"), "a SOURCE or --preset-model, not both"),
        (("nowhere.json",), "nowhere.json"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], message: str, monkeypatch: Any, capsys: Any):
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1
