"""The operations of a U-Net's step as calls to time: one of our sets, its definition, and torch's own.

Shapes are those that fill most of google/ddpm-cifar10-32's step. A call reads inputs that are made anew as often as it
takes to leave no cache warm, and is checked against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import ops as sets
from ddpm_fast.benchmarking.checks import allowances
from ddpm_fast.benchmarking.timing import Run, copies_for, rotated
from ddpm_fast.house_rule import error
from ddpm_fast.kernels import cost, reference
from ddpm_fast.kernels.cost import Cost
from ddpm_fast.ops import Ops
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table

GROUPS, EPS = 32, 1e-6
MOST_COPIES = 64
# Of torch's error, for one operation alone: Winograd's transforms round once more on both sides of the product. Whole
# networks, in which that averages out, are held to twice by `ddpm-fast bench` and `verify`.
TIMES = 4.0


@dataclass(frozen=True)
class Operation:
    """One operation on one shape. C, H: channels and height of its input; K: output channels."""

    name: str
    channels: int
    height: int
    out_channels: int = 0
    skip_channels: int = 0

    @property
    def label(self) -> str:
        skip = f"+{self.skip_channels}" if self.skip_channels else ""
        out = f"->{self.out_channels}" if self.out_channels else ""
        return f"{self.name} {self.channels}{skip}{out} {self.height}x{self.height}"

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        channels = 3 * self.channels if self.name == "attention" else self.channels
        return (batch, channels, self.height, self.height)

    def cost(self, batch: int, dtype: torch.dtype) -> Cost:
        """FLOPs and bytes that no implementation can avoid. A pair of launches pays for what lies between them."""
        x, k = self.shape(batch), self.out_channels
        if self.name == "attention":
            return cost.attention(x, dtype)
        if self.name == "norm_act":
            return cost.norm_act(x, dtype, skip_channels=self.skip_channels)
        if self.name == "sampler_step":
            return cost.sampler_step(x, dtype)
        if self.name == "conv_step":
            return cost.conv_step(x, k, dtype, low_channels=None)
        if self.name == "upsample_conv":
            return cost.upsample_conv(x, k, dtype)
        kernel = 1 if self.name == "conv1x1" else 3
        joined = (batch, self.channels + self.skip_channels, *x[2:])
        product = cost.conv(joined, k, dtype, kernel=kernel)
        if self.name != "norm_conv":
            return product
        return cost.norm_act(x, dtype, skip_channels=self.skip_channels) + product

    @property
    def roof(self) -> str:
        """By whose roof it is judged: a name of kernels/reference.py."""
        named = {"conv3x3": "conv", "norm_conv": "conv", "upsample_conv": "conv"}
        return named.get(self.name, self.name)


OPERATIONS = (
    Operation("conv3x3", 128, 32, 128),
    Operation("conv3x3", 256, 16, 256),
    Operation("conv3x3", 256, 8, 256),
    Operation("conv1x1", 256, 16, 768),
    Operation("upsample_conv", 256, 16, 256),
    Operation("norm_act", 128, 32),
    Operation("norm_act", 256, 32, 0, 128),
    Operation("norm_conv", 256, 16, 256),
    Operation("norm_conv", 256, 16, 256, 256),
    Operation("attention", 256, 16),
    Operation("sampler_step", 3, 32),
    Operation("conv_step", 128, 32, 3),
)
STEPS = ("sampler_step", "conv_step")  # they read x_t, float32, and draw noise


_ROWS = step_table(Schedule(), None, "ddpm").rows[500:501]  # one row is all that a step reads


@dataclass(frozen=True)
class Weights:
    norm: Tensor | None  # [C]
    shift: Tensor | None
    conv: Tensor | None  # [K, C, k, k]
    bias: Tensor | None  # [K]


def weights(op: Operation, device: torch.device) -> Weights:
    """float32, the same each time."""
    g = torch.Generator().manual_seed(1)
    c, k = op.channels + op.skip_channels, op.out_channels
    side = 1 if op.name == "conv1x1" else 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device)

    normed = op.name in ("norm_act", "norm_conv")
    return Weights(
        1 + 0.1 * draw(c) if normed else None,
        0.1 * draw(c) if normed else None,
        draw(k, c, side, side) / (c * side * side) ** 0.5 if k else None,
        0.1 * draw(k) if k else None,
    )


def inputs(op: Operation, batch: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """x, and the skip where there is one, channels_last; of the steps x_t [N, 3, H, W] float32 before them."""
    g = torch.Generator().manual_seed(seed)
    shapes = [op.shape(batch)]
    if op.skip_channels:
        shapes.append((batch, op.skip_channels, op.height, op.height))
    drawn = (torch.randn(s, generator=g).to(device, dtype) for s in shapes)
    maps = tuple(x.contiguous(memory_format=torch.channels_last) for x in drawn)
    if op.name not in STEPS:
        return maps
    return (torch.randn((batch, 3, op.height, op.height), generator=g).to(device), *maps)


def by_set(op: Operation, chosen: Ops, w: Weights, dtype: torch.dtype) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(entering: tensors -> feature maps, call: feature maps -> tensor) of one of our sets."""
    if op.name in STEPS:
        alone = op.name == "sampler_step"  # then y is the network's output, a tensor
        return lambda x, y: (x, y if alone else chosen.enter(y)), _step(op, chosen, w, dtype)
    packed = None
    if w.conv is not None:
        pack = chosen.pack_upsample_conv if op.name == "upsample_conv" else chosen.pack_conv
        packed = pack(w.conv, dtype=dtype)

    def norm(x: Any, skip: Any = None) -> Any:
        return chosen.norm_act(x, w.norm, w.shift, GROUPS, EPS, skip=skip)

    calls: dict[str, Callable[..., Any]] = {
        "attention": lambda qkv: chosen.attention(qkv, 1),
        "norm_act": norm,
        "upsample_conv": lambda x: chosen.upsample_conv(x, packed, w.bias),
        "norm_conv": lambda x, skip=None: chosen.conv(norm(x, skip), packed, w.bias),
    }
    call = calls.get(op.name, lambda x: chosen.conv(x, packed, w.bias))
    # A set may postpone work until its result is read as a tensor.
    return lambda *tensors: tuple(map(chosen.enter, tensors)), lambda *maps: chosen.leave(call(*maps))


def _step(op: Operation, chosen: Ops, w: Weights, dtype: torch.dtype) -> Callable[..., Tensor]:
    """(x_t, map) -> x_{t-1}: alone, or behind the last convolution, in one launch where the set has that.

    On a GPU the step draws its noise; the sets of a CPU are given it, as by the engine.
    """
    packed: Any = None
    fused = op.name == "conv_step" and chosen.conv_step is not None and chosen.pack_step_conv is not None
    if w.conv is not None:
        pack: Any = chosen.pack_step_conv if fused else chosen.pack_conv
        packed = pack(w.conv, *((3,) if fused else ()), dtype=dtype)
    draws = chosen.initial_noise is not None
    held: dict[str, Any] = {}

    def call(x: Tensor, y: Any) -> Tensor:
        if not held:  # of the device and batch that the first call shows
            held["state"] = (_ROWS.to(x.device, x.dtype), torch.zeros(2, dtype=torch.int32, device=x.device))
            held["key"] = (torch.zeros(1, dtype=torch.int64, device=x.device), torch.arange(len(x), device=x.device))
            held["x_prev"] = torch.empty_like(x)
            seed, ids = held["key"]
            z = reference.philox_normal(seed, ids, held["state"][1][:1], x.shape[1:])
            held["noise"] = {} if draws else {"noise": z}
        rows, counter = held["state"]
        counter.zero_()
        around = {"variance": "fixed", "x_prev": held["x_prev"]}
        if fused:
            assert chosen.conv_step is not None
            return chosen.conv_step(y, packed, w.bias, x, rows, counter, *held["key"], **around)
        out = y if packed is None else chosen.leave(chosen.conv(y, packed, w.bias))
        return chosen.sampler_step(x, out, rows, counter, *held["key"], **held["noise"], **around)

    return call


def by_torch(op: Operation, w: Weights, dtype: torch.dtype) -> Callable[..., Tensor]:
    """What a user of torch writes, in ``dtype`` throughout."""
    norm, shift, bias = (None if v is None else v.to(dtype) for v in (w.norm, w.shift, w.bias))
    conv = None if w.conv is None else w.conv.to(dtype, memory_format=torch.channels_last)

    def normed(x: Tensor, skip: Tensor | None = None) -> Tensor:
        return F.silu(F.group_norm(x if skip is None else torch.cat((x, skip), 1), GROUPS, norm, shift, EPS))

    def convolved(x: Tensor) -> Tensor:
        assert conv is not None
        return F.conv2d(x, conv, bias, padding=conv.shape[-1] // 2)

    def attention(qkv: Tensor) -> Tensor:
        n, width, h, side = qkv.shape
        q, k, v = qkv.permute(0, 2, 3, 1).reshape(n, 1, h * side, width).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return y.reshape(n, h, side, width // 3).permute(0, 3, 1, 2)

    def step(x: Tensor, out: Tensor) -> Tensor:
        kx, ko, clip, c0, cx = _ROWS[0, :5].tolist()
        x0 = (kx * x + ko * out.float()).clamp(-clip, clip)
        return c0 * x0 + cx * x + float(_ROWS[0, reference.SIGMA]) * torch.randn_like(x)

    calls: dict[str, Callable[..., Tensor]] = {
        "attention": attention,
        "sampler_step": step,
        "conv_step": lambda x, y: step(x, convolved(y)),
        "norm_act": normed,
        "upsample_conv": lambda x: convolved(F.interpolate(x, scale_factor=2.0, mode="nearest")),
        "norm_conv": lambda x, skip=None: convolved(normed(x, skip)),
    }
    return calls.get(op.name, convolved)


@torch.inference_mode()
def prepared(
    op: Operation, who: str, batch: int, dtype: torch.dtype, device: torch.device, cache_bytes: int
) -> tuple[Run, str | None]:
    """A call that takes fresh inputs by turns, and what is wrong with it: None where its error is allowed.

    who: "torch", or a set in ops/.
    """
    w = weights(op, device)
    tensors = inputs(op, batch, dtype, device)
    wrong = None
    if who == "torch":  # what others are compared with
        enter, call = (lambda *t: t), by_torch(op, w, dtype)
    else:
        enter, call = by_set(op, getattr(sets, who)(), w, dtype)
        wrong = _wrong(op, call(*enter(*tensors)), w, tensors, dtype)
    held = sum(t.numel() * t.element_size() for t in tensors)
    count = min(copies_for(held, cache_bytes), MOST_COPIES)
    copies = [enter(*(t.clone() for t in tensors)) for _ in range(count)]
    return rotated(torch.inference_mode()(call), copies), wrong


def _wrong(op: Operation, got: Tensor, w: Weights, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> str | None:
    wide = Weights(*(None if v is None else v.double() for v in (w.norm, w.shift, w.conv, w.bias)))
    _, true_call = by_set(op, sets.reference(), wide, torch.float64)
    truth = true_call(*(t.double() for t in tensors))
    # Of a step torch draws other noise: there the definition, in the same dtype, sets what an error may be.
    plain = by_set(op, sets.reference(), w, dtype)[1] if op.name in STEPS else by_torch(op, w, dtype)
    ours, theirs = error(got, truth), error(plain(*tensors), truth)
    result = torch.float32 if op.name in STEPS else dtype
    largest, rms = allowances(result, theirs.largest, theirs.rms, TIMES)
    if ours.largest <= largest and ours.rms <= rms:
        return None
    return f"largest error {ours.largest:.2e} ({largest:.2e} allowed), RMS {ours.rms:.2e} ({rms:.2e} allowed)"
