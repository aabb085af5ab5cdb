"""Ho et al.'s checkpoints against a restatement of their network and sampler, and against diffusers by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensors import excess
from torch import Tensor

from ddpm_fast.checkpoints import Checkpoint, CheckpointError, load
from ddpm_fast.sampler import Sampler

# channels, multiples, blocks, levels with attention; image size to run at; the release's own
CIFAR10 = (128, (1, 2, 2, 2), 2, (1,))
LSUN = (128, (1, 1, 2, 2, 4, 4), 2, (4,))
CELEBA64 = (128, (1, 2, 2, 2, 4), 2, (2,))
TINY = (32, (1, 2), 1, (0,))
Arch = tuple[int, tuple[int, ...], int, tuple[int, ...]]


def weights(arch: Arch, seed: int = 0, meta: bool = False) -> dict[str, Tensor]:
    """A random state dict in their names."""
    ch, mults, blocks, attended = arch
    g = torch.Generator().manual_seed(seed)
    sd: dict[str, Tensor] = {}

    def randn(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta") if meta else torch.randn(*shape, generator=g)

    def put(name: str, *shape: int, gain: float = 1.0) -> None:
        sd[f"{name}.weight"] = gain * randn(*shape) / math.sqrt(math.prod(shape[1:]))
        sd[f"{name}.bias"] = 0.3 * randn(shape[0])

    def norm(name: str, c: int) -> None:
        sd[f"{name}.weight"], sd[f"{name}.bias"] = 1 + 0.3 * randn(c), 0.3 * randn(c)

    def block(name: str, cin: int, cout: int) -> None:
        norm(f"{name}.norm1", cin)
        put(f"{name}.conv1", cout, cin, 3, 3)
        put(f"{name}.temb_proj", cout, 4 * ch, gain=0.5)
        norm(f"{name}.norm2", cout)
        put(f"{name}.conv2", cout, cout, 3, 3, gain=0.5)
        if cin != cout:
            put(f"{name}.nin_shortcut", cout, cin, 1, 1)

    def attention(name: str, c: int) -> None:
        norm(f"{name}.norm", c)
        for part, gain in (("q", 1.5), ("k", 1.5), ("v", 1.0), ("proj_out", 0.5)):
            put(f"{name}.{part}", c, c, 1, 1, gain=gain)

    put("temb.dense.0", 4 * ch, ch)
    put("temb.dense.1", 4 * ch, 4 * ch)
    put("conv_in", ch, 3, 3, 3)
    c, stack = ch, [ch]
    for i, mult in enumerate(mults):
        for j in range(blocks):
            block(f"down.{i}.block.{j}", c, ch * mult)
            c = ch * mult
            if i in attended:
                attention(f"down.{i}.attn.{j}", c)
            stack.append(c)
        if i < len(mults) - 1:
            put(f"down.{i}.downsample.conv", c, c, 3, 3)
            stack.append(c)
    block("mid.block_1", c, c)
    attention("mid.attn_1", c)
    block("mid.block_2", c, c)
    for i in reversed(range(len(mults))):
        for j in range(blocks + 1):
            block(f"up.{i}.block.{j}", c + stack.pop(), ch * mults[i])
            c = ch * mults[i]
            if i in attended:
                attention(f"up.{i}.attn.{j}", c)
        if i:
            put(f"up.{i}.upsample.conv", c, c, 3, 3)
    norm("norm_out", c)
    put("conv_out", 3, c, 3, 3)
    return sd


def forward(arch: Arch, sd: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    """Their Model.forward: [N, 3, H, W], t [N] -> [N, 3, H, W]."""
    ch, mults, blocks, _ = arch

    def conv(h: Tensor, name: str, **kwargs: Any) -> Tensor:
        return F.conv2d(h, sd[f"{name}.weight"], sd[f"{name}.bias"], **kwargs)

    def linear(h: Tensor, name: str) -> Tensor:
        return F.linear(h, sd[f"{name}.weight"], sd[f"{name}.bias"])

    def norm(h: Tensor, name: str) -> Tensor:
        return F.group_norm(h, 32, sd[f"{name}.weight"], sd[f"{name}.bias"], 1e-6)

    def swish(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    def block(h: Tensor, name: str) -> Tensor:
        y = conv(swish(norm(h, f"{name}.norm1")), f"{name}.conv1", padding=1)
        y = y + linear(swish(temb), f"{name}.temb_proj")[:, :, None, None]
        y = conv(swish(norm(y, f"{name}.norm2")), f"{name}.conv2", padding=1)
        return y + (conv(h, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in sd else h)

    def attention(h: Tensor, name: str) -> Tensor:
        if f"{name}.q.weight" not in sd:
            return h
        n = norm(h, f"{name}.norm")
        q, k, v = (conv(n, f"{name}.{part}").flatten(2) for part in "qkv")
        w = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * h.shape[1] ** -0.5, dim=2)
        a = torch.einsum("bij,bcj->bci", w, v).view_as(h)
        return h + conv(a, f"{name}.proj_out")

    half = ch // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angle = t.float()[:, None] * frequencies
    temb = linear(torch.cat((angle.sin(), angle.cos()), dim=1).to(x.dtype), "temb.dense.0")
    temb = linear(swish(temb), "temb.dense.1")
    h = conv(x, "conv_in", padding=1)
    hs = [h]
    for i in range(len(mults)):
        for j in range(blocks):
            h = attention(block(h, f"down.{i}.block.{j}"), f"down.{i}.attn.{j}")
            hs.append(h)
        if i < len(mults) - 1:
            h = conv(F.pad(h, (0, 1, 0, 1)), f"down.{i}.downsample.conv", stride=2)
            hs.append(h)
    h = block(attention(block(h, "mid.block_1"), "mid.attn_1"), "mid.block_2")
    for i in reversed(range(len(mults))):
        for j in range(blocks + 1):
            h = attention(block(torch.cat((h, hs.pop()), dim=1), f"up.{i}.block.{j}"), f"up.{i}.attn.{j}")
        if i:
            h = conv(F.interpolate(h, scale_factor=2, mode="nearest"), f"up.{i}.upsample.conv", padding=1)
    return conv(swish(norm(h, "norm_out")), "conv_out", padding=1)


def stored(tmp_path: Path, content: Any, name: str = "ema_diffusion_model.ckpt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


@torch.no_grad()
def error(checkpoint: Checkpoint, arch: Arch, sd: dict[str, Tensor], size: int) -> float:
    """Of the model's output, by the house rule: it is right up to 1."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0, 731])
    return excess(checkpoint.model(x, t), lambda weights, x: forward(arch, weights, x, t), sd, x)


# --- the network ---


@pytest.mark.parametrize(
    ("name", "arch", "size", "parameters"),
    [
        ("cifar10", CIFAR10, 16, 35_746_307),
        ("lsun_bedroom", LSUN, 64, 113_673_219),
        ("celebahq", LSUN, 32, 113_673_219),
        ("celeba64", CELEBA64, 16, None),
    ],
)
def test_release_at_reduced_width(
    name: str, arch: Arch, size: int, parameters: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By preset, and by the architecture alone, the preset made as narrow as the file."""
    from ddpm_fast.checkpoints import ho

    if parameters:
        assert sum(t.numel() for t in weights(arch, meta=True).values()) == parameters
    image = {"cifar10": 32, "celeba64": 64}.get(name, 256)
    wide = ho.PRESETS[name]
    assert wide["block_out_channels"] == tuple(arch[0] * mult for mult in arch[1])
    assert wide["attention"] == arch[3] and wide["sample_size"] == image
    narrow = (32, *arch[1:])
    sd = weights(narrow)
    path = stored(tmp_path, sd)
    checkpoint = load(path, preset=name)
    assert error(checkpoint, narrow, sd, size) <= 1
    large = name in ("cifar10", "celeba64")
    assert checkpoint.schedule.variance_type == ("fixed_large" if large else "fixed_small")
    assert checkpoint.model.config.sample_size == image and checkpoint.family == "Ho et al."
    monkeypatch.setitem(ho.PRESETS, name, {**wide, "block_out_channels": tuple(32 * mult for mult in arch[1])})
    told = load(path)
    assert (told.model.config, told.schedule) == (checkpoint.model.config, checkpoint.schedule)
    assert any(f"because the architecture is that of {name}" in note for note in told.notes)
    notes = "; ".join(told.notes)
    assert ("assumed, not known, of celeba64: variance_type='fixed_large'" in notes) == (name == "celeba64")
    assert ("'ddpm_noisy' sampler draws with beta_t whatever var_type: override" in notes) != large
    stated = load(path, overrides={"var_type": "fixedsmall"})
    assert "not known" not in "; ".join(stated.notes) and stated.schedule.variance_type == "fixed_small"
    other = "celeba64" if name == "cifar10" else "cifar10"
    with pytest.raises(CheckpointError, match=f"preset='{other}' is of another architecture"):
        load(path, preset=other)


@pytest.mark.parametrize("arch", [TINY, (32, (1,), 2, ()), (32, (1, 3, 2), 1, (0, 2))])
def test_other_architectures(arch: Arch, tmp_path: Path) -> None:
    sd = weights(arch)
    checkpoint = load(stored(tmp_path, sd), overrides={"var_type": "fixedsmall", "image_size": 8})
    assert error(checkpoint, arch, sd, 8) <= 1
    assert checkpoint.model.config.sample_size == 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"norm_eps": 1e-2},
        {"downsample_padding": 1},
        {"freq_shift": 0},
        {"flip_sin_to_cos": True},
        {"attention_head_dim": 8},
        {"norm_num_groups": 16},
    ],
)
def test_settings_that_no_shape_shows_matter(wrong: dict[str, Any], tmp_path: Path) -> None:
    sd = weights(TINY)
    checkpoint = load(stored(tmp_path, sd), overrides={"var_type": "fixedsmall", **wrong})
    assert error(checkpoint, TINY, sd, 8) > 1e-3
    assert any(note.startswith("overridden: var_type='fixedsmall'") for note in checkpoint.notes)


def test_the_averaged_weights_of_ddim_s_list(tmp_path: Path) -> None:
    model, ema = weights(TINY, seed=1), weights(TINY, seed=2)
    wrapped = {f"module.{name}": t for name, t in model.items()}
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    overrides = {"var_type": "fixedlarge"}
    both = load(stored(tmp_path, [wrapped, optimizer, 7, 1000, ema], "ckpt.pth"), overrides=overrides)
    assert error(both, TINY, ema, 8) <= 1 < error(both, TINY, model, 8)
    assert both.notes[0].startswith("of the 2 networks in the file (model, ema) the averaged one, ema, is used")
    raw = load(tmp_path / "ckpt.pth", overrides=overrides, weights="model")
    assert error(raw, TINY, model, 8) <= 1
    alone = load(stored(tmp_path, [wrapped, optimizer, 7, 1000], "ckpt_1.pth"), overrides=overrides)
    assert error(alone, TINY, model, 8) <= 1
    assert any("no averaged weights" in note for note in alone.notes)


def test_bayesian_logvar_is_left_out(tmp_path: Path) -> None:
    sd = weights(TINY)
    checkpoint = load(stored(tmp_path, {**sd, "logvar": torch.zeros(1000)}), overrides={"var_type": "fixedlarge"})
    assert error(checkpoint, TINY, sd, 8) <= 1
    assert any("logvar" in note for note in checkpoint.notes)


# --- sampling ---


@pytest.mark.parametrize(
    ("flags", "betas"),
    [
        ({}, np.linspace(1e-4, 0.02, 25)),
        ({"beta_schedule": "quad"}, np.linspace(1e-4**0.5, 0.02**0.5, 25) ** 2),
        ({"beta_schedule": "sigmoid"}, 1 / (np.exp(-np.linspace(-6, 6, 25)) + 1) * (0.02 - 1e-4) + 1e-4),
    ],
)
@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall"])
def test_sampler_step_by_step(flags: dict[str, Any], betas: np.ndarray, variance: str, tmp_path: Path) -> None:
    """The float64 tables of pytorch_diffusion: x0 clipped, log variances with index 0 replaced by posterior[1]."""
    sd = weights(TINY)
    overrides = {"var_type": variance, "image_size": 8, "num_diffusion_timesteps": 25, **flags}
    checkpoint = load(stored(tmp_path, sd), overrides=overrides)
    a = np.cumprod(1 - betas)
    before = np.append(1.0, a[:-1])
    posterior = betas * (1 - before) / (1 - a)
    large, small = np.append(posterior[1], betas[1:]), np.append(posterior[1], posterior[1:])
    sigma = np.sqrt(large if variance == "fixedlarge" else small)
    sampler = Sampler(checkpoint.model, checkpoint.schedule, 2, noise=torch.Generator().manual_seed(5))
    seen: list[Tensor] = []
    with torch.no_grad():
        sampler.sample(2, callback=lambda step, x: seen.append(x.clone()))
        g = torch.Generator().manual_seed(5)
        assert torch.equal(seen[0], torch.randn(2, 3, 8, 8, generator=g)) and len(seen) == 26
        for x, got, t in zip(seen, seen[1:], reversed(range(25))):
            z = torch.randn(2, 3, 8, 8, generator=g) if t else torch.zeros_like(x)

            def step(sd: dict[str, Tensor], x: Tensor, z: Tensor, t: int = t) -> Tensor:
                eps = forward(TINY, sd, x, torch.full((2,), t))
                x0 = ((1 / a[t]) ** 0.5 * x - (1 / a[t] - 1) ** 0.5 * eps).clamp(-1, 1)
                mean = betas[t] * before[t] ** 0.5 / (1 - a[t]) * x0
                return mean + (1 - before[t]) * (1 - betas[t]) ** 0.5 / (1 - a[t]) * x + sigma[t] * z

            assert excess(got, step, sd, x, z) <= 1, t


# --- errors ---


@pytest.mark.parametrize(
    ("change", "overrides", "match"),
    [
        ({}, {}, "of no released architecture, .* give overrides var_type .* or name a preset: cifar10"),
        ({}, {"variance": "x"}, "unknown override of a Ho et al. checkpoint 'variance'; did you mean variance_type"),
        ({}, {"var_type": "large"}, "the schedule of .* is not usable: .*variance_type"),
        ({}, {"var_type": "fixedlarge", "variance_type": "fixed_small"}, "variance_type is given twice"),
        ({}, {"var_type": "fixedlarge", "block_out_channels": [32, 32]}, "block_out_channels=.* does not fit"),
        ({"extra": 0}, {"var_type": "fixedlarge"}, "1 unexpected: extra"),
        ({"down.0.block.0.conv_shortcut.weight": 0}, {"var_type": "fixedlarge"}, "has 3x3 shortcuts"),
        ({"down.0.downsample.conv.weight": None}, {"var_type": "fixedlarge"}, "resamples without convolutions"),
        ({"mid.attn_1.q.weight": None}, {"var_type": "fixedlarge"}, "mid_block.attentions.0.to_"),
        ({"up.0.block.0.norm1.weight": None}, {"var_type": "fixedlarge"}, "1 missing: up_blocks.1.resnets.0.norm1"),
        ({"down.1.block.0.conv1.weight": None}, {"var_type": "fixedlarge"}, "not a whole U-Net of Ho et al"),
    ],
)
def test_errors(change: dict[str, Any], overrides: dict[str, Any], match: str, tmp_path: Path) -> None:
    sd = weights(TINY)
    for name, value in change.items():
        if value is None:
            del sd[name]
        else:
            sd[name] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=match) as info:
        load(stored(tmp_path, sd), overrides=overrides)
    assert "\n" not in str(info.value)


def test_a_first_multiple_other_than_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="first level has 64 channels, its first convolution 32"):
        load(stored(tmp_path, weights((32, (2, 1), 1, ()))), overrides={"var_type": "fixedlarge"})


def test_unknown_preset(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"unknown preset for a Ho et al. checkpoint 'cifar'; did you mean cifar10"
    ):
        load(stored(tmp_path, weights(TINY)), preset="cifar")
