"""Sets of operations: the fused one against the reference over whole networks, and what recording counts."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from tensors import fresh
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddpm_fast import ops
from ddpm_fast.config import UNetConfig
from ddpm_fast.house_rule import check
from ddpm_fast.kernels import cost, reference
from ddpm_fast.kernels.reference import Shortcut
from ddpm_fast.presets import PRESETS
from ddpm_fast.unet import TimeRows, UNet

pytest.importorskip("triton", reason="the fused operations need Triton")
from ddpm_fast.ops.triton_set import FeatureMap

# 32 and 64 channels in 8 groups: 32 + 64 = 96 channels make groups of 12, the third of which straddles the seam.
SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"downsample_padding": 0},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 1.5},
    "resnet_resampling": {
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "all_attention": {
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": None,
    },
}


def network(dtype: torch.dtype = torch.float64, **changes: Any) -> UNet:
    """Small, with weights (norms and biases too) that no symmetry hides behind."""
    torch.manual_seed(1)
    model = UNet(UNetConfig(**{**SMALL, **changes})).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(torch.randn_like(p) * (0.1 if p.dim() == 1 else 0.0))
    return model.to(dtype)


def run(model: UNet, x: Tensor, which: ops.Ops, dtype: torch.dtype, row: int = 1) -> Tensor:
    """The network at row ``row`` of a table of three steps."""
    model = model.to(dtype)
    times = torch.tensor([700.0, 40.0, 3.0], dtype=torch.float64, device=x.device)
    table = model.to(torch.float64).time_table(times)
    model.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    at = torch.tensor([row], dtype=torch.int32, device=x.device)
    return model.run(x.to(dtype), TimeRows(table=table.to(wide), row=at), which)


@contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the kernels launched inside, interpreted or not."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    log: list[str] = []
    with (
        mock.patch.object(InterpretedFunction, "__getitem__", _logged(InterpretedFunction.__getitem__, log)),
        mock.patch.object(JITFunction, "__getitem__", _logged(JITFunction.__getitem__, log)),
    ):
        yield log


def _logged(getitem: Any, log: list[str]) -> Any:
    def logged(self: Any, grid: Any) -> Any:
        log.append(self.fn.__name__)
        return getitem(self, grid)

    return logged


# --- the fused set against the reference ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_network_on_fused_operations_keeps_the_house_rule(variant: str, dtype: torch.dtype, device: torch.device):
    if dtype == torch.bfloat16 and variant in ("resnet_resampling", "all_attention") and device.type == "cpu":
        pytest.skip("the interpreter is slow; bfloat16 is covered by the other variants, these paths by float32")
    model = network(dtype, **VARIANTS[variant]).to(device)
    x = fresh((2, 3, 8, 8), dtype, device, seed=3)
    with torch.no_grad():
        same = run(model, x, ops.reference(), dtype)
        fused = run(model, x, ops.triton(), dtype)
        truth = run(model, x, ops.reference(), torch.float64)
    check(fused, same, truth, name=variant)


def test_a_sample_does_not_depend_on_its_batch(device: torch.device):
    model = network(torch.bfloat16).to(device)
    x = fresh((3, 3, 8, 8), torch.bfloat16, device, seed=4)
    with torch.no_grad():
        together = run(model, x, ops.triton(), torch.bfloat16)
        alone = run(model, x[1:2], ops.triton(), torch.bfloat16)
    assert together.isfinite().all()
    assert torch.equal(together[1:2], alone)


def test_a_padded_image_and_packed_weights_give_the_same_bits(device: torch.device):
    """What a prepared model hands over: the step's 16-channel copy of x, and weights packed once."""
    from ddpm_fast.kernels.conv_pack import pack_conv, pack_upsample_conv

    fused = ops.triton()
    x, weight = (
        fresh((1, 3, 4, 4), torch.bfloat16, device, seed=5),
        fresh((32, 3, 3, 3), torch.bfloat16, device, seed=6),
    )
    padded = torch.cat((x, x.new_zeros(1, 13, 4, 4)), 1)
    plain = fused.leave(fused.conv(fused.enter(x), weight))
    packed = pack_conv(weight, channels=(16,))
    assert torch.equal(plain, fused.leave(fused.conv(fused.enter(padded), packed)))
    h, w2 = fused.enter(plain), fresh((32, 32, 3, 3), torch.bfloat16, device, seed=7)
    assert torch.equal(
        fused.leave(fused.upsample_conv(h, w2)), fused.leave(fused.upsample_conv(h, pack_upsample_conv(w2)))
    )


def test_feature_maps_carry_the_statistics_of_their_pixels(device: torch.device):
    fused = ops.triton()
    x = fused.enter(fresh((2, 16, 8, 8), torch.float32, device, seed=8))
    y = fused.conv(x, fresh((32, 16, 3, 3), torch.float32, device, seed=9), with_stats=True)
    assert isinstance(y, FeatureMap) and y.stats is not None
    count, mean, m2 = y.stats.double().unbind(2)  # [N, P, C] each
    assert torch.equal(count.sum(1), torch.full_like(count[:, 0], 64))
    whole = (count * mean).sum(1) / 64
    pixels = y.data.double().flatten(2)
    torch.testing.assert_close(whole, pixels.mean(2), rtol=0, atol=1e-6)
    merged = (m2 + count * (mean - whole[:, None]).square()).sum(1)
    torch.testing.assert_close(merged, pixels.var(2, correction=0) * 64, rtol=1e-5, atol=0)
    assert fused.conv(x, fresh((32, 16, 3, 3), torch.float32, device, seed=9)).stats is None


def test_the_norm_reads_the_statistics_it_is_given(device: torch.device):
    """Wrong statistics must show: they are used, not made again."""
    fused = ops.triton()
    x = fused.enter(fresh((1, 16, 4, 4), torch.float32, device, seed=10))
    right = FeatureMap(x.data, reference.channel_stats(x.data).contiguous())
    wrong = FeatureMap(x.data, right.stats + 1.0)
    a, b, c = (fused.norm_act(f, None, None, 4, 1e-6).data for f in (x, right, wrong))
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, c, atol=0.05)


def test_what_has_no_kernel_falls_back_call_by_call(device: torch.device):
    fused, model = ops.triton(), network(torch.float32, act_fn="mish").to(device)
    x = fresh((1, 3, 8, 8), torch.float32, device, seed=11)
    with torch.no_grad(), launches() as log:
        y = run(model, x, fused, torch.float32)
    check(y, run(model, x, ops.reference(), torch.float32), run(model, x, ops.reference(), torch.float64))
    assert "mish" in fused.falls_back("norm_act", {"x": x, "act": "mish"})
    assert fused.falls_back("norm_act", {"x": x, "act": "silu"}) is None
    names = Counter("norm" if "norm" in name else "conv" for name in log)
    assert names["conv"] > 15
    assert names["norm"] == 4 + 1, "four attentions normalise without an activation; conv_norm_out has SiLU always"


def test_a_7x7_convolution_is_one_launch(device: torch.device):
    """lucidrains' first: its image lies padded to 16 channels, and three pixels of zeros around it."""
    fused, dtype = ops.triton(), torch.bfloat16
    x, weight = fresh((2, 3, 8, 8), dtype, device, seed=51), fresh((16, 3, 7, 7), dtype, device, seed=52, std=0.1)
    assert fused.falls_back("conv", {"x": x, "weight": weight}) is None
    with launches() as log:
        y = fused.leave(fused.conv(fused.enter(x), fused.pack_conv(weight, dtype=dtype, channels=(16,))))
    assert len(log) == 1
    check(y, reference.conv(x, weight), reference.conv(x.double(), weight.double()))


def test_float64_falls_back_to_the_reference(device: torch.device):
    """Up to the order of float64 sums, which follows the memory format."""
    model = network().to(device)
    x = fresh((1, 3, 8, 8), torch.float64, device, seed=12)
    with torch.no_grad():
        with launches() as launched:
            y = run(model, x, ops.triton(), torch.float64)
        truth = run(model, x, ops.reference(), torch.float64)
    assert not launched
    torch.testing.assert_close(y, truth, rtol=0, atol=1e-13)


def test_the_fused_set_refuses_to_lose_gradients(device: torch.device):
    model = network(torch.float32).to(device).requires_grad_(True)
    with pytest.raises(RuntimeError, match="no_grad"):
        model.run(torch.zeros(1, 3, 8, 8, device=device), TimeRows(torch.zeros(1, 128, device=device)), ops.triton())


def test_the_fused_sampler_step_is_the_set_s_own(device: torch.device):
    x = fresh((2, 3, 4, 4), torch.float32, device, seed=13)
    out = fresh((2, 3, 4, 4), torch.float32, device, seed=14)
    table = torch.zeros(4, reference.TABLE_WIDTH, device=device)
    table[:, : reference.TIME] = torch.tensor([1.2, -0.7, 1.0, 0.6, 0.3, 0.1, 0.5, 0, 0])
    seed, ids = torch.tensor([7], device=device), torch.tensor([3, 9], device=device)
    results = []
    for which in (ops.triton(), ops.reference()):
        counter = torch.tensor([2, 0], dtype=torch.int32, device=device)
        results.append(which.sampler_step(x, out, table, counter, seed, ids))
        assert counter[0] == 3
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_dynamic_thresholding_falls_back(device: torch.device):
    x, out = (fresh((2, 3, 4, 4), torch.float32, device, seed=s) for s in (41, 42))
    table = torch.full((4, reference.TABLE_WIDTH), 0.5, device=device)
    results = []
    for which in (ops.triton(), ops.reference()):
        counter = torch.tensor([1, 0], dtype=torch.int32, device=device)
        seed, ids = torch.tensor([7], device=device), torch.tensor([3, 9], device=device)
        with launches() as launched:
            results.append(which.sampler_step(x, out, table, counter, seed, ids, thresholding=(0.9, 2.0)))
        assert not launched
    assert torch.equal(*results)


def test_the_last_convolution_and_the_step_are_one_launch(device: torch.device):
    fused, log = ops.recording(ops.triton())
    h = fresh((2, 32, 8, 8), torch.float32, device, seed=43)
    weight, bias = (
        fresh((3, 32, 3, 3), torch.float32, device, seed=44, std=0.1),
        fresh((3,), torch.float32, device, seed=45),
    )
    x = fresh((2, 3, 8, 8), torch.float32, device, seed=46)
    table = torch.full((4, reference.TABLE_WIDTH), 0.5, device=device)
    seed, ids = torch.tensor([7], device=device), torch.tensor([3, 9], device=device)
    counters = [torch.tensor([1, 0], dtype=torch.int32, device=device) for _ in range(2)]
    with launches() as launched:
        y = fused.conv_step(fused.enter(h), weight, bias, x, table, counters[0], seed, ids)
    out = reference.conv(h, weight, bias)
    torch.testing.assert_close(
        y, reference.sampler_step(x, out, table, counters[1], seed, ids), rtol=1e-4, atol=1e-5
    )  # fmt: skip
    assert counters[0][0] == counters[1][0] == 2
    assert len(launched) == log[0].cost.launches == 1
    assert log[0].cost == cost.conv_step(h.shape, 3, torch.float32, low_channels=None)


# --- launches, as recorded and as launched ---


def block(device: torch.device, which: ops.Ops, concatenate: bool) -> Tensor:
    """One residual block, its input (and skip) from convolutions as in a network."""
    make = [fresh((c, 16, 3, 3), torch.float32, device, seed=20 + c) for c in (32, 64)]
    image = which.enter(fresh((1, 16, 8, 8), torch.float32, device, seed=20))
    x, skip = (which.conv(image, w, with_stats=True) for w in make)
    width = 96 if concatenate else 32
    k1, k2, short = ((32, width, 3, 3), (32, 32, 3, 3), (32, width, 1, 1))
    w1, w2, ws = (fresh(s, torch.float32, device, seed=30 + i) for i, s in enumerate((k1, k2, short)))
    time = fresh((5, 32), torch.float32, device, seed=40)
    row = torch.tensor([2], dtype=torch.int32, device=device)
    skip = skip if concatenate else None
    h = which.norm_act(x, None, None, 8, 1e-6, skip=skip)
    h = which.conv(h, w1, time=time, row=row, with_stats=True)
    h = which.norm_act(h, None, None, 8, 1e-6)
    around = {"shortcut": Shortcut(x, skip, ws, None)} if concatenate else {"residual": x}
    return which.leave(which.conv(h, w2, with_stats=True, **around))


@pytest.mark.parametrize("concatenate", [False, True])
def test_a_residual_block_is_four_launches(concatenate: bool, device: torch.device):
    recorded, log = ops.recording(ops.triton())
    with launches() as launched:
        y = block(device, recorded, concatenate)
    assert len(launched) == 2 + 4, launched  # two make the inputs
    assert [r.operation for r in log[2:]] == ["norm_act", "conv", "norm_act", "conv"]
    assert sum(r.cost.launches for r in log) == len(launched)
    torch.testing.assert_close(y, block(device, ops.reference(), concatenate), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_launches_are_those_that_happen(variant: str, device: torch.device):
    """The resampling that plain torch does is no launch of ours: one record each instead."""
    model = network(torch.float32, **VARIANTS[variant]).to(device)
    recorded, log = ops.recording(ops.triton())
    with torch.no_grad(), launches() as launched:
        run(model, fresh((1, 3, 8, 8), torch.float32, device, seed=15), recorded, torch.float32)
    ours = [r for r in log if r.operation not in ("upsample", "downsample")]
    assert sum(r.cost.launches for r in ours) == len(launched)
    assert all(r.cost.launches == 1 for r in log)


def test_recorded_statistics_have_the_size_of_the_kernels_own(device: torch.device):
    fused, log = ops.recording(ops.triton())
    x = fused.enter(fresh((1, 16, 16, 16), torch.bfloat16, device, seed=16))
    w = fresh((32, 16, 3, 3), torch.bfloat16, device, seed=17)
    for operation, kwargs in (
        (fused.conv, {}),
        (fused.conv, {"stride": 2, "padding": (0, 1)}),
        (fused.upsample_conv, {}),
    ):
        y = operation(x, w, with_stats=True, **kwargs)
        pixels = y.data.numel() * y.data.element_size()
        assert log[-1].cost.bytes_written - pixels == y.stats.numel() * 4


def test_a_step_as_it_runs_costs_what_the_plan_says(device: torch.device):
    """The image of a prepared copy lies padded to 16 channels: its convolution is priced by the three that exist."""
    from ddpm_fast.engine import StepProgram
    from ddpm_fast.engine.prepared import prepare
    from ddpm_fast.planning import records
    from ddpm_fast.schedule import Schedule
    from ddpm_fast.step_table import step_table

    one_level = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    dtype = torch.bfloat16
    model, table = network(dtype, sample_size=8, **one_level), step_table(Schedule(num_train_timesteps=4))
    recorded, log = ops.recording(ops.triton())
    program = StepProgram(prepare(model, dtype, device, recorded), table, 1, (3, 8, 8), arena=False)
    program.begin(0, torch.zeros(1, dtype=torch.int64, device=device))
    log.clear()
    with torch.inference_mode():
        program.step()
    assert log == records(model.config, table, 1, dtype)
    first = next(r for r in log if r.operation == "conv")
    assert first.shapes[0] == ("x", (1, 3, 8, 8)) and first.cost.flops == 2 * (8 * 8) * 9 * 3 * 32
    assert first.cost.bytes_read == (16 * 8 * 8 + 9 * 3 * 32) * 2 + 32 * 4  # as it lies; the bias is float32


# --- recording: prices of whole networks, on meta ---


def priced(preset: str, form: str, batch: int = 1) -> tuple[list[ops.Record], int]:
    """Records of `UNet.run`, and the FLOPs that torch counts in all of `UNet.forward`."""
    p = PRESETS[preset]
    with torch.device("meta"), torch.no_grad():
        model = UNet(UNetConfig(**p.model)).eval()
        x = torch.empty(batch, 3, p.image_size, p.image_size)
        recorded, log = ops.recording(ops.reference(), form)
        model.run(x, TimeRows(model.embed(torch.zeros(batch))), recorded)
        with FlopCounterMode(display=False) as counter:
            model(x, 1)
    return log, counter.get_total_flops()


@pytest.mark.parametrize(
    ("preset", "parameters", "gflop", "saved"),
    [("cifar10", 35_746_307, 12.44, 0.071), ("lsun256", 113_673_219, 497, 0.055)],
)
def test_published_sizes(preset: str, parameters: int, gflop: float, saved: float):
    """GFLOP an image and step: convolutions and attention, 2 x MAC; the time embedding's Linear layers besides."""
    with torch.device("meta"):
        model = UNet(UNetConfig(**PRESETS[preset].model))
    assert sum(p.numel() for p in model.parameters()) == parameters
    log, counted = priced(preset, "plain")
    width, first = model.config.time_width, model.config.block_out_channels[0]
    blocks = sum(b.time_emb_proj.out_features for b in model.residual_blocks())
    linear = sum(
        cost.linear(1, i, o, torch.float32).flops for i, o in ((first, width), (width, width), (width, blocks))
    )  # fmt: skip
    flops = cost.total([r.cost for r in log]).flops
    assert flops + linear == counted, "every product of the network is priced"
    assert counted / 1e9 == pytest.approx(gflop, rel=5e-4)
    fused = cost.total([r.cost for r in priced(preset, "fused")[0]]).flops
    assert 1 - fused / flops == pytest.approx(saved, abs=5e-4)


def test_a_batch_costs_its_images_and_the_weights_once():
    one, eight = (cost.total([r.cost for r in priced("cifar10", "fused", n)[0]]) for n in (1, 8))
    assert eight.flops == 8 * one.flops
    assert eight.launches == one.launches
    shared = (8 * one.bytes - eight.bytes) / 7
    weights = sum(p.numel() for p in UNet(UNetConfig(**PRESETS["cifar10"].model)).to("meta").parameters()) * 4
    # Not the time embedding's 2.9 M values, but 16/9 of the upsampling weights.
    assert shared == pytest.approx(weights, rel=0.1)


def test_recording_passes_values_and_errors_through():
    recorded, log = ops.recording(ops.reference())
    x = fresh((1, 8, 4, 4), torch.float64, seed=18)
    assert torch.equal(recorded.norm_act(x, None, None, 4, 1e-6), reference.norm_act(x, None, None, 4, 1e-6))
    with pytest.raises(ValueError, match="C % groups"):
        recorded.norm_act(x, None, None, 3, 1e-6)
    assert len(log) == 1
    assert log[0].shapes == (("x", (1, 8, 4, 4)), ("out", (1, 8, 4, 4)))
    assert (log[0].operation, log[0].dtype, log[0].detail) == ("norm_act", torch.float64, "4 groups, silu")


def test_a_fallback_is_priced_as_eager_torch():
    recorded, log = ops.recording(ops.triton())
    x = recorded.enter(fresh((1, 8, 4, 4), torch.float32, seed=19))
    recorded.norm_act(x, None, None, 4, 1e-6, act="mish")
    assert log[0].cost == cost.norm_act((1, 16, 4, 4), torch.float32, affine=False, form="plain")


# --- without Triton ---


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_and_recording_need_no_triton_and_triton_says_so():
    said = python(
        "import sys\n"
        "import ddpm_fast.ops as ops\n"
        "from ddpm_fast import *\n"
        "assert 'triton' not in sys.modules, 'import ddpm_fast imports triton'\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "recorded, log = ops.recording(ops.reference())\n"
        "with torch.device('meta'): recorded.conv(torch.empty(1, 8, 4, 4), torch.empty(8, 8, 3, 3), with_stats=True)\n"
        "print(log[0].cost.launches)\n"
        "try: ops.triton()\n"
        "except RuntimeError as e: print(e)\n"
    )
    assert said.startswith("1\n")
    assert "not installed" in said


def test_cpu_tensors_without_the_interpreter_are_one_clear_error():
    said = python(
        "import os\n"
        "os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch, ddpm_fast.ops as ops\n"
        "t = ops.triton()\n"
        "try: t.conv(t.enter(torch.zeros(1, 16, 4, 4)), torch.zeros(16, 16, 3, 3))\n"
        "except RuntimeError as e: print(e)\n"
    )
    assert "CUDA" in said and "TRITON_INTERPRET" in said
