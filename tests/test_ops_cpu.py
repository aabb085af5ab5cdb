"""The operations of a CPU: each against the definitions in float64, with oneDNN and without, and over whole chains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import TINY, normal, unet
from tensors import check_op, double, fresh, same_chain, states
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import ops
from ddpm_fast.engine.choose_ops import choose_ops
from ddpm_fast.engine.prepared import prepare, weight_bytes
from ddpm_fast.house_rule import FLOOR, check
from ddpm_fast.kernels import host_memory, norm_compiled, norm_cpu, onednn, reference, upsample_difference
from ddpm_fast.kernels.native import ELEMENTS
from ddpm_fast.kernels.reference import Shortcut
from ddpm_fast.ops import cpu_set as ops_cpu
from ddpm_fast.ops.cpu_set import channels_last
from ddpm_fast.unet import TimeRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_COMPILER = ops_cpu.compiled_norm(torch.float32) is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="NO C++ COMPILER: the compiled norm_act is NOT TESTED")


@pytest.fixture(params=["oneDNN", "plain torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With oneDNN for weights however few, and as on a machine whose torch has none."""
    monkeypatch.setattr(onednn, "WORTH", 0)
    if request.param == "oneDNN":
        if not onednn.computes(torch.float32):
            pytest.skip("torch has no oneDNN here, or this is no x86 processor")
    else:
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    return request.param


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- convolution ---

ROW = torch.tensor([2, 0], dtype=torch.int32)
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {},
    "1x1": {"size": 1},
    "no bias": {"bias": False},
    "strided": {"stride": 2},
    "strided, padded behind": {"stride": 2, "padding": (0, 1)},
    "row of a table": {"time": 5, "row": ROW},
    "row of a table, no bias": {"time": 5, "row": ROW, "bias": False},
    "rows of images": {"time": 2},
    "residual": {"residual": True},
    "residual scaled": {"residual": True, "scale": 0.7, "time": 1},
    "skip": {"skip": 10},
    "skip, residual": {"skip": 10, "residual": True},
    "shortcut": {"shortcut": (7, 0), "time": 5, "row": ROW},
    "shortcut over a skip": {"shortcut": (7, 5), "scale": 0.5},
    "shortcut over a skip, residual": {"shortcut": (7, 5), "residual": True},
}


def convolution(name: str, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any], list[Tensor], dict[str, Any]]:
    """(arguments, keywords) as the reference takes them, and with packed weights."""
    wanted = dict(CONVOLUTIONS[name])
    n, channels, h, w, k = 2, 12, 7, 6, 20
    size, skip = wanted.pop("size", 3), wanted.pop("skip", 0)
    x, weight = fresh((n, channels, h, w), dtype, seed=1), normal(k, channels + skip, size, size, seed=2) / 8
    weight = weight.to(dtype)
    bias = normal(k, seed=3) if wanted.pop("bias", True) else None
    if skip:
        wanted["skip"] = fresh((n, skip, h, w), dtype, seed=4)
    if "time" in wanted:
        wanted["time"] = normal(wanted["time"], k, seed=5)
    if wanted.get("residual"):
        wanted["residual"] = fresh((n, k, h, w), dtype, seed=6)
    packed = dict(wanted)
    if "shortcut" in wanted:
        a, b = wanted["shortcut"]
        side = normal(k, a + b, 1, 1, seed=7).to(dtype)
        maps = fresh((n, a, h, w), dtype, seed=8), fresh((n, b, h, w), dtype, seed=9) if b else None
        wanted["shortcut"] = Shortcut(*maps, side, normal(k, seed=10))
        lying = onednn.pack_conv(side, channels=(a, b) if b else None)
        packed["shortcut"] = Shortcut(*maps, lying, normal(k, seed=10))  # type: ignore[arg-type]
    own = onednn.pack_conv(weight, channels=(channels, skip) if skip else None)
    return [x, weight, bias], wanted, [x, own, bias], packed  # type: ignore[list-item]


def hold(ours: Any, definition: Any, given: tuple[Any, ...], **kwargs: Any) -> Tensor:
    """``ours`` with packed weights to the house rule, whose truth has the weights that were packed."""
    args, options, own_args, own_options = given
    got = ours(*own_args, **own_options)
    same = definition(*args, **options)
    truth = definition(*(double(a) for a in args), **{k: double(v) for k, v in options.items()})
    check(got, same, truth, **kwargs)
    assert got.is_contiguous(memory_format=torch.channels_last)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, dtype: torch.dtype, backend: str):
    hold(onednn.conv, reference.conv, convolution(name, dtype))


def test_weights_follow_the_input_s_shape_and_are_held_once(monkeypatch: pytest.MonkeyPatch):
    """Two shapes in turn, then a third: the arrangement of the first is made again, from that of another."""
    monkeypatch.setattr(onednn, "WORTH", 0)
    weight = normal(64, 32, 3, 3, seed=1) / 17
    packed = onednn.pack_conv(weight)
    for h, n in ((4, 1), (16, 3), (4, 1), (8, 2), (4, 1), (16, 3)):
        x = fresh((n, 32, h, h), torch.float32, seed=h)
        check(onednn.conv(x, packed), F.conv2d(x, weight, padding=1), F.conv2d(x.double(), weight.double(), padding=1))
        assert len(packed.tensors()) <= 2
    one = onednn.pack_conv(weight)
    assert sum(t.numel() for t in one.tensors()) == weight.numel()
    onednn.conv(x, one)
    assert sum(t.numel() for t in one.tensors()) == weight.numel(), "the weights as given are let go"
    weight.zero_()
    assert onednn.conv(x, one).abs().max() > 0.1, "packed weights are the caller's own memory"


# --- upsampling ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(7, 5), (1, 1), (1, 4), (2, 8)])
@pytest.mark.parametrize("form", ["plain", "row", "images", "residual", "shortcut"])
def test_upsampling_convolution(
    form: str, size: tuple[int, int], dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
):
    """Directly, and as for a large map. Weights are float32 where they are packed: taps are summed, then rounded."""
    n, c, k = 2, 12, 20
    x, weight, bias = fresh((n, c, *size), dtype, seed=1), normal(k, c, 3, 3, seed=2) / 10, normal(k, seed=3)
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "row": {"time": normal(5, k, seed=4), "row": ROW},
        "images": {"time": normal(n, k, seed=4), "scale": 0.5},
        "residual": {"residual": fresh((n, k, 2 * size[0], 2 * size[1]), dtype, seed=5)},
        "shortcut": {},
    }
    options = forms[form]
    own = dict(options)
    if form == "shortcut":
        beside, side = fresh((n, 7, 2 * size[0], 2 * size[1]), dtype, seed=5), normal(k, 7, 1, 1, seed=6)
        options["shortcut"] = Shortcut(beside, None, side, None)
        own["shortcut"] = Shortcut(beside, None, onednn.pack_conv(side, dtype=dtype), None)  # type: ignore[arg-type]
    packed = upsample_difference.pack_upsample_conv(weight, dtype=dtype)
    given = ([x, weight, bias], options, [x, packed, bias], own)
    assert packed.form(x.shape) == "direct"
    hold(upsample_difference.upsample_conv, reference.upsample_conv, given)
    monkeypatch.setattr(upsample_difference, "DIRECT", 0)
    assert packed.form(x.shape) == ("differences" if dtype == torch.float32 else "taps")
    hold(upsample_difference.upsample_conv, reference.upsample_conv, given)


# --- normalisation ---

NORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no affine": {"affine": False},
    "skip": {"skip": 8},
    "groups that straddle": {"skip": 12, "groups": 2},
    "row before": {"bias_row": 5, "row": ROW},
    "rows of images before, skip": {"bias_row": 2, "skip": 8},
    "row behind": {"scale_shift": 5, "row": ROW},
    "rows of images behind": {"scale_shift": 2, "act": "none"},
    "all": {"bias_row": 5, "scale_shift": 5, "row": ROW, "skip": 8, "act": "mish", "residual": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("name", NORMS)
def test_normalisation(name: str, mean: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """As a small map, whole and image by image, also where the mean is far larger than the deviation."""
    wanted = dict(NORMS[name])
    n, channels, skip = 2, 16, wanted.pop("skip", 0)
    groups, total = wanted.pop("groups", 4), channels + skip
    affine = (normal(total, seed=2), normal(total, seed=3)) if wanted.pop("affine", True) else (None, None)
    x = fresh((n, channels, 9, 5), dtype, seed=1, mean=mean)
    if skip:
        wanted["skip"] = fresh((n, skip, 9, 5), dtype, seed=4, mean=mean)
    for key, width in (("bias_row", total), ("scale_shift", 2 * total)):
        if key in wanted:
            wanted[key] = normal(wanted[key], width, seed=5)
    if wanted.get("residual"):
        wanted["residual"] = fresh((n, total, 9, 5), dtype, seed=6)
    args = (x, *affine, groups, 1e-5)
    before = x.clone()
    if HAS_COMPILER and dtype in ELEMENTS and wanted.get("act", "silu") in norm_compiled.ACTS:
        y = check_op(ops_cpu.compiled_norm(dtype), reference.norm_act, args, wanted)
        assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, before)
    for limit, value in (("SMALL", norm_cpu.SMALL), ("SMALL", 0), ("CACHED", 1)):
        monkeypatch.setattr(norm_cpu, limit, value)
        y = check_op(norm_cpu.norm_act, reference.norm_act, args, wanted)
        assert y.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, before)


def test_normalisation_of_many_pixels_keeps_its_digits():
    """Where torch's kernel for channels_last is far off: the reason for not using it."""
    x = fresh((1, 8, 192, 192), torch.float32, seed=1, mean=3.0)
    truth = F.group_norm(x.double(), 2, eps=1e-5)
    same = reference.norm_act(x, None, None, 2, 1e-5, act="none")
    check(norm_cpu.norm_act(x, None, None, 2, 1e-5, act="none"), same, truth)
    check(ops.cpu().norm_act(x, None, None, 2, 1e-5, act="none"), same, truth)
    with pytest.raises(AssertionError, match="error"):
        check(F.group_norm(x, 2, eps=1e-5), same, truth)


def test_bfloat16_leaves_torch_s_kernel_where_means_are_large(monkeypatch: pytest.MonkeyPatch):
    args = (fresh((1, 8, 128, 128), torch.bfloat16, seed=1, mean=250.0), None, None, 2, 1e-5)
    check_op(norm_cpu.norm_act, reference.norm_act, args, {"act": "none"})
    monkeypatch.setattr(norm_cpu, "MILD", 1e9)
    with pytest.raises(AssertionError, match="error"):
        check_op(norm_cpu.norm_act, reference.norm_act, args, {"act": "none"})


@needs_compiler
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize(
    ("n", "c", "skip", "h", "w", "groups"),
    [
        (1, 80, 16, 7, 7, 8),  # four vectors at a time, then one; groups of 12 straddle
        (3, 70, 0, 5, 3, 5),  # channels that vectors do not divide
        (2, 8, 4, 3, 70, 3),  # rows longer than a run of pixels may be
        (1, 1, 0, 9, 9, 1),
    ],
)
def test_compiled_normalisation_of_odd_shapes(
    n: int, c: int, skip: int, h: int, w: int, groups: int, dtype: torch.dtype
):
    x, total = fresh((n, c, h, w), dtype, seed=1, mean=5.0), c + skip
    options = {"skip": fresh((n, skip, h, w), dtype, seed=2)} if skip else {}
    args = (x, normal(total, seed=3), normal(total, seed=4), groups, 1e-6)
    check_op(ops_cpu.compiled_norm(dtype), reference.norm_act, args, options)


@needs_compiler
def test_compiled_normalisation_has_the_same_bits_for_any_number_of_threads():
    x, seen, before = fresh((3, 24, 9, 11), torch.float32, seed=1), [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            seen.append(ops.cpu().norm_act(x, None, None, 4, 1e-5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_without_a_compiler_torch_s_operations_normalise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Nothing is said of it: the set is the same, and slower."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    ops_cpu.compiled_norm.cache_clear()
    args = (fresh((2, 16, 9, 5), torch.float32, seed=1), None, None, 4, 1e-5)
    try:
        assert ops_cpu.compiled_norm(torch.float32) is None
        assert torch.equal(ops.cpu().norm_act(*args), norm_cpu.norm_act(*args))
    finally:
        ops_cpu.compiled_norm.cache_clear()
    monkeypatch.undo()
    if HAS_COMPILER:
        assert not torch.equal(ops.cpu().norm_act(*args), norm_cpu.norm_act(*args)), "that was the same code twice"


# --- the set ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 1.5, "out_channels": 6},
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "num_class_embeds": 3,
            "downsample_padding": 0,
        },
        {"act_fn": "gelu", "time_embedding_type": "fourier", "norm_num_groups": 2},
    ],
)
def test_a_network_keeps_the_house_rule(
    changes: dict[str, Any], dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(upsample_difference, "DIRECT", 0)
    monkeypatch.setattr(norm_cpu, "SMALL", 0)
    model = unet({**TINY, **changes})
    x, t = fresh((2, 3, 8, 8), dtype, seed=1), torch.tensor([700.0, 3.0])
    labels = None if model.class_embedding is None else torch.tensor([2, 0])
    copy = prepare(model, dtype, "cpu", ops.cpu())
    got = copy(x, t, labels)
    same = unet({**TINY, **changes}).to(dtype)(x, t, labels)
    truth = unet({**TINY, **changes}).double()(x.double(), t.double(), labels)
    check(got, same, truth, floor=4 * FLOOR)


def test_the_bundled_model_over_all_its_steps():
    """1000 steps in float32 stay by the network's own from first to last: to an eightieth of a grey level, or to what
    rounding makes of such a chain."""
    checkpoint = df.load()
    model, schedule, size = checkpoint.model, checkpoint.schedule, checkpoint.model.config.sample_size

    def plain() -> Tensor:
        return states(lambda x, t: model(x, t), schedule, image_shape=(3, size, size))

    got, want = states(model, schedule, ops="cpu"), plain()
    assert len(got) == 21 and same_chain(got, want, model, plain, 1e-4)
    assert not torch.equal(got[-1], want[-1]), "that was the same set twice"


def test_what_is_chosen():
    """For runs too short to compile anything; `winograd` has tests of its own."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    names = {device.type: choose_ops("auto", device)[0].name for device in (cpu, torch.device("mps"))}
    assert names == {"cpu": "cpu", "mps": "reference"}
    assert choose_ops("cpu", cuda)[0].name == "cpu" and choose_ops("reference", cpu)[0].name == "reference"
    own = ops.reference()
    assert choose_ops(own, cpu)[0] is own
    with pytest.raises(ValueError, match=r"ops must be one of auto, .*; got 'gpu'"):
        choose_ops("gpu", cpu)


def test_gradients_and_other_devices_are_refused():
    chosen = ops.cpu()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no gradients"):
        chosen.enter(torch.zeros(1, 3, 4, 4, requires_grad=True))
    with pytest.raises(ValueError, match="needs tensors on the CPU; got one on cuda"):
        chosen.enter(torch.empty(1, 3, 4, 4, device="meta").as_subclass(_OnCuda))


class _OnCuda(Tensor):
    device = torch.device("cuda")  # type: ignore[assignment]


def test_packed_weights_are_counted():
    held = [weight_bytes(prepare(unet(TINY), torch.float32, "cpu", which)) for which in (ops.cpu(), ops.reference())]
    assert held[0] == held[1] > 10_000


def test_float64_is_the_reference_s():
    model = unet(TINY).double()
    x, t = normal(2, 3, 8, 8, dtype=torch.float64), torch.tensor([7.0], dtype=torch.float64)
    got = prepare(model, torch.float64, "cpu", ops.cpu())(x, t)
    torch.testing.assert_close(got, model(x, t), rtol=1e-12, atol=1e-12)
    chosen = ops.cpu()
    assert "float64" in str(chosen.falls_back("norm_act", {"x": x}))
    assert chosen.falls_back("norm_act", {"x": x.float()}) is None
    assert chosen.falls_back("conv", {"x": x.float(), "weight": onednn.pack_conv(normal(4, 3, 1, 1))}) is None


def test_unpacked_weights_serve_too():
    """`UNet.run` takes a set together with the model's own weights."""
    model = unet(TINY)
    x, time = channels_last(normal(2, 3, 8, 8)), TimeRows(model.embed(torch.tensor([5.0, 900.0])))
    truth = unet(TINY).double().run(x.double(), TimeRows(model.embed(torch.tensor([5.0, 900.0])).double()))
    check(model.run(x, time, ops.cpu()), model.run(x, time), truth, floor=4 * FLOOR)


def test_a_processor_without_wide_vectors():
    """oneDNN held to AVX2, where it has no bfloat16: everything is still right, in a process of its own."""
    code = """
import torch, ddpm_fast as df
from ddpm_fast.kernels import onednn
c = df.load()
print(onednn.computes(torch.float32), onednn.computes(torch.bfloat16))
for dtype in (torch.float32, torch.bfloat16):
    draw = lambda ops, dtype: df.Sampler(c.model, c.schedule, 2, [400], dtype=dtype, ops=ops).sample(2)
    off = (draw("cpu", dtype) - draw("reference", torch.float32)).abs()
    print(float(off.max()), float(off.square().mean().sqrt()))
"""
    if not onednn.computes(torch.float32):
        pytest.skip("torch has no oneDNN here, or this is no x86 processor")
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    has, *lines = done.stdout.splitlines()
    assert has == "True False"
    (exact, _), (_, low) = (map(float, line.split()) for line in lines)
    assert exact <= 1e-4 and 1e-6 < low <= 2e-2


def test_freed_memory_is_kept_where_there_is_glibc(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    monkeypatch.setattr(host_memory, "keep_freed_memory", lambda: calls.append(1))
    ops.cpu(keep_memory=False)
    assert not calls
    ops.cpu()
    assert calls == [1]
    monkeypatch.undo()
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    assert host_memory.keep_freed_memory() is False


def test_a_large_map_keeps_its_pages():
    """Freed and asked for again, 64 MB soon cost no page faults; as glibc is made, 16,384 each time."""
    resource = pytest.importorskip("resource")
    if not host_memory.keep_freed_memory():
        pytest.skip("no glibc")
    faults = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults) < 1000
