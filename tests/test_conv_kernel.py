"""The fused convolution against the float64 reference: every path, epilogue and awkward shape, by the house rule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensors import double, first_nan, fresh, poison
from torch import Tensor

from ddpm_fast.house_rule import check
from ddpm_fast.kernels import conv as fused
from ddpm_fast.kernels import reference
from ddpm_fast.kernels.launch import Launch
from ddpm_fast.kernels.launch_conv import conv_launch, part_pixels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NHWC = torch.channels_last


@dataclass(frozen=True)
class Case:
    """One call. Channels: of x and the skip; shortcut: of its two inputs."""

    n: int
    channels: tuple[int, ...]
    hw: tuple[int, int]
    k: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, ...] | None = None
    upsample: bool = False
    bias: bool = True
    time: str = ""  # row | image | one
    residual: bool = False
    shortcut: tuple[int, ...] = ()
    scale: float = 1.0
    stats: bool = True
    packed: bool = False
    weight_channels: int = 0  # fewer than x has: x is padded with zeros
    dtype: torch.dtype = F32

    def __str__(self) -> str:
        shown = {k: v for k, v in self.__dict__.items() if k not in ("n", "channels", "hw", "k", "dtype")}
        changed = [f"{k}={v}" for k, v in shown.items() if v != self.__dataclass_fields__[k].default]
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([f"n{self.n}", f"{self.channels}", f"{self.hw}", f"k{self.k}", dtype, *changed])


def guarded(x: Tensor | None) -> Tensor | None:
    """x [N, C, H, W] between two images of NaN: a read outside of it shows."""
    if x is None:
        return None
    n, *rest = x.shape
    room = poison((n + 2, *rest), x.dtype, x.device, NHWC)
    room[1:-1] = x
    return room[1:-1]


def arguments(case: Case, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `reference.conv` or `reference.upsample_conv` takes, drawn anew for each case."""
    count = iter(range(100))

    def draw(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        seed = 1000 * next(count) + case.n + 7 * case.k
        return fresh(shape, case.dtype, device, seed=seed, std=std, mean=mean)

    n, k, (h, w) = case.n, case.k, case.hw
    x = draw(n, case.channels[0], h, w)
    skip = draw(n, case.channels[1], h, w, mean=0.5) if len(case.channels) > 1 else None
    total = case.weight_channels or sum(case.channels)
    weight = draw(k, total, case.size, case.size, std=(total * case.size**2) ** -0.5)
    bias = draw(k) if case.bias else None
    kwargs: dict[str, Any] = {"with_stats": case.stats, "scale": case.scale}
    if not case.upsample:
        kwargs |= {"skip": guarded(skip), "stride": case.stride, "padding": case.padding}
    size = tuple(reference_call(case, meta(x), (meta(weight), meta(bias)), meta_kwargs(kwargs)).shape)
    if case.residual:
        kwargs["residual"] = guarded(draw(*size))
    if case.time:
        kwargs["time"] = draw({"row": 5, "image": n, "one": 1}[case.time], k)
        kwargs["row"] = torch.tensor([3, 77], dtype=torch.int32, device=device) if case.time == "row" else None
    if case.shortcut:
        short_x, *rest = (guarded(draw(n, c, *size[2:])) for c in case.shortcut)
        short_weight = draw(k, sum(case.shortcut), 1, 1, std=sum(case.shortcut) ** -0.5)
        kwargs["shortcut"] = reference.Shortcut(short_x, rest[0] if rest else None, short_weight, draw(k))
    return (guarded(x), weight, bias), kwargs


def meta(x: Any) -> Any:
    return x.to("meta") if isinstance(x, Tensor) else x


def meta_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {key: meta(value) for key, value in kwargs.items() if key != "with_stats"}


def reference_call(case: Case, x: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The reference's pixels. It takes as many channels as the weights have."""
    function = reference.upsample_conv if case.upsample else reference.conv
    if case.weight_channels:
        x = x[:, : case.weight_channels]
    return function(x, *rest, **kwargs)


def check_conv(
    module: ModuleType,  # kernels/conv.py, or a copy with a bug
    case: Case,
    device: torch.device,
    launch: Launch | None = None,
    arch: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Hold one call to the house rule: pixels, statistics, and nothing written outside. Returns both."""
    (x, weight, bias), kwargs = arguments(case, device)
    if case.weight_channels:
        x[:, case.weight_channels :] = 0
    plain = {key: value for key, value in kwargs.items() if key != "with_stats"}
    same = reference_call(case, x, (weight, bias), plain)
    truth = reference_call(case, double(x), (double(weight), double(bias)), {k: double(v) for k, v in plain.items()})
    run = module.upsample_conv if case.upsample else module.conv
    packed: Any = weight
    if case.packed:
        packed = (
            module.pack_upsample_conv(weight) if case.upsample else module.pack_conv(weight, channels=case.channels)
        )
        if case.shortcut:
            short = module.pack_conv(kwargs["shortcut"].weight, channels=case.shortcut)
            kwargs["shortcut"] = kwargs["shortcut"]._replace(weight=short)
    room = poison((case.n + 2, *same.shape[1:]), case.dtype, device, NHWC)

    up = 2 if case.upsample else 1
    if case.stats:
        parts = len(runs(same, up))
        kwargs["stats_out"] = poison((case.n, parts, 3, case.k), F32, device)
    got = run(x, packed, bias, **kwargs, out=room[1:-1], launch=launch, arch=arch)
    y, stats = got if case.stats else (got, None)
    assert y.data_ptr() == room[1:-1].data_ptr(), "the result is not in out"
    check(y, same, truth, name="pixels")
    assert bool(room[[0, -1]].isnan().all()), "written outside of out"
    if stats is not None:
        check_stats(y, stats, up)
    return y, stats


def runs(y: Tensor, up: int) -> list[Tensor]:
    """The pixels of each entry of the statistics, [N, K, count]: runs of an image, or of each phase of it."""
    found = []
    for phase in range(up * up):
        image = y[:, :, phase // 2 :: up, phase % 2 :: up]
        found += image.flatten(2).split(part_pixels(*image.shape[2:]), dim=2)
    return found


def check_stats(y: Tensor, stats: Tensor, up: int) -> None:
    """Each part's count, mean and centred sum of squares are those of the stored values."""
    parts = runs(y, up)
    assert stats.shape == (y.shape[0], len(parts), 3, y.shape[1]), f"statistics have shape {tuple(stats.shape)}"
    assert not stats.isnan().any(), f"statistics unwritten at {first_nan(stats)}"
    for i, part in enumerate(parts):
        count = float(part.shape[2])
        assert bool((stats[:, i, 0] == count).all()), f"part {i} has {count} pixels; got {stats[0, i, 0, 0]}"
        for j, name in ((1, "mean"), (2, "M2")):
            same, truth = (reference.channel_stats(p[..., None])[:, 0, j] for p in (part.float(), part.double()))
            check(stats[:, i, j], same, truth, name=f"{name} of part {i}")


CASES = [
    Case(2, (32,), (8, 8), 32, time="row"),
    Case(1, (16,), (8, 8), 16, residual=True, packed=True),
    Case(3, (96,), (4, 4), 24, time="image", scale=0.5**0.5),
    Case(5, (32,), (4, 4), 16, residual=True, time="one"),  # boxes of 4 and 8 images, the last one partly outside
    Case(3, (16,), (8, 8), 20, shortcut=(32,), packed=True),  # K divides no tile
    Case(2, (256, 128), (4, 4), 16, packed=True),  # concatenation of the CIFAR-10 model: 12-channel groups follow
    Case(2, (24, 40), (7, 7), 16, time="row", shortcut=(24, 40), residual=True, scale=0.7),
    Case(2, (16,), (7, 7), 12, bias=False),
    Case(1, (16,), (2, 256), 16),  # a tile is a run inside a row
    Case(1, (16,), (16, 8), 16, time="image"),
    Case(3, (8,), (1, 1), 8),
    Case(2, (3,), (8, 8), 16, stats=False),
    Case(2, (16,), (8, 8), 16, weight_channels=3),  # conv_in: x padded to 16 channels
    Case(2, (32,), (8, 8), 3, stats=False),  # conv_out
    Case(2, (32,), (8, 8), 6, packed=True),
    Case(2, (32,), (8, 8), 16, stride=2),
    Case(2, (32,), (8, 8), 16, stride=2, padding=(0, 1), residual=True),
    Case(3, (16, 16), (16, 8), 16, stride=2, padding=(1, 1), packed=True),
    Case(2, (12,), (7, 7), 16, stride=2, padding=(0, 1)),
    Case(2, (16,), (6, 6), 16, stride=2, padding=(0, 1), time="row"),
    Case(2, (16,), (8, 8), 16, padding=(0, 0)),
    Case(1, (16, 16), (9, 8), 16, padding=(1, 0, 1, 1), time="row"),  # the upper rows of a larger image, by a box
    Case(2, (12,), (4, 7), 16, padding=(0, 0, 1, 1), stride=1),  # rows from its middle, by pointers
    Case(2, (16,), (4, 4), 16, upsample=True, time="row"),
    Case(3, (16,), (8, 8), 16, upsample=True, packed=True, residual=True),
    Case(2, (20,), (3, 3), 24, upsample=True, shortcut=(16, 8), packed=True),
    Case(2, (32,), (8, 8), 96, size=1, padding=(0, 0), stats=False),  # QKV
    Case(3, (32,), (4, 4), 32, size=1, residual=True),  # projection
    Case(2, (10, 6), (5, 3), 8, size=1, bias=False, shortcut=(7,)),
    Case(1, (16,), (5, 5), 16, size=7),
    Case(1, (16,), (4, 8), 16, size=4, stride=2, padding=(1, 1), packed=True),
]


def variants() -> list[Any]:
    """Each case in float32, and in one half precision; through descriptors (sm_90) and pointers (sm_80)."""
    found = []
    for i, case in enumerate(CASES):
        low = replace(case, dtype=(BF16, F16)[i % 2])
        pairs = [(case, 90), (low, 90), (low, 80)]
        found += [pytest.param(c, a, id=f"{c} sm_{a}") for c, a in pairs]
    return found


@pytest.mark.parametrize(("case", "arch"), variants())
def test_conv(case: Case, arch: int, device: torch.device) -> None:
    """On a GPU sm_90 stands for its own choices; sm_80 is the pointer path anywhere."""
    check_conv(fused, case, device, arch=None if device.type == "cuda" and arch == 90 else arch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_larger_images(case: Case, dtype: torch.dtype) -> None:
    """Sixteen times the pixels: the tiles that real networks use. Too slow for the interpreter."""
    check_conv(fused, replace(case, dtype=dtype, hw=(case.hw[0] * 4, case.hw[1] * 4)), torch.device("cuda"))


shapes = st.builds(
    Case,
    n=st.integers(1, 3),
    channels=st.lists(st.sampled_from([1, 3, 8, 16, 20, 32]), min_size=1, max_size=2).map(tuple),
    hw=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    k=st.sampled_from([1, 3, 8, 17, 32]),
    size=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([None, (1, 1), (0, 2), (0, 1, 2, 1)]),
    bias=st.booleans(),
    time=st.sampled_from(["", "row", "image", "one"]),
    residual=st.booleans(),
    shortcut=st.sampled_from([(), (8,), (5, 16)]),
    packed=st.booleans(),
    dtype=st.sampled_from([F32, BF16, F16]),
)


@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=shapes, arch=st.sampled_from([80, 90]))
def test_conv_of_any_shape(case: Case, arch: int, device: torch.device) -> None:
    check_conv(fused, case, device, arch=None if device.type == "cuda" and arch == 90 else arch)


def tiles(n: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """A tile of its own for each batch size; `BN` and `BM` are all that a batch may change."""
    large = device.type == "cuda" and dtype != F32  # 64 rows and more, so that all use the same instruction
    bn, bm = {1: (64, 32), 3: (64, 64), 8: (128, 128)}[n] if large else {1: (16, 32), 3: (32, 32), 8: (32, 64)}[n]
    run = 1 if dtype == F32 else 8
    return Launch(8 if bn == 128 else 4, 2, {"BN": bn, "BM": bm, "RUN": run}, "another for each batch")


@pytest.fixture
def products_in_order() -> Iterator[None]:
    """numpy's BLAS orders a sum by the shape of the whole product, which no GPU does: sum channel by channel."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
        total = np.zeros((a.shape[0], b.shape[1]), dtype)
        for c in range(a.shape[1]):
            total += a[:, c, None].astype(dtype) * b[None, c].astype(dtype)
        return total

    with mock.patch("triton.runtime.interpreter.np.matmul", matmul):
        yield


INVARIANT = [
    Case(8, (16, 32), (4, 4), 24, time="row"),
    Case(8, (16,), (8, 8), 16, shortcut=(16,), dtype=F16),
    Case(8, (16,), (7, 7), 16, residual=True, dtype=BF16),
    Case(8, (16,), (8, 8), 16, stride=2, padding=(0, 1), time="image"),
    Case(8, (16,), (4, 4), 16, upsample=True),
    Case(8, (32,), (4, 4), 16, size=1, residual=True),
]


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("case", INVARIANT, ids=str)
def test_sample_does_not_depend_on_its_batch(case: Case, forced: bool, device: torch.device) -> None:
    """Bit for bit, in batches of 1, 3 and 8: with the tiles that launch_conv picks, and with others forced."""
    (x, weight, bias), kwargs = arguments(case, device)
    run = fused.upsample_conv if case.upsample else fused.conv

    def launch(n: int) -> Launch | None:
        return tiles(n, case.dtype, device) if forced else None

    whole = run(x, weight, bias, **kwargs, launch=launch(8))
    for first, n in ((7, 1), (2, 3)):
        some_kwargs = {k: rows(v, first, n) for k, v in kwargs.items()}
        some = run(rows(x, first, n), weight, bias, **some_kwargs, launch=launch(n))
        for name, a, b in zip(("pixels", "statistics"), whole, some, strict=True):
            assert torch.equal(a[first : first + n], b), f"{name} of images {first}.. change in a batch of {n}"


def rows(x: Any, first: int, n: int) -> Any:
    """Images first to first + n of what holds one an image; all else as it is."""
    if isinstance(x, reference.Shortcut):
        return reference.Shortcut(rows(x.x, first, n), rows(x.skip, first, n), x.weight, x.bias)
    return x[first : first + n] if isinstance(x, Tensor) and len(x) == 8 else x


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_launch_choices_hold_whole_parts_and_fit(arch: int, dtype: torch.dtype) -> None:
    """A tile exists for every size of part, and its copies in flight fit the shared memory of the architecture."""
    limit = {80: 163, 90: 227, 100: 227}.get(arch, 99) * 1024
    for part in (1, 8, 16, 32, 64, 128):
        for k in (3, 16, 64, 512):
            for pixels in (part, 1024, 2**20):
                launch = conv_launch(pixels, k, 64, part, dtype, arch)
                bn, bm = launch.meta["BN"], launch.meta["BM"]
                assert bm % part == 0, (launch, part)
                assert part % launch.meta["RUN"] == 0, (launch, part)
                assert launch.num_stages * (bn + bm) * 64 * dtype.itemsize <= limit, (launch, part)
        wide, spread = (conv_launch(pixels, 512, 64, part, BF16, arch) for pixels in (2**20, part))
        assert wide.meta["BM"] >= spread.meta["BM"], "a large batch takes tiles as large as a small one"


def test_upsampling_folds_taps_once() -> None:
    """The four phases' taps are the sums of the 3x3 ones, rounded once from float32."""
    weight = fresh((5, 16, 3, 3), BF16, seed=1)
    packed = fused.pack_upsample_conv(weight)
    taps = packed.matrix.view(5, 2, 2, 2, 2, 16).double()  # K, phase, tap, C
    w = weight.double()
    meets = {(0, 0): [0], (0, 1): [1, 2], (1, 0): [0, 1], (1, 1): [2]}  # (phase, tap) along an axis -> 3x3 taps
    for (a, t), dy in meets.items():
        for (b, u), dx in meets.items():
            truth = sum(w[:, :, i, j] for i in dy for j in dx)
            assert torch.equal(taps[:, a, b, t, u], truth.float().to(BF16).double()), (a, b, t, u)


def test_errors_say_what_to_do(device: torch.device) -> None:
    x, w = fresh((2, 16, 8, 8), F32, device, seed=1), fresh((16, 16, 3, 3), F32, device, seed=2)
    with pytest.raises(ValueError, match=r"channels_last memory; got .* use \.contiguous"):
        fused.conv(x.contiguous(), w)
    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32; got torch\.float64"):
        fused.conv(x.double(), w.double())
    with pytest.raises(ValueError, match=r"packed for channels \(16, 16\).*pack it with"):
        fused.conv(x, fused.pack_conv(w), skip=x)
    with pytest.raises(ValueError, match="pack_upsample_conv; pack them again"):
        fused.conv(x, fused.pack_upsample_conv(w))
    with pytest.raises(ValueError, match="1 row or one an image"):
        fused.conv(x, w, time=torch.zeros(5, 16, device=device))
    with pytest.raises(ValueError, match="at least one pixel"):
        fused.conv(x[:, :, :1, :1].contiguous(memory_format=NHWC), w, padding=(0, 0))
    with pytest.raises(ValueError, match="whole parts of 32 pixels; got BM=16"):
        fused.conv(x, w, with_stats=True, launch=Launch(4, 2, {"BN": 16, "BM": 16, "RUN": 1}, "too small"))


def python(source: str) -> str:
    """The output of ``source`` in a process without the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_cpu_tensors_without_the_interpreter_are_refused() -> None:
    said = python(
        "import torch\n"
        "from ddpm_fast.kernels.conv import conv\n"
        "try:\n"
        "    conv(torch.zeros(1, 8, 4, 4).to(memory_format=torch.channels_last), torch.zeros(8, 8, 3, 3))\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert "need CUDA tensors; got cpu" in said


COMPILE = """
import json, re, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ddpm_fast.kernels.conv import ConvShape, specialization
for shape in (
    ConvShape(64, 16, 16, (128,), 128, bias="fp32", residual=True, with_stats=True),
    ConvShape(1, 16, 16, (128,), 128, bias="fp32", time="fp32", time_rows="image", with_stats=True),
):
    s = specialization(shape, 90)
    source = ASTSource(s.kernel, {n: s.signature[n] for n in s.kernel.arg_names}, dict(s.constexprs),
                       {(i,): [["tt.divisibility", 16]] for i, n in enumerate(s.kernel.arg_names)
                        if s.signature[n].startswith("*")})
    options = {"num_warps": s.launch.num_warps, "num_stages": s.launch.num_stages}
    ir = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ttgir"]
    reduced = re.findall(r'"tt.reduce"\\(%(\\w+)\\)', ir)
    layouts = [re.search(rf"%{v} = .*-> tensor<[^#]*(#\\w+)>", ir).group(1) for v in reduced]
    print(json.dumps({"layouts": layouts, "wgmma": "ttng.warp_group_dot" in ir, "operands": re.findall(
        r"ttng.warp_group_dot %\\w+, %\\w+, .* : (\\S+)", ir)}))
"""


def test_statistics_are_summed_in_the_layout_of_the_product() -> None:
    """What _part_sums relies on, read off the compiled sm_90 kernel; and both operands come from shared memory."""
    pytest.importorskip("triton.backends.nvidia")
    for line in python(COMPILE).splitlines():
        found = json.loads(line)
        assert found["wgmma"]
        assert all(kind.startswith("!ttg.memdesc") for kind in found["operands"]), found["operands"]
        assert len(found["layouts"]) == 2, "one reduction for means, one for M2"
        assert not any("blocked" in layout for layout in found["layouts"]), found["layouts"]
