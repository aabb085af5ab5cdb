"""accelerate(pipeline) against the pipeline itself; Sampler around other networks against loops by hand."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from dropin_setup import LONG_TABLES, SHORT, SMALL, TABLES
from models import diffusers_unet
from tensors import same_chain
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.dropin import Accelerated

CONDITIONED: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 4,
}


def pipeline(config: dict[str, Any] | None = None, **options: Any) -> DDPMPipeline:
    p = DDPMPipeline(diffusers_unet({**SMALL, **(config or {})}), DDPMScheduler(**options))
    p.set_progress_bar_config(disable=True)
    return p


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def worst(a: Any, b: Any) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def agrees(fast: Any, p: Any, draw: Callable[[Any], Any], tables: float = TABLES) -> bool:
    """Whether ``draw`` gives the same images by ``fast`` as by the pipeline ``p``."""
    return same_chain(draw(fast), draw(p), p.unet, lambda: draw(p), tables)


# --- the same generator, the same images ---


def test_1000_steps_are_the_pipeline_s():
    p = pipeline()

    def draw(q: Any) -> Any:
        return q(2, generators(1)[0], output_type="np").images

    theirs = draw(p)
    assert same_chain(draw(df.accelerate(p)), theirs, p.unet, lambda: draw(p), LONG_TABLES)
    assert ((theirs > 0) & (theirs < 1)).mean() > 0.5  # not all of it clipped, where anything would agree


@pytest.mark.parametrize(
    "options, config",
    [
        ({"variance_type": "fixed_large"}, {}),
        ({"prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}),
        ({"variance_type": "learned_range"}, {"out_channels": 6}),
    ],
)
def test_50_steps_are_the_pipeline_s(options: dict[str, Any], config: dict[str, Any]):
    p = pipeline(config, **options)
    assert agrees(df.accelerate(p), p, lambda q: q(3, generators(2)[0], 50, output_type="np").images, LONG_TABLES)


def test_a_list_of_generators():
    p = pipeline(**SHORT)
    fast = df.accelerate(p)
    assert agrees(fast, p, lambda q: q(3, generators(4, 5, 6), 20, output_type="np").images)
    second = fast(1, generators(5), 20, output_type="np").images

    def draw() -> Any:
        return p(3, generators(4, 5, 6), 20, output_type="np").images[1:2]

    assert same_chain(second, draw(), p.unet, draw, TABLES)
    with pytest.raises(ValueError, match="one an image; got 2 for "):
        fast(3, generators(4, 5), 20)


def test_without_a_generator_the_global_stream_goes_on():
    p = pipeline(**SHORT)
    fast = df.accelerate(p)
    after = []

    def draw(q: Any) -> Any:
        torch.manual_seed(9)
        images = [q(n, num_inference_steps=20, output_type="np").images for n in (1, 2)]
        after.append(float(torch.rand(())))
        return np.concatenate(images)

    assert agrees(fast, p, draw)
    assert len(set(after)) == 1, "as many numbers were drawn"


def test_one_object_for_any_batch_and_number_of_steps():
    p = pipeline(**SHORT)
    fast = df.accelerate(p)
    for n, steps in [(1, 20), (3, 20), (2, 10), (1, 20)]:

        def draw(q: Any, n: int = n, steps: int = steps) -> Any:
            return q(n, generators(n)[0], steps, output_type="np").images

        assert agrees(fast, p, draw)


# --- DDIM ---


@pytest.mark.parametrize(
    "call",
    [{}, {"eta": 0.7}, {"use_clipped_model_output": True, "eta": 0.2}],
    ids=lambda call: ",".join(call) or "default",
)
def test_a_ddim_pipeline_with_its_own_call(call: dict[str, Any]):
    """The same images, and as many numbers drawn: none a step at eta 0."""
    p = DDIMPipeline(diffusers_unet(SMALL), DDIMScheduler(set_alpha_to_one=False, timestep_spacing="linspace"))
    p.set_progress_bar_config(disable=True)
    fast, after = df.accelerate(p, ops="cpu"), []
    steps = {} if not call else {"num_inference_steps": 12}

    def draw(q: Any) -> Any:
        generator = generators(7)[0]
        images = q(2, generator, output_type="np", **steps, **call).images
        after.append(float(torch.rand((), generator=generator)))
        return images

    assert agrees(fast, p, draw, LONG_TABLES)
    assert len(set(after)) == 1
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]; got 1.5"):
        fast(eta=1.5, num_inference_steps=2)


def test_a_ddim_scheduler_in_a_ddpm_pipeline():
    p = pipeline(**SHORT)
    p.scheduler = DDIMScheduler.from_config(p.scheduler.config)
    fast = df.accelerate(p)
    assert agrees(fast, p, lambda q: q(2, generators(7)[0], 10, output_type="np").images)
    with pytest.raises(ValueError, match=r"1000"):  # DDPMPipeline's own default
        fast()


@pytest.mark.parametrize(
    "config",
    [
        {"in_channels": 1, "out_channels": 1, "sample_size": (8, 12)},
        {"time_embedding_type": "fourier", "resnet_time_scale_shift": "scale_shift", "act_fn": "gelu"},
    ],
)
def test_other_networks(config: dict[str, Any]):
    """Fourier features want t > 0."""
    p = pipeline(config, **SHORT, steps_offset=1)
    assert agrees(df.accelerate(p), p, lambda q: q(2, generators(3)[0], 10, output_type="np").images)


def test_a_compiled_network_is_looked_through():
    p, plain = pipeline(**SHORT), pipeline(**SHORT)
    p.unet = torch.compile(p.unet)  # compiles at its first call, which never comes
    assert agrees(df.accelerate(p), plain, lambda q: q(1, generators(3)[0], 20, output_type="np").images)


# --- results, and what hangs on them ---


@pytest.mark.parametrize("channels", [1, 3])
def test_output_types(channels: int):
    p = pipeline({"in_channels": channels, "out_channels": channels}, **SHORT)
    fast = df.accelerate(p)
    theirs, ours = (
        {kind: q(2, generators(1)[0], 8, output_type=kind).images for kind in ("pil", "np", "numpy", None, "pt")}
        for q in (p, fast)
    )
    for kind in ("np", "numpy", None):
        assert isinstance(ours[kind], np.ndarray) and ours[kind].dtype == theirs[kind].dtype
        assert agrees(fast, p, lambda q, kind=kind: q(2, generators(1)[0], 8, output_type=kind).images)
    assert isinstance(ours["pt"], Tensor) and not ours["pt"].is_inference()
    assert agrees(fast, p, lambda q: q(2, generators(1)[0], 8, output_type="pt").images)
    assert [image.mode for image in ours["pil"]] == [image.mode for image in theirs["pil"]]
    for a, b in zip(ours["pil"], theirs["pil"]):
        # Rounding to bytes: a value near a half may fall to either side, and then differs by one.
        assert worst(np.asarray(a, int), np.asarray(b, int)) <= 1
        assert (np.asarray(a) != np.asarray(b)).mean() < 0.05


def test_the_result_is_taken_as_a_pipeline_s():
    fast = df.accelerate(pipeline(**SHORT))
    result = fast(num_inference_steps=5)
    assert result.images is result["images"] is result[0] is result.to_tuple()[0] is result[:1][0]
    assert len(result.images) == 1 and result.images[0].size == (8, 8)
    with pytest.raises(KeyError):
        result["image"]
    (images,) = fast(num_inference_steps=5, output_type="np", return_dict=False)
    assert images.shape == (1, 8, 8, 3)
    with pytest.raises(ValueError, match="one of pil, np, numpy, pt; got 'latent'"):
        fast(output_type="latent")


def test_the_progress_bar_follows_its_configuration(capsys: pytest.CaptureFixture[str]):
    p = pipeline(**SHORT)
    fast = df.accelerate(p)
    fast(num_inference_steps=20)
    assert capsys.readouterr().err == ""  # the pipeline's own setting
    fast.set_progress_bar_config(desc="drawing", ascii=True)
    watched = fast(num_inference_steps=20, generator=generators(1)[0], output_type="np").images
    assert "drawing: 100%" in (shown := capsys.readouterr().err) and "20/20" in shown
    fast.set_progress_bar_config(disable=True)
    unwatched = fast(num_inference_steps=20, generator=generators(1)[0], output_type="np").images
    assert capsys.readouterr().err == "" and (watched == unwatched).all()


def test_a_long_bar_asks_the_device_at_most_100_times(monkeypatch: pytest.MonkeyPatch):
    intervals = []
    sample = df.Sampler.sample

    def spy(self: df.Sampler, *args: Any, **kwargs: Any) -> Tensor:
        intervals.append(kwargs["interval"])
        return sample(self, *args, **kwargs)

    monkeypatch.setattr(df.Sampler, "sample", spy)
    fast = df.accelerate(pipeline())
    fast.set_progress_bar_config(leave=False)
    fast(num_inference_steps=250)
    assert intervals == [3]


def test_another_dtype_computes_in_it_and_leaves_the_pipeline_alone():
    p = pipeline(**SHORT)
    before = {k: (v.clone(), v.data_ptr()) for k, v in p.unet.state_dict().items()}
    scheduler = dict(p.scheduler.config)
    fast = df.accelerate(p, dtype=torch.float16)
    half = fast(2, generators(1)[0], 20, output_type="pt").images
    full = fast.to(torch.float32)(2, generators(1)[0], 20, output_type="pt").images
    assert half.dtype == torch.float32 and fast.dtype == torch.float32
    # Noise too is drawn in float16, which in some versions of torch is another stream than float32's.
    theirs = copy.deepcopy(p).to(torch.float16)(2, generators(1)[0], 20, output_type="np").images
    assert 1e-5 < worst(half.permute(0, 2, 3, 1), theirs) < 0.05
    assert not torch.equal(half, full)
    assert fast.to("cpu") is fast and fast.device == torch.device("cpu")
    assert p.unet.dtype == torch.float32 and p.unet.training is False
    assert all(v.data_ptr() == before[k][1] and torch.equal(v, before[k][0]) for k, v in p.unet.state_dict().items())
    assert dict(p.scheduler.config) == scheduler and p.scheduler.num_inference_steps is None


def test_the_pipeline_answers_what_is_not_drawing():
    p = pipeline(**SHORT)
    fast = df.accelerate(p)
    assert fast.unet is p.unet and fast.scheduler is p.scheduler and fast.config == p.config
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing
    with pytest.raises(AttributeError):
        _ = Accelerated.__new__(Accelerated).anything  # copy and pickle ask before there is a pipeline


# --- what is refused ---


def test_more_steps_than_the_model_knows():
    fast = df.accelerate(pipeline(**SHORT))
    with pytest.raises(ValueError, match=r"1000.*20|20.*1000"):
        fast()


def test_what_is_no_ddpm_pipeline():
    p = pipeline(**SHORT)
    with pytest.raises(ValueError, match="takes a diffusers DDPMPipeline or DDIMPipeline; got UNet2DModel"):
        df.accelerate(p.unet)
    p.scheduler = PNDMScheduler.from_config(p.scheduler.config)
    with pytest.raises(
        ValueError, match="DDPMScheduler or DDIMScheduler; this pipeline has a PNDMScheduler; to draw by DDIM, set"
    ):
        df.accelerate(p)

    with pytest.raises(ValueError, match=r"around a UNet2DModel; this one has a UNet2DConditionModel$"):
        df.accelerate(DDPMPipeline(UNet2DConditionModel(**CONDITIONED), DDPMScheduler()))


def test_diffusers_is_not_imported(monkeypatch: pytest.MonkeyPatch):
    """None in sys.modules makes any import of it fail."""
    p = pipeline(**SHORT)
    for name in [m for m in sys.modules if m.split(".")[0] == "diffusers"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        import diffusers  # noqa: F401
    assert len(df.accelerate(p)(2, num_inference_steps=2).images) == 2


# --- Sampler around a callable ---

SHAPE = (3, 6, 6)


class Home(nn.Module):
    """A home-grown network of x and t."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, outputs, 3, padding=1)
        self.time = nn.Linear(1, outputs)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(x) + self.time(t.float()[:, None] / 20).sin()[:, :, None, None]


class Lucidrains(Home):
    """As denoising_diffusion_pytorch calls its Unet: (x, time, x_self_cond=None), time int64 [N]."""

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        assert time.dtype == torch.int64 and time.shape == (len(x),), "an embedding table would refuse it"
        return super().forward(x, time)


class Guided(Home):
    """As guided-diffusion's UNetModel: (x, timesteps, y=None), 2C outputs, float timesteps when rescaled."""

    def __init__(self):
        super().__init__(6)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        assert timesteps.is_floating_point() and timesteps.shape == (len(x),)
        return super().forward(x, timesteps), {}


def by_hand(model: Any, scheduler: DDPMScheduler, n: int, seed: int, scale: float = 1.0) -> Tensor:
    """The loop that anyone writes, with diffusers' scheduler; the network's time is scale * t."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *SHAPE, generator=g)
    with torch.no_grad():
        for t in scheduler.timesteps.tolist():
            times = torch.full((n,), t) if scale == 1.0 else torch.full((n,), scale * t)
            out = model(x, times)
            out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
            x = scheduler.step(out, t, x, generator=g).prev_sample
    return x


@pytest.mark.parametrize(
    "model, options, scale",
    [
        (Home(), {}, 1.0),
        (Lucidrains(), {"variance_type": "fixed_small", "beta_schedule": "squaredcos_cap_v2"}, 1.0),
        (Guided(), {"variance_type": "learned_range"}, 1000 / 21),
        (diffusers_unet({**SMALL, "sample_size": 6}), {"variance_type": "fixed_large"}, 1.0),
    ],
    ids=["home", "lucidrains", "guided", "diffusers"],
)
def test_other_people_s_networks(model: Any, options: dict[str, Any], scale: float):
    options = {**SHORT, **options}

    def draw() -> Tensor:
        return by_hand(model, DDPMScheduler(**options), 3, 5, scale)

    sampler = df.Sampler(model, df.Schedule(**options), noise="torch", image_shape=SHAPE, time_scale=scale)
    assert same_chain(sampler.sample(3, seed=5), draw(), model, draw, TABLES)
