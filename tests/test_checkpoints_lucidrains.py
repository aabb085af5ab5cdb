"""lucidrains' checkpoints against a restatement of their networks and loops (`lucidrains_oracle`), and against the
package itself where it is installed."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_stand_in import StandIn
from lucidrains_oracle import Diffusion, Net, betas, forward, trainer_file, weights
from tensors import SHAKES, excess, same_chain, shake
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ddpm_fast import cli, graphs
from ddpm_fast.checkpoints import Checkpoint, CheckpointError, convert, identify, load, save
from ddpm_fast.checkpoints.layout import Layout
from ddpm_fast.checkpoints.lucidrains_unet import LucidrainsUnet
from ddpm_fast.engine import CallableProgram
from ddpm_fast.graphs import GraphCache
from ddpm_fast.house_rule import FLOOR, check
from ddpm_fast.inspection import describe, describe_text
from ddpm_fast.ops import reference
from ddpm_fast.roofline import Roofs
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table
from ddpm_fast.verification import verify

SIZE = 8
STATED = {"objective": "pred_noise", "timesteps": 20, "beta_schedule": "linear"}

OLD = Net(nested=True, memory=0, groups=8)
# What each preset's version is, by the table of versions: how the oracle computes it.
NETS: dict[str, Net] = {
    "2.3.4": Net(),
    "2.0.0": Net(mults=(1, 2, 3), full=(True, False, True), heads=(2, 3, 1), dim_head=(8, 4, 16)),
    "1.9.0": Net(groups=8, self_condition=True, full=(False, False)),
    "1.8.0": Net(groups=8, memory=0),
    "1.7.4": OLD,
    "1.7.3": replace(OLD, over_pixels=True),
    "1.7.2": replace(OLD, over_pixels=True, standardise="clamped"),
    "1.7.0": replace(OLD, over_pixels=True, standardise="added", layer_norm=True, self_condition=True),
    "0.1.0": replace(OLD, over_pixels=True, standardise="added", layer_norm=True, mults=(2,)),
    "0.32.0": replace(OLD, over_pixels=True, standardise="added", layer_norm=True),
    "0.28.0": replace(OLD, over_pixels=True, standardise="added", layer_norm=True, strided=True),
    "0.27.4": replace(OLD, over_pixels=True, standardise="added", layer_norm=True, strided=True, cosine=10.0),
    "0.26.4": replace(OLD, over_pixels=True, layer_norm=True, strided=True, cosine=16.0),
    "0.26.0": replace(OLD, layer_norm=True, strided=True, cosine=16.0),
    "0.25.0": replace(OLD, layer_norm=True, strided=True),
}
# The versions on either side of each change, whose files look alike.
ALIKE = [
    ("1.7.4", "1.7.3"),
    ("1.7.3", "1.7.2"),
    ("1.7.2", "1.7.0"),
    ("1.7.0", "1.7.1"),
    ("0.32.0", "1.7.4"),
    ("0.28.0", "0.27.4"),
    ("0.27.4", "0.26.4"),
    ("0.26.4", "0.26.0"),
    ("0.26.0", "0.25.0"),
]


def stored(tmp_path: Path, content: Any, name: str = "model-1.pt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def inputs(net: Net, n: int = 2) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(1)
    shape = (n, net.channels, SIZE, SIZE)
    x, before = torch.randn(shape, generator=g), torch.rand(shape, generator=g) * 2 - 1
    return x, torch.tensor([3, 731][:n]), before if net.self_condition else None


@torch.no_grad()
def error(model: Any, net: Net, sd: dict[str, Tensor]) -> float:
    """Of the model's output, by the house rule of float32: it is right up to 1."""
    x, t, before = inputs(net)
    got = model(x, t, before) if net.self_condition else model(x, t)
    return excess(got, lambda sd, x, before: forward(net, sd, x, t, before), sd, x, before)


# --- the network, by version ---


@pytest.mark.parametrize("version", NETS)
def test_network_of_a_version(version: str, tmp_path: Path) -> None:
    net = NETS[version]
    sd = weights(net)
    checkpoint = load(stored(tmp_path, sd), preset=version)
    assert error(checkpoint.model, net, sd) <= 1
    assert error(checkpoint.model.for_sampling(torch.float32, "cpu"), net, sd) <= 1
    assert checkpoint.family == "lucidrains" and not checkpoint.model.training
    if not net.nested:  # the names are the file's
        assert set(checkpoint.model.state_dict()) == set(sd)


@pytest.mark.parametrize(("version", "other"), ALIKE)
def test_another_version_loads_but_matters(version: str, other: str, tmp_path: Path) -> None:
    net = NETS[version]
    sd = weights(net)
    assert error(load(stored(tmp_path, sd), preset=other).model, net, sd) > 100


@pytest.mark.parametrize(
    ("net", "settings"),
    [
        (Net(channels=1, out=2), {"learned_variance": True}),
        (Net(init_dim=12, mults=(1, 1, 3)), {"dim_mults": [1, 1, 3]}),
        (Net(features=6), {"learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 6}),
        (Net(theta=100), {"sinusoidal_pos_emb_theta": 100}),
        (replace(NETS["1.8.0"], heads=(8, 8), dim_head=(16, 16)), {"attn_heads": 8}),
        (replace(NETS["1.8.0"], heads=(2, 2), dim_head=(8, 8)), {"attn_dim_head": 8}),
        (replace(NETS["1.9.0"], groups=4), {"resnet_block_groups": 4, "self_condition": True}),
    ],
    ids=["learned_gray", "init_dim", "frequencies", "theta", "heads", "dim_head", "groups"],
)
def test_arguments(net: Net, settings: dict[str, Any], tmp_path: Path) -> None:
    sd = weights(net)
    checkpoint = load(stored(tmp_path, sd), overrides={**STATED, **settings})
    assert error(checkpoint.model, net, sd) <= 1


def test_shapes_tell_the_configuration(tmp_path: Path) -> None:
    net = replace(NETS["2.0.0"], init_dim=12, self_condition=True, channels=2)
    config = load(stored(tmp_path, weights(net)), overrides={**STATED, "image_size": [8, 12]}).model.config
    assert (config.dim, config.init_dim, config.dim_mults, config.channels, config.out_dim) == (8, 12, (1, 2, 3), 2, 2)
    assert (config.full_attn, config.attn_heads, config.attn_dim_head) == (net.full, net.heads, net.dim_head)
    assert config.self_condition and not config.learned_variance and config.num_mem_kv == 4
    assert config.image_size == (8, 12)


def test_half_precision_keeps_the_house_rule(tmp_path: Path) -> None:
    net = NETS["1.7.0"]
    sd = weights(net)
    model = load(stored(tmp_path, sd), preset="1.7.0").model
    plain = error(lambda x, t, c: model.bfloat16()(x, t, c), net, sd)
    ours = error(load(tmp_path / "model-1.pt", preset="1.7.0").model.for_sampling(torch.bfloat16, "cpu"), net, sd)
    assert 1 < ours <= 2 * plain


# --- files ---


def test_a_trainer_s_file(tmp_path: Path) -> None:
    """The averaged network, the model's own buffers, the version on record."""
    net = NETS["1.7.2"]
    diffusion = Diffusion(betas("cosine", 40), "pred_v")
    path = stored(tmp_path, trainer_file(net, diffusion, version="1.7.2"))
    checkpoint = load(path, overrides={"image_size": SIZE})
    assert error(checkpoint.model, net, weights(net)) <= 1
    assert torch.allclose(checkpoint.schedule.betas, betas("cosine", 40), rtol=1e-9, atol=0)
    schedule = checkpoint.schedule
    assert (schedule.num_train_timesteps, schedule.prediction_type) == (40, "v_prediction")
    assert (schedule.variance_type, schedule.clip_sample) == ("fixed_small", True)
    text = describe_text(describe(checkpoint))
    for part in (
        "8 x 8, 3 channels",
        "of the 2 networks in the file (model, ema.ema_model) the averaged one, ema.ema_model, is used; weights=NAME",
        "left out: ema.initted, ema.step, step, opt, scaler, version",
        "by version 1.7.2: channel_norm='rms', standardised='clamped', values_over_pixels=True, cosine_scale=None",
        "inferred from the buffers: timesteps=40, beta_schedule=cosine",
        "inferred from loss_weight: objective=pred_v",
        "inferred from the shapes: dim=8, init_dim=8, dim_mults=[1, 2], channels=3",
        "resnet_block_groups=8, sinusoidal_pos_emb_theta=10000",
        "attn_heads=4, attn_dim_head=32",
        "assumed: auto_normalize=True",
        "GFLOP an image and step",
    ):
        assert part in text, part
    with pytest.raises(CheckpointError, match=r"preset '2\.0\.0' does not fit"):
        load(path, preset="2.0.0")


def test_the_recorded_version(tmp_path: Path) -> None:
    """Old networks need it, newer ones may have a fork's."""
    diffusion = Diffusion(betas("sigmoid", 20), "pred_v")
    for text in ("2.3.4", "0.0.9", "main"):
        assert load(stored(tmp_path, trainer_file(Net(), diffusion, version=text))).model.config.num_mem_kv == 4
    path = stored(tmp_path, trainer_file(NETS["1.7.4"], diffusion, version="2.0.0"))
    with pytest.raises(
        CheckpointError, match=r"the version 2\.0\.0 that the file records does not fit .*--weights-preset VERSION"
    ):
        load(path)
    checkpoint = load(path, preset="1.7.4")
    assert error(checkpoint.model, NETS["1.7.4"], weights(NETS["1.7.4"])) <= 1
    assert any("the file records version 2.0.0; the preset's is used" in note for note in checkpoint.notes)


@pytest.mark.parametrize("prefix", ["", "model.", "denoise_fn.", "module.model.", "ema_model.model.", "unet."])
def test_wrappers_of_a_state_dict(prefix: str, tmp_path: Path) -> None:
    net = Net()
    content = {prefix + name: t.half() for name, t in weights(net).items()}
    checkpoint = load(stored(tmp_path, content), overrides=STATED)
    assert error(checkpoint.model, net, {name: t.half().float() for name, t in weights(net).items()}) <= 1
    assert any("stored in float16" in note for note in checkpoint.notes)


def test_before_the_wrapper_of_averages(tmp_path: Path) -> None:
    """Before 0.21 the average was a GaussianDiffusion itself, and the network in it denoise_fn."""
    net = NETS["0.25.0"]
    buffers = Diffusion(betas("linear", 30), "pred_noise").buffers
    own, averaged = ({f"denoise_fn.{k}": t for k, t in weights(net, seed).items()} | buffers for seed in (1, 0))
    path = stored(tmp_path, {"step": 1, "model": own, "ema": averaged})
    assert error(load(path, preset="0.25.0").model, net, weights(net)) <= 1


def test_a_file_without_averages_says_so(tmp_path: Path) -> None:
    net = Net()
    content = {**trainer_file(net, Diffusion(betas("sigmoid", 20), "pred_v"), seed=-1), "ema": None}
    checkpoint = load(stored(tmp_path, content))
    assert error(checkpoint.model, net, weights(net, 0)) <= 1
    assert any("no averaged" in note for note in checkpoint.notes)


# --- what the buffers tell ---


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("total", [1000, 37])
def test_named_schedules(name: str, total: int, tmp_path: Path) -> None:
    expected = betas(name, total)
    stated = load(stored(tmp_path, weights(Net())), overrides={**STATED, "timesteps": total, "beta_schedule": name})
    assert torch.allclose(stated.schedule.betas, expected, rtol=1e-9, atol=0)
    content = {f"model.{k}": t for k, t in weights(Net()).items()} | Diffusion(expected, "pred_v").buffers
    told = load(stored(tmp_path, content))
    assert torch.equal(told.schedule.betas, stated.schedule.betas)
    assert any(f"timesteps={total}, beta_schedule={name}" in note for note in told.notes)


def test_betas_of_no_name(tmp_path: Path) -> None:
    """Near beta = 1 a float32 beta says little of 1 - beta; the products that sampling needs are right all the same."""
    own = torch.linspace(0.001, 0.99999, 20, dtype=torch.float64) ** 2
    content = {f"model.{k}": t for k, t in weights(Net()).items()} | Diffusion(own, "pred_x0").buffers
    checkpoint = load(stored(tmp_path, content))
    assert torch.allclose(checkpoint.schedule.alphas_cumprod, torch.cumprod(1 - own, 0), rtol=1e-6, atol=0)
    assert any("beta_schedule=none of the package's own" in note for note in checkpoint.notes)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("name", ["linear", "sigmoid"])
def test_objective_by_the_weights_of_the_loss(objective: str, gamma: float | None, name: str, tmp_path: Path) -> None:
    buffers = Diffusion(betas(name, 1000), objective, gamma).buffers
    content = {f"model.{k}": t for k, t in weights(Net()).items()} | buffers
    words = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
    assert load(stored(tmp_path, content)).schedule.prediction_type == words[objective]


def test_an_objective_that_is_not_told_is_not_guessed(tmp_path: Path) -> None:
    net = NETS["1.7.0"]
    content = trainer_file(net, Diffusion(betas("cosine", 20), "pred_noise"), version="1.4.0")
    for part in (content["model"], content["ema"]):
        for name in [name for name in part if name.endswith("loss_weight")]:
            part[name.replace("loss_weight", "p2_loss_weight")] = torch.ones_like(part.pop(name))
    path = stored(tmp_path, content)
    with pytest.raises(CheckpointError, match="its buffers do not tell the objective: give objective"):
        load(path)
    assert load(path, overrides={"objective": "pred_x0"}).schedule.prediction_type == "sample"
    by_preset = load(path, preset="1.4.0")
    assert by_preset.schedule.prediction_type == "epsilon"
    assert any("by the defaults of denoising-diffusion-pytorch 1.4.0" in note for note in by_preset.notes)


# --- sampling ---

LOOPS: dict[str, tuple[Net, str, int | None, float]] = {
    "noise": (Net(), "pred_noise", None, 0.0),
    "x0_gray": (Net(channels=1), "pred_x0", None, 0.0),
    "v": (Net(), "pred_v", None, 0.0),
    "self_condition": (Net(self_condition=True), "pred_v", None, 0.0),
    "self_condition_1.7.0": (NETS["1.7.0"], "pred_v", None, 0.0),
    "learned": (Net(channels=2, out=4), "pred_noise", None, 0.0),
    "ddim_noise": (Net(), "pred_noise", 7, 0.0),
    "ddim_early": (Net(), "pred_noise", 7, 0.2),
    "ddim_v_eta": (Net(), "pred_v", 11, 0.6),
    "ddim_self_condition": (Net(self_condition=True), "pred_x0", 6, 1.0),
}


def trained(tmp_path: Path) -> Checkpoint:
    """Of a self-conditioned network."""
    content = trainer_file(Net(self_condition=True), Diffusion(betas("sigmoid", 8), "pred_v"), gain=0.4)
    return load(stored(tmp_path, content), overrides={"image_size": SIZE})


def chain(name: str, tmp_path: Path, shaken: bool = False) -> tuple[Checkpoint, list[Tensor], int | None, float]:
    """A checkpoint, and x_T and x after each step of the oracle's loop for it, by torch's generator of seed 5."""
    net, objective, steps, eta = LOOPS[name]
    learned = net.out == 2 * net.channels
    diffusion = Diffusion(betas("sigmoid", 25), objective, learned=learned)
    kwargs = {"gain": 0.4}  # so that the chain is not chaotic
    path = stored(tmp_path, trainer_file(net, diffusion, version="1.7.0", **kwargs))
    sd = {name: value.double() for name, value in weights(net, **kwargs).items()}
    g, shape = torch.Generator().manual_seed(5), (2, net.channels, SIZE, SIZE)
    signs = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(shape, generator=g)

    def network(x: Tensor, t: Tensor, before: Tensor | None) -> Tensor:
        out = forward(net, sd, x.double(), t, None if before is None else before.double())
        return (shake(out, signs) if shaken else out).float()

    early = name == "ddim_early"
    if steps is None:
        loop = diffusion.ddpm(network, shape, draw)
    else:
        loop = diffusion.ddim(network, shape, draw, steps, eta, rederive=not early)
    overrides = {"image_size": SIZE} | ({"learned_variance": True} if learned else {})
    overrides |= {"rederive_pred_noise": False} if early else {}
    return load(path, None if net.nested else "2.3.4", overrides), list(loop), steps, eta


@pytest.mark.parametrize("name", LOOPS)
def test_loop_step_by_step(name: str, tmp_path: Path) -> None:
    """To the rounding that the chain has made of each output's by then; a later step makes up for none."""
    checkpoint, expected, steps, eta = chain(name, tmp_path)
    moved = chain(name, tmp_path, shaken=True)[1]
    sampler = Sampler(
        checkpoint.model,
        checkpoint.schedule,
        batch_size=2,
        steps=steps,
        method="ddpm" if steps is None else "ddim",
        eta=eta,
        noise=torch.Generator().manual_seed(5),
        ops="reference",
    )
    seen: list[Tensor] = []
    sampler.sample(2, callback=lambda i, x: seen.append(x.clone()))
    assert len(seen) == len(expected)
    assert torch.equal(seen[0], expected[0])
    for i, (got, true, other) in enumerate(zip(seen, expected, moved)):
        bound = SHAKES * (other - true).abs().max() + FLOOR * true.abs().max()
        assert (got - true).abs().max() <= bound < 1e-3, i


def test_a_short_chain_is_their_s() -> None:
    schedule = Schedule(num_train_timesteps=1000, timestep_spacing="truncated")
    assert schedule.timesteps(3) == [999, 665, 332]
    assert schedule.timesteps(250) == list(range(999, 0, -4))
    assert schedule.timesteps(1000) == list(range(999, -1, -1))
    for steps in (7, 30, 300, 999):
        spaced = torch.linspace(-1, 999, steps + 1).tolist()
        assert schedule.timesteps(steps) == [int(t) for t in spaced[:0:-1]]


def test_self_conditioning_begins_anew(tmp_path: Path) -> None:
    checkpoint = trained(tmp_path)
    sampler = Sampler(checkpoint.model, checkpoint.schedule, batch_size=2)
    first = sampler.sample(2, seed=1)
    sampler.sample(2, seed=2)
    assert torch.equal(sampler.sample(2, seed=1), first)
    without = Sampler(_Unconditioned(checkpoint.model), checkpoint.schedule, 2, image_shape=(3, SIZE, SIZE))
    assert not torch.allclose(first, without.sample(2, seed=1), atol=0.01)
    with pytest.raises(ValueError, match=r"self_condition is called .* it takes no labels"):
        sampler.sample(2, labels=1)


class _Unconditioned(torch.nn.Module):
    """The network as one would call it who forgets the third input."""

    def __init__(self, model: LucidrainsUnet):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model(x, t)


@pytest.mark.parametrize("form", ["step", "chunk", "loop"])
def test_self_conditioning_is_captured(form: str, tmp_path: Path) -> None:
    """What a graph records is right for every step: the x_0 of the step before lies in a static buffer."""
    checkpoint = trained(tmp_path)
    model = checkpoint.model.for_sampling(torch.float32, "cpu")
    program = CallableProgram(model, step_table(checkpoint.schedule), 2, (3, SIZE, SIZE), "cpu", reference())
    assert program.x0 is not None
    program.begin(3)
    for _ in range(program.steps):
        program.step()
    expected = program.x.clone()
    backend = StandIn(written=lambda: [program.x, program.counter, program.x0])
    runner = graphs.runner(program, form, backend=backend, cache=GraphCache())
    assert runner.kind == form
    program.begin(3)
    runner.advance(program.steps)
    assert torch.equal(program.x, expected)


# --- commands ---


def test_verify_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = trained(tmp_path)
    report = verify(checkpoint, dtype=torch.bfloat16, n=1, steps=4, probes=4)
    assert report.ok and report.probes[1].output.ours.largest > 1e-3
    right = LucidrainsUnet.for_sampling

    def wrong(model: LucidrainsUnet, dtype: torch.dtype, device: torch.device) -> LucidrainsUnet:
        copy = right(model, dtype, device)
        copy.mid_attn.norm.g.mul_(1.01)
        return copy

    monkeypatch.setattr(LucidrainsUnet, "for_sampling", wrong)
    assert not verify(checkpoint, n=1, steps=3).ok


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    net = Net(self_condition=True)
    path = stored(tmp_path, trainer_file(net, Diffusion(betas("sigmoid", 5), "pred_v"), gain=0.4))
    monkeypatch.chdir(tmp_path)
    made_up = Roofs("made up", "float32", 1, torch.__version__, 4e6, 2e6, 8e6)
    monkeypatch.setattr("ddpm_fast.roofline.roofs", lambda device, dtype, refresh=False: made_up)

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["ddpm-fast", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out if not stop.value.code else err

    size = "--set", "image_size=8"
    code, text = run("inspect", path, *size)
    assert code == 0 and "level 1" in text and "linear attention" in text and "self_condition=True" in text
    assert run("sample", path, *size, "-n", 2, "--device", "cpu", "--out", "two.png")[0] == 0
    for words, message in (
        (("sample", path, "-n", 1, "--device", "cpu"), "--set image_size=N"),
        (("plan", path, *size), "plan prices the launches of our own U-Net"),
        (("plan", path), "ddpm-fast profile times it"),
        (("profile", path, "--device", "cpu"), "--set image_size=N"),
        (("convert", path, "out"), "is a lucidrains network, which diffusers has not"),
        (("convert", path, "out.pt", "--to", "openai"), "is a lucidrains network, which openai has not"),
        (("bench", path, *size, "--device", "cpu", "--dtype", "float32"), "is a lucidrains network, which is none"),
        (("inspect", path, "--weights-preset", "latest"), "the version of denoising-diffusion-pytorch that trained it"),
    ):
        code, text = run(*words)
        assert code == 2 and message in text and text.count("\n") == 1


def test_profile_prices_the_network_as_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its FLOPs are those that torch counts in the oracle; its bytes weights, x, the x_0 of before, and the output."""
    net, batch = Net(self_condition=True), 3
    path = stored(tmp_path, trainer_file(net, Diffusion(betas("sigmoid", 5), "pred_v"), gain=0.4))
    made_up = Roofs("made up", "float32", 1, torch.__version__, 4e6, 2e6, 8e6)
    monkeypatch.setattr("ddpm_fast.roofline.roofs", lambda device, dtype, refresh: made_up)
    words = [
        "--set",
        "image_size=8",
        "--batch-size",
        batch,
        "--steps",
        2,
        "--device",
        "cpu",
        "--out",
        tmp_path / "p.json",
    ]
    monkeypatch.setattr(sys, "argv", ["ddpm-fast", "profile", *map(str, (path, *words))])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = capsys.readouterr().out
    assert not stop.value.code and "note          LucidrainsUnet is a network of another code base" in text
    rows = {row["operation"]: row for row in json.loads((tmp_path / "p.json").read_text())["rows"]}
    x, before = torch.zeros(batch, net.channels, SIZE, SIZE), torch.zeros(batch, net.channels, SIZE, SIZE)
    sd = weights(net)
    with FlopCounterMode(display=False) as counter:
        forward(net, sd, x, torch.zeros(batch, dtype=torch.int64), before)
    assert set(rows) == {"model", "sampler_step"} and rows["model"]["calls"] == 1
    assert rows["model"]["flops"] == counter.get_total_flops() > 1e6
    assert rows["model"]["bytes"] == 4 * (sum(p.numel() for p in sd.values()) + 3 * x.numel())


def test_it_has_no_other_layout(tmp_path: Path) -> None:
    checkpoint = load(stored(tmp_path, weights(Net())), preset="2.0.0")
    with pytest.raises(CheckpointError, match="diffusers has no such network as lucidrains"):
        save(tmp_path / "out", checkpoint.model, checkpoint.schedule)
    with pytest.raises(CheckpointError, match="lucidrains network, which diffusers has not"):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- refusals ---

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(part: str) -> Change:
    return lambda sd: {name: t for name, t in sd.items() if part not in name}


def prefixed(prefix: str, **more: Tensor) -> Change:
    return lambda sd: {prefix + name: t for name, t in sd.items()} | more


REFUSED: dict[str, tuple[Net, Change, dict[str, Any], str]] = {
    "no_version": (
        OLD,
        dict,
        {"overrides": STATED},
        "differ in their arithmetic without a trace .* --weights-preset 1.7.1",
    ),
    "strided": (NETS["0.28.0"], dict, {"overrides": STATED}, "0.22.0 to before 0.32.0; .* --weights-preset 0.28.0"),
    "no_diffusion": (
        Net(),
        dict,
        {},
        "no buffers of a GaussianDiffusion: give objective .* timesteps .*--weights-preset 2.0.0",
    ),
    "not_enough": (Net(), dict, {"overrides": {"objective": "pred_v"}}, "give objective"),
    "too_new": (OLD, dict, {"preset": "2.0.0"}, "'2.0.0' does not fit .* as in 0.32.0 to before 1.8.0"),
    "too_old": (Net(), dict, {"preset": "1.9.0"}, "does not fit .* as in 2.0.0 or later"),
    "not_a_version": (Net(), dict, {"preset": "google"}, "a preset for a lucidrains checkpoint is the version"),
    "unknown": (Net(), dict, {"overrides": {"objectives": "pred_v"}}, "did you mean objective?"),
    "dim": (Net(), dict, {"overrides": {**STATED, "dim": 64}}, "dim=64 does not fit .*, which has 8"),
    "mults": (Net(), dict, {"overrides": {**STATED, "dim_mults": [1, 2, 4]}}, r"does not fit .*, which has \[1, 2\]"),
    "attn": (Net(), dict, {"overrides": {**STATED, "attn_heads": 8}}, r"attn_heads=8 does not fit .* \[4, 4\]"),
    "heads": (replace(NETS["1.8.0"], heads=(2, 2)), dict, {"overrides": STATED}, "do not tell the heads: give attn_h"),
    "groups": (NETS["1.8.0"], dict, {"overrides": {**STATED, "resnet_block_groups": 3}}, "=3 does not divide 8"),
    "flag": (Net(), dict, {"overrides": {**STATED, "rederive_pred_noise": 1}}, "must be true or false; got 1"),
    "size": (Net(), dict, {"overrides": {**STATED, "image_size": 9}}, "image_size must be divisible by 2"),
    "objective": (Net(), dict, {"overrides": {**STATED, "objective": "eps"}}, "objective must be one of pred_noise"),
    "schedule": (Net(), dict, {"overrides": {**STATED, "beta_schedule": "quad"}}, "must be one of linear, cosine"),
    "steps": (Net(), dict, {"overrides": {**STATED, "timesteps": 0}}, "timesteps must be in 1"),
    "half": (Net(), without("ups."), {"overrides": STATED}, "a lucidrains checkpoint, but not of a whole U-Net"),
    "part": (Net(), without("mid_attn.to_qkv"), {"overrides": STATED}, "1 missing: mid_attn.to_qkv.weight"),
    "classes": (Net(), lambda sd: {**sd, "classes_emb.weight": torch.ones(3, 8)}, {}, "class-conditional network"),
    "sequence": (Net(), lambda sd: {**sd, "init_conv.weight": torch.ones(8, 3, 7)}, {}, "a 1-D .sequence. network"),
    "video": (Net(), lambda sd: {**sd, "init_conv.weight": torch.ones(8, 3, 1, 7, 7)}, {}, "a 3-D .video. network"),
    "elucidated": (Net(features=6), prefixed("net."), {}, "an ElucidatedDiffusion, whose noise levels are continuous"),
    "continuous": (Net(features=6), prefixed("model."), {"overrides": STATED}, "continuous time, without betas"),
    "mish": (Net(), lambda sd: {**sd, "downs.0.0.block1.block.0.weight": sd["init_conv.weight"]}, {}, "before 0.22.0"),
    "weighted": (Net(out=8), dict, {"overrides": STATED}, "of a WeightedObjectiveGaussianDiffusion, whose network"),
    "out": (Net(out=5), dict, {"overrides": STATED}, "3 channels in and 5 out"),
    "elucidated_in_a_trainer": (
        Net(features=6),
        lambda sd: {"step": torch.tensor(1), **prefixed("model.net.")(sd), **prefixed("ema.ema_model.net.")(sd)},
        {},
        "an ElucidatedDiffusion, whose noise levels are continuous",
    ),
    "continuous_alone": (Net(features=6), dict, {}, "ElucidatedDiffusion and the continuous-time classes .* need one"),
    "continuous_by_preset": (Net(features=6), dict, {"preset": "2.0.0"}, "the continuous-time classes of the package"),
    "nan": (Net(), lambda sd: {**sd, "init_conv.bias": torch.full((8,), torch.nan)}, {"overrides": STATED}, "NaN"),
    "betas": (
        Net(),
        prefixed("model.", betas=torch.full((9,), 2.0), loss_weight=torch.ones(9)),
        {"overrides": {"objective": "pred_v"}},
        "the schedule of .* is not usable",
    ),
    "other_betas": (
        Net(),
        prefixed("model.", betas=betas("linear", 40).float()),
        {"overrides": {"objective": "pred_v", "beta_schedule": "cosine"}},
        "beta_schedule='cosine' does not fit .* beta_schedule=linear",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, tmp_path: Path) -> None:
    net, change, arguments, message = REFUSED[name]
    path = stored(tmp_path, dict(change(weights(net))))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path, **arguments)
    assert "\n" not in str(caught.value)


def test_every_tensor_is_needed_as_it_is() -> None:
    """Each is left out, reshaped, cut, of another type or renamed, in turn."""
    sd = weights(Net(mults=(2,)))

    def taken(tensors: dict[str, Tensor]) -> None:
        layout = Layout(Path("file"), None, None, None, [])
        found, family = identify(tensors, layout, "file", preset="2.3.4")
        assert family.name == "lucidrains" and family.load is not None
        family.load(found)

    taken(sd)
    for i, (name, t) in enumerate(sd.items()):
        others = {}, {name: t[..., None]}, {name: t[:-1]}, {name: t.long()}, {f"{name}s": t}
        with pytest.raises(CheckpointError):
            taken({k: v for k, v in sd.items() if k != name} | others[i % len(others)])


def test_karras_unet_is_refused(tmp_path: Path) -> None:
    content = {"net.to_time_emb.1.weight": torch.ones(2), "net.downs.0.block1.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"a Karras \(EDM2\) U-Net"):
        load(stored(tmp_path, {"step": 1, "model": content, "ema": {}}))


# --- the package itself ---


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lucidrains' module, with empty ones in place of what it imports for training; gone again afterwards."""
    pytest.importorskip("einops")
    found = importlib.util.find_spec("denoising_diffusion_pytorch")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("denoising-diffusion-pytorch is not installed")
    name = "denoising_diffusion_pytorch"
    nothing = types.SimpleNamespace()
    contents: dict[str, dict[str, Any]] = {
        "torchvision": {"transforms": nothing, "utils": nothing},
        "scipy.optimize": {"linear_sum_assignment": None},
        "scipy": {},
        "accelerate": {"Accelerator": None},
        "ema_pytorch": {"EMA": None},
        name: {"__path__": list(found.submodule_search_locations)},
    }
    for module, values in contents.items():
        stub = types.ModuleType(module)
        stub.__dict__.update(values)
        monkeypatch.setitem(sys.modules, module, stub)
    for part in ("denoising_diffusion_pytorch", "attend", "version"):
        monkeypatch.delitem(sys.modules, f"{name}.{part}", raising=False)
    module = pytest.importorskip(f"{name}.{name}", exc_type=ImportError)
    yield module
    for loaded in [m for m in sys.modules if m.startswith(f"{name}.")]:
        del sys.modules[loaded]


@pytest.mark.parametrize(
    ("unet", "diffusion"),
    [
        ({"dim_mults": (1, 2), "self_condition": True}, {"objective": "pred_v"}),
        (
            {"dim_mults": (1, 2, 3), "full_attn": (False, True, True)},
            {"objective": "pred_x0", "beta_schedule": "linear"},
        ),
        ({"dim_mults": (2,), "channels": 1}, {"beta_schedule": "cosine", "min_snr_loss_weight": True}),
    ],
    ids=["self_condition", "three_levels", "cosine"],
)
def test_the_package_s_own_images(
    unet: dict[str, Any], diffusion: dict[str, Any], package: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = package.Unet(dim=8, **unet).eval()
    theirs = package.GaussianDiffusion(network, image_size=SIZE, timesteps=30, **diffusion)
    path = stored(tmp_path, theirs.state_dict())
    checkpoint = load(path, overrides={"image_size": SIZE})
    x, t = torch.randn(2, network.channels, SIZE, SIZE), torch.tensor([1, 17])
    with torch.no_grad():
        same, got, truth = network(x, t), checkpoint.model(x, t), copy.deepcopy(network).double()(x.double(), t)
    check(got, same, truth)
    for options in ({}, {"method": "ddim", "steps": 6, "eta": 0.5}):
        if options:
            theirs.is_ddim_sampling, theirs.sampling_timesteps, theirs.ddim_sampling_eta = True, 6, 0.5

        def draw() -> Tensor:
            torch.manual_seed(9)
            return theirs.sample(batch_size=2)

        got = Sampler(checkpoint.model, checkpoint.schedule, 2, noise="torch", **options).sample(2, seed=9)
        assert same_chain(got / 2 + 0.5, draw(), network, draw, 1e-5)  # of their buffers in float32
