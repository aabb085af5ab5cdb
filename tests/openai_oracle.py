"""Improved- and guided-diffusion restated for the tests: the network as a function of a state dict, and its loops.

Written from the published semantics alone; nothing here comes from ddpm_fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Net:
    """The flags of the code base that build a network."""

    ch: int
    blocks: int
    mults: tuple[float, ...]
    ds: tuple[int, ...]  # downsampling factors with attention
    heads: int = 1
    head_channels: int = -1
    new_order: bool = False
    updown: bool = False
    scale_shift: bool = True
    out: int = 6
    classes: int | None = None
    channels: int = 3


def weights(net: Net, seed: int = 0, meta: bool = False) -> dict[str, Tensor]:
    """A random state dict in the order and names of theirs; every tensor is random, norms and biases too.

    meta: shapes alone.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta") if meta else torch.randn(*shape, generator=g)

    sd: dict[str, Tensor] = {}

    def put(name: str, *shape: int, gain: float = 1.0) -> None:
        fan = math.prod(shape[1:]) if len(shape) > 1 else 1
        sd[f"{name}.weight"] = gain * randn(*shape) / math.sqrt(fan)
        sd[f"{name}.bias"] = 0.3 * randn(shape[0])

    def norm(name: str, c: int) -> None:
        sd[f"{name}.weight"] = 1 + 0.3 * randn(c)
        sd[f"{name}.bias"] = 0.3 * randn(c)

    def res(name: str, cin: int, cout: int) -> None:
        norm(f"{name}.in_layers.0", cin)
        put(f"{name}.in_layers.2", cout, cin, 3, 3)
        put(f"{name}.emb_layers.1", cout * (2 if net.scale_shift else 1), 4 * net.ch, gain=0.3)
        norm(f"{name}.out_layers.0", cout)
        put(f"{name}.out_layers.3", cout, cout, 3, 3, gain=0.5)
        if cin != cout:
            put(f"{name}.skip_connection", cout, cin, 1, 1)

    def attention(name: str, c: int) -> None:
        norm(f"{name}.norm", c)
        put(f"{name}.qkv", 3 * c, c, 1, gain=1.5)
        put(f"{name}.proj_out", c, c, 1, gain=0.5)

    put("time_embed.0", 4 * net.ch, net.ch)
    put("time_embed.2", 4 * net.ch, 4 * net.ch)
    if net.classes:
        sd["label_emb.weight"] = randn(net.classes, 4 * net.ch)
    c = int(net.mults[0] * net.ch)
    put("input_blocks.0.0", c, net.channels, 3, 3)
    stack, n, ds = [c], 1, 1
    for level, mult in enumerate(net.mults):
        for _ in range(net.blocks):
            res(f"input_blocks.{n}.0", c, int(mult * net.ch))
            c = int(mult * net.ch)
            if ds in net.ds:
                attention(f"input_blocks.{n}.1", c)
            stack.append(c)
            n += 1
        if level < len(net.mults) - 1:
            res(f"input_blocks.{n}.0", c, c) if net.updown else put(f"input_blocks.{n}.0.op", c, c, 3, 3)
            stack.append(c)
            n, ds = n + 1, ds * 2
    res("middle_block.0", c, c)
    attention("middle_block.1", c)
    res("middle_block.2", c, c)
    n = 0
    for level, mult in reversed(list(enumerate(net.mults))):
        for i in range(net.blocks + 1):
            res(f"output_blocks.{n}.0", c + stack.pop(), int(mult * net.ch))
            c, k = int(mult * net.ch), 1
            if ds in net.ds:
                attention(f"output_blocks.{n}.1", c)
                k = 2
            if level and i == net.blocks:
                name = f"output_blocks.{n}.{k}"
                res(name, c, c) if net.updown else put(f"{name}.conv", c, c, 3, 3)
                ds //= 2
            n += 1
    norm("out.0", c)
    put("out.2", net.out, c, 3, 3)
    return sd


def forward(net: Net, sd: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """UNetModel.forward by the names that the state dict has: [N, C, H, W], t [N] -> [N, out, H, W]."""

    def linear(h: Tensor, name: str) -> Tensor:
        return F.linear(h, sd[f"{name}.weight"], sd[f"{name}.bias"])

    def conv(h: Tensor, name: str, **kwargs: Any) -> Tensor:
        return F.conv2d(h, sd[f"{name}.weight"], sd[f"{name}.bias"], **kwargs)

    def norm(h: Tensor, name: str) -> Tensor:
        return F.group_norm(h, 32, sd[f"{name}.weight"], sd[f"{name}.bias"], 1e-5)

    def double(h: Tensor) -> Tensor:
        return F.interpolate(h, scale_factor=2, mode="nearest")

    def res(h: Tensor, name: str, change: Callable[[Tensor], Tensor] = lambda h: h) -> Tensor:
        skip = change(h)
        h = conv(change(F.silu(norm(h, f"{name}.in_layers.0"))), f"{name}.in_layers.2", padding=1)
        e = linear(F.silu(emb), f"{name}.emb_layers.1")[:, :, None, None]
        if net.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(h, f"{name}.out_layers.0") * (1 + scale) + shift
        else:
            h = norm(h + e, f"{name}.out_layers.0")
        h = conv(F.silu(h), f"{name}.out_layers.3", padding=1)
        if f"{name}.skip_connection.weight" in sd:
            skip = conv(skip, f"{name}.skip_connection")
        return skip + h

    def attention(h: Tensor, name: str) -> Tensor:
        b, c, height, width = h.shape
        n = net.heads if net.head_channels == -1 else c // net.head_channels
        flat = F.group_norm(h.flatten(2), 32, sd[f"{name}.norm.weight"], sd[f"{name}.norm.bias"], 1e-5)
        qkv = F.conv1d(flat, sd[f"{name}.qkv.weight"], sd[f"{name}.qkv.bias"])
        d = c // n
        if net.new_order:
            q, k, v = (part.reshape(b * n, d, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(b * n, 3 * d, -1).split(d, dim=1)
        root = 1 / math.sqrt(math.sqrt(d))
        w = torch.softmax(torch.einsum("bct,bcs->bts", q * root, k * root), dim=-1)
        a = torch.einsum("bts,bcs->bct", w, v).reshape(b, c, -1)
        a = F.conv1d(a, sd[f"{name}.proj_out.weight"], sd[f"{name}.proj_out.bias"])
        return h + a.reshape(b, c, height, width)

    def block(h: Tensor, name: str, up: bool) -> Tensor:
        """Whatever a block of the state dict holds, element by element."""
        for k in range(3):
            element = f"{name}.{k}"
            if f"{element}.in_layers.0.weight" in sd:
                # a residual block that is alone on the way down and keeps its width may be a downsampler
                if element in changes:
                    h = res(h, element, double if up else lambda h: F.avg_pool2d(h, 2))
                else:
                    h = res(h, element)
            elif f"{element}.qkv.weight" in sd:
                h = attention(h, element)
            elif f"{element}.op.weight" in sd:
                h = conv(h, f"{element}.op", stride=2, padding=1)
            elif f"{element}.conv.weight" in sd:
                h = conv(double(h), f"{element}.conv", padding=1)
            elif f"{element}.weight" in sd:
                h = conv(h, element, padding=1)
        return h

    changes = set()
    if net.updown:
        levels = len(net.mults)
        for level in range(levels - 1):
            changes.add(f"input_blocks.{(level + 1) * (net.blocks + 1)}.0")
        for level in range(1, levels):
            n = (levels - level) * (net.blocks + 1) - 1
            changes.add(f"output_blocks.{n}.{2 if 2**level in net.ds else 1}")
    half = net.ch // 2
    angle = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    emb = linear(
        F.silu(linear(torch.cat((angle.cos(), angle.sin()), dim=1).to(x.dtype), "time_embed.0")), "time_embed.2"
    )
    if net.classes:
        assert y is not None
        emb = emb + sd["label_emb.weight"][y]
    h, hs = x, []
    for n in range(1 + max(int(name.split(".")[1]) for name in sd if name.startswith("input_blocks."))):
        h = block(h, f"input_blocks.{n}", up=False)
        hs.append(h)
    h = res(attention(res(h, "middle_block.0"), "middle_block.1"), "middle_block.2")
    for n in range(len(hs)):
        h = block(torch.cat((h, hs.pop()), dim=1), f"output_blocks.{n}", up=True)
    return conv(F.silu(norm(h, "out.0")), "out.2", padding=1)


# --- diffusion ---


def betas(name: str, steps: int) -> np.ndarray:
    if name == "linear":
        return np.linspace(0.0001 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=np.float64)

    def bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)])


def respaced(steps: int, rule: str) -> list[int]:
    """The timesteps that are kept, ascending."""
    if rule.startswith("ddim"):
        wanted = int(rule[4:])
        stride = next(k for k in range(1, steps) if len(range(0, steps, k)) == wanted)
        return list(range(0, steps, stride))
    counts = [int(c) for c in rule.split(",")]
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (1 if i < steps % len(counts) else 0)
        place, stride = 0.0, 1.0 if count <= 1 else (size - 1) / (count - 1)
        for _ in range(count):
            kept.append(start + round(place))
            place += stride
        start += size
    return kept


class Diffusion:
    """SpacedDiffusion: float64 tables over the kept steps. Steps are in the dtype of x."""

    def __init__(self, name: str, steps: int, rule: str, rescale: bool, variance: str, xstart: bool = False):
        self.kept = respaced(steps, rule) if rule else list(range(steps))
        full = np.cumprod(1 - betas(name, steps))[self.kept]
        before = np.append(1.0, full[:-1])
        self.betas = 1 - full / before
        self.a = np.cumprod(1 - self.betas)
        self.ap = np.append(1.0, self.a[:-1])
        self.posterior = self.betas * (1 - self.ap) / (1 - self.a)
        self.log_posterior = np.log(np.append(self.posterior[1], self.posterior[1:]))
        self.c1 = self.betas * np.sqrt(self.ap) / (1 - self.a)
        self.c2 = (1 - self.ap) * np.sqrt(1 - self.betas) / (1 - self.a)
        self.variance, self.xstart = variance, xstart
        self.times = [t * (1000.0 / steps) if rescale else t for t in self.kept]

    def split(self, out: Tensor, x: Tensor, i: int) -> tuple[Tensor, Tensor | float]:
        """(clipped x0, log variance)."""
        c = x.shape[1]
        log_variance: Tensor | float
        if self.variance == "learned_range":
            out, v = out[:, :c], out[:, c:]
            fraction = (v + 1) / 2
            high, low = float(np.log(self.betas[i])), float(self.log_posterior[i])
            log_variance = fraction * high + (1 - fraction) * low
        elif self.variance == "fixed_large":
            log_variance = float(np.log(np.append(self.posterior[1], self.betas[1:]))[i])
        else:
            log_variance = float(self.log_posterior[i])
        a = float(self.a[i])
        x0 = out if self.xstart else math.sqrt(1 / a) * x - math.sqrt(1 / a - 1) * out
        return x0.clamp(-1, 1), log_variance

    def p_sample(self, out: Tensor, x: Tensor, i: int, noise: Tensor) -> Tensor:
        x0, log_variance = self.split(out, x, i)
        mean = float(self.c1[i]) * x0 + float(self.c2[i]) * x
        return mean + (i != 0) * torch.exp(0.5 * torch.as_tensor(log_variance, dtype=x.dtype)) * noise

    def ddim_sample(self, out: Tensor, x: Tensor, i: int, noise: Tensor, eta: float) -> Tensor:
        x0, _ = self.split(out, x, i)
        a, ap = float(self.a[i]), float(self.ap[i])
        eps = (math.sqrt(1 / a) * x - x0) / math.sqrt(1 / a - 1)
        sigma = eta * math.sqrt((1 - ap) / (1 - a)) * math.sqrt(1 - a / ap)
        return x0 * math.sqrt(ap) + math.sqrt(1 - ap - sigma**2) * eps + (i != 0) * sigma * noise
