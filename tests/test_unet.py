"""UNet against diffusers' UNet2DModel in the same process: keys both ways, outputs, gradients."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from models import TINY, diffusers_unet, normal, unet
from torch import Tensor

from ddpm_fast.config import UNetConfig
from ddpm_fast.diffusion import training_loss
from ddpm_fast.house_rule import check
from ddpm_fast.ops import reference
from ddpm_fast.schedule import Schedule
from ddpm_fast.unet import ResnetBlock, TimeRows, UNet, sinusoid

GOOGLE: dict[str, Any] = {
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
}
CIFAR10: dict[str, Any] = {
    **GOOGLE,
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
LSUN256: dict[str, Any] = {
    **GOOGLE,
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}
ATTENTION_AT_EACH = {
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
}
RESNET_BLOCKS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
}
THREE_LEVELS = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
# As google/ncsnpp-celebahq-256 and the like are, at a quarter of the width and three of the seven levels.
NCSNPP: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "time_embedding_type": "fourier",
    "layers_per_block": 2,
    "attention_head_dim": None,
    "norm_num_groups": None,
    "norm_eps": 1e-6,
    "mid_block_scale_factor": 2**0.5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": TINY,
    "google": {**TINY, **GOOGLE, "layers_per_block": 2},
    "lsun256_at_a_quarter": {**LSUN256, "block_out_channels": (32, 32, 64, 64, 128, 128), "sample_size": 64},
    "three_levels": {**TINY, **THREE_LEVELS, "layers_per_block": 2, "sample_size": 12},
    "resnet_blocks": {**TINY, **RESNET_BLOCKS, "downsample_padding": 0},
    "attention_with_resnet_resampling": {
        **TINY,
        **ATTENTION_AT_EACH,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "scale_shift": {**TINY, **THREE_LEVELS, "resnet_time_scale_shift": "scale_shift"},
    "scale_shift_resnet_blocks": {**TINY, **RESNET_BLOCKS, "resnet_time_scale_shift": "scale_shift"},
    "scale_shift_normed_attention": {**TINY, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "own_groups_in_the_mid_block": {**TINY, "attn_norm_num_groups": 8},
    "heads_that_do_not_divide": {**TINY, **ATTENTION_AT_EACH, "attention_head_dim": 7, "norm_num_groups": 2},
    "mid_scale_factor": {**TINY, "mid_block_scale_factor": 1.7},
    "no_mid_attention": {**TINY, "add_attention": False},
    "no_mid_block": {**TINY, "mid_block_type": None},
    "fourier": {**TINY, "time_embedding_type": "fourier"},
    "learned_time": {**TINY, "time_embedding_type": "learned", "num_train_timesteps": 100},
    "time_width": {**TINY, "time_embedding_dim": 24, "flip_sin_to_cos": False, "freq_shift": 0.5},
    "odd_width": {**TINY, "block_out_channels": (9, 15), "norm_num_groups": 3, "attention_head_dim": 5},
    "classes": {**TINY, "num_class_embeds": 5},
    "class_timestep": {**TINY, "class_embed_type": "timestep"},
    "class_identity": {**TINY, "class_embed_type": "identity"},
    "fourier_class_timestep": {**TINY, "time_embedding_type": "fourier", "class_embed_type": "timestep"},
    "centred_grey_learned_variance": {**TINY, "in_channels": 1, "out_channels": 2, "center_input_sample": True},
    "gelu": {**TINY, "act_fn": "gelu"},
    "mish": {**TINY, "act_fn": "mish", "resnet_time_scale_shift": "scale_shift"},
    "relu": {**TINY, "act_fn": "relu", "layers_per_block": 3},
    "dropout": {**TINY, "dropout": 0.3},
    "one_level": {
        **TINY,
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
    "wide": {**TINY, "sample_size": (8, 14)},
    "ncsnpp": NCSNPP,
    "skip_blocks_all_with_attention": {
        **NCSNPP,
        "block_out_channels": (32, 96),  # of 32 groups, 24 and, by upstream's slip, 32
        "down_block_types": ("AttnSkipDownBlock2D",) * 2,
        "up_block_types": ("AttnSkipUpBlock2D",) * 2,
        "time_embedding_type": "positional",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 4,
        "attention_head_dim": 16,
        "sample_size": (4, 12),
        "center_input_sample": True,
        "num_class_embeds": 5,
        "act_fn": "gelu",
    },
    "skip_blocks_beside_others": {
        **TINY,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D", "SkipDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "SkipUpBlock2D", "SkipUpBlock2D"),
    },
    "a_last_skip_block_alone": {**TINY, "up_block_types": ("AttnUpBlock2D", "SkipUpBlock2D"), "out_channels": 6},
}


def inputs(config: dict[str, Any], n: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Any]:
    """(x, t, labels) that fit a configuration."""
    size = config["sample_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    x = normal(n, config.get("in_channels", 3), height, width, seed=1, dtype=dtype)
    t = torch.tensor([7, 42][:n])
    labels: Any = None
    if config.get("class_embed_type") == "timestep":
        labels = torch.tensor([3, 11][:n])
    elif config.get("class_embed_type") == "identity":
        labels = normal(n, 4 * config["block_out_channels"][0], seed=2, dtype=dtype)
    elif config.get("num_class_embeds"):
        labels = torch.tensor([0, 4][:n])
    return x, t, labels


def relative_error(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    return float((y - expected).abs().max() / expected.square().mean().sqrt())


def in_float64(theirs: Any) -> Any:
    """A float64 copy of a UNet2DModel. There, upstream casts t's sinusoid, and not the labels'."""
    exact = copy.deepcopy(theirs).double()
    exact.time_proj.register_forward_hook(lambda module, given, out: out.double())
    return exact


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_outputs_and_keys_are_upstream_s(name: str):
    """By the house rule: two right float32 networks each differ from float64, and so from one another."""
    config = CONFIGS[name]
    theirs = diffusers_unet(config)
    ours = UNet(UNetConfig(**config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t, labels = inputs(config)
    expected = theirs(x, t, labels).sample
    wide = labels.double() if labels is not None and labels.is_floating_point() else labels
    check(ours(x, t, labels), expected, in_float64(theirs)(x.double(), t, wide).sample)

    back = diffusers.UNet2DModel(**config).eval()  # other weights, until ours come
    back.load_state_dict(ours.state_dict(), strict=True)
    assert torch.equal(back(x, t, labels).sample, expected)


@pytest.mark.parametrize("name", ["google", "three_levels", "scale_shift", "fourier", "learned_time", "wide"])
@torch.no_grad()
def test_float64_and_one_timestep_for_all(name: str):
    """Upstream's sinusoid stays float32 in a float64 model; so does ours, cast to the model's dtype after it."""
    config = CONFIGS[name]
    theirs, ours = diffusers_unet(config).double(), unet(config).double()
    x, _, labels = inputs(config, dtype=torch.float64)
    y = ours(x, 42, labels)
    assert y.dtype == torch.float64
    assert relative_error(y, theirs(x, 42, labels).sample) <= 1e-12
    assert torch.equal(ours(x, torch.tensor(42), labels), y)
    assert torch.equal(ours(x, torch.tensor([42]), labels), y)


@torch.no_grad()
def test_google_cifar10_at_full_width():
    theirs = diffusers.UNet2DModel(**CIFAR10).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.01)
    ours = UNet(UNetConfig(**CIFAR10)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t, _ = inputs(CIFAR10, n=1)
    check(ours(x, t), theirs(x, t).sample, in_float64(theirs)(x.double(), t).sample)


@pytest.mark.parametrize("config, parameters", [(CIFAR10, 35_746_307), (LSUN256, 113_673_219)])
def test_the_released_models_sizes_and_keys(config: dict[str, Any], parameters: int):
    with torch.device("meta"):
        ours, theirs = UNet(UNetConfig(**config)), diffusers.UNet2DModel(**config)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    shapes = [{k: tuple(v.shape) for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", [n for n in CONFIGS if "lsun" not in n])
@torch.no_grad()
def test_a_time_table_gives_what_the_timestep_gives(name: str):
    """`run` on a row of `time_table` equals `forward` on its timestep: the engine's way is the plain way.

    In float64, since the one row and the batch of rows are summed in different orders.
    """
    config = CONFIGS[name]
    model = unet(config).double()
    x, _, labels = inputs(config, dtype=torch.float64)
    chain = torch.tensor([90, 42, 7])
    expected = model(x, 42, labels)
    counter = torch.tensor([1, 0], dtype=torch.int32)
    if labels is None:
        time = TimeRows(table=model.time_table(chain), row=counter, t=chain)
        blocks = model.residual_blocks()
        assert time.table.shape == (3, blocks[-1].time_slice.stop)
        assert [b.time_slice.start for b in blocks[1:]] == [b.time_slice.stop for b in blocks[:-1]]
    else:  # one row an image
        t = torch.full((2,), 42)
        time = TimeRows(table=model.time_table(t, labels), t=t)
    assert relative_error(model.run(x, time), expected) <= 1e-12
    if labels is None:
        counter += 1
        assert relative_error(model.run(x, time), model(x, 7)) <= 1e-12  # the row is read when it is needed


@pytest.mark.parametrize("channels, shift, flip", [(8, 0, True), (8, 1, False), (7, 0, False), (6, 0.5, True)])
def test_sinusoid(channels: int, shift: float, flip: bool):
    """Against its formula in float64; float32 costs an angle of t up to t * 2^-24."""
    t = torch.tensor([0.0, 1.0, 37.5, 999.0], dtype=torch.float64)
    half = channels // 2
    angle = t[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - shift))
    parts = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
    expected = torch.cat(parts + [torch.zeros(4, channels % 2, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(sinusoid(t, channels, shift, flip), expected, rtol=0, atol=1e-12)
    got = sinusoid(t.float(), channels, shift, flip)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() <= 4 * 999 * 2.0**-24


@pytest.mark.parametrize("name", [n for n in CONFIGS if "lsun" not in n])
def test_gradients_flow_to_every_parameter(name: str):
    config = {**CONFIGS[name], "dropout": 0.0}
    model = unet(config).train()
    schedule = Schedule(num_train_timesteps=100)
    x, t, labels = inputs(config)
    noise = normal(*x.shape, seed=3)
    training_loss(model, schedule, x, t, noise, labels).backward()
    for key, p in model.named_parameters():
        if not p.requires_grad:
            assert key == "time_proj.weight" and config["time_embedding_type"] == "fourier"
            continue
        assert p.grad is not None and p.grad.isfinite().all(), key
        if key.endswith("to_k.bias"):  # a constant added to all scores of a pixel drops out of the softmax
            assert p.grad.abs().max() < 1e-6, key
        else:
            assert p.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["google", "scale_shift", "attention_with_resnet_resampling", "classes"])
def test_gradients_are_upstream_s(name: str):
    config = CONFIGS[name]
    theirs, ours = diffusers_unet(config), unet(config)
    exact = in_float64(theirs)
    x, t, labels = inputs(config)
    target = normal(2, 3, x.shape[2], x.shape[3], seed=3)
    ((ours(x, t, labels) - target) ** 2).mean().backward()
    ((theirs(x, t, labels).sample - target) ** 2).mean().backward()
    ((exact(x.double(), t, labels).sample - target.double()) ** 2).mean().backward()
    named = [dict(m.named_parameters()) for m in (ours, theirs, exact)]
    assert named[0].keys() == named[1].keys()
    # As one vector: the gradients of some biases are zero but for rounding, and would be judged by their own size.
    check(*(torch.cat([p[key].grad.flatten() for key in named[0]]) for p in named))


def test_dropout_is_for_training_only():
    """Between norm2's activation and conv2: the rest of the elements are scaled by 1 / (1 - p)."""
    config = UNetConfig(**{**CONFIGS["dropout"], "dropout": 0.5})
    torch.manual_seed(0)
    block = ResnetBlock(config, 8, 8).train()
    with torch.no_grad():
        block.conv2.weight.zero_()
        block.conv2.weight[:, :, 1, 1] = torch.eye(8)
        block.conv2.bias.zero_()
    x, emb = normal(1, 8, 16, 16), normal(1, config.time_width, seed=1)
    time = TimeRows(emb)
    with torch.no_grad():
        whole = block.eval()(reference(), x, None, time) - x
        dropped = block.train()(reference(), x, None, time) - x
    kept = (dropped - 2 * whole).abs() <= 1e-5
    zero = dropped.abs() <= 1e-6
    assert (kept | zero).all()
    # 2048 elements kept with probability 1/2: a standard deviation of 22.6; five of them
    assert abs(int(zero.sum()) - 1024) < 113


def test_low_precision_keeps_the_model_s_dtype():
    config = CONFIGS["google"]
    x, t, _ = inputs(config)
    exact = unet(config).double()(x.double(), t)
    y = unet(config).bfloat16()(x, t)
    assert y.dtype == torch.bfloat16
    theirs = diffusers_unet(config).bfloat16()(x.bfloat16(), t).sample
    check(y, theirs, exact)


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (1, 3, 8, 15), (1, 3, 1, 1)])
def test_odd_sizes_are_refused(shape: tuple[int, ...]):
    match = f"UNet halves the image 1 times, so H and W must be multiples of 2; got {shape[2]}x{shape[3]}"
    with pytest.raises(ValueError, match=match):
        unet(TINY)(torch.zeros(shape), 1)


@pytest.mark.parametrize(
    "x, t, labels, match",
    [
        (torch.zeros(2, 4, 8, 8), 1, None, r"UNet needs x of shape \[N, 3, H, W\]; got \(2, 4, 8, 8\)"),
        (torch.zeros(3, 8, 8), 1, None, r"UNet needs x of shape \[N, 3, H, W\]; got \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), torch.tensor([1, 2, 3]), None, "one timestep, or one an image; got 3 for 2 images"),
        (torch.zeros(2, 3, 8, 8), 1, torch.tensor([0, 1]), "no classes .* takes no labels"),
    ],
)
def test_wrong_inputs(x: Tensor, t: Any, labels: Any, match: str):
    with pytest.raises(ValueError, match=match):
        unet(TINY)(x, t, labels)


def test_labels_are_needed_where_there_are_classes():
    model = unet(CONFIGS["classes"])
    x = torch.zeros(3, 3, 8, 8)
    with pytest.raises(ValueError, match="this model is class-conditional: pass labels"):
        model(x, 1)
    with pytest.raises(ValueError, match="one label an image is needed; got 2 for 3"):
        model(x, 1, torch.tensor([0, 1]))
    one = model(x, 1, torch.tensor([2]))
    assert torch.equal(one, model(x, 1, torch.tensor([2, 2, 2])))
    assert not torch.equal(one, model(x, 1, torch.tensor([1, 1, 1])))
