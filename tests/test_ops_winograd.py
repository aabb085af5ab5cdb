"""`ops.winograd()`: every operation against the definitions in float64, whole models, whole chains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import normal, unet
from tensors import double, fresh, same_chain, states
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import ops
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.house_rule import check, error
from ddpm_fast.kernels import reference
from ddpm_fast.kernels.reference import Shortcut
from ddpm_fast.kernels.winograd import F2, F4, Products, Scheme
from ddpm_fast.ops import compiled
from ddpm_fast.ops import winograd_set as ops_winograd
from ddpm_fast.ops.winograd_set import FeatureMap, Normalised, PackedWinograd
from ddpm_fast.unet import TimeRows, UNet


def _compiler() -> bool:
    try:
        return bool(compiled.compiler())
    except RuntimeError:
        return False


pytestmark = pytest.mark.skipif(not _compiler(), reason="NO C++ COMPILER: ops.winograd() is NOT TESTED")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def winograd() -> ops.Ops:
    return ops.winograd(keep_memory=False)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the forms that convolutions took."""
    seen: set[str] = set()
    call = Products.__call__
    monkeypatch.setattr(Products, "__call__", lambda self, v: (seen.add(self.scheme.name), call(self, v))[1])
    return seen


def need(dtype: torch.dtype) -> None:
    if not ops_winograd.computes(dtype):
        pytest.skip(f"oneDNN has no products in {dtype} on this processor: the set computes as `cpu` does")


def force(monkeypatch: pytest.MonkeyPatch, scheme: Scheme | None) -> None:
    monkeypatch.setattr(ops_winograd, "scheme_for", lambda *shape: scheme)


def hold(got: Any, definition: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """``got`` by the house rule against the definition."""
    same = definition(*args, **kwargs)
    check(got, same, definition(*map(double, args), **{k: double(v) for k, v in kwargs.items()}))


# --- normalisation ---

NORMALISATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no affine": {"affine": False},
    "skip": {"c2": 8},
    "no activation": {"act": "none"},
    "row of a table": {"rows": "bias_row", "r": 3},
    "scale and shift of images": {"rows": "scale_shift", "r": 2},
    "residual": {"residual": True},
    "gelu": {"act": "gelu"},
    "large mean": {"mean": 30.0, "c2": 8},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", NORMALISATIONS)
def test_normalisation(winograd: ops.Ops, case: str, dtype: torch.dtype):
    """16 + 8 channels in 2 groups of 12: the second straddles x and skip. What is lazy is read and checked whole."""
    given = {
        "affine": True,
        "c2": 0,
        "act": "silu",
        "rows": None,
        "residual": False,
        "mean": 0.0,
        **NORMALISATIONS[case],
    }
    x = fresh((2, 16, 5, 7), dtype, seed=1, mean=given["mean"])
    skip = fresh((2, given["c2"], 5, 7), dtype, seed=2, mean=given["mean"]) if given["c2"] else None
    c = 16 + given["c2"]
    weight, bias = (fresh((c,), torch.float32, seed=s) if given["affine"] else None for s in (3, 4))
    around: dict[str, Any] = {"skip": skip, "act": given["act"]}
    if given["rows"]:
        width = c * (2 if given["rows"] == "scale_shift" else 1)
        around[given["rows"]] = fresh((given["r"], width), torch.float32, seed=5)
        around["row"] = torch.tensor([2, 0], dtype=torch.int32) if given["r"] == 3 else None
    if given["residual"]:
        around["residual"] = fresh((2, c, 5, 7), dtype, seed=6)
    features = {k: FeatureMap(v) if k in ("skip", "residual") and v is not None else v for k, v in around.items()}
    got = winograd.norm_act(winograd.enter(x), weight, bias, 2, 1e-5, **features)
    assert isinstance(got, Normalised) == (given["act"] != "gelu" and not given["residual"])
    assert got.shape == (2, c, 5, 7) and got.dtype == dtype
    hold(winograd.leave(got), reference.norm_act, (x, weight, bias, 2, 1e-5), around)


# --- convolution ---

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "time of the step": {"time": 3},
    "time of images": {"time": 2},
    "residual scaled": {"residual": True, "scale": 0.7},
    "shortcut": {"shortcut": True},
    "shortcut and residual": {"shortcut": True, "residual": True},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", ["conv", "upsample_conv"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_layers(
    winograd: ops.Ops, monkeypatch: pytest.MonkeyPatch, used: set[str], case: str, operation: str, dtype: torch.dtype
):
    """A normalisation, a convolution and what surrounds it, of unrounded weights.

    In bfloat16 transformed pixels and products are rounded too: a layer's RMS error is within the house rule, its
    largest is held to it over whole models, below.
    """
    need(dtype)
    given = {"bias": True, "time": 0, "residual": False, "scale": 1.0, "shortcut": False, **CONVOLUTIONS[case]}
    force(monkeypatch, F2)
    n, c, k, h, w = 2, 20, 24, 5, 7
    size = (2 * h, 2 * w) if operation == "upsample_conv" else (h, w)
    x = fresh((n, c, h, w), dtype, seed=1)
    weight = fresh((k, c, 3, 3), torch.float32, seed=2, std=(9 * c) ** -0.5)
    bias = fresh((k,), torch.float32, seed=3) if given["bias"] else None
    around: dict[str, Any] = {"scale": given["scale"]}
    if given["time"]:
        around["time"] = fresh((given["time"], k), torch.float32, seed=4)
        around["row"] = torch.tensor([2, 9], dtype=torch.int32) if given["time"] == 3 else None
    if given["residual"]:
        around["residual"] = fresh((n, k, *size), dtype, seed=5)
    features = {key: FeatureMap(v) if key == "residual" else v for key, v in around.items()}
    if given["shortcut"]:
        s, s2 = fresh((n, 9, *size), dtype, seed=6), fresh((n, 7, *size), dtype, seed=7)
        plain = fresh((k, 16, 1, 1), torch.float32, seed=8, std=0.25)
        packed = winograd.pack_conv(plain, dtype=dtype, channels=(9, 7))
        around["shortcut"] = Shortcut(s, s2, plain, None)
        features["shortcut"] = Shortcut(FeatureMap(s), FeatureMap(s2), packed, None)
    pack = winograd.pack_conv if operation == "conv" else winograd.pack_upsample_conv
    lazy = winograd.norm_act(winograd.enter(x), None, None, 4, 1e-5)
    got = getattr(winograd, operation)(lazy, pack(weight, dtype=dtype), bias, with_stats=True, **features)
    assert used == {F2.name if operation == "conv" else "upsampling by differences"}
    assert got.stats is not None, "the next normalisation was promised them"

    def definition(x: Tensor, weight: Tensor, bias: Tensor | None, **around: Any) -> Tensor:
        return getattr(reference, operation)(reference.norm_act(x, None, None, 4, 1e-5), weight, bias, **around)

    truth = definition(*(v if v is None else v.double() for v in (x, weight, bias)), **double_all(around))
    mine, theirs = error(got.data, truth), error(definition(x, weight.to(dtype), bias, **around), truth)
    assert mine.rms <= 2 * theirs.rms and mine.largest <= 4 * theirs.largest


def double_all(around: dict[str, Any]) -> dict[str, Any]:
    return {key: double(value) for key, value in around.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_has_no_winograd_form_is_convolved_as_by_cpu(winograd: ops.Ops, used: set[str], dtype: torch.dtype):
    """Strided and 1x1 convolutions, few channels, two inputs side by side; of a map that is still to be normalised."""
    x = fresh((2, 32, 8, 8), dtype, seed=1)
    lazy = winograd.norm_act(FeatureMap(x), None, None, 4, 1e-5)
    whole = reference.norm_act(x.double(), None, None, 4, 1e-5)
    rounded = whole.to(dtype)
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((16, 32, 3, 3), {"stride": 2, "padding": (0, 1)}),
        ((16, 32, 3, 3), {"stride": 2}),
        ((48, 32, 1, 1), {}),
        ((3, 32, 3, 3), {}),
    ]
    for shape, how in cases:
        weight = fresh(shape, torch.float32, seed=2, std=0.1)
        got = winograd.conv(lazy, winograd.pack_conv(weight, dtype=dtype), None, **how)
        same = reference.conv(rounded, weight.to(dtype), None, **how)
        check(got.data, same, reference.conv(whole, weight.to(dtype).double(), None, **how), name=str((shape, how)))
    skip = fresh((2, 8, 8, 8), dtype, seed=3)
    weight = fresh((16, 40, 3, 3), torch.float32, seed=4, std=0.1)
    packed = winograd.pack_conv(weight, dtype=dtype, channels=(32, 8))
    got = winograd.conv(FeatureMap(x), packed, None, skip=FeatureMap(skip))
    hold(got.data, reference.conv, (x, weight.to(dtype), None), {"skip": skip})
    for operation in ("downsample", "upsample"):
        got = getattr(winograd, operation)(lazy)
        check(got.data, getattr(reference, operation)(rounded), getattr(reference, operation)(whole))
    assert used == set()


def test_chunks_bound_memory_and_change_nothing(winograd: ops.Ops, monkeypatch: pytest.MonkeyPatch):
    chunks = ops_winograd._chunks.__wrapped__
    monkeypatch.setattr(ops_winograd, "CHUNK_BYTES", 1000)
    assert chunks(10, 300) == [(0, 3), (3, 3), (6, 3), (9, 1)] and chunks(3, 5000) == [(0, 1), (1, 1), (2, 1)]
    assert chunks(4, 250) == [(0, 4)] and chunks(5, 250) == [(0, 3), (3, 2)]
    force(monkeypatch, F4)
    x = fresh((3, 32, 9, 7), torch.float32, seed=1)
    packed = winograd.pack_conv(fresh((24, 32, 3, 3), torch.float32, seed=2, std=0.1), dtype=torch.float32)
    time = fresh((3, 24), torch.float32, seed=3)
    seen, sizes = [], set()
    call = Products.__call__
    monkeypatch.setattr(Products, "__call__", lambda self, v: (sizes.add(len(v)), call(self, v))[1])
    for size in (2**26, 1):
        monkeypatch.setattr(ops_winograd, "CHUNK_BYTES", size)
        monkeypatch.setattr(ops_winograd, "_chunks", chunks)
        y = winograd.conv(FeatureMap(x), packed, time=time, with_stats=True)
        seen.append((y.data, y.stats.values))
    assert sizes == {3 * 3 * 2, 2}  # all tiles of three images, and one row of them
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(*seen))


def test_what_does_not_fit_is_refused_or_computed_elsewhere(winograd: ops.Ops, used: set[str]):
    weight = fresh((16, 32, 3, 3), torch.float32, seed=1, std=0.1)
    packed = winograd.pack_conv(weight, dtype=torch.float32)
    with pytest.raises(ValueError, match="the weights are for 32 channels; got a map of 48"):
        winograd.conv(FeatureMap(fresh((1, 48, 32, 32), torch.float32, seed=2)), packed)
    x = fresh((3, 32, 16, 16), torch.float32, seed=2)
    with pytest.raises(ValueError, match="one row, or one an image; got 2 for 3"):
        winograd.norm_act(FeatureMap(x), None, None, 4, 1e-5, bias_row=torch.zeros(2, 32))
    half = x.bfloat16()
    got = winograd.conv(FeatureMap(half), packed).data  # weights of another dtype
    assert got.dtype == torch.bfloat16 and used == set()
    assert error(got, reference.conv(half.double(), weight.double())).largest < 0.02
    ghost = winograd.pack_conv(weight.to("meta"), dtype=torch.float32)
    lazy = winograd.norm_act(winograd.enter(x.to("meta")), None, None, 4, 1e-5)
    assert winograd.conv(lazy, ghost).shape == (3, 16, 16, 16)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("h", "w"), [(8, 8), (21, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(winograd: ops.Ops, dtype: torch.dtype, h: int, w: int, heads: int):
    qkv = fresh((2, 72, h, w), dtype, seed=1)
    hold(winograd.attention(FeatureMap(qkv), heads).data, reference.attention, (qkv, heads), {})


# --- whole models ---

SMALL: dict[str, Any] = {
    "sample_size": (12, 20),  # 6 x 10 a level below: no multiple of 4
    "block_out_channels": (64, 128),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,  # 12 channels of the 128 + 64 in one: groups straddle the concatenation
    "attention_head_dim": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "as DDPM's": {},
    "scale-shift, resnets that resample": {
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "gelu, one level": {
        "act_fn": "gelu",
        "block_out_channels": (64,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
}


def run(model: UNet, x: Tensor, chosen: ops.Ops, dtype: torch.dtype) -> Tensor:
    prepared = prepare(model, dtype, "cpu", chosen)
    table = prepared.time_table(torch.tensor([3.0, 500.0]))
    return prepared.run(x.to(dtype), TimeRows(table=table, row=torch.tensor([1, 0], dtype=torch.int32)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("which", MODELS)
def test_whole_models(winograd: ops.Ops, used: set[str], which: str, n: int, dtype: torch.dtype):
    need(dtype)
    model = unet(SMALL | MODELS[which])
    x = normal(n, 3, 12, 20, seed=n)
    truth = run(model, x, ops.reference(), torch.float64)
    got = run(model, x, winograd, dtype)
    assert used, "nothing was computed by Winograd's algorithm"
    if dtype == torch.float32:
        torchs = error(run(model, x, ops.reference(), dtype), truth)
        mine = error(got, truth)
        assert F4.name in used and mine.largest <= min(1e-4, 5 * torchs.largest) and mine.rms <= 5 * torchs.rms
    else:
        assert F4.name not in used
        check(got, run(model, x, ops.reference(), dtype), truth)


def test_recorded_weighed_and_for_another_batch(winograd: ops.Ops):
    """The set under `recording` and `weight_bytes`; forms for a second batch size beside those of the first."""
    from ddpm_fast.engine.prepared import weight_bytes

    model = unet(SMALL)
    recorded, log = ops.recording(winograd)
    prepared = prepare(model, torch.float32, "cpu", replace(winograd, conv=recorded.conv))
    before = weight_bytes(prepared)
    assert before >= sum(4 * p.numel() for name, p in model.named_parameters() if "conv" in name)
    rows = TimeRows(table=prepared.time_table(torch.tensor([3.0])), row=torch.tensor([0]))
    first = prepared.run(normal(3, 3, 12, 20, seed=1), rows)
    assert weight_bytes(prepared) > before and any(record.detail.startswith("3x3") for record in log)
    alone = prepared.run(normal(3, 3, 12, 20, seed=1)[1:2], rows)
    assert torch.allclose(first[1:2], alone, atol=1e-5) and torch.equal(
        first, prepared.run(normal(3, 3, 12, 20, seed=1), rows)
    )


def test_the_bundled_model_over_all_its_steps(used: set[str]):
    """As in tests/test_ops_cpu.py: to an eightieth of a grey level, or to what rounding makes of such a chain."""
    checkpoint = df.load()
    model, schedule, size = checkpoint.model, checkpoint.schedule, checkpoint.model.config.sample_size

    def plain() -> Tensor:
        return states(lambda x, t: model(x, t), schedule, image_shape=(3, size, size))

    got, want = states(model, schedule, ops="winograd"), plain()
    assert len(got) == 21 and {F4.name, "upsampling by differences"} & used
    assert same_chain(got, want, model, plain, 1e-4)
    assert not torch.equal(got[-1], want[-1]), "that was the same set twice"


def test_other_dtypes_run_as_by_cpu(winograd: ops.Ops, used: set[str]):
    model = unet(SMALL)
    x = normal(1, 3, 12, 20, seed=1)
    truth = run(model, x, ops.reference(), torch.float64)
    assert error(run(model, x, winograd, torch.float64), truth).largest < 1e-12
    assert error(run(model, x, winograd, torch.float16), truth).largest < 0.05
    assert used == set()


def test_gradients_are_refused(winograd: ops.Ops):
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no gradients"):
        winograd.enter(torch.zeros(1, 3, 4, 4, requires_grad=True))
    assert isinstance(winograd.pack_conv(torch.zeros(16, 16, 3, 3), dtype=torch.float32), PackedWinograd)
