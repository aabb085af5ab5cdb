"""OpenAI's checkpoints against a restatement of their network and loops (`openai_oracle`), written from the papers."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from openai_oracle import Diffusion, Net, forward, respaced, weights
from tensors import excess

from ddpm_fast.checkpoints import Checkpoint, CheckpointError, load
from ddpm_fast.checkpoints.openai_layout import structure_of
from ddpm_fast.checkpoints.openai_presets import RELEASES, releases_of, structure_from
from ddpm_fast.inspection import describe, describe_text
from ddpm_fast.kernels.reference import sampler_step
from ddpm_fast.sampler import Sampler, to_uint8

TOLERANCE = 1e-5  # of the oracle's RMS, at the worst element

IMPROVED = Net(128, 3, (1, 2, 2, 2), (2, 4), heads=4)
GUIDED = Net(256, 2, (1, 1, 2, 2, 4, 4), (8, 16, 32), head_channels=64, updown=True, classes=1000)
# A release as its paper's appendix gives it; a width and an image size to run it at; millions of parameters.
FULL: dict[str, tuple[Net, int, int, float]] = {
    "cifar10_uncond_50M_500K": (IMPROVED, 32, 16, 52.5),
    "imagenet64_uncond_100M_1500K": (replace(IMPROVED, mults=(1, 2, 3, 4), ds=(4, 8)), 32, 16, 121.1),
    "imagenet64_cond_270M_250K": (
        replace(IMPROVED, ch=192, mults=(1, 2, 3, 4), ds=(4, 8), classes=1000),
        32,
        16,
        273.0,
    ),
    "lsun_uncond_100M_1200K_bs128": (Net(128, 2, (1, 1, 2, 2, 4, 4), (16,), scale_shift=False), 32, 64, 113.7),
    "64x64_diffusion": (
        replace(GUIDED, ch=192, blocks=3, mults=(1, 2, 3, 4), ds=(2, 4, 8), new_order=True),
        64,
        16,
        295.9,
    ),
    "128x128_diffusion": (
        replace(GUIDED, mults=(1, 1, 2, 3, 4), ds=(4, 8, 16), head_channels=-1, heads=4),
        32,
        32,
        421.5,
    ),
    "256x256_diffusion": (GUIDED, 32, 64, 553.8),
    "256x256_diffusion_uncond": (replace(GUIDED, classes=None), 32, 64, 552.8),
    "512x512_diffusion": (replace(GUIDED, mults=(0.5, 1, 1, 2, 2, 4, 4), ds=(16, 32, 64)), 64, 64, 559.0),
}
SAME_AS = {
    "cifar10_uncond_vlb_50M_500K": "cifar10_uncond_50M_500K",
    "imagenet64_uncond_vlb_100M_1500K": "imagenet64_uncond_100M_1500K",
    "lsun_uncond_100M_2400K_bs64": "lsun_uncond_100M_1200K_bs128",
    "lsun_bedroom": "256x256_diffusion_uncond",
    "lsun_cat": "256x256_diffusion_uncond",
    "lsun_horse": "256x256_diffusion_uncond",
    "lsun_horse_nodropout": "256x256_diffusion_uncond",
}
TINY = Net(32, 1, (1, 2), (2,), heads=4)
FLAGS: dict[str, Any] = {
    "num_heads": 4,
    "image_size": 8,
    "diffusion_steps": 40,
    "noise_schedule": "cosine",
    "rescale_timesteps": True,
}


def stored(tmp_path: Path, net: Net, seed: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
    path, sd = tmp_path / "ema_0.9999_000100.pt", weights(net, seed)
    torch.save(sd, path)
    return path, sd


def inputs(net: Net, size: int, n: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, net.channels, size, size, generator=g)
    t = torch.tensor([0.25, 731.5])[:n]
    return x, t, None if net.classes is None else torch.tensor([3, net.classes - 1])[:n]


@torch.no_grad()
def error(checkpoint: Checkpoint, net: Net, sd: dict[str, torch.Tensor], size: int) -> float:
    """Of the model's output, by the house rule: it is right up to 1."""
    x, t, y = inputs(net, size)
    return excess(checkpoint.model(x, t, y), lambda weights, x: forward(net, weights, x, t, y), sd, x)


# --- the released architectures ---


@pytest.mark.parametrize("name", FULL)
def test_release_at_reduced_width(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by its fingerprint alone, the release made as narrow as the file; and by its name."""
    full, ch, size, _ = FULL[name]
    net = replace(full, ch=ch)
    path, sd = stored(tmp_path, net)
    named = load(path, preset=name)
    monkeypatch.setitem(RELEASES, name, {**RELEASES[name], "num_channels": ch})
    checkpoint = load(path)
    assert (checkpoint.model.config, checkpoint.schedule) == (named.model.config, named.schedule)
    assert any(note.startswith(f"assumed, because the architecture is that of {name}: ") for note in checkpoint.notes)
    assert error(checkpoint, net, sd, size) <= 1
    assert checkpoint.family == "OpenAI" and checkpoint.model.config.sample_size == RELEASES[name]["image_size"]


@pytest.mark.parametrize("name", RELEASES)
def test_fingerprint_of_a_release(name: str) -> None:
    net, *_, millions = FULL[SAME_AS.get(name, name)]
    shapes = weights(net, meta=True)
    structure = structure_of(shapes, name)
    assert structure == structure_from(RELEASES[name])
    assert name in releases_of(structure)
    assert len({str(sorted(RELEASES[other].items())) for other in releases_of(structure)}) == 1
    assert round(sum(t.numel() for t in shapes.values()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", FULL)
def test_heads_of_a_release(name: str) -> None:
    net, flags = FULL[name][0], RELEASES[name]
    given = flags["num_heads"] if flags["num_head_channels"] == -1 else None, flags["num_head_channels"]
    assert given == (net.heads if net.head_channels == -1 else None, net.head_channels)
    assert flags["use_new_attention_order"] == net.new_order


def test_settings_follow_from_the_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose architecture is that of a release needs no preset. The release is made narrow for the test."""
    name = "cifar10_uncond_50M_500K"
    net = replace(FULL[name][0], ch=32)
    monkeypatch.setitem(RELEASES, name, {**RELEASES[name], "num_channels": 32})
    path, sd = stored(tmp_path, net)
    checkpoint = load(path)
    assert error(checkpoint, net, sd, 16) <= 1
    schedule = checkpoint.schedule
    assert (schedule.num_train_timesteps, schedule.time_scale) == (4000, 0.25)
    assert (schedule.beta_schedule, schedule.variance_type) == ("squaredcos_cap_v2", "learned_range")
    text = describe_text(describe(checkpoint))
    assert f"assumed, because the architecture is that of {name}: num_heads=4" in text
    assert "inferred from the shapes: num_channels=32, num_res_blocks=3, channel_mult='1,2,2,2'" in text
    changed = load(path, overrides={"num_head_channels": 32, "diffusion_steps": 100, "rescale_timesteps": False})
    assert error(changed, replace(net, head_channels=32), sd, 16) <= 1
    assert (changed.schedule.num_train_timesteps, changed.schedule.time_scale) == (100, 1.0)
    assert any(note.startswith("overridden: num_head_channels=32") for note in changed.notes)
    with pytest.raises(CheckpointError, match=f"'lsun_cat' is of another architecture: .* that of {name}"):
        load(path, preset="lsun_cat")


# --- other architectures ---

ODD = {
    "classes": replace(TINY, classes=5),
    "fixed_variance": replace(TINY, out=3),
    "gray": replace(TINY, channels=1, out=2),
    "no_scale_shift_updown": replace(TINY, scale_shift=False, updown=True, blocks=2),
    "one_level": Net(32, 2, (1,), (1,), heads=2),
    "no_attention_but_the_middle": replace(TINY, ds=()),
    "first_multiple": Net(32, 1, (2, 1, 3), (1, 4), heads=4, updown=True),
    "new_order": replace(TINY, new_order=True),
    "head_channels": replace(TINY, head_channels=16),
}


@pytest.mark.parametrize("name", ODD)
def test_trained_by_others(name: str, tmp_path: Path) -> None:
    net = ODD[name]
    path, sd = stored(tmp_path, net)
    flags = {**FLAGS, "num_heads": net.heads, "use_new_attention_order": net.new_order}
    flags |= {"num_head_channels": net.head_channels} if net.head_channels != -1 else {}
    assert error(load(path, overrides=flags), net, sd, 8) <= 1


@pytest.mark.parametrize(
    ("wrong", "least"),
    [
        ({"use_new_attention_order": True}, 0.5),
        ({"num_heads": 2}, 0.5),
        ({"num_heads": 1}, 0.5),
        ({"num_head_channels": 32}, 0.5),
    ],
)
def test_wrong_heads_or_order_load_but_matter(wrong: dict[str, Any], least: float, tmp_path: Path) -> None:
    path, sd = stored(tmp_path, TINY)
    assert error(load(path, overrides={**FLAGS, **wrong}), TINY, sd, 8) > least


def test_half_precision_and_wrappers(tmp_path: Path) -> None:
    path = tmp_path / "model000100.pt"
    sd = {name: t.half() for name, t in weights(TINY).items()}
    torch.save({f"module.{name}": t for name, t in sd.items()}, path)
    checkpoint = load(path, overrides=FLAGS)
    assert error(checkpoint, TINY, {name: t.float() for name, t in sd.items()}, 8) <= 1
    assert any("stored in float16" in note for note in checkpoint.notes)


# --- sampling ---

# flags, the network's output channels, steps or rule
LOOPS: dict[str, tuple[dict[str, Any], int, str]] = {
    "learned_range": ({}, 6, ""),
    "learned_range_sections": ({}, 6, "3,1,7"),
    "learned_range_linear": ({"noise_schedule": "linear", "rescale_timesteps": False}, 6, "15"),
    "fixed_large": ({"noise_schedule": "linear"}, 3, ""),
    "fixed_large_stride": ({}, 3, "ddim20"),
    "fixed_small": ({"sigma_small": True, "noise_schedule": "linear"}, 3, "13"),
    "predict_xstart": ({"predict_xstart": True}, 6, "8,8"),
    "unclipped_time": ({"diffusion_steps": 37}, 6, "10,15"),
}


@pytest.mark.parametrize("eta", [None, 0.0, 0.7])
@pytest.mark.parametrize("name", LOOPS)
def test_loop_step_by_step(name: str, eta: float | None, tmp_path: Path) -> None:
    """Every step of p_sample_loop (eta None) or ddim_sample_loop, from the same x and with the same noise."""
    changed, out, rule = LOOPS[name]
    net = replace(TINY, out=out)
    path, sd = stored(tmp_path, net)
    flags = {**FLAGS, **changed}
    checkpoint = load(path, overrides=flags)
    variance = "learned_range" if out == 6 else "fixed_small" if flags.get("sigma_small") else "fixed_large"
    theirs = Diffusion(
        "linear" if flags["noise_schedule"] == "linear" else "cosine",
        flags["diffusion_steps"],
        rule,
        flags["rescale_timesteps"],
        variance,
        flags.get("predict_xstart", False),
    )
    method: dict[str, Any] = {} if eta is None else {"method": "ddim", "eta": eta}
    sampler = Sampler(
        checkpoint.model, checkpoint.schedule, 2, steps=rule or None, noise=torch.Generator().manual_seed(5), **method
    )
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        sampler.sample(2, callback=lambda step, x: seen.append(x.clone()))
    g = torch.Generator().manual_seed(5)
    assert torch.equal(seen[0], torch.randn(2, 3, 8, 8, generator=g))
    assert len(seen) == len(theirs.kept) + 1

    def step(x: torch.Tensor, output: torch.Tensor, i: int, z: torch.Tensor) -> torch.Tensor:
        z = z.to(x.dtype)
        return theirs.p_sample(output, x, i, z) if eta is None else theirs.ddim_sample(output, x, i, z, eta)

    sd64 = {key: t.double() for key, t in sd.items()}
    rows = sampler.table.rows
    for x, got, i in zip(seen, seen[1:], reversed(range(len(theirs.kept)))):
        t = torch.full((2,), float(theirs.times[i]))
        z = torch.randn(2, 3, 8, 8, generator=g) if i else torch.zeros(2, 3, 8, 8)
        output = forward(net, sd64, x.double(), t)
        expected = step(x.double(), output, i, z)
        # where noise is nearly all of x, x0 multiplies the rounding of any float32 network
        rounding = (step(x, forward(net, sd, x, t), i, z) - expected).abs().max()
        rms = expected.square().mean().sqrt()
        assert (got - expected).abs().max() <= TOLERANCE * rms + 2 * rounding
        row = torch.tensor([len(theirs.kept) - 1 - i, 0], dtype=torch.int32)
        exact = sampler_step(x.double(), output, rows, row, row, row, variance=sampler.table.variance, noise=z.double())
        assert (exact - expected).abs().max() <= 1e-8 * rms


def test_number_of_steps_is_their_sections_rule(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, TINY)
    flags = {**FLAGS, "diffusion_steps": 1000, "rescale_timesteps": False}
    checkpoint = load(path, overrides=flags)
    sampler = Sampler(checkpoint.model, checkpoint.schedule, steps=250)
    # CHECKPOINTS, 2.4: 0, 4, 8 ... 995, 999
    assert sampler.table.timesteps[-3:] == (8, 4, 0) and sampler.table.timesteps[:2] == (999, 995)
    # linspace rounds the exact halves of 23 steps to even; their sum of strides does not meet the halves exactly
    assert Sampler(checkpoint.model, checkpoint.schedule, steps=23).table.timesteps == tuple(respaced(1000, "23")[::-1])
    shorter = load(path, overrides={**flags, "timestep_respacing": 250}).schedule
    assert Sampler(checkpoint.model, shorter).table.timesteps == sampler.table.timesteps
    stride = load(path, overrides={**flags, "timestep_respacing": "ddim25"}).schedule
    assert Sampler(checkpoint.model, stride, method="ddim").table.timesteps == tuple(range(960, -1, -40))


@pytest.mark.parametrize("method", [{}, {"method": "ddim"}, {"method": "ddim", "eta": 0.5}])
def test_the_stream_has_a_normal_for_every_step(method: dict[str, Any], tmp_path: Path) -> None:
    """CHECKPOINTS, 2.4: at t = 0 too, and for DDIM at eta 0, where it is multiplied by zero. So a second batch is
    theirs as well."""
    path, _ = stored(tmp_path, TINY)
    checkpoint = load(path, overrides={**FLAGS, "timestep_respacing": "4"})
    generator = torch.Generator().manual_seed(5)
    Sampler(checkpoint.model, checkpoint.schedule, 2, noise=generator, **method).sample(2)
    after = torch.Generator().manual_seed(5)
    for _ in range(1 + 4):
        torch.randn(2, 3, 8, 8, generator=after)
    assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=after))


def test_truncation_to_uint8() -> None:
    x = torch.tensor([-1.2, -1.0, -0.9961, 0.0, 0.999, 1.0, 7.0]).view(1, 7, 1, 1)
    expected = [0, 0, 0, 127, 254, 255, 255]  # ((x + 1) * 127.5) without its fraction
    assert to_uint8(x, truncate=True).flatten().tolist() == expected
    assert to_uint8(x).flatten().tolist() == [0, 0, 0, 128, 255, 255, 255]


# --- errors: one line each ---


def refused(path: Path, match: str, **kwargs: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as info:
        load(path, **kwargs)
    assert "\n" not in str(info.value)


def test_unknown_architecture_names_what_is_needed(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, TINY)
    needed = re.escape("num_heads (or num_head_channels), diffusion_steps, noise_schedule, rescale_timesteps")
    refused(path, f"do not tell {needed}: give them as overrides .* or name a preset: improved-diffusion, guided-")
    refused(path, "do not tell noise_schedule:", overrides={k: v for k, v in FLAGS.items() if k != "noise_schedule"})
    checkpoint = load(path, overrides={k: v for k, v in FLAGS.items() if k != "image_size"})
    assert any("could not be known: image_size" in note for note in checkpoint.notes)
    assert any("assumed, as by the code bases' defaults: num_head_channels=-1, use_new" in n for n in checkpoint.notes)


def test_defaults_of_the_code_bases_differ(tmp_path: Path) -> None:
    path, sd = stored(tmp_path, TINY)
    improved = load(path, preset="improved-diffusion", overrides={"diffusion_steps": 4000, "num_heads": 2})
    guided = load(path, preset="guided-diffusion")
    assert (improved.schedule.time_scale, guided.schedule.time_scale) == (0.25, 1.0)
    assert error(guided, TINY, sd, 8) <= 1  # four heads
    assert error(improved, replace(TINY, heads=2), sd, 8) <= 1


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"num_head": 4}, "unknown override of an OpenAI checkpoint 'num_head'; did you mean num_heads"),
        ({"norm_eps": 1e-6}, "unknown override of an OpenAI checkpoint 'norm_eps'"),
        ({"num_heads": 3}, "num_heads=3 does not divide the 64 channels of an attention"),
        ({"num_heads": 0}, "num_heads=0 does not divide"),
        ({"num_head_channels": 24}, "num_head_channels=24 does not divide the 64 channels"),
        ({"num_heads_upsample": 2}, "num_heads_upsample=2 other than num_heads=4 is not supported"),
        ({"num_heads": "four"}, "override num_heads must be a whole number; got 'four'"),
        ({"rescale_timesteps": 1}, "override rescale_timesteps must be true or false; got 1"),
        ({"diffusion_steps": True}, "override diffusion_steps must be a whole number; got True"),
        ({"diffusion_steps": 0}, "diffusion_steps must be in 1..1,000,000; got 0"),
        ({"noise_schedule": "sqrt"}, "noise_schedule must be linear or cosine; got 'sqrt'"),
        ({"timestep_respacing": "many"}, "the schedule of .* is not usable: .*got 'many'"),
        ({"learn_sigma": False}, "override learn_sigma=False does not fit .*, which has True"),
        ({"class_cond": True}, "override class_cond=True does not fit .*, which has False"),
        ({"resblock_updown": True}, "override resblock_updown=True does not fit"),
        ({"use_scale_shift_norm": False}, "override use_scale_shift_norm=False does not fit"),
        ({"num_channels": 64}, "override num_channels=64 does not fit .*, which has 32"),
        ({"num_res_blocks": 2}, "override num_res_blocks=2 does not fit .*, which has 1"),
        ({"channel_mult": "1,2,4"}, "override channel_mult='1,2,4' does not fit .*, which has '1,2'"),
        ({"channel_mult": "1,x"}, "override channel_mult must be numbers with commas between; got '1,x'"),
        ({"attention_resolutions": "8,4"}, "attention_resolutions='8,4' does not fit .*, which has '4'"),
    ],
)
def test_wrong_flags(overrides: dict[str, Any], match: str, tmp_path: Path) -> None:
    path, _ = stored(tmp_path, TINY)
    refused(path, match, overrides={**FLAGS, **overrides})


def test_right_flags_of_the_architecture_are_taken(tmp_path: Path) -> None:
    path, sd = stored(tmp_path, TINY)
    assert error(load(path, overrides={**FLAGS, "channel_mult": ""}), TINY, sd, 8) <= 1  # their default
    true = {"num_channels": 32, "channel_mult": "1,2", "attention_resolutions": 4, "learn_sigma": True, "dropout": 0.1}
    checkpoint = load(path, overrides={**FLAGS, **true, "class_cond": False, "use_fp16": True})
    assert error(checkpoint, TINY, sd, 8) <= 1
    assert any("of no effect on sampling: dropout, use_fp16" in note for note in checkpoint.notes)


def test_wrong_preset(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, TINY)
    refused(path, "unknown preset for an OpenAI checkpoint '64x64'; did you mean 64x64_diffusion", preset="64x64")


def rearranged(change: Any) -> Any:
    def make(tmp_path: Path, net: Net = TINY) -> Path:
        path, sd = stored(tmp_path, net)
        torch.save(change(sd), path)
        return path

    return make


def without(*prefixes: str) -> Any:
    return lambda sd: {name: t for name, t in sd.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without("output_blocks."), "a guided-diffusion classifier"),
        (without("output_blocks.3."), r"has 3 output_blocks, but 2 levels of 1 residual blocks make 4"),
        (without("output_blocks.0."), "output_blocks.0 lacks parts or weights"),
        (without("input_blocks.3.1"), "output_blocks.0 is made of res\\+attention, where its level needs res"),
        (without("output_blocks.1.1"), "output_blocks.1 lacks parts"),
        (without("out.2"), "is not a whole OpenAI U-Net: it has no 'out.2.weight'"),
        (lambda sd: {**sd, "time_embed.0.weight": torch.zeros(3)}, "blocks are missing, or weights have too few axes"),
        (without("middle_block.1"), "missing: mid_block.attentions.0"),
        (without("input_blocks.1.0.in_layers.0"), "2 missing: down_blocks.0.resnets.0.norm1.weight"),
        (lambda sd: {**sd, "extra.weight": torch.zeros(3)}, "1 unexpected: extra.weight"),
        (lambda sd: {**sd, "out.2.bias": torch.full((6,), torch.nan)}, "holds 6 NaN or infinite"),
        (lambda sd: {**sd, "input_blocks.3.1.qkv.weight": torch.zeros(100, 64, 1)}, "mis-shaped: down_blocks.1.att"),
        (lambda sd: {**sd, "middle_block.1.qkv.weight": torch.zeros(1).expand(3 << 30, 64, 1)}, "claim .* bytes"),
        (lambda sd: {"state": {}, "param_groups": []}, "is an optimizer's state, not a model"),
    ],
)
def test_damaged_or_foreign(change: Any, match: str, tmp_path: Path) -> None:
    refused(rearranged(change)(tmp_path), match, overrides=FLAGS)


def test_upsamplers_are_refused(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, replace(TINY, channels=6))
    refused(path, "takes 6 channels and gives 6: a super-resolution model", overrides=FLAGS)
