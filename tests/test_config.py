"""UNetConfig: upstream's names and defaults, and an error for each wrong field that says which, what and what else."""

from __future__ import annotations

import inspect
import json
from dataclasses import FrozenInstanceError, fields
from typing import Any

import diffusers
import pytest
from models import TINY, diffusers_unet, normal, unet

from ddpm_fast.config import EXTENSIONS, UNetConfig


def test_fields_and_defaults_are_upstream_s():
    signature = inspect.signature(diffusers.UNet2DModel.__init__)
    upstream = {n: p.default for n, p in signature.parameters.items() if n != "self"}
    assert {f.name: f.default for f in fields(UNetConfig) if f.name not in EXTENSIONS} == upstream


def test_an_empty_json_means_upstream_s_defaults():
    ours = UNetConfig.from_dict({}).to_dict()
    theirs = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    assert ours == {
        n: list(p.default) if isinstance(p.default, tuple) else p.default for n, p in theirs.items() if n != "self"
    }


def test_json_round_trip():
    config = UNetConfig(**{**TINY, "sample_size": (8, 12), "num_class_embeds": 3})
    text = json.dumps(config.to_dict())
    assert UNetConfig.from_dict({**json.loads(text), "_class_name": "UNet2DModel"}) == config
    assert hash(UNetConfig.from_dict(json.loads(text))) == hash(config)
    with pytest.warns(UserWarning, match="UNetConfig ignores unknown fields: colour, size"):
        UNetConfig.from_dict({**TINY, "size": 1, "colour": 2})


def test_what_diffusers_writes_is_read():
    config = dict(diffusers.UNet2DModel(**TINY).config)
    assert UNetConfig.from_dict(config) == UNetConfig(**TINY)


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        UNetConfig(**TINY).dropout = 0.1  # type: ignore[misc]


def test_derived_values():
    config = UNetConfig(**TINY)
    assert (config.time_width, config.levels, config.image_size, config.head_dim(16)) == (32, 2, (8, 8), 4)
    config = UNetConfig(**{**TINY, "time_embedding_dim": 20, "sample_size": [8, 12], "attention_head_dim": None})
    assert (config.time_width, config.image_size, config.head_dim(16)) == (20, (8, 12), 16)
    assert UNetConfig(**{**TINY, "sample_size": None}).image_size is None


POSITIVE = "a positive integer"
POSITIVE_OR_NULL = "a positive integer or null"
NUMBER = "a positive number"
BOOLEAN = "true or false"
WRONG: list[tuple[str, Any, str]] = [
    *[(n, v, POSITIVE) for n in ("in_channels", "out_channels", "layers_per_block") for v in (0, 1.5, True, None)],
    ("norm_num_groups", 0, POSITIVE_OR_NULL),
    *[
        (n, v, POSITIVE_OR_NULL)
        for n in ("time_embedding_dim", "num_class_embeds", "attention_head_dim")
        for v in (0, "8")
    ],
    ("attn_norm_num_groups", -1, POSITIVE_OR_NULL),
    ("num_train_timesteps", 0, POSITIVE_OR_NULL),
    *[
        (n, v, NUMBER)
        for n in ("mid_block_scale_factor", "norm_eps", "block_scale_factor")
        for v in (0, -1.0, "1", True, float("nan"))
    ],
    ("up_attention", "first", "one of 'all', 'last'"),
    ("resnet_resample_shortcut", 1, BOOLEAN),
    ("dropout", 1.0, "a number in [0, 1)"),
    ("dropout", -0.1, "a number in [0, 1)"),
    ("dropout", None, "a number in [0, 1)"),
    ("freq_shift", "1", "a number"),
    *[(n, v, BOOLEAN) for n in ("center_input_sample", "flip_sin_to_cos", "add_attention") for v in (1, "true", None)],
    *[
        ("sample_size", v, "a positive integer, a pair of them, or null")
        for v in (0, (8, 8, 8), (8,), (8, 0), "8", True)
    ],
    ("time_embedding_type", "sinusoidal", "one of 'positional', 'fourier', 'learned'"),
    ("mid_block_type", "UNetMidBlock2DCrossAttn", "one of 'UNetMidBlock2D', None"),
    ("downsample_type", "fir", "one of 'conv', 'resnet'"),
    ("upsample_type", "fir", "one of 'conv', 'resnet'"),
    ("act_fn", "tanh", "one of 'silu', 'swish', 'mish', 'gelu', 'relu'"),
    ("act_fn", "none", "one of 'silu', 'swish', 'mish', 'gelu', 'relu'"),
    ("resnet_time_scale_shift", "ada_group", "one of 'default', 'scale_shift'"),
    ("class_embed_type", "projection", "one of None, 'timestep', 'identity'"),
    ("downsample_padding", 2, "one of 0, 1"),
    ("downsample_padding", True, "one of 0, 1"),
    ("block_out_channels", 8, "a list"),
    ("block_out_channels", (8, -16), "a list of positive integers"),
    ("down_block_types", "DownBlock2D", "a list"),
    ("down_block_types", ("DownBlock2D",), "as long as block_out_channels (2)"),
    ("up_block_types", ("UpBlock2D",) * 3, "as long as block_out_channels (2)"),
]


@pytest.mark.parametrize("name, value, allowed", WRONG, ids=[f"{n}={v!r}" for n, v, _ in WRONG])
def test_a_wrong_field_says_which_what_came_and_what_is_allowed(name: str, value: Any, allowed: str):
    with pytest.raises(ValueError) as error:
        UNetConfig(**{**TINY, name: value})
    got = tuple(value) if isinstance(value, list) else value
    hint = f" (on the command line: --set {name}=[{value}])" if isinstance(value, str) and allowed == "a list" else ""
    assert str(error.value) == f"UNetConfig.{name} must be {allowed}; got {got!r}{hint}"


@pytest.mark.parametrize(
    "values, message",
    [
        ({"block_out_channels": ()}, "UNetConfig.block_out_channels must be a list of positive integers; got ()"),
        (
            {"down_block_types": ("DownBlock2D", "UpBlock2D")},
            "UNetConfig.down_block_types must be made of DownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D, "
            "SkipDownBlock2D, AttnSkipDownBlock2D; got 'UpBlock2D'",
        ),
        (
            {"time_embedding_type": "learned"},
            "UNetConfig.num_train_timesteps must be given when time_embedding_type is 'learned'; got None",
        ),
        (
            {"attention_head_dim": 17},
            "UNetConfig.attention_head_dim must be at most the 16 channels it divides; got 17",
        ),
        ({"attn_norm_num_groups": 3}, "UNetConfig.attn_norm_num_groups must be a divisor of 16; got 3"),
        (
            {"norm_num_groups": 3},
            "UNetConfig.norm_num_groups must be a divisor of every width it normalises; 8 is not a multiple; got 3",
        ),
    ],
)
def test_fields_that_do_not_fit_together(values: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        UNetConfig(**{**TINY, **values})
    assert str(error.value) == message


def test_groups_divide_every_level_and_so_every_concatenation():
    """8 + 12 channels meet in an up block: 4 groups divide 8, 12 and 20; 8 groups would divide 8 alone."""
    values = {**TINY, "block_out_channels": (8, 12)}
    unet(values)(normal(1, 3, 8, 8), 1)
    with pytest.raises(ValueError, match="12 is not a multiple; got 8"):
        UNetConfig(**{**values, "norm_num_groups": 8})


def test_null_resampling_is_a_convolution_as_upstream_has_it():
    assert UNetConfig(**{**TINY, "downsample_type": None, "upsample_type": None}) == UNetConfig(**TINY)


SKIPS = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"in_channels": 1}, "UNetConfig.in_channels must be 3 with Skip blocks, whose side path is RGB; got 1"),
        ({"out_channels": 6}, "UNetConfig.out_channels must be 3 with Skip blocks, whose side path is RGB; got 6"),
        (
            {"block_out_channels": (8, 14), "norm_num_groups": 2},
            "UNetConfig.block_out_channels must be such that SkipDownBlock2D can part 14 in 3 groups; got (8, 14)",
        ),
        (
            {"block_out_channels": (3, 20), "norm_num_groups": 1},
            "UNetConfig.block_out_channels must be such that SkipDownBlock2D can part 3 in 0 groups; got (3, 20)",
        ),
        (
            {"down_block_types": ("AttnSkipDownBlock2D", "SkipDownBlock2D"), "block_out_channels": (8, 8)},
            "UNetConfig.block_out_channels must be such that AttnSkipDownBlock2D can part 8 in 32 groups; got (8, 8)",
        ),
        (
            {"up_block_types": ("SkipUpBlock2D", "UpBlock2D")},
            "UNetConfig needs Skip blocks before all others on the way down, and behind them on the way up; got "
            "SkipDownBlock2D, SkipDownBlock2D and SkipUpBlock2D, UpBlock2D",
        ),
    ],
)
def test_what_skip_blocks_need(values: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        UNetConfig(**{**TINY, **SKIPS, **values})
    with pytest.raises((RuntimeError, TypeError, ValueError, ZeroDivisionError)):  # and upstream does not run it
        diffusers_unet({**TINY, **SKIPS, **values})(normal(1, values.get("in_channels", 3), 8, 8), 1)
    assert str(error.value) == message
