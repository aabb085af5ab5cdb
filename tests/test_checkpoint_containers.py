"""Networks inside what training scripts save: found, the averaged one taken, the rest left out with a note.

The oracle is the network that was wrapped: what loads gives its outputs.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from test_checkpoints_diffusers import CONFIGS, TINY, assert_same, run, theirs
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ddpm_fast.checkpoints import Checkpoint, CheckpointError, load

RAW, AVERAGED = theirs(TINY, 1), theirs(TINY, 2)
State = dict[str, Tensor]


def stored(tmp_path: Path, content: Any, name: str = "weights.pt") -> Path:
    """A file beside the U-Net's config.json."""
    RAW.save_config(tmp_path)
    torch.save(content, tmp_path / name)
    return tmp_path / name


def is_of(checkpoint: Checkpoint, model: Any) -> None:
    assert_same(run(checkpoint.model, TINY), run(model, TINY))


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


OPTIMIZER: dict[str, Any] = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
RNG = torch.get_rng_state()


class Metric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3, 3))
        self.inception = nn.Linear(2, 2)


ONE_NETWORK: dict[str, tuple[Any, str | None]] = {
    "bare": (lambda s: s, None),
    "attribute": (lambda s: prefixed("net.", s), None),
    "attributes": (lambda s: prefixed("ldm.model.diffusion_model.", s), None),
    "averaged model": (
        lambda s: {"n_averaged": torch.tensor(9), **prefixed("module.", s)},
        "the network in the file is module; left out: n_averaged",
    ),
    "random state": (lambda s: {"model": s, "rng_state": RNG}, "the network in the file is model; left out: rng_state"),
    "optimizer": (
        lambda s: {"model": s, "optimizer": OPTIMIZER, "epoch": 3, "loss": torch.tensor(0.5)},
        "the network in the file is model; left out: loss, optimizer, epoch",
    ),
    "only a number": (
        lambda s: {"model_state_dict": s, "loss": 0.5},
        "the network in the file is model_state_dict; left out: loss",
    ),
    "lightning": (
        lambda s: {
            "epoch": 3,
            "state_dict": {
                **prefixed("model.unet.", s),
                "betas": torch.ones(9),
                **prefixed("fid.", Metric().state_dict()),
            },
            "optimizer_states": [OPTIMIZER],
            "callbacks": {"checkpoint": {"best": torch.tensor(1.0)}},
        },
        "is model; left out: state_dict.betas, state_dict.fid, callbacks, epoch, optimizer_states",
    ),
    "list": (lambda s: {"models": [s, {"head.weight": torch.ones(2, 2)}]}, "left out: models.1"),
    "distributed": (lambda s: {"module": prefixed("module.", s), "lr_scheduler": None}, "left out: lr_scheduler"),
    "compiled": (lambda s: prefixed("module._orig_mod.", s), None),
    "compiled blocks": (
        lambda s: {n.replace("mid_block.", "mid_block._orig_mod."): t for n, t in prefixed("_orig_mod.", s).items()},
        None,
    ),
    "FSDP": (
        lambda s: {
            n.replace("resnets.0.", "resnets.0._fsdp_wrapped_module._checkpoint_wrapped_module."): t
            for n, t in prefixed("_fsdp_wrapped_module.", s).items()
        },
        None,
    ),
    "beside another network's head": (
        lambda s: {**prefixed("unet.", s), **prefixed("head.", nn.Linear(3, 3).state_dict())},
        "the network in the file is unet; left out: head",
    ),
    "strays of its own": (
        lambda s: {
            **s,
            "betas": torch.ones(9),
            "sqrt_alphas_cumprod": torch.ones(9),
            "step": torch.tensor(4),
            "rng": RNG,
        },
        "left out, as they are no weights: betas, rng, sqrt_alphas_cumprod and 1 more",
    ),
    "counts of operations": (
        lambda s: {**s, **{f"{n}.total_ops": torch.zeros(1).double() for n in ("conv_in", "mid_block.resnets.0")}},
        "left out, as they are no weights: conv_in.total_ops, mid_block.resnets.0.total_ops",
    ),
    "inside k-diffusion's wrapper": (
        lambda s: {"log_sigmas": torch.ones(9), **prefixed("inner_model.", s)},
        "the network in the file is inner_model; left out: log_sigmas",
    ),
    "in a list": (lambda s: [s, OPTIMIZER], "the network in the file is 0; left out: 1"),
    "in a tuple": (lambda s: (7, {"net": s}), "the network in the file is 1; left out: 0"),
    "in a dict with a default": (lambda s: defaultdict(list, s), None),
    "as NumPy arrays": (lambda s: {name: tensor.numpy() for name, tensor in s.items()}, None),
    "as NumPy arrays by columns": (lambda s: {n: np.asfortranarray(t.numpy()) for n, t in s.items()}, None),
    "from before averaging": (lambda s: {"model_before_ema": s}, None),
    "without averages": (
        lambda s: {"without_ema": s, "ema_decay": np.float64(0.99), "ema": None},
        "is without_ema; left",
    ),
    "averages alone": (lambda s: {"ema": s}, "the network in the file is an averaged one (ema)"),
}


@pytest.mark.parametrize("name", ONE_NETWORK)
def test_one_network_in_a_file(name: str, tmp_path: Path) -> None:
    wrap, note = ONE_NETWORK[name]
    checkpoint = load(stored(tmp_path, wrap(RAW.state_dict())))
    is_of(checkpoint, RAW)
    told = [n for n in checkpoint.notes if "in the file" in n or "left out" in n]
    assert told == [] if note is None else any(note in n for n in told), told


def test_a_wrapper_that_may_mean_another_process(tmp_path: Path) -> None:
    checkpoint = load(stored(tmp_path, prefixed("inner_model.", RAW.state_dict())))
    assert any("as k-diffusion wraps them: its images are right if it was trained" in n for n in checkpoint.notes)


def test_torch_s_own_averaged_model(tmp_path: Path) -> None:
    averaged = AveragedModel(RAW, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(RAW)
    averaged.update_parameters(AVERAGED)
    expected = averaged.module
    checkpoint = load(stored(tmp_path, {"model": AVERAGED.state_dict(), "second": averaged.state_dict()}))
    is_of(checkpoint, expected)
    chosen = "of the 2 networks in the file (model, second) the averaged one, second, is used; weights=NAME"
    assert checkpoint.notes[0] == f"{chosen} (--weights NAME) takes another"


SEVERAL: dict[str, tuple[Any, list[str]]] = {
    "by name": (lambda raw, ema: {"model": raw, "ema": ema, "step": 3}, ["model", "ema"]),
    "timm": (lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema}, ["state_dict", "state_dict_ema"]),
    "prefixes": (
        lambda raw, ema: {**prefixed("unet.", raw), **prefixed("ema_unet.module.", ema)},
        ["unet", "ema_unet"],
    ),
    "lightning": (
        lambda raw, ema: {"state_dict": {**prefixed("net.", raw), **prefixed("net_ema.", ema)}},
        ["net", "net_ema"],
    ),
    "beside its own": (lambda raw, ema: {**raw, **prefixed("ema_model.", ema)}, ["model", "ema_model"]),
    "shadow": (lambda raw, ema: {"net": raw, "ema_helper": {"mu": 0.9, "shadow": ema}}, ["net", "ema_helper"]),
    "without dots": (  # CompVis: a module whose buffers have lost the dots in their names
        lambda raw, ema: {
            "state_dict": {
                **prefixed("model.diffusion_model.", raw),
                **{f"model_ema.diffusion_model{name.replace('.', '')}": t for name, t in ema.items()},
                "model_ema.decay": torch.tensor(0.9999),
                "model_ema.num_updates": torch.tensor(7),
                "betas": torch.ones(5),
            }
        },
        ["model", "model_ema"],
    ),
    "diffusers' EMAModel": (
        lambda raw, ema: {"unet": raw, "ema": ema_model(ema).state_dict()},
        ["unet", "ema"],
    ),
    "Score-SDE": (
        lambda raw, ema: {
            "optimizer": OPTIMIZER,
            "model": {"module.sigmas": torch.ones(50), **prefixed("module.", raw)},
            "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": list(ema.values())},
            "step": 7,
        },
        ["model", "ema"],
    ),
    "a list": (
        lambda raw, ema: {"model": raw, "ema_params": list(ema.values()), "ema_rate": 0.999},
        ["model", "ema_params"],
    ),
    "averages as NumPy arrays": (
        lambda raw, ema: {"model": raw, "ema": {n: t.numpy() for n, t in ema.items()}},
        ["model", "ema"],
    ),
    "averages as a list of NumPy arrays": (
        lambda raw, ema: {"model": raw, "ema": {"shadow_params": [t.numpy() for t in ema.values()]}},
        ["model", "ema"],
    ),
    "averages in a dict with a default": (
        lambda raw, ema: {"model": raw, "ema": defaultdict(list, ema)},
        ["model", "ema"],
    ),
    "a pair in a list": (lambda raw, ema: [raw, {"ema": ema}], ["0", "1"]),
    "three": (
        lambda raw, ema: {"model": raw, "teacher": {n: t.clone() for n, t in raw.items()}, "ema": ema},
        ["model", "teacher", "ema"],
    ),
}


def ema_model(state: State) -> EMAModel:
    """diffusers' averages whose values are those of a state dict."""
    model = diffusers.UNet2DModel(**TINY)
    model.load_state_dict(state)
    return EMAModel(model.parameters(), decay=0.9)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_networks(name: str, tmp_path: Path) -> None:
    """The averaged one by default, each by its name, and an unknown name tells which there are."""
    wrap, names = SEVERAL[name]
    path = stored(tmp_path, wrap(RAW.state_dict(), AVERAGED.state_dict()))
    checkpoint = load(path)
    is_of(checkpoint, AVERAGED)
    listed = ", ".join(names)
    chosen = f"of the {len(names)} networks in the file ({listed}) the averaged one, {names[-1]}, is used; weights=NAME"
    assert sum(chosen in note for note in checkpoint.notes) == 1, checkpoint.notes
    for own in names:
        is_of(load(path, weights=own), AVERAGED if own == names[-1] else RAW)
    with pytest.raises(CheckpointError) as caught:
        load(path, weights="swa")
    assert str(caught.value) == f"{path} has no weights 'swa'; it has {listed}"


def test_none_or_two_of_several_are_averaged(tmp_path: Path) -> None:
    path = stored(tmp_path, {"student": RAW.state_dict(), "teacher": AVERAGED.state_dict()})
    with pytest.raises(CheckpointError, match=r"holds 2 networks \(student, teacher\), none of them averaged: choose"):
        load(path)
    is_of(load(path, weights="teacher"), AVERAGED)
    path = stored(tmp_path, {"ema_0.99": RAW.state_dict(), "ema_0.9999": AVERAGED.state_dict()})
    with pytest.raises(CheckpointError, match=r"2 of them averaged: choose one, as in weights='ema_0\.99'"):
        load(path)
    is_of(load(path, weights="ema_0.9999"), AVERAGED)


def test_a_name_for_a_file_of_one_network(tmp_path: Path) -> None:
    path = stored(tmp_path, {"model": RAW.state_dict(), "step": 3})
    is_of(load(path, weights="model"), RAW)
    with pytest.raises(CheckpointError, match=r"has no weights 'ema'; it has model$"):
        load(path, weights="ema")


# --- averages in the order of parameters() ---


@pytest.mark.parametrize("name", CONFIGS)
def test_averages_of_diffusers(name: str, tmp_path: Path) -> None:
    """EMAModel's state with the model beside it, and alone beside the model's config.json."""
    config = CONFIGS[name]
    model, averaged = theirs(config, 1), theirs(config, 2)
    ema = EMAModel(averaged.parameters())
    model.save_config(tmp_path)
    torch.save({"unet": model.state_dict(), "ema": ema.state_dict()}, tmp_path / "both.pt")
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    for file in ("both.pt", "ema.pt"):
        checkpoint = load(tmp_path / file)
        assert_same(run(checkpoint.model, config), run(averaged, config))
    assert any("named by the config.json beside it" in note for note in checkpoint.notes)


def test_averages_that_fit_nothing(tmp_path: Path) -> None:
    ema = ema_model(RAW.state_dict()).state_dict()
    torch.save(ema, tmp_path / "ema.pt")
    with pytest.raises(CheckpointError, match=r"a list of 144 tensors in the order of parameters\(\), without names"):
        load(tmp_path / "ema.pt")
    theirs({**TINY, "layers_per_block": 2}).save_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"by the config\.json beside it .* put the right config\.json there"):
        load(tmp_path / "ema.pt")
    turned = {**ema, "shadow_params": ema["shadow_params"][::-1]}
    path = stored(tmp_path, {"unet": RAW.state_dict(), "ema": turned})
    with pytest.raises(CheckpointError, match=r"averages \(ema, 144 tensors\) fit no network .* weights='unet'"):
        load(path)
    is_of(load(path, weights="unet"), RAW)


def test_averages_whose_order_is_not_clear(tmp_path: Path) -> None:
    """A model's dict with a tensor that may or may not be a parameter: two ways to name the averages, so neither."""
    state = OrderedDict(RAW.state_dict())
    first = {"conv_in.weight": state["conv_in.weight"], "conv_in.bias": state["conv_in.bias"]}
    doubled = {**first, "time_embedding.extra": first["conv_in.bias"].clone(), **state}
    path = stored(tmp_path, {"model": doubled, "ema": {"shadow_params": list(AVERAGED.parameters())}})
    with pytest.raises(CheckpointError, match="fit no network"):
        load(path)


def test_averages_of_a_part(tmp_path: Path) -> None:
    """Those of parameters that were not averaged are the trained ones, and a note says so."""
    averages = ema_model(AVERAGED.state_dict()).state_dict()["shadow_params"]
    path = stored(tmp_path, {"model": RAW.state_dict(), "ema": {"shadow_params": averages[2:]}})
    first = list(RAW.state_dict())[:2]
    checkpoint = load(path)
    said = f"2 tensors have no average, so the trained ones are used: {', '.join(first)}"
    assert said in checkpoint.notes
    state, raw = checkpoint.model.state_dict(), load(path, weights="model").model.state_dict()
    assert torch.equal(state["conv_in.weight"], raw["conv_in.weight"])
    assert not torch.equal(state["conv_out.weight"], raw["conv_out.weight"])


@pytest.mark.parametrize("inside", ["tensors", "arrays", "a dict"])
def test_averages_in_an_object_that_is_left_out(inside: str, tmp_path: Path) -> None:
    """The trained weights do not pass for averages that cannot be read."""
    state = AVERAGED.state_dict()
    values: dict[str, Any] = {n.replace(".", "_"): t.numpy() if inside == "arrays" else t for n, t in state.items()}
    ema = SimpleNamespace(**({"shadow": values} if inside == "a dict" else values))
    path = stored(tmp_path, {"model": RAW.state_dict(), "ema": ema, "args": SimpleNamespace(ema_decay=0.9)})
    with pytest.raises(CheckpointError, match=r"averages \(ema\) are no tensors .*--weights model\), which sample"):
        load(path)
    is_of(load(path, weights="model"), RAW)


def test_arrays_of_other_numbers_are_no_weights(tmp_path: Path) -> None:
    """Strings, objects and big-endian numbers stay left out; whole numbers are no averages."""
    beside = {"a": np.array(["x"]), "b": np.ones(3, ">f4"), "c": np.ones(0), "ema_steps": np.arange(3)}
    checkpoint = load(stored(tmp_path, {"model": RAW.state_dict(), **beside}))
    is_of(checkpoint, RAW)
    assert "the network in the file is model; left out: ema_steps, a, b, c" in checkpoint.notes


# --- structures without end ---


def test_structures_without_end(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"model": RAW.state_dict()}
    loop["self"] = loop
    is_of(load(stored(tmp_path, {"a": loop})), RAW)
    path = stored(tmp_path, {"latest": loop["model"], "best": loop["model"]})  # one network under two names
    is_of(load(path), RAW)
    is_of(load(path, weights="best"), RAW)
    wide: Any = [torch.zeros(1)]
    for _ in range(9):
        wide = [wide] * 30
    with pytest.raises(CheckpointError, match="holds more than 1,000,000 values"):
        load(stored(tmp_path, {"a": wide}))
