"""lucidrains' denoising-diffusion-pytorch restated for the tests: the network as a function of a state dict, by the
version that trained it, its GaussianDiffusion's buffers, and its two sampling loops.

Written from the published semantics alone; nothing here comes from ddpm_fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Net:
    """Arguments of Unet, and what its version does. The defaults are those of 2.x."""

    dim: int = 8
    mults: tuple[int, ...] = (1, 2)
    channels: int = 3
    init_dim: int | None = None
    out: int | None = None  # channels of the output
    self_condition: bool = False
    full: tuple[bool, ...] | None = None  # by level; None: the deepest alone
    heads: tuple[int, ...] | None = None
    dim_head: tuple[int, ...] | None = None
    features: int | None = None  # random or learned frequencies, two values each
    theta: float = 10000
    nested: bool = False  # names of before 1.8.0, which had linear attention at every level
    memory: int = 4
    groups: int | None = None  # GroupNorm in the blocks
    layer_norm: bool = False  # before attention and after linear attention, in place of RMSNorm
    standardise: str | None = None  # block convolutions: eps "added" to the variance or variance "clamped" at it
    over_pixels: bool = False
    cosine: float | None = None
    strided: bool = False  # 4x4 convolutions of stride 2 go down

    @property
    def first(self) -> int:
        return self.init_dim or self.dim

    @property
    def levels(self) -> list[tuple[int, int]]:
        widths = [self.first, *(self.dim * m for m in self.mults)]
        return list(pairwise(widths))

    def attention(self, level: int) -> tuple[bool, int, int]:
        """(full, heads, channels of a head) at a level; -1 is the deepest."""
        last = len(self.mults) - 1
        level = last if level < 0 else level
        full = self.full[level] if self.full else level == last and not self.nested
        return full, (self.heads or (4,) * 9)[level], (self.dim_head or (32,) * 9)[level]


def weights(net: Net, seed: int = 0, gain: float = 1.0) -> dict[str, Tensor]:
    """A random state dict under the names of the version; every tensor is random, norms and biases too."""
    g = torch.Generator().manual_seed(seed)
    sd: dict[str, Tensor] = {}

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def put(name: str, *shape: int, bias: bool = True) -> None:
        sd[f"{name}.weight"] = gain * randn(*shape) / math.sqrt(math.prod(shape[1:]))
        if bias:
            sd[f"{name}.bias"] = 0.3 * gain * randn(shape[0])

    def channel_norm(name: str, c: int) -> None:
        sd[f"{name}.g"] = 1 + 0.3 * randn(1, c, 1, 1)

    def res(name: str, cin: int, cout: int) -> None:
        put(f"{name}.mlp.1", 2 * cout, 4 * net.dim)
        for block, c in (("block1", cin), ("block2", cout)):
            put(f"{name}.{block}.proj", cout, c, 3, 3)
            if net.standardise:  # whose variance is below the eps
                sd[f"{name}.{block}.proj.weight"][0] *= 0.01
            if net.groups:
                sd[f"{name}.{block}.norm.weight"] = 1 + 0.3 * randn(cout)
                sd[f"{name}.{block}.norm.bias"] = 0.3 * randn(cout)
            else:
                channel_norm(f"{name}.{block}.norm", cout)
        if cin != cout:
            put(f"{name}.res_conv", cout, cin, 1, 1)

    def attention(name: str, c: int, full: bool, heads: int, d: int) -> None:
        channel_norm(f"{name}.fn.norm" if net.nested else f"{name}.norm", c)
        inside = f"{name}.fn.fn" if net.nested else name
        if net.memory:
            sd[f"{inside}.mem_kv"] = randn(2, heads, *((net.memory, d) if full else (d, net.memory)))
        put(f"{inside}.to_qkv", 3 * heads * d, c, 1, 1, bias=False)
        if full:
            put(f"{inside}.to_out", c, heads * d, 1, 1)
        else:
            put(f"{inside}.to_out.0", c, heads * d, 1, 1)
            channel_norm(f"{inside}.to_out.1", c)

    put("init_conv", net.first, net.channels * (2 if net.self_condition else 1), 7, 7)
    wide = 4 * net.dim
    if net.features:
        sd["time_mlp.0.weights"] = 0.01 * randn(net.features // 2)
    put("time_mlp.1", wide, 1 + net.features if net.features else net.dim)
    put("time_mlp.3", wide, wide)
    last = len(net.levels) - 1
    for i, (cin, cout) in enumerate(net.levels):
        res(f"downs.{i}.0", cin, cin)
        res(f"downs.{i}.1", cin, cin)
        attention(f"downs.{i}.2", cin, *net.attention(i))
        if i == last:
            put(f"downs.{i}.3", cout, cin, 3, 3)
        elif net.strided:
            put(f"downs.{i}.3", cout, cin, 4, 4)
        else:
            put(f"downs.{i}.3.1", cout, 4 * cin, 1, 1)
    deepest = net.levels[-1][1]
    res("mid_block1", deepest, deepest)
    attention("mid_attn", deepest, True, *net.attention(-1)[1:])
    res("mid_block2", deepest, deepest)
    for j, (cin, cout) in enumerate(reversed(net.levels)):
        res(f"ups.{j}.0", cin + cout, cout)
        res(f"ups.{j}.1", cin + cout, cout)
        attention(f"ups.{j}.2", cout, *net.attention(last - j))
        put(f"ups.{j}.3" if j == last else f"ups.{j}.3.1", cin, cout, 3, 3)
    res("final_res_block", 2 * net.first, net.first)
    put("final_conv", net.out or net.channels, net.first, 1, 1)
    return sd


def forward(net: Net, sd: dict[str, Tensor], x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
    """Unet.forward by the names that the state dict has: x [N, C, H, W], t [N] -> [N, out, H, W]."""

    def linear(h: Tensor, name: str) -> Tensor:
        return F.linear(h, sd[f"{name}.weight"], sd[f"{name}.bias"])

    def conv(h: Tensor, name: str, **kwargs: Any) -> Tensor:
        return F.conv2d(h, sd[f"{name}.weight"], sd.get(f"{name}.bias"), **kwargs)

    def rms(h: Tensor, g: Tensor) -> Tensor:
        return h / h.norm(dim=1, keepdim=True).clamp(min=1e-12) * g * math.sqrt(h.shape[1])

    def channel_norm(h: Tensor, name: str) -> Tensor:
        g = sd[f"{name}.g"]
        if not net.layer_norm:
            return rms(h, g)
        mean, variance = h.mean(1, keepdim=True), h.var(1, unbiased=False, keepdim=True)
        return (h - mean) / torch.sqrt(variance + 1e-5) * g

    def block(h: Tensor, name: str, condition: tuple[Tensor, Tensor] | None) -> Tensor:
        w = sd[f"{name}.proj.weight"]
        if net.standardise:
            flat = w.flatten(1)
            variance = flat.var(1, unbiased=False)[:, None]
            floor = variance + 1e-5 if net.standardise == "added" else variance.clamp(min=1e-5)
            w = ((flat - flat.mean(1, keepdim=True)) / floor.sqrt()).view_as(w)
        h = F.conv2d(h, w, sd[f"{name}.proj.bias"], padding=1)
        if net.groups:
            h = F.group_norm(h, net.groups, sd[f"{name}.norm.weight"], sd[f"{name}.norm.bias"], 1e-5)
        else:
            h = rms(h, sd[f"{name}.norm.g"])
        if condition is not None:
            h = h * (1 + condition[0]) + condition[1]
        return h * torch.sigmoid(h)

    def res(h: Tensor, name: str) -> Tensor:
        scale, shift = linear(emb * torch.sigmoid(emb), f"{name}.mlp.1")[:, :, None, None].chunk(2, dim=1)
        y = block(block(h, f"{name}.block1", (scale, shift)), f"{name}.block2", None)
        return y + (conv(h, f"{name}.res_conv") if f"{name}.res_conv.weight" in sd else h)

    def attention(h: Tensor, name: str, full: bool, heads: int, d: int, cosine: float | None = None) -> Tensor:
        inside = f"{name}.fn.fn" if net.nested else name
        height, width = h.shape[2:]
        normed = channel_norm(h, f"{name}.fn.norm" if net.nested else f"{name}.norm")
        q, k, v = (
            part.reshape(len(h), heads, d, height * width) for part in conv(normed, f"{inside}.to_qkv").chunk(3, dim=1)
        )
        if net.over_pixels and not full:
            v = v / (height * width)
        if net.memory:
            memory = sd[f"{inside}.mem_kv"]
            columns = memory.transpose(2, 3) if full else memory  # [2, heads, d, n]
            k, v = (torch.cat((m.expand(len(h), -1, -1, -1), part), dim=3) for m, part in zip(columns, (k, v)))
        if full:
            if cosine is None:
                similarity = torch.einsum("bhdi,bhdj->bhij", q, k) * d**-0.5
            else:
                similarity = torch.einsum("bhdi,bhdj->bhij", F.normalize(q, dim=2), F.normalize(k, dim=2)) * cosine
            out = torch.einsum("bhij,bhdj->bhdi", similarity.softmax(3), v)
            return h + conv(out.reshape(len(h), heads * d, height, width), f"{inside}.to_out")
        context = torch.einsum("bhdn,bhen->bhde", k.softmax(3), v)
        out = torch.einsum("bhde,bhdn->bhen", context, q.softmax(2) * d**-0.5)
        out = conv(out.reshape(len(h), heads * d, height, width), f"{inside}.to_out.0")
        return h + channel_norm(out, f"{inside}.to_out.1")

    def down(h: Tensor, name: str) -> Tensor:
        if net.strided:
            return conv(h, name, stride=2, padding=1)
        n, c, height, width = h.shape
        cells = h.reshape(n, c, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        return conv(cells.reshape(n, 4 * c, height // 2, width // 2), f"{name}.1")

    if net.self_condition:
        x = torch.cat((torch.zeros_like(x) if condition is None else condition, x), dim=1)
    times = t.to(x.dtype)
    if net.features:
        angles = times[:, None] * sd["time_mlp.0.weights"] * 2 * math.pi
        emb = torch.cat((times[:, None], angles.sin(), angles.cos()), dim=1)
    else:
        half = net.dim // 2
        rates = torch.exp(-math.log(net.theta) * torch.arange(half, dtype=x.dtype) / (half - 1))
        emb = torch.cat(((times[:, None] * rates).sin(), (times[:, None] * rates).cos()), dim=1)
    emb = linear(emb, "time_mlp.1")
    emb = linear(emb * 0.5 * (1 + torch.erf(emb / math.sqrt(2))), "time_mlp.3")
    h = first = conv(x, "init_conv", padding=3)
    skips, last = [], len(net.levels) - 1
    for i in range(last + 1):
        h = res(h, f"downs.{i}.0")
        skips.append(h)
        h = attention(res(h, f"downs.{i}.1"), f"downs.{i}.2", *net.attention(i))
        skips.append(h)
        h = conv(h, f"downs.{i}.3", padding=1) if i == last else down(h, f"downs.{i}.3")
    h = res(h, "mid_block1")
    h = res(attention(h, "mid_attn", True, *net.attention(-1)[1:], net.cosine), "mid_block2")
    for j in range(last + 1):
        h = res(torch.cat((h, skips.pop()), dim=1), f"ups.{j}.0")
        h = res(torch.cat((h, skips.pop()), dim=1), f"ups.{j}.1")
        h = attention(h, f"ups.{j}.2", *net.attention(last - j))
        if j < last:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
        h = conv(h, f"ups.{j}.3" if j == last else f"ups.{j}.3.1", padding=1)
    return conv(res(torch.cat((h, first), dim=1), "final_res_block"), "final_conv")


# --- the diffusion ---


def betas(name: str, total: int) -> Tensor:
    """[T] float64: linear (scaled by 1000 / T), cosine (offset 0.008) or sigmoid (-3 to 3), at most 0.999."""
    if name == "linear":
        return torch.tensor(
            [1000 / total * (1e-4 + (0.02 - 1e-4) * i / (total - 1)) for i in range(total)], dtype=torch.float64
        )

    def signal(u: float) -> float:
        if name == "cosine":
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        ends = [float(torch.tensor(v).sigmoid()) for v in (-3.0, 3.0)]  # float32, as there
        return (ends[1] - 1 / (1 + math.exp(3 - 6 * u))) / float(torch.tensor(ends[1]) - torch.tensor(ends[0]))

    a = [signal(i / total) for i in range(total + 1)]
    return torch.tensor([min(max(1 - a[i + 1] / a[i], 0), 0.999) for i in range(total)], dtype=torch.float64)


class Diffusion:
    """GaussianDiffusion's buffers, float32 of float64, and its loops over any network f(x, t, condition)."""

    def __init__(self, b: Tensor, objective: str, gamma: float | None = None, learned: bool = False):
        a = torch.cumprod(1 - b, 0)
        before = torch.cat((torch.ones(1, dtype=torch.float64), a[:-1]))
        posterior = b * (1 - before) / (1 - a)
        snr = a / (1 - a)
        clipped = snr if gamma is None else snr.clamp(max=gamma)
        self.objective, self.learned = objective, learned
        self.buffers = {
            "betas": b,
            "alphas_cumprod": a,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": a.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - a).sqrt(),
            "sqrt_recip_alphas_cumprod": (1 / a).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / a - 1).sqrt(),
            "posterior_variance": posterior,
            "posterior_log_variance_clipped": posterior.clamp(min=1e-20).log(),
            "posterior_mean_coef1": b * before.sqrt() / (1 - a),
            "posterior_mean_coef2": (1 - before) * (1 - b).sqrt() / (1 - a),
            "loss_weight": {"pred_noise": clipped / snr, "pred_x0": clipped, "pred_v": clipped / (snr + 1)}[objective],
        }
        self.buffers = {name: value.float() for name, value in self.buffers.items()}

    def __getattr__(self, name: str) -> Tensor:
        return self.buffers[name]

    def x0(self, out: Tensor, t: int, x: Tensor) -> Tensor:
        if self.objective == "pred_noise":
            out = self.sqrt_recip_alphas_cumprod[t] * x - self.sqrt_recipm1_alphas_cumprod[t] * out
        elif self.objective == "pred_v":
            out = self.sqrt_alphas_cumprod[t] * x - self.sqrt_one_minus_alphas_cumprod[t] * out
        return out.clamp(-1, 1)

    @torch.no_grad()
    def ddpm(self, f: Callable[..., Tensor], shape: tuple[int, ...], draw: Callable[[], Tensor]) -> Iterator[Tensor]:
        """x_T, then x after each step. One normal at first, one a step while t > 0."""
        x, before = draw(), None
        yield x
        for t in reversed(range(len(self.betas))):
            out = f(x, torch.full((shape[0],), t), before)
            log_variance: Tensor = self.posterior_log_variance_clipped[t]
            if self.learned:
                out, v = out.chunk(2, dim=1)
                log_variance = (v + 1) / 2 * self.betas[t].log() + (1 - (v + 1) / 2) * log_variance
            before = self.x0(out, t, x)
            mean = self.posterior_mean_coef1[t] * before + self.posterior_mean_coef2[t] * x
            x = mean + (0.5 * log_variance).exp() * (draw() if t > 0 else 0)
            yield x

    @torch.no_grad()
    def ddim(
        self,
        f: Callable[..., Tensor],
        shape: tuple[int, ...],
        draw: Callable[[], Tensor],
        steps: int,
        eta: float,
        rederive: bool = True,  # of pred_noise: the noise that fits the clipped x_0, not the network's own
    ) -> Iterator[Tensor]:
        """The same with sampling_timesteps < timesteps. One normal at every step but the last, at eta 0 too."""
        spaced = torch.linspace(-1, len(self.betas) - 1, steps + 1)
        times = [int(t) for t in spaced.tolist()][::-1]
        x, before = draw(), None
        yield x
        for t, following in pairwise(times):
            out = f(x, torch.full((shape[0],), t), before)
            before = self.x0(out, t, x)
            if following < 0:
                x = before
            else:
                noise = (self.sqrt_recip_alphas_cumprod[t] * x - before) / self.sqrt_recipm1_alphas_cumprod[t]
                noise = noise if rederive else out
                a, a_next = self.alphas_cumprod[t], self.alphas_cumprod[following]
                sigma = eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
                x = before * a_next.sqrt() + (1 - a_next - sigma**2).sqrt() * noise + sigma * draw()
            yield x


def trainer_file(net: Net, diffusion: Diffusion, seed: int = 0, version: str | None = "2.3.4", **kwargs: Any) -> Any:
    """What Trainer.save writes, with optimizer and scaler left small; the EMA's network is weights(net, seed)."""
    own = {f"model.{name}": t for name, t in weights(net, seed + 1, **kwargs).items()} | diffusion.buffers
    drifted = {name: t * 1.0001 for name, t in diffusion.buffers.items()}
    averaged = {f"model.{name}": t for name, t in weights(net, seed, **kwargs).items()} | drifted
    ema = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    ema |= {f"ema_model.{name}": t for name, t in averaged.items()}
    ema |= {f"online_model.{name}": t for name, t in own.items()}
    content = {"step": 7, "model": own, "opt": {"state": {}, "param_groups": []}, "ema": ema, "scaler": None}
    return content if version is None else {**content, "version": version}
