"""Sampler: the same images for any batch, diffusers' images for diffusers' noise, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from dropin_setup import LONG_TABLES, SHORT, SMALL, TABLES
from models import TINY, diffusers_unet, normal, unet
from tensors import rounding, same_chain
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.house_rule import check, error
from ddpm_fast.kernels.reference import INITIAL_STEP, philox_normal
from ddpm_fast.sampler import DTYPES

ONE_LEVEL: dict[str, Any] = {
    **SMALL,
    "block_out_channels": (4,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "mid_block_type": None,
}
SCHEDULE = df.Schedule(**SHORT)
SHAPE = (3, 4, 4)


def pictures(x: Tensor) -> Tensor:
    """[-1, 1] -> the pipelines' [0, 1]."""
    return (x / 2 + 0.5).clamp(0, 1)


def pipeline(config: dict[str, Any], kind: Any = DDPMPipeline, scheduler: Any = DDPMScheduler, **options: Any) -> Any:
    p = kind(diffusers_unet(config), scheduler(**options))
    p.set_progress_bar_config(disable=True)
    return p


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


def half(x: Tensor, t: Tensor) -> Tensor:
    """A callable that depends on x and t, elementwise: exactly the same in any batch."""
    return 0.5 * x + 0.01 * t.to(x.dtype)[:, None, None, None]


def plain(**kwargs: Any) -> df.Sampler:
    return df.Sampler(half, SCHEDULE, **{"image_shape": SHAPE, **kwargs})


# --- diffusers' noise, diffusers' images ---


def agrees(sampler: df.Sampler, p: Any, draw: Callable[[], Any], n: int, tables: float = TABLES, **kwargs: Any) -> bool:
    """Whether the Sampler draws the images of the pipeline ``p``, which are ``draw()``."""
    return same_chain(pictures(sampler.sample(n, **kwargs)), draw(), p.unet, draw, tables)


def test_1000_steps_with_a_list_of_generators_in_any_batches():
    p = pipeline(ONE_LEVEL, variance_type="fixed_large")
    schedule = df.Schedule(variance_type="fixed_large")
    sampler = df.Sampler(unet(ONE_LEVEL), schedule, batch_size=2, noise=generators(4, 5, 6))
    assert agrees(sampler, p, lambda: p(3, generators(4, 5, 6), output_type="pt").images, 3, LONG_TABLES)


def test_one_generator_goes_on_from_batch_to_batch():
    p = pipeline(SMALL, **SHORT)

    def draw() -> Tensor:
        g = generators(7)[0]
        return torch.cat([p(n, g, 20, output_type="pt").images for n in (2, 1)])

    for noise in (generators(7)[0], generators(7)):
        assert agrees(df.Sampler(unet(SMALL), SCHEDULE, batch_size=2, noise=noise), p, draw, 3)


@pytest.mark.parametrize(
    "options, n",
    [
        ({}, 10),
        ({"timestep_spacing": "trailing", "variance_type": "fixed_large"}, 7),
        ({"timestep_spacing": "linspace", "prediction_type": "v_prediction"}, 12),
        ({"steps_offset": 1, "variance_type": "fixed_small_log"}, 10),
        ({"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "thresholding": True}, 20),
        ({"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True, "clip_sample_range": 0.8}, 20),
    ],
)
def test_respaced_chains_are_the_pipeline_s(options: dict[str, Any], n: int):
    options = {**SHORT, **options}
    p = pipeline(SMALL, **options)
    sampler = df.Sampler(unet(SMALL), df.Schedule(**options), steps=n, noise="torch")
    assert agrees(sampler, p, lambda: p(2, generators(3)[0], n, output_type="pt").images, 2, seed=3)


@pytest.mark.parametrize("variance", ["learned_range", "learned"])
def test_a_learned_variance_is_the_pipeline_s(variance: str):
    config = {**SMALL, "out_channels": 6}
    theirs, ours = diffusers_unet(config), unet(config)
    if variance == "learned":  # a variance is positive: 0.3, and 0.03 of what the network says
        for m in (theirs, ours):
            with torch.no_grad():
                m.conv_out.weight[3:] *= 0.03
                m.conv_out.bias[3:] = 0.3
    p = DDPMPipeline(theirs, DDPMScheduler(**SHORT, variance_type=variance))
    p.set_progress_bar_config(disable=True)
    sampler = df.Sampler(ours, df.Schedule(**SHORT, variance_type=variance), noise="torch")
    assert agrees(sampler, p, lambda: p(2, generators(3)[0], 20, output_type="pt").images, 2, seed=3)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_the_pipeline_s(eta: float):
    p = pipeline(SMALL, DDIMPipeline, DDIMScheduler, **SHORT)

    def draw() -> Tensor:
        return p(2, generators(3)[0], eta, num_inference_steps=10, output_type="pt").images

    sampler = df.Sampler(unet(SMALL), SCHEDULE, steps=10, method="ddim", eta=eta, noise="torch")
    assert agrees(sampler, p, draw, 2, seed=3)


def test_ddim_reads_the_first_half_of_a_learned_variance_network():
    config = {**SMALL, "out_channels": 6}
    model, exact = unet(config), unet(config).double()
    mean_only = df.Sampler(
        lambda x, t: exact(x.double(), t)[:, :3].float(), SCHEDULE, method="ddim", image_shape=(3, 8, 8)
    )
    schedule = df.Schedule(**SHORT, variance_type="learned_range")
    got = df.Sampler(model, schedule, method="ddim").sample(2)
    assert same_chain(got, mean_only.sample(2), exact, lambda: mean_only.sample(2))


@pytest.mark.parametrize(
    "kind", [{"num_class_embeds": 4}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"}]
)
def test_class_labels(kind: dict[str, Any]):
    """DDPMPipeline passes no labels, so: its loop, with them."""
    config = {**SMALL, **kind}
    theirs, scheduler = diffusers_unet(config), DDPMScheduler(**SHORT)
    labels = normal(3, 16, seed=8) if kind == {"class_embed_type": "identity"} else torch.tensor([3, 0, 2])
    scheduler.set_timesteps(20)

    @torch.no_grad()
    def draw() -> Tensor:
        g = generators(5, 6, 7)
        x = torch.cat([torch.randn(1, 3, 8, 8, generator=one) for one in g])
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t, labels).sample, t, x, generator=g).prev_sample
        return x

    sampler = df.Sampler(unet(config), SCHEDULE, batch_size=2, noise=generators(5, 6, 7))
    assert same_chain(sampler.sample(3, labels=labels), draw(), theirs, draw, TABLES)


def test_one_label_for_all_and_a_list():
    model = unet({**SMALL, "num_class_embeds": 4})
    sampler = df.Sampler(model, SCHEDULE)
    assert sampler.num_classes == 4
    one = sampler.sample(2, labels=3)
    assert torch.equal(one, sampler.sample(2, labels=[3, 3]))
    mixed = sampler.sample(2, labels=[3, 1])
    assert torch.equal(mixed[0], one[0]), "sums are taken in the same order, whatever the neighbour's values"
    assert (mixed[1] - one[1]).abs().max() > 1e-2


# --- noise by (seed, id, step) ---


def test_a_chain_by_hand_with_the_counter_s_noise():
    """x_T and every z are reference.philox_normal at (seed, id, step), and each step is the schedule's."""
    seed, first_id = 12, 5
    ids, key = torch.arange(first_id, first_id + 3), torch.tensor([seed])
    x = philox_normal(key, ids, torch.tensor([INITIAL_STEP]), SHAPE).double()
    for i, t in enumerate(range(19, -1, -1)):
        z = philox_normal(key, ids, torch.tensor([i]), SHAPE).double()
        x = SCHEDULE.step(half(x, torch.full((3,), t)), t, x, z)
    got = plain().sample(3, seed, first_id=first_id)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), x, rtol=0, atol=5e-6)


def test_noise_does_not_depend_on_the_batch():
    """Elementwise arithmetic on the same noise: the same bits, whole batches, partial ones, and one by one."""
    whole = plain(batch_size=7).sample(7)
    assert len({float(x[0, 0, 0]) for x in whole}) == 7
    for batch_size in (1, 2, 3, 64):
        assert torch.equal(plain(batch_size=batch_size).sample(7), whole)
    assert torch.equal(plain(batch_size=2).sample(3, first_id=4), whole[4:])


def rounding_of_one(n: int, seed: int = 0) -> float:
    """What rounding may do to n samples of SMALL: each image's convolutions may sum in another order."""
    theirs = diffusers_unet(SMALL)
    sampler = df.Sampler(theirs, SCHEDULE, image_shape=(3, 8, 8))
    return rounding(theirs, lambda: sampler.sample(n, seed=seed), sampler.sample(n, seed=seed))


def test_a_network_gives_the_same_set_for_any_batch_size():
    """float32 convolutions may sum in another order for another batch."""
    model, bound = unet(SMALL), rounding_of_one(5, seed=2)
    whole = df.Sampler(model, SCHEDULE).sample(5, seed=2)
    for batch_size in (1, 2, 5):
        got = df.Sampler(model, SCHEDULE, batch_size=batch_size).sample(5, seed=2)
        torch.testing.assert_close(got, whole, rtol=0, atol=bound)
    got = df.Sampler(model, SCHEDULE, batch_size=2).sample(2, seed=2, first_id=3)
    torch.testing.assert_close(got, whole[3:], rtol=0, atol=bound)


def test_long_and_negative_seeds_and_far_ids():
    sampler = plain()
    base = sampler.sample(1, seed=5)
    for seed in (2**63 + 5, 2**64 - 1, 2**32 + 5, -5):
        assert not torch.equal(sampler.sample(1, seed=seed), base)
    for seed in (2**64, 2**64 + 5, -(2**63) - 1):  # a seed is 64 bits: none wraps round
        with pytest.raises(ValueError, match=rf"seed must be in \[-2\*\*63, 2\*\*64\).*; got {seed}$"):
            sampler.sample(1, seed=seed)
    assert torch.equal(sampler.sample(1, seed=-1), sampler.sample(1, seed=2**64 - 1))
    far = sampler.sample(2, seed=5, first_id=2**33 - 1)
    assert torch.equal(far[1:], sampler.sample(1, seed=5, first_id=2**33))
    assert not torch.equal(far[1:], base)  # the id's high word counts
    sampler.sample(1, first_id=2**63 - 1)  # the last there is
    with pytest.raises(ValueError, match=r"2\*\*63\); got first_id=9223372036854775807 and n=2"):
        sampler.sample(2, first_id=2**63 - 1)


def test_the_same_seed_twice_and_other_seeds():
    sampler = df.Sampler(unet(SMALL), SCHEDULE)
    first = sampler.sample(2, seed=4)
    assert torch.equal(sampler.sample(2, seed=4), first)
    assert not torch.equal(sampler.sample(2, seed=5), first)
    state = torch.get_rng_state()
    sampler.sample(1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's stream is not drawn from


def test_none_and_one():
    sampler = df.Sampler(unet(SMALL), SCHEDULE, batch_size=4)
    assert sampler.sample(0).shape == (0, 3, 8, 8)
    torch.testing.assert_close(sampler.sample(1), sampler.sample(2)[:1], rtol=0, atol=rounding_of_one(2))


# --- the loop ---


@pytest.mark.parametrize("interval, moments", [(1, list(range(21))), (6, [0, 6, 12, 18, 20]), (50, [0, 20])])
def test_callback_moments_and_values(interval: int, moments: list[int]):
    seen: list[tuple[int, Tensor]] = []
    x = plain(batch_size=2).sample(3, callback=lambda step, x: seen.append((step, x.clone())), interval=interval)
    assert [s for s, _ in seen] == 2 * moments
    assert [len(x) for _, x in seen] == [2] * len(moments) + [1] * len(moments)
    first, second = seen[: len(moments)], seen[len(moments) :]
    key = torch.tensor([0])
    assert torch.equal(first[0][1], philox_normal(key, torch.arange(2), torch.tensor([INITIAL_STEP]), SHAPE))
    assert torch.equal(torch.cat((first[-1][1], second[-1][1])), x)
    if interval == 6:  # after 18 steps comes t = 1
        y = first[-2][1].double()
        for i, t in ((18, 1), (19, 0)):
            z = philox_normal(key, torch.arange(2), torch.tensor([i]), SHAPE).double()
            y = SCHEDULE.step(half(y, torch.full((2,), t)), t, y, z)
        torch.testing.assert_close(x[:2].double(), y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("interval", [1, 6])
def test_progress_counts_every_step_of_every_batch(interval: int, monkeypatch: pytest.MonkeyPatch):
    bars: list[Any] = []

    class Bar:
        def __init__(self, total: int, **kwargs: Any):
            self.total, self.n = total, 0
            bars.append(self)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *args: object) -> None:
            pass

        def update(self, n: int) -> None:
            self.n += n

    monkeypatch.setattr("ddpm_fast.progress.Bar", Bar)
    plain(batch_size=2).sample(3, progress=True, interval=interval)
    plain().sample(1)
    assert [(b.total, b.n) for b in bars] == [(40, 40)]  # the second call, without progress, made none


def test_the_progress_bar_is_on_stderr(capsys: pytest.CaptureFixture[str]):
    plain().sample(2, progress=True)
    out, err = capsys.readouterr()
    first, last = err.splitlines()  # no terminal, so lines of a log
    assert out == "" and "2 images:   0%" in first and "2 images: 100%" in last and "20/20" in last and "\r" not in err


def test_in_a_terminal_the_progress_bar_moves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ddpm_fast.progress.animated", lambda: True)
    plain().sample(2, progress=True)
    err = capsys.readouterr().err
    assert err.startswith("\r2 images:   0%") and err.count("\r") > 1 and err.count("\n") == 1


def test_the_user_s_model_is_not_changed():
    model = unet(SMALL).train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sampler = df.Sampler(model, SCHEDULE, dtype=torch.bfloat16)
    sampler.sample(1)
    assert model.training and all(m.training for m in model.modules())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(before["conv_in.weight"]))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) and value.stride() == before[key].stride()
    with torch.no_grad():  # and later changes to it are not the sampler's
        old = sampler.sample(1)
        model.conv_out.bias += 1
    assert torch.equal(sampler.sample(1), old)


def test_dropout_is_off():
    config = {**SMALL, "dropout": 0.5}
    model = unet(config)
    expected = df.Sampler(model.eval(), SCHEDULE).sample(1)
    assert torch.equal(df.Sampler(model.train(), SCHEDULE).sample(1), expected)


@pytest.mark.parametrize("t", [19, 12, 5, 0])
def test_bfloat16_keeps_the_house_rule(t: int):
    """One step from the same x_t: a loop whose network is upstream's in bfloat16 has torch's error, x_t in float32.

    In a chain of several steps rounding compounds, and twice torch's error would be nobody's bound.
    """
    theirs = diffusers_unet(SMALL).bfloat16()
    exact, shape = diffusers_unet(SMALL).double(), {"image_shape": (3, 8, 8)}

    def drawn(model: Any, **options: Any) -> Tensor:
        return df.Sampler(model, SCHEDULE, steps=[t], **options).sample(4)

    truth = drawn(lambda x, t: exact(x.double(), t).sample.float(), **shape).double()
    got, torchs = drawn(unet(SMALL), dtype=torch.bfloat16), drawn(lambda x, t: theirs(x.bfloat16(), t), **shape)
    check(got, torchs, truth)
    assert error(got, truth).rms > 1e-4, "that was not bfloat16"


# --- models of others ---


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.factor * x + 0.01 * t.to(x.dtype)[:, None, None, None]


@pytest.mark.parametrize(
    "model",
    [
        Module(),
        lambda x, t: (half(x, t), "more"),
        lambda x, t: [half(x, t)],
        lambda x, t: SimpleNamespace(sample=half(x, t)),
    ],
    ids=["module", "tuple", "list", "sample"],
)
def test_any_callable(model: Any):
    got = df.Sampler(model, SCHEDULE, image_shape=SHAPE).sample(2, seed=1)
    torch.testing.assert_close(got, plain().sample(2, seed=1), rtol=0, atol=1e-6)


def test_a_callable_sees_every_timestep_and_float32():
    seen: list[tuple[list[int], torch.dtype]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((t.tolist(), x.dtype))
        return half(x, t)

    df.Sampler(model, SCHEDULE, steps=[17, 4, 1], image_shape=SHAPE).sample(2)
    assert seen == [([t, t], torch.float32) for t in (17, 4, 1)]


def test_a_callable_with_labels():
    sampler = df.Sampler(lambda x, t, y: half(x, t) + y[:, None, None, None], SCHEDULE, image_shape=SHAPE)
    shifted = df.Sampler(lambda x, t: half(x, t) + 2, SCHEDULE, image_shape=SHAPE).sample(2)
    assert torch.equal(sampler.sample(2, labels=[2, 2]), shifted)


def test_a_diffusers_model_is_a_callable():
    got = df.Sampler(diffusers_unet(SMALL), SCHEDULE, image_shape=(3, 8, 8)).sample(2)
    torch.testing.assert_close(got, df.Sampler(unet(SMALL), SCHEDULE).sample(2), rtol=0, atol=rounding_of_one(2))


def test_image_shape_overrides_the_model_s_size():
    assert df.Sampler(unet(SMALL), SCHEDULE, steps=2, image_shape=(3, 4, 12)).sample(1).shape == (1, 3, 4, 12)
    assert df.Sampler(unet({**SMALL, "sample_size": (4, 6)}), SCHEDULE, steps=2).sample(1).shape == (1, 3, 4, 6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size must be a positive integer or 'auto'; got 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive integer or 'auto'; got 1.5"),
        ({"dtype": torch.float64}, "dtype must be one of float32, bfloat16, float16; got torch.float64"),
        ({"graph": "yes"}, "graph must be .*; got 'yes'"),
        ({"ops": "cuda"}, "ops must be .*; got 'cuda'"),
        (
            {"noise": "white"},
            "noise must be 'philox', 'torch', a torch.Generator or a list of one an image; got 'white'",
        ),
        (
            {"method": "heun"},
            "method must be one of ddpm, ddim, ancestral_sampling, euler_maruyama, reverse_diffusion; got 'heun'",
        ),
        ({"steps": 21}, "steps must be between 1 and num_train_timesteps=20; got 21"),
        ({"image_shape": None}, r"image_shape=\(C, H, W\) is needed: the model does not state its image size"),
    ],
)
def test_what_does_not_fit_together(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plain(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n": -1}, "n must be 0 or more; got -1"),
        ({"n": 2, "interval": 0}, "interval must be 1 or more; got 0"),
        ({"n": 2, "labels": [1]}, "labels must be one number, or one an image; got 1 for n=2"),
        ({"n": 2, "labels": [0, 4]}, r"labels must be in 0\.\.3; got 0\.\.4"),
        ({"n": 2, "labels": -1}, r"labels must be in 0\.\.3; got -1$"),
        ({"n": 2}, r"this model has 4 classes \(0 to 3\): pass labels"),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], message: str):
    sampler = df.Sampler(unet({**ONE_LEVEL, "num_class_embeds": 4}), SCHEDULE)
    with pytest.raises(ValueError, match=message):
        sampler.sample(**arguments)


def test_labels_for_a_model_without_classes():
    sampler = df.Sampler(unet(ONE_LEVEL), SCHEDULE)
    assert sampler.checked_labels(None, 3) is None
    with pytest.raises(ValueError, match="this model has no classes, so it takes no labels"):
        sampler.sample(1, labels=0)


def test_the_fused_set_complains_of_the_device_at_once(monkeypatch: pytest.MonkeyPatch):
    """Not when a set of images has been begun."""
    pytest.importorskip("triton")
    from ddpm_fast.kernels import launch

    df.Sampler(unet(ONE_LEVEL), SCHEDULE, device="cpu", ops="triton")  # in the interpreter any device will do
    monkeypatch.setattr(launch, "triton", SimpleNamespace(JITFunction=object))
    with pytest.raises(RuntimeError, match="the fused kernels need CUDA tensors; got cpu"):
        df.Sampler(unet(ONE_LEVEL), SCHEDULE, device="cpu", ops="triton")


def test_an_image_that_the_network_cannot_halve_is_refused_at_once():
    with pytest.raises(ValueError, match="multiples of 2; got 7x8"):
        df.Sampler(unet(TINY), SCHEDULE, image_shape=(3, 7, 8))


def test_labels_are_checked_without_drawing(monkeypatch: pytest.MonkeyPatch):
    """What a command asks before it begins a set: the same answers and complaints as of `sample`, and nothing drawn."""
    sampler = df.Sampler(unet({**ONE_LEVEL, "num_class_embeds": 4}), SCHEDULE)
    monkeypatch.setattr(sampler, "_program", None)
    assert [sampler.checked_labels(given, 2).tolist() for given in (3, [0, 3], torch.tensor([2, 1]))] == [
        [3, 3],
        [0, 3],
        [2, 1],
    ]
    for given, message in (
        (None, "4 classes \\(0 to 3\\): pass labels"),
        (4, r"in 0\.\.3; got 4$"),
        ([1], "got 1 for n=2"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler.checked_labels(given, 2)


def test_generators_are_counted_before_anything_is_drawn():
    calls: list[int] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return half(x, t)

    sampler = df.Sampler(model, SCHEDULE, batch_size=2, noise=generators(1, 2, 3), image_shape=SHAPE)
    with pytest.raises(ValueError, match="a list of generators needs one an image; got 3 for n=5"):
        sampler.sample(5)
    assert calls == []


@pytest.mark.parametrize(
    "variance, channels, wanted", [("fixed_small", 6, 3), ("learned_range", 3, 6), ("fixed_large", 4, 3)]
)
def test_a_wrong_output_shape(variance: str, channels: int, wanted: int):
    schedule = df.Schedule(**SHORT, variance_type=variance)
    sampler = df.Sampler(lambda x, t: torch.zeros(len(x), channels, 4, 4), schedule, image_shape=SHAPE)
    match = rf"output must be \[2, {wanted}, 4, 4\] for a schedule with .*variance_type; got \[2, {channels}, 4, 4\]"
    with pytest.raises(ValueError, match=match):
        sampler.sample(2)


def test_to_uint8_rounds_as_diffusers_pictures_do():
    """Every value from -1.2 to 1.2 in steps of 1 / 2550: ties to even, and clipped."""
    x = torch.linspace(-1.2, 1.2, 6121)[:6120].reshape(1, 3, 40, 51)
    arrays = pictures(x).permute(0, 2, 3, 1).numpy()
    (image,) = DDPMPipeline.numpy_to_pil(arrays)
    assert np.array_equal(df.to_uint8(x)[0].numpy(), np.asarray(image))
    ties = torch.tensor([(k + 0.5) / 255 * 2 - 1 for k in range(255)]).double().reshape(1, 1, 1, 255)
    got = df.to_uint8(ties).flatten().tolist()
    assert all(abs(v - (k + 0.5)) == 0.5 for k, v in enumerate(got))
    assert df.to_uint8(torch.zeros(2, 1, 3, 5)).unique().tolist() == [128]  # 127.5 to even


def test_every_dtype_of_the_command_line_samples():
    for dtype in DTYPES.values():
        x = df.Sampler(unet(ONE_LEVEL), SCHEDULE, steps=3, dtype=dtype).sample(1)
        assert x.dtype == torch.float32 and x.isfinite().all() and x.abs().max() <= 1 + 1e-6
