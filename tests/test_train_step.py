"""One training step: what it draws, what it computes, and what it refuses, against numbers worked out by hand."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_setup import CLASSES, CONFIG, COUNT, CPU, MODEL, SCHEDULE, images, trainer

from ddpm_fast import Schedule, UNet, UNetConfig
from ddpm_fast.data import ImageData
from ddpm_fast.presets import PRESETS, TrainConfig, learning_rate, preset
from ddpm_fast.training import step as train_step
from ddpm_fast.training.ema import EMA
from ddpm_fast.training.step import DIFFUSION, ORDER, Trainer, batch_index, check_fit, make_batch, stream_seed

# Batches


@pytest.mark.parametrize("batch_size", [1, 7, 8, 20, 53])  # dividing the 20 images or not, and more than all
def test_every_image_comes_once_an_epoch(batch_size: int) -> None:
    steps = math.ceil(5 * COUNT / batch_size)
    row = np.concatenate([batch_index(COUNT, batch_size, seed=3, step=k) for k in range(steps)])
    epochs = row[: 5 * COUNT].reshape(5, COUNT)
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert batch_index(COUNT, batch_size, seed=4, step=0).tolist() != row[:batch_size].tolist() or batch_size == 1


def test_a_batch_holds_its_images_in_the_models_range_and_half_of_them_mirrored() -> None:
    data, mirrored = images(), 0
    for k in range(40):
        batch = make_batch(data, replace(CONFIG, label_dropout=0.0), k, CPU)
        index = batch_index(COUNT, CONFIG.batch_size, CONFIG.seed, k)
        want = data.images[index].astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1
        for got, plain in zip(batch.x0.numpy(), want):
            flipped = np.abs(got - plain[..., ::-1]).max() < 1e-6
            assert flipped or np.abs(got - plain).max() < 1e-6
            mirrored += flipped
        assert batch.labels.tolist() == (index % CLASSES).tolist()
    n = 40 * CONFIG.batch_size
    assert abs(mirrored - n / 2) < 4 * math.sqrt(n / 4)
    unflipped = make_batch(data, replace(CONFIG, flip=False), 0, CPU).x0
    index = batch_index(COUNT, CONFIG.batch_size, CONFIG.seed, 0)
    np.testing.assert_array_equal(unflipped, torch.from_numpy(data.batch(index)).float() / 127.5 - 1)


def test_labels_become_the_null_class_as_often_as_asked() -> None:
    data, probability, dropped, places = images(), 0.25, [], []
    for k in range(200):
        labels = make_batch(data, CONFIG, k, CPU).labels.numpy()
        true = data.labels[batch_index(COUNT, CONFIG.batch_size, CONFIG.seed, k)]
        null = labels == CLASSES
        np.testing.assert_array_equal(labels[~null], true[~null])
        dropped += [null.mean()]
        places += [null]
    n = 200 * CONFIG.batch_size
    spread = math.sqrt(probability * (1 - probability) / n)
    assert abs(np.mean(dropped) - probability) < 4 * spread
    by_place = np.mean(places, axis=0)  # no position of the batch is favoured
    assert np.abs(by_place - probability).max() < 4 * spread * math.sqrt(CONFIG.batch_size)


# Algorithm 1


def drawn(trained: Trainer, k: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What step ``k`` hands to ``training_loss``, and the random state that dropout would draw from."""
    seen: dict[str, Any] = {}

    def spy(model: UNet, schedule: Schedule, x0: Tensor, **kwargs: Any) -> Tensor:
        seen.update(kwargs, x0=x0, dropout=torch.get_rng_state())
        return model.conv_in.bias.square().sum()

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "training_loss", spy)
        trained.step(k, make_batch(trained.data, trained.config, k, CPU))
    return seen


def test_every_draw_depends_on_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer()
    early = drawn(first, 0, monkeypatch)
    late = drawn(first, 5, monkeypatch)
    torch.manual_seed(99)
    torch.randn(17)
    other = drawn(trainer(lr=0.5), 5, monkeypatch)
    for name in ("x0", "t", "noise", "labels", "dropout"):
        assert torch.equal(late[name], other[name]), name
    for by, stranger in (("step", early), ("seed", drawn(trainer(seed=1), 5, monkeypatch))):
        for name in ("x0", "t", "noise", "labels", "dropout"):
            assert not torch.equal(late[name], stranger[name]), f"{name} does not depend on the {by}"


def test_the_streams_of_random_numbers_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begun with an older version must go on as it began."""
    seeds = [stream_seed(0, DIFFUSION, 0), stream_seed(0, DIFFUSION, 5), stream_seed(3, ORDER, 1)]
    assert seeds == [2494635221133837528, 1633752205898330326, 7482082633366827798]
    seen = drawn(trainer(), 5, monkeypatch)
    stream = torch.Generator().manual_seed(seeds[1])
    assert torch.equal(seen["t"], torch.randint(0, 50, (8,), generator=stream))
    assert torch.equal(seen["noise"], torch.randn(8, 3, 8, 8, generator=stream))


def test_t_is_uniform_and_noise_is_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainer(batch_size=20, lr=1e-5)
    draws = [drawn(trained, k, monkeypatch) for k in range(60)]
    t = torch.cat([d["t"] for d in draws])
    counts = torch.bincount(t, minlength=SCHEDULE.num_train_timesteps).double()
    expected = len(t) / SCHEDULE.num_train_timesteps
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == 50 and counts.min() > 0
    assert chi_squared < 85.4  # 49 degrees of freedom: exceeded once in a thousand
    noise = torch.cat([d["noise"] for d in draws]).double().flatten()
    n = len(noise)
    assert abs(noise.mean()) < 4 / math.sqrt(n)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / n)


def test_the_loss_is_equation_14_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    k, model = 4, replace(MODEL, dropout=0.0)
    seen = drawn(trainer(model=model), k, monkeypatch)
    trained, batch = trainer(model=model), make_batch(images(), CONFIG, k, CPU)
    before = copy.deepcopy(trained.model).double()
    loss, _ = trained.step(k, batch)
    betas = torch.linspace(1e-4, 0.2, 50, dtype=torch.float64)
    a = torch.cumprod(1 - betas, 0)[seen["t"]][:, None, None, None]
    x0, noise = batch.x0.double(), seen["noise"].double()
    with torch.no_grad():
        predicted = before(a.sqrt() * x0 + (1 - a).sqrt() * noise, seen["t"], batch.labels)
    want = ((noise - predicted) ** 2).mean()
    assert abs(float(loss) - float(want)) < 1e-5 * float(want)


def test_gradients_reach_every_parameter() -> None:
    trained = trainer(batch_size=20, label_dropout=0.5)
    trained.step(0, make_batch(trained.data, trained.config, 0, CPU))
    for name, parameter in trained.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # The same number added to every key cancels in the softmax: exactly zero but for rounding.
        if not name.endswith("to_k.bias"):
            assert parameter.grad.abs().max() > 1e-6, name


def test_dropout_is_at_work_and_repeats_with_its_step() -> None:
    batch = make_batch(images(), CONFIG, 0, CPU)
    without, first, again = (
        float(trainer(model=replace(MODEL, dropout=rate)).step(0, batch)[0]) for rate in (0.0, 0.2, 0.2)
    )
    assert first == again and first != without


def test_classes_and_the_null_class_are_trained() -> None:
    """Only the embeddings of labels in the batch move: Adam leaves a row with no gradient where it is."""
    data = images()
    two = ImageData(data.images, data.labels % 2, ("a", "b", "c"), source="no c")
    for label_dropout, moved in ((0.0, [True, True, False, False]), (0.5, [True, True, False, True])):
        model = replace(MODEL, num_class_embeds=CLASSES + 1)
        trained = trainer(two, model, optimizer="adam", weight_decay=0.0, label_dropout=label_dropout, batch_size=20)
        before = trained.model.class_embedding.weight.detach().clone()
        trained.step(0, make_batch(two, trained.config, 0, CPU))
        after = trained.model.class_embedding.weight.detach()
        assert (after != before).any(dim=1).tolist() == moved


def test_unlabelled_model_on_labelled_images() -> None:
    trained = trainer(model=replace(MODEL, num_class_embeds=None), label_dropout=0.0)
    loss, norm = trained.step(0, make_batch(trained.data, trained.config, 0, CPU))
    assert math.isfinite(float(loss)) and math.isfinite(float(norm))


# Optimizer, rate, average


def test_learning_rate_by_hand() -> None:
    warm = TrainConfig(lr=2.0, warmup_steps=4, steps=8)
    assert [learning_rate(warm, k) for k in range(8)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]
    cosine = replace(warm, lr_schedule="cosine")
    want = [0.5, 1.0, 1.5, 2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0]
    assert [learning_rate(cosine, k) for k in range(9)] == pytest.approx(want, abs=1e-15)
    assert learning_rate(replace(cosine, warmup_steps=0), 4) == pytest.approx(1.0)


@pytest.mark.parametrize("k", [0, 1, 4])
def test_the_optimizer_moves_by_the_rate_of_its_step(k: int) -> None:
    """Adam's first update is the rate times the gradient's sign."""
    trained = trainer(optimizer="adam", weight_decay=0.0, lr_schedule="cosine")
    before = [p.detach().clone() for p in trained.model.parameters()]
    trained.step(k, make_batch(trained.data, trained.config, k, CPU))
    moved = max(float((p.detach() - b).abs().max()) for p, b in zip(trained.model.parameters(), before))
    want = [0.005, 0.01, None, None, 0.01 * 0.5 * (1 + math.cos(math.pi * 0.5))][k]
    assert moved == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(("grad_clip", "clipped"), [(0.01, True), (1e6, False), (None, False)])
def test_gradient_clipping(grad_clip: float | None, clipped: bool) -> None:
    trained = trainer(grad_clip=grad_clip)
    _, norm = trained.step(0, make_batch(trained.data, trained.config, 0, CPU))
    left = math.sqrt(sum(float(p.grad.double().square().sum()) for p in trained.model.parameters()))
    assert left == pytest.approx(0.01 if clipped else float(norm), rel=1e-4)
    assert float(norm) > 0.05


def test_ema_by_hand_in_float64() -> None:
    rng = np.random.default_rng(0)
    layer = torch.nn.Linear(3, 2)
    ema = EMA(layer, decay=0.7)
    average = layer.weight.detach().double().numpy().copy()
    for k in range(40):
        weight = rng.standard_normal((2, 3))
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
        decay = min(0.7, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * weight.astype(np.float32)
        ema.update(layer, k)
        np.testing.assert_allclose(ema.model.weight.numpy(), average, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in ema.model.parameters()) and not ema.model.training
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\); got 1"):
        EMA(layer, decay=1)


def test_the_trainers_ema_follows_its_weights() -> None:
    trained = trainer()
    name = "mid_block.resnets.0.conv1.weight"
    average = trained.model.state_dict()[name].double().clone()
    for k in range(6):
        trained.step(k, make_batch(trained.data, trained.config, k, CPU))
        decay = min(CONFIG.ema_decay, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * trained.model.state_dict()[name].double()
    torch.testing.assert_close(trained.ema.model.state_dict()[name].double(), average, rtol=0, atol=1e-6)


def test_bf16_computes_in_bf16_and_keeps_float32_weights() -> None:
    batch = make_batch(images(), CONFIG, 0, CPU)
    plain, mixed = trainer(precision="fp32"), trainer(precision="bf16")
    seen = []
    mixed.model.time_embedding.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    exact, rounded = float(plain.step(0, batch)[0]), float(mixed.step(0, batch)[0])
    assert seen == [torch.bfloat16]
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.02)
    assert {t.dtype for t in mixed.model.parameters()} | {t.dtype for t in mixed.ema.model.parameters()} == {
        torch.float32
    }
    assert not mixed.scaler.is_enabled()


# What is refused


@pytest.mark.parametrize(
    ("model", "config", "schedule", "message"),
    [
        ({"in_channels": 1, "out_channels": 1}, {}, {}, "in_channels must be the data's channels 3; got 1"),
        ({"sample_size": 16}, {}, {}, "sample_size must be the data's 8x8; got 16"),
        ({"num_class_embeds": None}, {}, {}, "label_dropout needs a model with num_class_embeds"),
        ({"num_class_embeds": 3}, {}, {}, r"3 classes \+ 1 \(the null class, index 3\); got 3"),
        ({"num_class_embeds": 2}, {"label_dropout": 0.0}, {}, "at least the data's 3 classes; got 2"),
        ({"class_embed_type": "identity"}, {}, {}, "class_embed_type None; got 'identity'"),
        ({"out_channels": 6}, {}, {}, "L_simple trains no variance"),
        ({"block_scale_factor": 2.0}, {}, {}, "no field for sums divided by 2 .* cannot be converted"),
        ({}, {}, {"variance_type": "learned_range"}, "L_simple trains no variance.*'learned_range'"),
        ({"time_embedding_type": "fourier"}, {}, {}, "the log of t = 0"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 49}, {}, {}, "at least the schedule's 50; got 49"),
    ],
)
def test_what_does_not_fit_together(model: dict, config: dict, schedule: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fit(images(), replace(MODEL, **model), replace(SCHEDULE, **schedule), replace(CONFIG, **config))


def test_images_that_do_not_fit() -> None:
    unlabelled = ImageData(images().images, source="plain")
    with pytest.raises(ValueError, match="num_class_embeds=4 needs labelled data; plain has no labels"):
        check_fit(unlabelled, MODEL, SCHEDULE, CONFIG)
    odd = ImageData(np.zeros((2, 9, 8, 3), np.uint8), np.zeros(2, np.int64), ("a", "b", "c"))
    with pytest.raises(ValueError, match="2 levels needs images whose sides are multiples of 2; got 9x8"):
        check_fit(odd, replace(MODEL, sample_size=None), SCHEDULE, CONFIG)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("batch_size", 0, "a whole number of at least 1"),
        ("steps", 1.5, "a whole number of at least 1"),
        ("warmup_steps", -1, "a whole number of at least 0"),
        ("seed", -1, "a whole number of at least 0"),
        ("lr", 0.0, "positive"),
        ("lr", math.inf, "positive"),
        ("betas", (0.9, 1.0), r"two in \[0, 1\)"),
        ("eps", 0, "positive"),
        ("weight_decay", math.nan, "at least 0"),
        ("grad_clip", 0.0, "positive or None"),
        ("ema_decay", 1.0, r"in \[0, 1\)"),
        ("label_dropout", 1.0, r"in \[0, 1\)"),
        ("optimizer", "sgd", "one of adam, adamw"),
        ("lr_schedule", "linear", "one of constant, cosine"),
        ("precision", "int8", "one of auto, fp32, bf16, fp16"),
    ],
)
def test_wrong_settings_are_named(field: str, value: object, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"TrainConfig\.{field} must be {allowed}; got "):
        TrainConfig(**{field: value})


# Presets


@pytest.mark.parametrize(
    ("name", "size", "parameters"),
    [("cifar10", 32, 35_746_307), ("lsun256", 256, 113_673_219)],  # those of google/ddpm-cifar10-32 and ddpm-*-256
)
def test_the_papers_networks(name: str, size: int, parameters: int) -> None:
    data = ImageData(np.zeros((1, size, size, 3), np.uint8))
    with torch.device("meta"):
        model = UNet(UNetConfig(**preset(name).model_for(data)))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.norm_eps == 1e-6 and model.config.downsample_padding == 0 and not model.config.flip_sin_to_cos
    train, schedule = preset(name).train, Schedule(**preset(name).schedule)
    # Ho et al. 2020, appendix B.
    assert (train.lr, train.batch_size, train.steps, train.flip, model.config.dropout) == {
        "cifar10": (2e-4, 128, 800_000, True, 0.1),
        "lsun256": (2e-5, 64, 2_400_000, False, 0.0),  # bedrooms are the one data set without flips
    }[name]
    assert (train.optimizer, train.betas, train.grad_clip, train.ema_decay) == ("adam", (0.9, 0.999), 1.0, 0.9999)
    assert (schedule.num_train_timesteps, schedule.beta_start, schedule.beta_end) == (1000, 1e-4, 0.02)


def test_the_bundled_models_network_fits_three_megabytes() -> None:
    data = ImageData(np.zeros((1, 16, 16, 3), np.uint8))
    with torch.device("meta"):
        model = UNet(UNetConfig(**preset("tiny").model_for(data)))
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters > 500_000 and 2 * parameters < 3_000_000
    assert PRESETS["tiny"].image_size == 16 and PRESETS["tiny"].data == "avatars:pixel-art"


def test_a_preset_takes_size_channels_and_classes_from_the_data() -> None:
    data = ImageData(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4), tuple("abcd"))
    for label_dropout, classes in ((0.0, 4), (0.1, 5)):
        model = preset("tiny").model_for(data, label_dropout, layers_per_block=2)
        assert (model["sample_size"], model["in_channels"], model["out_channels"]) == (8, 1, 1)
        assert model["num_class_embeds"] == classes and model["layers_per_block"] == 2
    assert preset("tiny").with_train(lr=1.0).train == replace(PRESETS["tiny"].train, lr=1.0)
    with pytest.raises(ValueError, match=r"must be square; got 8x4"):
        preset("tiny").model_for(ImageData(np.zeros((1, 4, 8, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"no preset is called 'huge'; there are: cifar10, lsun256, tiny"):
        preset("huge")
