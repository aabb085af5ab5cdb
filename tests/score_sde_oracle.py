"""Score-SDE's VP networks and samplers restated for the tests: `ddpm`, and the DDPM++ form of `ncsnpp`.

Written from the published semantics alone; nothing here comes from ddpm_fast. Everything is in the dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Net:
    """The fields of a config file that build a network."""

    nf: int = 32
    mults: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attended: tuple[int, ...] = (1,)  # levels whose resolution is among attn_resolutions
    kind: str = "ddpm"  # the network's name
    biggan: bool = False  # resblock_type
    rescale: bool = False  # skip_rescale
    channels: int = 3


DDPM = Net()
DDPMPP = Net(kind="ncsnpp", biggan=True, rescale=True)


def weights(net: Net, seed: int = 0, meta: bool = False) -> dict[str, Tensor]:
    """A random state dict in the order and names of theirs; every tensor is random, norms and biases too.

    meta: shapes alone.
    """
    g = torch.Generator().manual_seed(seed)
    sd: dict[str, Tensor] = {}
    number = -1

    def randn(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta") if meta else torch.randn(*shape, generator=g)

    def module() -> str:
        nonlocal number
        number += 1
        return f"all_modules.{number}"

    def put(name: str, *shape: int, gain: float = 1.0) -> None:
        sd[f"{name}.weight"] = gain * randn(*shape) / math.sqrt(math.prod(shape[1:]))
        sd[f"{name}.bias"] = 0.3 * randn(shape[0])

    def norm(name: str, c: int) -> None:
        sd[f"{name}.weight"], sd[f"{name}.bias"] = 1 + 0.3 * randn(c), 0.3 * randn(c)

    def nin(name: str, cin: int, cout: int, gain: float = 1.0) -> None:
        sd[f"{name}.W"], sd[f"{name}.b"] = gain * randn(cin, cout) / math.sqrt(cin), 0.3 * randn(cout)

    def res(cin: int, cout: int, resamples: bool = False) -> None:
        name = module()
        norm(f"{name}.GroupNorm_0", cin)
        put(f"{name}.Conv_0", cout, cin, 3, 3)
        put(f"{name}.Dense_0", cout, 4 * net.nf, gain=0.5)
        norm(f"{name}.GroupNorm_1", cout)
        put(f"{name}.Conv_1", cout, cout, 3, 3, gain=0.7)
        if net.biggan and (cin != cout or resamples):
            put(f"{name}.Conv_2", cout, cin, 1, 1)
        elif cin != cout:
            nin(f"{name}.NIN_0", cin, cout)

    def attention(c: int) -> None:
        name = module()
        norm(f"{name}.GroupNorm_0", c)
        for k, gain in enumerate((1.5, 1.5, 1.0, 0.5)):
            nin(f"{name}.NIN_{k}", c, c, gain)

    def resampler(c: int) -> None:
        if net.biggan:
            res(c, c, resamples=True)
        else:
            put(f"{module()}.Conv_0", c, c, 3, 3)

    put(module(), 4 * net.nf, net.nf)
    put(module(), 4 * net.nf, 4 * net.nf)
    put(module(), net.nf, net.channels, 3, 3)
    c, stack = net.nf, [net.nf]
    for level, mult in enumerate(net.mults):
        for _ in range(net.blocks):
            res(c, net.nf * mult)
            c = net.nf * mult
            if level in net.attended:
                attention(c)
            stack.append(c)
        if level + 1 < len(net.mults):
            resampler(c)
            stack.append(c)
    res(c, c)
    attention(c)
    res(c, c)
    for level in reversed(range(len(net.mults))):
        for _ in range(net.blocks + 1):
            res(c + stack.pop(), net.nf * net.mults[level])
            c = net.nf * net.mults[level]
        if level in net.attended:
            attention(c)
        if level:
            resampler(c)
    norm(module(), c)
    put(module(), net.channels, c, 3, 3)
    return sd


def forward(net: Net, sd: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """[N, C, H, W], labels [N], fractional or not -> [N, C, H, W]."""
    numbers: Iterator[int] = iter(range(1000))

    def this() -> str:
        return f"all_modules.{next(numbers)}"

    def get(name: str) -> Tensor:
        return sd[name].to(x.dtype)

    def linear(h: Tensor, name: str) -> Tensor:
        return F.linear(h, get(f"{name}.weight"), get(f"{name}.bias"))

    def conv(h: Tensor, name: str, **kwargs: Any) -> Tensor:
        return F.conv2d(h, get(f"{name}.weight"), get(f"{name}.bias"), **kwargs)

    def nin(h: Tensor, name: str) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", h, get(f"{name}.W")) + get(f"{name}.b")[:, None, None]

    def norm(h: Tensor, name: str) -> Tensor:
        c = h.shape[1]
        groups = 32 if net.kind == "ddpm" else min(c // 4, 32)
        return F.group_norm(h, groups, get(f"{name}.weight"), get(f"{name}.bias"), 1e-6)

    def swish(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    def join(h: Tensor, around: Tensor) -> Tensor:
        return (h + around) / math.sqrt(2) if net.rescale else h + around

    def double(h: Tensor) -> Tensor:
        return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    def halve(h: Tensor) -> Tensor:
        b, c, height, width = h.shape
        return h.reshape(b, c, height // 2, 2, width // 2, 2).mean(dim=(3, 5))

    def res(h: Tensor, change: Any = None) -> Tensor:
        name, around = this(), h
        y = swish(norm(h, f"{name}.GroupNorm_0"))
        if change is not None:
            y, around = change(y), change(around)
        y = conv(y, f"{name}.Conv_0", padding=1) + linear(swish(temb), f"{name}.Dense_0")[:, :, None, None]
        y = conv(swish(norm(y, f"{name}.GroupNorm_1")), f"{name}.Conv_1", padding=1)
        if f"{name}.Conv_2.weight" in sd:
            around = conv(around, f"{name}.Conv_2")
        elif f"{name}.NIN_0.W" in sd:
            around = nin(around, f"{name}.NIN_0")
        return join(y, around)

    def attention(h: Tensor) -> Tensor:
        name = this()
        n = norm(h, f"{name}.GroupNorm_0")
        q, k, v = (nin(n, f"{name}.NIN_{i}").flatten(2) for i in range(3))
        w = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(h.shape[1]), dim=2)
        return join(nin(torch.einsum("bij,bcj->bci", w, v).view_as(h), f"{name}.NIN_3"), h)

    def down(h: Tensor) -> Tensor:
        return res(h, halve) if net.biggan else conv(F.pad(h, (0, 1, 0, 1)), f"{this()}.Conv_0", stride=2)

    def up(h: Tensor) -> Tensor:
        return res(h, double) if net.biggan else conv(double(h), f"{this()}.Conv_0", padding=1)

    half = net.nf // 2
    frequencies = torch.exp(torch.arange(half, dtype=x.dtype) * -(math.log(10000) / (half - 1)))
    angle = labels.to(x.dtype)[:, None] * frequencies
    temb = linear(torch.cat((angle.sin(), angle.cos()), dim=1), this())
    temb = linear(swish(temb), this())
    hs = [conv(x, this(), padding=1)]
    last = len(net.mults) - 1
    for level in range(last + 1):
        for _ in range(net.blocks):
            h = res(hs[-1])
            hs.append(attention(h) if level in net.attended else h)
        if level < last:
            hs.append(down(hs[-1]))
    h = res(attention(res(hs[-1])))
    for level in reversed(range(last + 1)):
        for _ in range(net.blocks + 1):
            h = res(torch.cat((h, hs.pop()), dim=1))
        if level in net.attended:
            h = attention(h)
        if level:
            h = up(h)
    return conv(swish(norm(h, this())), this(), padding=1)


class VP:
    """The VP SDE with N discretisation steps, and its predictors; numbers in float64, times in float32 as there."""

    def __init__(self, n: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0):
        self.n, self.low, self.high = n, beta_min, beta_max
        self.betas = np.linspace(beta_min / n, beta_max / n, n)
        self.stds = np.sqrt(1 - np.cumprod(1 - self.betas))
        self.times = np.asarray(torch.linspace(1, 1e-3, n))

    def labels(self, i: int, continuous: bool) -> np.float32:
        return self.times[i] * np.float32(999 if continuous else self.n - 1)

    def std(self, i: int, continuous: bool) -> float:
        if not continuous:
            return float(self.stds[int(self.labels(i, False))])
        t = float(self.times[i])
        return math.sqrt(1 - math.exp(-(t**2) / 2 * (self.high - self.low) - t * self.low))

    def step(
        self, predictor: str, i: int, x: Tensor, out: Tensor, z: Tensor, continuous: bool
    ) -> tuple[Tensor, Tensor]:
        """(x of the next step, its mean) by step i of N from x and the network's output."""
        t, score = float(self.times[i]), -out / self.std(i, continuous)
        beta = float(self.betas[int(self.times[i] * np.float32(self.n - 1))])
        if predictor == "ancestral_sampling":
            mean, deviation = (x + beta * score) / math.sqrt(1 - beta), math.sqrt(beta)
        elif predictor == "reverse_diffusion":
            f = math.sqrt(1 - beta) * x - x
            mean, deviation = x - (f - beta * score), math.sqrt(beta)
        else:
            rate = self.low + t * (self.high - self.low)
            drift = -0.5 * rate * x - rate * score
            mean, deviation = x + drift * (-1 / self.n), math.sqrt(rate) * math.sqrt(1 / self.n)
        return mean + deviation * z, mean
