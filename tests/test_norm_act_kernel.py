"""The fused GroupNorm + time embedding + activation against float64, by the house rule."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensors import double, fresh, poison
from torch import Tensor

from ddpm_fast.house_rule import check, error
from ddpm_fast.kernels import norm_act, norm_stats, reference

pytest.importorskip("triton")
ROWS = 5


class Case(NamedTuple):
    x: tuple[int, int, int, int]  # [N, C1, H, W]
    groups: int
    c2: int = 0  # channels of skip
    dtype: torch.dtype = torch.bfloat16
    produced: str = ""  # "x", "skip", "x skip": whose statistics come from the producer
    time: str = ""  # any of "bias_row", "scale_shift", and "row" (by the device counter) or none (one an image)
    residual: bool = False
    affine: bool = True
    act: str = "silu"
    mean: float = 1.0


GRID = [
    # One launch, the groups in the tile.
    Case((2, 32, 4, 4), 8, dtype=torch.float32),
    Case((2, 96, 7, 7), 32, time="bias_row row"),  # 3-channel groups, 49 pixels
    Case((1, 16, 1, 1), 4, dtype=torch.float32, time="scale_shift", affine=False),  # one pixel
    Case((2, 24, 3, 5), 3, c2=12, dtype=torch.float16, act="none", residual=True),  # 12-channel groups
    Case((2, 20, 4, 4), 4, c2=12, time="bias_row scale_shift row"),  # 8-channel groups over the boundary at 20
    Case((1, 64, 8, 8), 4, dtype=torch.float32, mean=100.0),
    # Statistics first, then one launch.
    Case((1, 128, 16, 16), 1, dtype=torch.float32, time="bias_row", mean=100.0),
    Case((1, 40, 20, 20), 1, c2=24, time="scale_shift row", residual=True),
    Case((1, 8, 72, 72), 2, dtype=torch.float32),  # 81 tiles, two in each part but the last
    # Statistics from the producers of both inputs, one, or the other.
    Case((2, 128, 4, 4), 32, produced="x", time="bias_row row"),
    Case((1, 256, 2, 2), 32, c2=128, produced="x skip", time="bias_row row", residual=True),  # 12-channel groups
    Case((2, 24, 10, 10), 3, c2=12, dtype=torch.float32, produced="x skip", time="bias_row scale_shift", mean=30.0),
    Case((1, 24, 10, 10), 3, c2=12, dtype=torch.float16, produced="skip", act="none"),
    Case((1, 20, 9, 9), 4, c2=12, produced="x", affine=False),
    Case((1, 384, 1, 3), 1, dtype=torch.float32, produced="x", time="scale_shift row"),
    Case((3, 384, 2, 2), 32, produced="x"),
]


def make(case: Case, device: torch.device, salt: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the reference for this case."""
    n, c1, h, w = case.x
    channels = c1 + case.c2

    def draw(shape: tuple[int, ...], k: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, std: float = 1.0):
        return fresh(shape, dtype, device, seed=10 * salt + k, mean=mean, std=std)

    x = draw(case.x, 1, case.dtype, case.mean)
    parameters = (draw((channels,), 2, mean=1.0), draw((channels,), 3)) if case.affine else (None, None)
    kwargs: dict[str, Any] = {"act": case.act}
    if case.c2:
        kwargs["skip"] = draw((n, case.c2, h, w), 4, case.dtype, case.mean - 2.0, 3.0)
    rows = ROWS if "row" in case.time.split() else n
    if "bias_row" in case.time:
        kwargs["bias_row"] = draw((rows, channels), 5, std=2.0)
    if "scale_shift" in case.time:
        kwargs["scale_shift"] = draw((rows, 2 * channels), 6)
    if "row" in case.time.split():
        kwargs["row"] = torch.tensor([3, 77], dtype=torch.int32, device=device)
    if case.residual:
        kwargs["residual"] = draw((n, channels, h, w), 7, case.dtype)
    return (x, *parameters, case.groups, 1e-5), kwargs


def dense(v: Any) -> Any:
    """NCHW copies: torch's CPU group norm in channels_last takes E[x^2] - E[x]^2, which is no yardstick."""
    return v.contiguous() if isinstance(v, Tensor) else v


def produce(case: Case, args: tuple[Any, ...], kwargs: dict[str, Any], parts: int = 2) -> dict[str, Tensor]:
    """Statistics as a producer leaves them: the pixels cut into parts, from the reference in float64."""
    named = {"x": ("stats", args[0]), "skip": ("skip_stats", kwargs.get("skip"))}
    found = {}
    for source in case.produced.split():
        name, t = named[source]
        pieces = [p for p in t.double().flatten(2)[..., None].tensor_split(parts, dim=2) if p.shape[2]]
        found[name] = torch.cat([reference.channel_stats(p) for p in pieces], dim=1).float().contiguous()
    return found


def run(module: ModuleType, case: Case, args: tuple[Any, ...], kwargs: dict[str, Any], **more: Any) -> Tensor:
    n, c1, h, w = case.x
    out = poison((n, c1 + case.c2, h, w), case.dtype, args[0].device, torch.channels_last)
    got = module.norm_act(*args, **kwargs, **produce(case, args, kwargs), out=out, **more)
    assert got is out
    return got


def check_norm_act(module: ModuleType, case: Case, device: torch.device, salt: int = 0) -> None:
    args, kwargs = make(case, device, salt)
    same = reference.norm_act(*map(dense, args), **{k: dense(v) for k, v in kwargs.items()})
    truth = reference.norm_act(*map(double, args), **{k: double(v) for k, v in kwargs.items()})
    check(run(module, case, args, kwargs), same, truth, name=str(case))


def merged(stats: Tensor) -> Tensor:
    """[N, P, 3, C] -> [N, 3, C] by Chan's rule in float64."""
    count, mean, m2 = stats.double().unbind(2)
    total = count.sum(1)
    m = (count * mean).sum(1) / total
    return torch.stack((total, m, (m2 + count * (mean - m[:, None]).square()).sum(1)), dim=1)


def check_stats(module: ModuleType, device: torch.device) -> None:
    """Each statistic within 8 float32 steps of float64, though the mean is 100 times the spread."""
    for shape in ((2, 96, 7, 7), (1, 3, 16, 20), (3, 5, 1, 1), (1, 8, 65, 64)):
        x = fresh(shape, torch.float32, device, seed=sum(shape), mean=100.0)
        got = module.group_stats(x)
        truth = reference.channel_stats(x.double())[:, 0]
        for i, name in enumerate(("count", "mean", "M2")):
            assert error(merged(got)[:, i], truth[:, i]).largest <= 2.0**-20, (shape, name)


def check_merge(module: ModuleType, device: torch.device) -> None:
    stats = torch.rand(2, 150, 3, 70, generator=torch.Generator().manual_seed(0)).to(device)
    stats[:, :, 0] = torch.arange(150, device=device)[None, :, None] % 5 + 1
    fewer = module.merge_stats(stats)
    assert fewer.shape[1] <= 64
    assert error(merged(fewer), merged(stats)).largest <= 2.0**-20


@pytest.mark.parametrize("case", GRID, ids=lambda c: f"{'x'.join(map(str, c.x))}-{c.c2}-{c.groups}-{c.produced}")
def test_grid(device, case):
    check_norm_act(norm_act, case, device)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_shape(device, data):
    groups = data.draw(st.sampled_from([1, 2, 3, 4, 8, 32]))
    channels = groups * data.draw(st.integers(1, 12))
    c2 = data.draw(st.integers(0, channels - 1))
    case = Case(
        x=(data.draw(st.integers(1, 2)), channels - c2, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))),
        groups=groups,
        c2=c2,
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        produced=data.draw(st.sampled_from(["", "x", "x skip"] if c2 else ["", "x"])),
        time=data.draw(st.sampled_from(["", "bias_row row", "scale_shift", "bias_row scale_shift row"])),
        residual=data.draw(st.booleans()),
        act=data.draw(st.sampled_from(["silu", "none"])),
    )
    if channels // groups * case.x[2] * case.x[3] == 1:
        return  # the variance of one value is 0: its norm is rounding noise over sqrt(eps), in any implementation
    check_norm_act(norm_act, case, device)


def test_statistics(device):
    check_stats(norm_stats, device)


def test_many_parts_are_merged_first(device):
    """As a 256 x 256 producer leaves them: more parts than a program should merge."""
    check_merge(norm_stats, device)
    case = Case((1, 12, 10, 10), 3, dtype=torch.float32)
    args, kwargs = make(case, device)
    stats = produce(case._replace(produced="x"), args, kwargs, parts=100)["stats"]
    same = reference.norm_act(*map(dense, args), **kwargs)
    truth = reference.norm_act(*map(double, args), **kwargs)
    check(norm_act.norm_act(*args, **kwargs, stats=stats), same, truth)


@pytest.mark.parametrize(
    "case",
    [
        Case((8, 24, 5, 5), 4, c2=8, time="bias_row row"),
        Case((8, 24, 17, 17), 1, c2=8),  # statistics first
        Case((8, 24, 9, 9), 3, c2=12, produced="x skip", residual=True, time="scale_shift"),
    ],
)
def test_rows_do_not_depend_on_the_batch(device, case):
    """Image k is bit for bit the same in a batch of 8, of 3, and alone."""
    args, kwargs = make(case, device)
    whole = run(norm_act, case, args, kwargs)
    for part in (slice(0, 1), slice(5, 8)):
        some = {k: v[part] if isinstance(v, Tensor) and v.shape[0] == 8 else v for k, v in kwargs.items() if k != "row"}
        row = {"row": kwargs["row"]} if "row" in kwargs else {}
        few = case._replace(x=(len(range(8)[part]), *case.x[1:]))
        assert torch.equal(run(norm_act, few, (args[0][part], *args[1:]), some | row), whole[part])


def test_the_row_is_read_on_the_device(device):
    """The same call, its counter moved in place: other rows of the table."""
    case = Case((2, 16, 4, 4), 4, time="bias_row scale_shift row", dtype=torch.float32)
    args, kwargs = make(case, device)
    for row in (0, ROWS - 1):
        kwargs["row"].copy_(torch.tensor([row, 0]))
        same = reference.norm_act(*map(dense, args), **kwargs)
        truth = reference.norm_act(*map(double, args), **{k: double(v) for k, v in kwargs.items()})
        check(run(norm_act, case, args, kwargs), same, truth, name=f"row {row}")


def test_views_of_wider_maps(device):
    """x, skip and out may be channel ranges of wider NHWC buffers, and a table's rows columns of a wider one."""
    case = Case((2, 16, 3, 3), 4, c2=8, time="bias_row row", dtype=torch.float32)
    args, kwargs = make(case, device)
    want = run(norm_act, case, args, kwargs)
    wide = poison((2, 40, 3, 3), torch.float32, device, torch.channels_last)
    wide[:, 8:24], wide[:, 24:32] = args[0], kwargs["skip"]
    table = poison((ROWS, 30), torch.float32, device)
    table[:, 2:26] = kwargs["bias_row"]
    target = poison((2, 32, 3, 3), torch.float32, device, torch.channels_last)
    views = {"skip": wide[:, 24:32], "bias_row": table[:, 2:26], "out": target[:, :24]}
    got = norm_act.norm_act(wide[:, 8:24], *args[1:], **(kwargs | views))
    assert torch.equal(got, want)
    assert bool(target[:, 24:].isnan().all())


def test_workspace_is_used(device):
    """Statistics taken here go into the caller's buffer, and the result is the same."""
    case = Case((2, 24, 17, 17), 1, c2=8)
    args, kwargs = make(case, device)
    size = norm_act.workspace_size(args[0], kwargs["skip"])
    workspace = poison((size,), torch.float32, device)
    got = run(norm_act, case, args, kwargs, workspace=workspace)
    assert not workspace.isnan().any()
    assert torch.equal(got, run(norm_act, case, args, kwargs))
    with pytest.raises(ValueError, match="workspace_size"):
        run(norm_act, case, args, kwargs, workspace=workspace[:-1])


BAD = {
    "float64": (lambda a, k: ((a[0].double(), *a[1:]), k), "use reference.norm_act"),
    "gelu": (lambda a, k: (a, k | {"act": "gelu"}), "use reference.norm_act for this block"),
    "groups": (lambda a, k: ((*a[:3], 5, 1e-5), k), "C % groups == 0; got C=16, groups=5"),
    "memory": (lambda a, k: ((a[0].contiguous(), *a[1:]), k), "channels_last memory"),
    "table width": (lambda a, k: (a, k | {"bias_row": a[1][None, :7]}), "time table must be [R, 16]"),
    "table rows": (lambda a, k: (a, k | {"bias_row": a[1].expand(3, 16)}), "one row, or one an image (2)"),
    "stats": (lambda a, k: (a, k | {"stats": a[1].expand(2, 1, 2, 16).contiguous()}), "stats must be contiguous"),
    "residual": (lambda a, k: (a, k | {"residual": a[0][:1]}), "residual must be [2, 16, 4, 4]"),
    "skip": (lambda a, k: (a, k | {"skip": a[0][:, :, :2]}), "skip must be [2, C2, 4, 4]"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_say_what_to_do(device, name):
    change, message = BAD[name]
    args, kwargs = change(*make(Case((2, 16, 4, 4), 4), device))
    with pytest.raises(ValueError, match=re.escape(message)):
        norm_act.norm_act(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_sizes(device, dtype):
    """Layers of the CIFAR-10 and the 256-pixel U-Nets, too large for the interpreter."""
    for case in (
        Case((16, 128, 32, 32), 32, dtype=dtype, produced="x", time="bias_row row"),
        Case((16, 256, 32, 32), 32, c2=128, dtype=dtype, produced="x skip"),
        Case((2, 128, 256, 256), 32, dtype=dtype),
        Case((2, 512, 16, 16), 32, c2=512, dtype=dtype, produced="x skip", residual=True),
    ):
        check_norm_act(norm_act, case, device)
