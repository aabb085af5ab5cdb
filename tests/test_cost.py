"""kernels/cost.py against independent counts: torch's flop counter, and the bytes of real tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ddpm_fast.kernels import cost, reference
from ddpm_fast.kernels.cost import Cost
from ddpm_fast.kernels.reference import Shortcut

N, H, W = 3, 6, 4
BF16, FP32 = torch.bfloat16, torch.float32


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def flops(f: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        f(*args, **kwargs)
    return counter.get_total_flops()


def moved(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class Traffic(TorchDispatchMode):
    """Bytes in and out of every torch operation that is no view, and how many there were.

    A convolution's bias is one more, in place: torch on a GPU adds it after cuDNN's convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result  # native_group_norm also returns mean and rstd
        if not func.is_view:
            flat = [a for group in args for a in (group if isinstance(group, (list, tuple)) else [group])]
            self.read += moved(*(a for a in flat if isinstance(a, Tensor) and a.dim()))
            self.written += moved(first)
            self.launches += 1
            if func is torch.ops.aten.convolution.default and args[2] is not None:
                self.read += moved(first)
                self.written += moved(first)
                self.launches += 1
        return result


def traffic(f: Callable[[], Any]) -> tuple[int, int, int]:
    with Traffic() as t:
        f()
    return t.read, t.written, t.launches


def as_tuple(c: Cost) -> tuple[int, int, int]:
    return c.bytes_read, c.bytes_written, c.launches


# --- FLOPs, by torch's counter over the reference ---


@pytest.mark.parametrize("form", cost.FORMS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "skip", "shortcut"),
    [
        (3, 1, None, 0, 0),
        (1, 1, None, 0, 0),
        (3, 2, (1, 1), 0, 0),
        (3, 2, (0, 1), 0, 0),
        (3, 1, None, 7, 0),
        (3, 1, None, 0, 9),
    ],
)
def test_conv_flops(form: str, kernel: int, stride: int, padding: tuple[int, int] | None, skip: int, shortcut: int):
    c, k = 5, 11
    s = Shortcut(meta(N, shortcut, H, W), None, meta(k, shortcut, 1, 1), meta(k)) if shortcut else None
    expected = flops(
        reference.conv,
        meta(N, c, H, W),
        meta(k, c + skip, kernel, kernel),
        meta(k),
        skip=meta(N, skip, H, W) if skip else None,
        stride=stride,
        padding=padding,
        shortcut=s,
    )
    got = cost.conv(
        (N, c, H, W),
        k,
        BF16,
        kernel=kernel,
        skip_channels=skip,
        stride=stride,
        padding=padding,
        shortcut_channels=shortcut,
        form=form,
    )
    assert got.flops == expected > 0


def test_upsample_conv_flops_are_those_of_four_small_convolutions():
    c, k = 5, 7
    x, phase = meta(N, c, H, W), meta(k, c, 2, 2)

    def four_phases() -> None:
        for top in (1, 0):
            for left in (1, 0):
                F.conv2d(F.pad(x, (left, 1 - left, top, 1 - top)), phase)

    plain = cost.upsample_conv((N, c, H, W), k, BF16, form="plain").flops
    fused = cost.upsample_conv((N, c, H, W), k, BF16).flops
    assert fused == flops(four_phases)
    assert plain == flops(reference.upsample_conv, x, meta(k, c, 3, 3))
    assert plain == 2.25 * fused


def test_upsample_conv_flops_include_its_shortcut():
    s = Shortcut(meta(N, 9, 2 * H, 2 * W), None, meta(7, 9, 1, 1), None)
    expected = flops(reference.upsample_conv, meta(N, 5, H, W), meta(7, 5, 3, 3), shortcut=s)
    assert cost.upsample_conv((N, 5, H, W), 7, BF16, shortcut_channels=9, form="plain").flops == expected


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_attention_flops(heads: int):
    qkv = meta(N, 48, H, W)
    assert cost.attention(qkv.shape, BF16).flops == flops(reference.attention, qkv, heads)


def test_linear_flops_and_bytes():
    x, weight, bias = meta(N, 5), meta(7, 5), meta(7)
    got = cost.linear(N, 5, 7, FP32)
    assert got.flops == flops(F.linear, x, weight, bias)
    assert (got.bytes_read, got.bytes_written) == (moved(x, weight, bias), N * 7 * 4)


# --- fused bytes: every tensor that the operation takes, once; every one that it gives, once ---


@pytest.mark.parametrize("rows", [1, N])
def test_norm_act_moves_its_arguments_once(rows: int):
    c1, c2, parts = 24, 8, 2
    x, skip, out = (meta(N, c, H, W, dtype=BF16) for c in (c1, c2, c1 + c2))
    vectors = [meta(c1 + c2), meta(c1 + c2), meta(rows, c1 + c2), meta(rows, 2 * (c1 + c2))]
    statistics = [meta(N, parts, 3, c1), meta(N, 1, 3, c2)]
    got = cost.norm_act(
        x.shape, BF16, skip_channels=c2, bias_rows=rows, shift_rows=rows, residual=True, parts=parts, skip_parts=1
    )
    assert as_tuple(got) == (moved(x, skip, out, *vectors, *statistics), moved(out), 1)
    assert got.flops == 0
    bare = cost.norm_act(x.shape, BF16, affine=False)
    assert as_tuple(bare) == (moved(x), moved(x), 1)


def test_conv_moves_its_arguments_once():
    c1, c2, s1, k, parts = 24, 8, 40, 16, 2
    x, skip, around, y = (meta(N, c, H, W, dtype=BF16) for c in (c1, c2, s1, k))
    weights = [meta(k, c1 + c2, 3, 3, dtype=BF16), meta(k, s1, 1, 1, dtype=BF16)]
    vectors = [meta(k), meta(k), meta(1, k)]  # bias, the shortcut's bias, the time row
    got = cost.conv(
        x.shape, k, BF16, skip_channels=c2, time_rows=1, residual=True, shortcut_channels=s1, parts=parts
    )  # fmt: skip
    assert as_tuple(got) == (moved(x, skip, around, y, *weights, *vectors), moved(y, meta(N, parts, 3, k)), 1)


def test_strided_conv_writes_the_small_image():
    x, y = meta(N, 16, H, W, dtype=BF16), meta(N, 16, H // 2, W // 2, dtype=BF16)
    for padding in ((1, 1), (0, 1)):
        got = cost.conv(x.shape, 16, BF16, stride=2, padding=padding, bias=False)
        assert as_tuple(got) == (moved(x, meta(16, 16, 3, 3, dtype=BF16)), moved(y), 1)


def test_conv_in_reads_a_padded_image():
    got = cost.conv((N, 3, H, W), 32, BF16, bias=False)
    assert got.bytes_read == moved(meta(N, 16, H, W, dtype=BF16), meta(32, 3, 3, 3, dtype=BF16))
    assert got.flops == flops(reference.conv, meta(N, 3, H, W), meta(32, 3, 3, 3)), "padding is not work"


def test_upsample_conv_moves_its_arguments_once():
    x, y = meta(N, 24, H, W, dtype=BF16), meta(N, 16, 2 * H, 2 * W, dtype=BF16)
    got = cost.upsample_conv(x.shape, 16, BF16, parts=4)
    weights = meta(4, 16, 24, 2, 2, dtype=BF16)
    assert as_tuple(got) == (moved(x, weights, meta(16)), moved(y, meta(N, 4, 3, 16)), 1)


def test_attention_and_resampling_move_their_arguments_once():
    qkv = meta(N, 48, H, W, dtype=BF16)
    assert as_tuple(cost.attention(qkv.shape, BF16)) == (moved(qkv), moved(meta(N, 16, H, W, dtype=BF16)), 1)
    x = meta(N, 16, H, W, dtype=BF16)
    for f in (reference.upsample, reference.downsample):
        assert as_tuple(getattr(cost, f.__name__)(x.shape, BF16)) == (moved(x), moved(f(x)), 1)


@pytest.mark.parametrize("variance", ["fixed", "learned_range"])
def test_sampler_step_moves_its_arguments_once(variance: str):
    x = meta(N, 3, H, W)
    out = meta(N, 3 if variance == "fixed" else 6, H, W, dtype=BF16)
    low, noise = meta(N, 16, H, W, dtype=BF16), meta(N, 3, H, W)
    ids, seed = meta(N, dtype=torch.int64), meta(1, dtype=torch.int64)
    counter, row = meta(2, dtype=torch.int32), meta(reference.TABLE_WIDTH)
    got = cost.sampler_step(x.shape, BF16, variance=variance, low_channels=16, given_noise=True)
    assert as_tuple(got) == (moved(x, out, noise, ids, seed, counter, row), moved(x, low), 1)
    assert cost.sampler_step(x.shape, BF16, variance=variance).bytes_written == moved(x)


@pytest.mark.parametrize(("variance", "outputs"), [("fixed", 3), ("learned", 6)])
def test_conv_step_saves_the_round_trip_of_the_output(variance: str, outputs: int):
    x = (N, 32, H, W)
    apart = cost.conv(x, outputs, BF16) + cost.sampler_step((N, 3, H, W), BF16, variance=variance, low_channels=16)
    fused = cost.conv_step(x, 3, BF16, variance=variance)
    assert fused.flops == apart.flops
    assert apart.bytes - fused.bytes == 2 * moved(meta(N, outputs, H, W, dtype=BF16))
    assert (fused.launches, apart.launches) == (1, 2)


# --- the plain form, by watching torch run it ---


def test_plain_norm_act_is_what_eager_torch_moves():
    x, skip, residual = meta(N, 24, H, W), meta(N, 8, H, W), meta(N, 32, H, W)
    weight, bias, rows, scale, shift = meta(32), meta(32), meta(N, 32), meta(N, 32), meta(N, 32)

    def eager() -> None:
        h = torch.cat((x, skip), 1) + rows[:, :, None, None]
        h = F.group_norm(h, 8, weight, bias)
        h = h * scale[:, :, None, None] + shift[:, :, None, None]
        F.silu(h) + residual

    got = cost.norm_act(
        x.shape, FP32, skip_channels=8, bias_rows=N, shift_rows=N, residual=True, form="plain"
    )  # fmt: skip
    assert as_tuple(got) == traffic(eager)


def test_plain_conv_is_what_eager_torch_moves():
    x, skip, around, residual = meta(N, 24, H, W), meta(N, 8, H, W), meta(N, 40, H, W), meta(N, 16, H, W)
    weight, bias, short, short_bias, rows = meta(16, 32, 3, 3), meta(16), meta(16, 40, 1, 1), meta(16), meta(N, 16)

    def eager() -> None:
        y = F.conv2d(torch.cat((x, skip), 1), weight, bias, padding=1) + rows[:, :, None, None]
        (y + F.conv2d(around, short, short_bias) + residual) * 0.5

    got = cost.conv(
        x.shape, 16, FP32, skip_channels=8, time_rows=N, residual=True, shortcut_channels=40, scale=0.5, form="plain"
    )
    assert as_tuple(got) == traffic(eager)


def test_plain_uneven_padding_and_upsampling_are_what_eager_torch_moves():
    x, weight = meta(N, 24, H, W), meta(16, 24, 3, 3)
    down = cost.conv(x.shape, 16, FP32, stride=2, padding=(0, 1), bias=False, form="plain")
    up = cost.upsample_conv(x.shape, 16, FP32, bias=False, form="plain")
    assert as_tuple(down) == traffic(lambda: F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2))
    assert as_tuple(up) == traffic(lambda: F.conv2d(F.interpolate(x, scale_factor=2.0), weight, padding=1))


@pytest.mark.parametrize("learned", [False, True])
def test_plain_sampler_step_is_what_eager_torch_moves(learned: bool):
    x, z = meta(N, 3, H, W), meta(N, 3, H, W)
    out = meta(N, 6 if learned else 3, H, W)

    def eager() -> None:
        eps = out[:, :3]
        x0 = ((x - 0.5 * eps) / 0.5).clamp(-1, 1)
        mean = 0.5 * x0 + 0.5 * x
        noise = torch.randn_like(x)
        mean + (out[:, 3:].exp() * noise if learned else 0.5 * noise)
        x.to(BF16)

    read, written, launches = traffic(eager)
    read -= moved(x)  # randn_like takes x for its shape alone
    got = cost.sampler_step(x.shape, FP32, variance="learned_range" if learned else "fixed", form="plain")
    # The network reads the result in the output's dtype; above it is float32, so the copy is counted at 4 bytes.
    assert (got.bytes_read, got.bytes_written - moved(z) + moved(meta(N, 3, H, W, dtype=BF16)), got.launches) == (
        read,
        written,
        launches,
    )


# --- the value itself ---


def test_costs_add_and_are_timed_by_the_slower_roof():
    a, b = Cost(10, 20, 30, 1), Cost(1, 2, 3, 1)
    assert cost.total([a, b]) == a + b == Cost(11, 22, 33, 2)
    assert cost.total([]) == Cost()
    assert a.seconds(flops_per_s=1, bytes_per_s=100) == 10
    assert a.seconds(flops_per_s=100, bytes_per_s=1) == 50


@pytest.mark.parametrize("f", [cost.norm_act, cost.sampler_step])
def test_an_unknown_form_is_refused(f: Callable[..., Cost]):
    with pytest.raises(ValueError, match="fused, plain; got 'eager'"):
        f((1, 8, 4, 4), BF16, form="eager")


# --- statistics ---


def test_many_statistics_are_merged_before_they_are_read():
    x = (N, 16, 64, 64)
    few, many = cost.norm_act(x, BF16, parts=64), cost.norm_act(x, BF16, parts=2100)
    assert few.launches == 1
    part = moved(meta(N, 3, 16))
    # 2100 parts -> 66 -> 3, each launch reading one and writing the next; norm_act reads the last.
    assert many.launches == 3
    assert many.bytes_read - few.bytes_read == part * (2100 + 66 + 3 - 64)
    assert many.bytes_written - few.bytes_written == part * (66 + 3)


def test_the_merging_rule_is_the_kernels_own():
    from ddpm_fast.kernels import launch

    assert cost.MAX_PARTS == launch.MAX_PARTS


def test_statistics_in_a_launch_of_their_own():
    x = meta(N, 16, H, W, dtype=BF16)
    assert as_tuple(cost.channel_stats(x.shape, BF16, 4)) == (moved(x), moved(meta(N, 4, 3, 16)), 1)
