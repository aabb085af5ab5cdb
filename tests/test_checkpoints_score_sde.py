"""Score-SDE's VP checkpoints against a restatement of their networks and samplers (`score_sde_oracle`)."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from score_sde_oracle import DDPM, DDPMPP, VP, Net, forward, weights
from tensors import SHAKES, excess, fresh, shake
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.checkpoints import Checkpoint, CheckpointError, convert, load
from ddpm_fast.checkpoints.score_sde import ALIASES, PRESETS
from ddpm_fast.checkpoints.score_sde_layout import structure_of
from ddpm_fast.cli import main
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.house_rule import check
from ddpm_fast.inspection import describe, describe_text
from ddpm_fast.kernels.reference import sampler_step
from ddpm_fast.ops import compiled
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table
from ddpm_fast.unet import TimeRows

TOLERANCE = 1e-11  # of the oracle's RMS, at the worst element: networks are compared in float64
NETS: dict[str, Net] = {
    "ddpm": DDPM,
    "ddpmpp": DDPMPP,
    "ddpm three levels": replace(DDPM, mults=(1, 1, 2), blocks=2, attended=(1,)),
    "ddpmpp three levels": replace(DDPMPP, mults=(1, 2, 2), blocks=2, attended=(1,)),
    "ddpmpp no attention but the middle": replace(DDPMPP, attended=()),
    "ddpmpp attention everywhere": replace(DDPMPP, attended=(0, 1)),
    "ddpmpp without skip_rescale": replace(DDPMPP, rescale=False),
    "ncsnpp of ddpm blocks": replace(DDPM, kind="ncsnpp", rescale=True),
    "one level, grey": replace(DDPM, mults=(1,), attended=(0,), channels=1),
}


def stored(tmp_path: Path, net: Net, seed: int = 0, sigmas: int | None = 1000) -> tuple[Path, dict[str, Tensor]]:
    """A state dict as DataParallel saves it, with the buffer that every network of theirs has."""
    path, sd = tmp_path / "model.pth", weights(net, seed)
    buffers = {} if sigmas is None else {"sigmas": torch.linspace(50, 0.01, sigmas, dtype=torch.float64)}
    torch.save({f"module.{name}": tensor for name, tensor in (buffers | sd).items()}, path)
    return path, sd


def flags(net: Net) -> dict[str, Any]:
    """What the weights of this network do not tell."""
    told: dict[str, Any] = {"image_size": 8}
    if net.kind == "ncsnpp" and not net.biggan:
        told["name"] = "ncsnpp"
    return told if net.rescale == (net.kind == "ncsnpp") else {**told, "skip_rescale": net.rescale}


def opened(tmp_path: Path, net: Net, **overrides: Any) -> tuple[Checkpoint, dict[str, Tensor]]:
    path, sd = stored(tmp_path, net)
    return load(path, overrides={**flags(net), **overrides}), sd


def inputs(net: Net) -> tuple[Tensor, Tensor]:
    return torch.randn(2, net.channels, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.25, 731.5])


def in64(checkpoint: Checkpoint, x: Tensor, t: Tensor) -> Tensor:
    """The network's output in float64, where no processor's order of sums is felt."""
    return copy.deepcopy(checkpoint.model).double()(x.double(), t.double() if t.is_floating_point() else t)


def relative(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).abs().max() / truth.square().mean().sqrt())


# --- the network ---


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_outputs_are_the_oracle_s(name: str, tmp_path: Path) -> None:
    net = NETS[name]
    checkpoint, sd = opened(tmp_path, net)
    x, t = inputs(net)
    truth = forward(net, sd, x.double(), t.double())
    assert checkpoint.family == "Score-SDE"
    assert excess(checkpoint.model(x, t), lambda x, t: forward(net, sd, x, t), x, t) <= 1
    assert relative(in64(checkpoint, x, t), truth) <= TOLERANCE


@pytest.mark.parametrize(
    ("net", "wrong"),
    [
        (DDPM, {"name": "ncsnpp", "skip_rescale": False}),  # its groups
        (DDPMPP, {"skip_rescale": False}),
        (replace(DDPM, kind="ncsnpp", rescale=True), {"name": "ddpm"}),
    ],
)
@torch.no_grad()
def test_what_the_weights_do_not_tell_matters(net: Net, wrong: dict[str, Any], tmp_path: Path) -> None:
    path, sd = stored(tmp_path, net)
    x, t = inputs(net)
    got = load(path, overrides=wrong).model(x, t)
    assert relative(got, forward(net, sd, x.double(), t.double())) > 0.05


@pytest.mark.parametrize("name", ["all_modules.6.NIN_1.W", "all_modules.8.Conv_2.weight", "all_modules.13.NIN_3.b"])
@torch.no_grad()
def test_every_kind_of_weight_is_read(name: str, tmp_path: Path) -> None:
    """A changed weight changes the output, and by as much as in the oracle."""
    sd = weights(replace(DDPMPP, attended=(0,)))
    name = next(n for n in sd if n.split(".", 2)[2] == name.split(".", 2)[2])
    net = replace(DDPMPP, attended=(0,))
    x, t = inputs(net)
    before = forward(net, sd, x.double(), t.double())
    sd[name] = sd[name] + torch.randn(sd[name].shape, generator=torch.Generator().manual_seed(7))
    torch.save(sd, tmp_path / "model.pth")
    truth = forward(net, sd, x.double(), t.double())
    assert relative(before, truth) > 1e-2
    assert relative(in64(load(tmp_path / "model.pth"), x, t), truth) <= TOLERANCE


@pytest.mark.parametrize("which", ["reference", "cpu", "winograd", "triton"])
@pytest.mark.parametrize("net", [DDPM, DDPMPP], ids=["ddpm", "ddpmpp"])
@torch.no_grad()
def test_every_set_of_operations_keeps_the_house_rule(which: str, net: Net, tmp_path: Path) -> None:
    if which == "winograd":
        try:
            compiled.compiler()
        except RuntimeError as error:
            pytest.skip(str(error))
    checkpoint, sd = opened(tmp_path, net)
    model = checkpoint.model.requires_grad_(False)
    for dtype in (torch.float32, torch.bfloat16) if which in ("reference", "triton") else (torch.float32,):
        x, t = fresh((1, 3, 4, 4), dtype, seed=3), torch.tensor([421.5])
        copy = prepare(model, dtype, "cpu", getattr(ops, which)())
        rows = TimeRows(table=copy.time_table(t), row=torch.zeros(1, dtype=torch.int32), t=t)
        cast = {name: tensor.to(dtype) for name, tensor in sd.items()} if dtype != torch.float32 else sd
        truth = forward(net, cast, x.double(), t.double())
        plain = model.to(dtype)(x, t) if dtype == torch.bfloat16 else model(x, t)
        check(copy.run(x, rows), plain, truth)


# --- sampling ---

CHAINS = [
    ("ancestral_sampling", False),
    ("ancestral_sampling", True),
    ("euler_maruyama", True),
    ("euler_maruyama", False),
    ("reverse_diffusion", True),
    ("reverse_diffusion", False),
]


@pytest.mark.parametrize(("predictor", "continuous"), CHAINS)
def test_every_row_is_the_oracle_s_step(predictor: str, continuous: bool, tmp_path: Path) -> None:
    """All thousand, on numbers: what the network is given, and x of the next step, in float64."""
    checkpoint, _ = opened(tmp_path, DDPM, predictor=predictor, continuous=continuous)
    assert checkpoint.schedule.method == predictor
    table, vp = step_table(checkpoint.schedule), VP()
    assert len(table) == 1000 and table.timesteps == tuple(range(999, -1, -1))
    assert table.draws == (True,) * 1000  # there too, whether or not the noise is used
    g = torch.Generator().manual_seed(2)
    x, out, z = (torch.randn(1, 1, 1, 2, generator=g, dtype=torch.float64) for _ in range(3))
    for i, time in enumerate(table.times().tolist()):
        assert time == float(vp.labels(i, continuous))
        noisy, mean = vp.step(predictor, i, x, out, z, continuous)
        counter, ids = torch.tensor([i, 0], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
        got = sampler_step(x, out, table.rows, counter, ids, ids, noise=z)
        assert relative(got, mean if i == 999 else noisy) <= 1e-11, i


@pytest.mark.parametrize(
    ("net", "predictor", "continuous"),
    [(DDPM, "ancestral_sampling", False), (DDPM, "euler_maruyama", True), (DDPMPP, "reverse_diffusion", False)]
    + [(DDPMPP, "ancestral_sampling", False), (DDPMPP, "euler_maruyama", True)],
)
@torch.no_grad()
def test_forty_steps_with_the_same_noise(net: Net, predictor: str, continuous: bool, tmp_path: Path) -> None:
    """A model of num_scales=40, by the Sampler and in one file's own number of steps; noise from torch's generator."""
    n = 40
    path, sd = stored(tmp_path, net, sigmas=n)
    checkpoint = load(path, overrides={**flags(net), "predictor": predictor, "continuous": continuous})

    def chain(shaken: bool) -> Tensor:
        vp, g, signs = VP(n), torch.Generator().manual_seed(5), torch.Generator().manual_seed(0)
        x = mean = torch.randn(2, 3, 8, 8, generator=g).double()
        for i in range(n):
            labels = torch.full((2,), float(vp.labels(i, continuous)), dtype=torch.float64)
            out = forward(net, sd, x, labels)
            out = shake(out, signs) if shaken else out
            z = torch.randn(2, 3, 8, 8, generator=g)
            x, mean = vp.step(predictor, i, x, out, z.double(), continuous)
        return mean

    truth = chain(False)
    bound = SHAKES * relative(chain(True), truth)
    assert bound < 1e-3, "the chain forgets rounding, so that its bound means something"
    got = Sampler(checkpoint.model, checkpoint.schedule, noise="torch", ops="reference").sample(2, seed=5)
    assert relative(got, truth) <= bound


def test_a_fused_step_is_the_reference_s(tmp_path: Path) -> None:
    """In Triton's interpreter, or on a GPU: the last convolution, a predictor's row and its noise in one kernel."""
    net = replace(DDPM, mults=(1,), attended=())
    checkpoint, _ = opened(tmp_path, net, image_size=4, continuous=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return in64(checkpoint, x.cpu(), t.cpu()).to(x)

    def drawn(which: str, model: Any = checkpoint.model) -> Tensor:
        options = {"ops": which, "device": device, "image_shape": (3, 4, 4)}
        sampler = Sampler(model, checkpoint.schedule, steps=9, **options)
        table = sampler.table
        sampler.table = replace(table, rows=table.rows[4:5], timesteps=table.timesteps[4:5], draws=(True,))
        return sampler.sample(1, seed=3).cpu()

    check(drawn("triton"), drawn("reference"), drawn("reference", exact).double())


def test_fewer_steps(tmp_path: Path) -> None:
    """A continuous model takes any number of them, as with num_scales there; one of timesteps visits fewer."""
    continuous = opened(tmp_path, DDPM, continuous=True, predictor="ancestral_sampling")[0].schedule
    vp = VP(50)
    table = step_table(continuous, 50)
    times = [float(vp.labels(i, True)) for i in range(50)]
    assert table.times().tolist() == times and times[0] == 999 and math.isclose(times[-1], 0.999, rel_tol=1e-6)
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def stepped(rows: Tensor) -> Tensor:
        zero, counter = torch.zeros(1, dtype=torch.int64), torch.tensor([20, 0], dtype=torch.int32)
        return sampler_step(x, 2 * x, rows, counter, zero, zero, noise=3 * x)

    assert relative(stepped(table.rows), vp.step("ancestral_sampling", 20, x, 2 * x, 3 * x, True)[0]) <= 1e-12
    discrete = opened(tmp_path, DDPM)[0].schedule
    table = step_table(discrete, 50)
    assert table.timesteps == tuple(range(980, -1, -20))
    assert [round(t, 3) for t in table.times().tolist()[:2]] == [980.019, 960.039]  # 999 - 0.999 (999 - t)
    plain = step_table(replace(discrete, method="ddpm"), 50)
    assert plain.times().tolist() == list(table.timesteps)
    assert relative(stepped(table.rows), stepped(plain.rows)) <= 1e-12  # DDPM with fixed_large and no clip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 20}, "needs more than 20 steps, .* got 20"),
        ({"steps": [900, 3]}, "takes a number of steps, spaced evenly in time, not a list of timesteps"),
        ({"steps": "ddim50"}, "takes a number of steps"),
        ({"eta": 0.5}, "eta belongs to method='ddim'"),
        ({"time_scale": 2.0}, "has times of its own; got 2.0"),
    ],
)
def test_what_a_predictor_cannot_take(arguments: dict[str, Any], message: str) -> None:
    schedule = Schedule(beta_schedule="vp_sde", variance_type="fixed_large", clip_sample=False)
    with pytest.raises(ValueError, match=message):
        step_table(schedule, method="reverse_diffusion", **arguments)


def test_predictors_are_for_their_schedule_alone() -> None:
    with pytest.raises(
        ValueError, match=r"is for Score-SDE's VP models; .* variance_type='fixed_small', where it needs"
    ):
        step_table(Schedule(), method="euler_maruyama")
    with pytest.raises(ValueError, match=r"Schedule\.method='euler_maruyama' does not fit clip_sample=True"):
        Schedule(variance_type="fixed_large", method="euler_maruyama")


def test_marginals_of_the_continuous_schedule() -> None:
    """a_t at t = 1/1000, ..., 1, by the integral of beta; the times its network is given; DDPM and DDIM over them."""
    scale = 999 / 1000
    schedule = Schedule(
        beta_schedule="vp_sde", variance_type="fixed_large", clip_sample=False, time_scale=scale, time_offset=scale
    )
    for i in (0, 17, 500, 999):
        t = (i + 1) / 1000
        assert math.isclose(float(schedule.alphas_cumprod[i]), math.exp(-(0.1 * t + 19.9 * t * t / 2)), rel_tol=1e-12)
        assert math.isclose(float(schedule.network_time(i)), 999 * t, rel_tol=1e-12)
    table = step_table(schedule, method="ddim", steps=10)
    assert [round(t, 3) for t in table.times().tolist()] == [round(0.999 * (t + 1), 3) for t in table.timesteps]
    assert Schedule.from_dict(schedule.to_dict()) == schedule


# --- settings and files ---


@pytest.mark.parametrize("net", [DDPM, DDPMPP], ids=["ddpm", "ddpmpp"])
@pytest.mark.parametrize("sigmas", [1000, 128])  # 128: as long as a bias
@torch.no_grad()
def test_a_training_checkpoint_gives_the_averages(net: Net, sigmas: int, tmp_path: Path) -> None:
    """checkpoint_N.pth: optimizer, model, ema and step; the averages are a list in the order of the parameters."""
    raw, averaged = weights(net, 1), weights(net, 2)
    buffer = {"module.sigmas": torch.linspace(50, 0.01, sigmas, dtype=torch.float64)}
    content = {
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 2e-4}]},
        "model": buffer | {f"module.{name}": tensor for name, tensor in raw.items()},
        "ema": {"decay": 0.9999, "num_updates": 9, "shadow_params": list(averaged.values())},
        "step": 400_001,
    }
    path = tmp_path / "checkpoint_8.pth"
    torch.save(content, path)
    x, t = inputs(net)
    for choice, sd in ((None, averaged), ("ema", averaged), ("model", raw)):
        checkpoint = load(path, overrides=flags(net), weights=choice)
        assert relative(in64(checkpoint, x, t), forward(net, sd, x.double(), t.double())) <= TOLERANCE
        assert checkpoint.schedule.num_train_timesteps == sigmas
    assert any("the averaged one, ema, is used" in note for note in load(path, overrides=flags(net)).notes)


def test_presets_are_the_config_files(tmp_path: Path) -> None:
    shapes = {
        # google/ddpm-*'s, which have two more attentions on the way up, of 4 C (C + 1) + 2 C parameters each
        "vp/ddpm/cifar10": (Net(128, (1, 2, 2, 2), 2, (1,)), 35_746_307 - 2 * (4 * 256 * 257 + 512)),
        "vp/ddpm/celebahq": (Net(128, (1, 1, 2, 2, 4, 4), 2, (4,)), 113_673_219 - 2 * (4 * 512 * 513 + 1024)),
        "vp/cifar10_ddpmpp": (replace(DDPMPP, nf=128, mults=(1, 2, 2, 2), blocks=4), None),
        "vp/cifar10_ddpmpp_deep_continuous": (replace(DDPMPP, nf=128, mults=(1, 2, 2, 2), blocks=8), None),
    }
    for name, (net, parameters) in shapes.items():
        sd, values = weights(net, meta=True), PRESETS[name]
        structure = structure_of(sd, name)
        assert (structure.ch_mult, structure.blocks) == (values["ch_mult"], values["num_res_blocks"])
        assert [i for i, has in enumerate(structure.attention) if has] == list(values["attention"])
        assert parameters in (None, sum(t.numel() for t in sd.values()))
    assert {name for name, values in PRESETS.items() if values["continuous"]} == {
        name for name in PRESETS if name.endswith("continuous")
    }
    path, _ = stored(tmp_path, DDPM)
    for preset in ("vp/ddpm/cifar10_continuous", "vp/cifar10_ddpm_continuous", "configs/vp/ddpm/cifar10_continuous.py"):
        checkpoint = load(path, preset=preset)
        assert checkpoint.schedule.method == "euler_maruyama" and checkpoint.schedule.beta_schedule == "vp_sde"
        assert any("the architecture is not that of vp/ddpm/cifar10_continuous" in note for note in checkpoint.notes)
    assert set(ALIASES.values()) <= set(PRESETS)


def test_assumptions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = stored(tmp_path, DDPM)
    checkpoint = load(path)
    s = checkpoint.schedule
    assert (s.num_train_timesteps, s.beta_schedule, s.beta_start, s.beta_end) == (1000, "linear", 1e-4, 0.02)
    assert (s.variance_type, s.clip_sample, s.method) == ("fixed_large", False, "ancestral_sampling")
    text = describe_text(describe(checkpoint))
    assert "nf=32, ch_mult=[1, 2], num_res_blocks=1, attn_resolutions=['size/2']" in text
    assert "inferred from the buffer sigmas, which is not read otherwise: num_scales=1000" in text
    assert "sde='vpsde', beta_min=0.1, beta_max=20.0, name='ddpm', continuous=False" in text
    assert "subvpsde or the vesde, which have the same names, images would be wrong" in text
    assert "ancestral_sampling of 1000 steps" in text and "up_attention=last" in text
    told = load(path, overrides={"model.beta_max": 10, "sde": "vpsde", "config.training.continuous": True})
    assert told.schedule.beta_end == 0.01 and told.schedule.beta_schedule == "vp_sde"
    assert not any("subvpsde" in note for note in told.notes)
    assert load(stored(tmp_path, DDPMPP)[0]).schedule.method == "euler_maruyama"
    assert load(stored(tmp_path, DDPM, sigmas=200)[0]).schedule.num_train_timesteps == 200
    small = {"ch_mult": (1, 2), "num_res_blocks": 1, "attention": (1,), "image_size": 16, "name": "ncsnpp"}
    monkeypatch.setattr("ddpm_fast.checkpoints.score_sde.NF", 32)
    monkeypatch.setitem(PRESETS, "vp/small", {**small, "continuous": False})
    path, _ = stored(tmp_path, DDPMPP)
    alike = load(path)  # the only preset of its architecture decides
    assert alike.schedule.method == "ancestral_sampling" and alike.model.config.sample_size == 16
    with pytest.raises(CheckpointError, match=r"is of another architecture: .* has that of vp/small"):
        load(path, preset="vp/cifar10_ddpmpp")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sde": "subvpsde"}, "override sde='subvpsde' names a variant that is not supported, only 'vpsde'"),
        ({"training.sde": "VESDE"}, "override sde='vesde' names a variant"),
        ({"fir": True}, "override fir=True names a variant that is not supported, only False; .* DDPM"),
        ({"progressive_input": "residual"}, "names a variant that is not supported, only 'none'"),
        ({"embedding_type": "fourier"}, "names a variant that is not supported, only 'positional'"),
        ({"nonlinearity": "elu"}, "names a variant that is not supported, only 'swish'"),
        ({"centered": False}, "names a variant that is not supported, only True"),
        ({"scale_by_sigma": True}, "names a variant that is not supported, only False"),
        ({"corrector": "langevin"}, "names a variant that is not supported, only 'none'"),
        ({"predictor": "heun"}, "predictor must be one of ancestral_sampling, euler_maruyama, reverse_diffusion"),
        ({"method": "ode"}, "method must be pc, or one of ddpm, ddim"),
        ({"beta_maxx": 3}, "unknown override of a Score-SDE checkpoint 'beta_maxx'; did you mean beta_max"),
        ({"continuous": 1}, "override continuous must be true or false; got 1"),
        ({"num_scales": 10}, "override num_scales=10 does not fit .* which has 1000"),
        ({"nf": 64}, "override nf=64 does not fit .* which has 32"),
        ({"ch_mult": [1, 3]}, r"override ch_mult=\[1, 3\] does not fit .* which has \[1, 2\]"),
        ({"attn_resolutions": [8], "image_size": 8}, r"attn_resolutions=\[8\] does not fit .* which has \[4\]"),
        ({"name": "ncsnv2"}, "override name='ncsnv2' is neither ddpm nor ncsnpp"),
        ({"skip_rescale": True}, "override skip_rescale=True is ncsnpp's; give name=ncsnpp too"),
        ({"beta_max": 5000}, "the schedule of .* is not usable: .* below 1"),
    ],
)
def test_refused_overrides(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(stored(tmp_path, DDPM)[0], overrides=overrides)


@pytest.mark.parametrize("preset", ["subvp/cifar10_ddpm_continuous", "ve/cifar10_ncsnpp", "vp/cifar10_ncsnpp"])
def test_presets_of_other_sdes_are_refused(preset: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"preset='{preset}' is of a model that is not supported; .* VP SDE"):
        load(stored(tmp_path, DDPM)[0], preset=preset)
    with pytest.raises(CheckpointError, match=r"unknown preset for a Score-SDE checkpoint 'cifar10'; .*vp/"):
        load(stored(tmp_path, DDPM)[0], preset="cifar10")
    with pytest.raises(CheckpointError, match=r"is of a ncsnpp network; .* is not one"):
        load(stored(tmp_path, DDPM)[0], preset="vp/cifar10_ddpmpp")


def variant(name: str) -> dict[str, Tensor]:
    """Names and shapes of another network of theirs."""
    sd = weights(DDPMPP)

    def moved(start: int, by: int) -> dict[str, Tensor]:
        """Modules from ``start`` on, ``by`` places later."""
        result = {}
        for key, tensor in sd.items():
            number, rest = key.removeprefix("all_modules.").split(".", 1)
            result[f"all_modules.{int(number) + by * (int(number) >= start)}.{rest}"] = tensor
        return result

    last = max(int(key.split(".")[1]) for key in sd)
    pair = {"weight": torch.ones(64), "bias": torch.ones(64)}
    if name == "fourier":
        return {"all_modules.0.W": torch.ones(32), **moved(0, 1)}
    if name == "unconditional":
        return {k: v for k, v in moved(0, -2).items() if int(k.split(".")[1]) >= 0}
    if name == "input_skip":
        return {**moved(5, 2), "all_modules.6.Conv.weight": torch.ones(32, 3, 1, 1)}
    if name == "fir residual":
        return {**moved(5, 1), "all_modules.5.Conv2d_0.weight": torch.ones(32, 3, 3, 3)}
    if name == "residual":
        return {**moved(5, 1), "all_modules.5.Conv_0.weight": torch.ones(32, 3, 3, 3)}
    if name == "output_skip":
        extra = {f"all_modules.{last - 1}.{k}": v for k, v in pair.items()}
        return {**moved(last - 1, 2), **extra, f"all_modules.{last}.weight": torch.ones(3, 64, 3, 3)}
    if name == "no resampling convolutions":
        sd = weights(DDPM)
        return {k: v for k, v in sd.items() if not (len(k.split(".")) == 4 and k.split(".")[1] == "4")}
    if name == "uneven":
        return moved(5, 1) | {
            k.replace("all_modules.3.", "all_modules.5."): v for k, v in sd.items() if k.startswith("all_modules.3.")
        }
    assert name == "ncsnv2"
    return {"begin_conv.weight": torch.ones(8, 3, 3, 3), "refine1.crp.convs.0.weight": torch.ones(8, 8, 3, 3)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fourier", "Fourier embedding of the noise level"),
        ("unconditional", r"no time embedding \(conditional false\)"),
        ("input_skip", r"a progressive input \(progressive_input 'input_skip'\)"),
        ("fir residual", r"FIR resampling \(fir true\)"),
        ("residual", r"a progressive input or output \(progressive_input or progressive 'residual'\)"),
        ("output_skip", "a progressive output"),
        ("no resampling convolutions", "no parameters at all_modules.4: it resamples without convolutions"),
        ("uneven", "is not a whole Score-SDE network: 9 residual blocks and 2 resamplers make no levels"),
        ("ncsnv2", r"is an NCSN \(Song and Ermon\), trained on noise levels"),
    ],
)
def test_other_networks_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(variant(name), path)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    if name not in ("ncsnv2", "uneven"):
        assert "those of the VP SDE are supported: ddpm, and DDPM++" in str(error.value)


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    sd = weights(DDPMPP)
    path = tmp_path / "model.pth"
    for name, message in (
        ("all_modules.6.NIN_2.b", "1 missing: down_blocks.1.attentions.0.to_v.bias"),
        ("all_modules.1.bias", "1 missing: time_embedding.linear_2.bias"),
        ("all_modules.3.Conv_1.weight", "all_modules.3 is a resampler, where|is not a whole|progressive"),
    ):
        torch.save({k: v for k, v in sd.items() if k != name}, path)
        with pytest.raises(CheckpointError, match=message):
            load(path)
    for name in sd:  # whichever tensor has lost its axes, or is not there
        for broken in ({**sd, name: torch.ones(3, 1, 1)}, {k: v for k, v in sd.items() if k != name}):
            torch.save(broken, path)
            with pytest.raises(CheckpointError):
                load(path)


# --- other formats, and the command line ---


@pytest.mark.parametrize("continuous", [False, True])
@torch.no_grad()
def test_ddpm_converts_to_diffusers(continuous: bool, tmp_path: Path) -> None:
    """The same outputs there: attention that adds zero, a table of the times, the betas of the marginals."""
    diffusers = pytest.importorskip("diffusers")
    net = replace(DDPM, blocks=2)
    checkpoint, sd = opened(tmp_path, net, continuous=continuous)
    notes = convert(checkpoint, tmp_path / "out")
    assert any("added with zero weights" in note for note in notes)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet").eval().double()
    x, _ = inputs(net)
    for t in (0, 640, 999):
        label = torch.full((2,), 999 * (t + 1) / 1000 if continuous else float(t), dtype=torch.float64)
        truth = forward(net, sd, x.double(), label)
        # the sinusoids of the scaled times are weights there, of float32 angles: 2^-25 of 999 is 3e-5 of a radian
        assert relative(theirs(x.double(), t).sample, truth) <= 1e-5
        assert relative(in64(load(tmp_path / "out"), x, torch.tensor(t)), truth) <= 1e-5
    scheduler = diffusers.DDPMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    assert scheduler.config.variance_type == "fixed_large" and scheduler.config.clip_sample is False
    torch.testing.assert_close(
        scheduler.alphas_cumprod.double(), checkpoint.schedule.alphas_cumprod, rtol=2e-4, atol=1e-8
    )
    with pytest.raises(CheckpointError, match=r"OpenAI's (U-Net has no such|code scales times)"):
        convert(checkpoint, tmp_path / "model.pt", to="openai")


def test_ddpmpp_is_not_diffusers(tmp_path: Path) -> None:
    checkpoint, _ = opened(tmp_path, DDPMPP)
    with pytest.raises(CheckpointError, match=r"no field for sums divided by 1.41421 .* skip_rescale"):
        convert(checkpoint, tmp_path / "out")
    plain, _ = opened(tmp_path, replace(DDPMPP, rescale=False))
    with pytest.raises(CheckpointError, match="no 1x1 convolution around residual blocks that resample"):
        convert(plain, tmp_path / "out")
    groups, _ = opened(tmp_path, replace(DDPM, kind="ncsnpp", rescale=True), skip_rescale=False)
    with pytest.raises(CheckpointError, match="norm_num_groups null"):
        convert(groups, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("net", [DDPM, DDPMPP], ids=["ddpm", "ddpmpp"])
def test_the_command_line(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = stored(tmp_path, net)

    def run(command: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["ddpm-fast", command, str(path), "--set", "image_size=8", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    code, text, _ = run("inspect", "--json")
    facts = json.loads(text)
    assert (code, facts["family"], facts["steps"]) == (0, "Score-SDE", 1000)
    code, text, _ = run("verify", "--steps", "3")
    assert code == 0 and "within the house rule" in text
    assert run("plan")[0] == 0
    out = tmp_path / "images.npz"
    assert run("sample", "-n", "2", "--steps", "4", "--out", str(out))[0] == 0 and out.exists()
    code, _, err = run("sample", "-n", "2", "--set", "sde=subvpsde", "--out", str(tmp_path / "other.npz"))
    assert code == 2 and "names a variant that is not supported" in err and len(err.splitlines()) <= 2
    assert not (tmp_path / "other.npz").exists()
