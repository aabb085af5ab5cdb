"""UNetConfig: the fields, names and defaults of diffusers' UNet2DModel, checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .kernels.reference import ACTIVATIONS

SKIP_DOWN, SKIP_UP = ("SkipDownBlock2D", "AttnSkipDownBlock2D"), ("SkipUpBlock2D", "AttnSkipUpBlock2D")  # NCSN++
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", *SKIP_DOWN)
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", *SKIP_UP)
# Fields that upstream does not have. At their defaults they are left out of `to_dict`.
EXTENSIONS = (
    "num_attention_heads",
    "time_proj_channels",
    "block_scale_factor",
    "up_attention",
    "resnet_resample_shortcut",
)
SKIP_ATTENTION_GROUPS = 32  # whatever the configuration says


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of a `UNet`. Field names, meaning and defaults are those of diffusers' ``UNet2DModel``
    (its ``config.json``), so a file with missing keys means here what it means there. Note that the released
    google/ddpm-* files differ from these defaults (norm_eps 1e-6, downsample_padding 0, freq_shift 1,
    flip_sin_to_cos false, attention_head_dim null).

    Raises ValueError: the field, what came, what is allowed.
    """

    sample_size: int | tuple[int, int] | None = None  # pixels; informative, any multiple of 2^(levels-1) runs
    in_channels: int = 3
    out_channels: int = 3  # 2 * in_channels with a learned variance
    center_input_sample: bool = False  # x -> 2x - 1 first
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None  # None: 4 * block_out_channels[0]
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1  # 0: one row and column of zeros at the bottom and right
    downsample_type: str = "conv"  # read by AttnDownBlock2D only, as upstream
    upsample_type: str = "conv"  # read by AttnUpBlock2D only
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8  # channels a head; None: one head
    norm_num_groups: int | None = 32  # None: min(C // 4, 32), as Skip blocks always have it; upstream: in them alone
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True  # in the mid block
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None  # rows of a learned time embedding
    num_attention_heads: int | None = None  # so many at every width, in place of attention_head_dim; not upstream's
    time_proj_channels: int | None = None  # of the sinusoid; None: block_out_channels[0]; not upstream's
    # The three that follow are Score-SDE's, not upstream's.
    block_scale_factor: float = 1.0  # divides the sums of every level's residual blocks and attention, Skip blocks' not
    up_attention: str = "all"  # of an AttnUpBlock2D: after "all" its residual blocks, or after the "last" alone
    resnet_resample_shortcut: bool = False  # a 1x1 convolution around residual blocks that resample

    def __post_init__(self) -> None:
        if isinstance(self.act_fn, str):
            object.__setattr__(self, "act_fn", self.act_fn.lower())  # as upstream looks it up
        for name in ("downsample_type", "upsample_type"):
            if getattr(self, name) is None:  # upstream takes null for its default
                object.__setattr__(self, name, "conv")
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                again = f" (on the command line: --set {name}=[{value}])" if isinstance(value, str) else ""
                raise ValueError(f"UNetConfig.{name} must be a list; got {value!r}{again}")
            object.__setattr__(self, name, tuple(value))
        if isinstance(self.sample_size, list):
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
        _check_numbers(self)
        _check_names(self)
        _check_blocks(self)
        _check_channels(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """From a ``config.json``: keys that start with "_" are metadata, unknown ones are named in a warning."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(k for k in values if k not in known and not k.startswith("_"))
        if unknown:
            warnings.warn(f"UNetConfig ignores unknown fields: {', '.join(unknown)}", stacklevel=2)
        return cls(**{k: v for k, v in values.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, in diffusers' field names; what is not diffusers' only where it is not at its default."""
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in EXTENSIONS or getattr(self, f.name) != f.default
        }
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def time_width(self) -> int:
        """Channels of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def levels(self) -> int:
        return len(self.block_out_channels)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(H, W) in pixels, or None where the file does not say."""
        if self.sample_size is None or isinstance(self.sample_size, tuple):
            return self.sample_size
        return (self.sample_size, self.sample_size)

    @property
    def ends_in_conv_out(self) -> bool:
        """Whether the output is conv_out's: not divided by t, no image of the Skip blocks added."""
        return self.time_embedding_type != "fourier" and not set(SKIP_UP) & set(self.up_block_types[:-1])

    def down_inputs(self, i: int) -> list[tuple[int, int]]:
        """(channels, 0) that each residual block of down block i reads."""
        widths = self.block_out_channels
        return [(widths[max(i - 1, 0)], 0)] + [(widths[i], 0)] * (self.layers_per_block - 1)

    def up_inputs(self, i: int) -> list[tuple[int, int]]:
        """(channels from below, channels of the skip) that each residual block of up block i reads."""
        widths = self.block_out_channels[::-1]
        skips = [widths[i]] * self.layers_per_block + [widths[min(i + 1, self.levels - 1)]]
        return [(widths[max(i - 1, 0)] if j == 0 else widths[i], skip) for j, skip in enumerate(skips)]

    def groups(self, channels: int, kind: str = "", skip: int = 0) -> int:
        """Groups of a norm over so many channels, and as many of a skip as said, in a block of this kind."""
        if kind == "AttnSkipUpBlock2D" and skip:  # upstream divides only the second by 4
            return min(channels + skip // 4, 32)
        if kind in SKIP_DOWN + SKIP_UP or self.norm_num_groups is None:
            return min((channels + skip) // 4, 32)
        return self.norm_num_groups

    def head_dim(self, channels: int) -> int:
        if self.num_attention_heads is not None:
            return channels // self.num_attention_heads
        return channels if self.attention_head_dim is None else self.attention_head_dim


def _wrong(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"UNetConfig.{name} must be {allowed}; got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_numbers(c: UNetConfig) -> None:
    for name in ("in_channels", "out_channels", "layers_per_block"):
        value = getattr(c, name)
        if not _is_int(value) or value < 1:
            raise _wrong(name, value, "a positive integer")
    for name in (
        "time_embedding_dim",
        "attention_head_dim",
        "norm_num_groups",
        "attn_norm_num_groups",
        "num_class_embeds",
        "num_train_timesteps",
        "num_attention_heads",
        "time_proj_channels",
    ):
        value = getattr(c, name)
        if value is not None and (not _is_int(value) or value < 1):
            raise _wrong(name, value, "a positive integer or null")
    for name in ("mid_block_scale_factor", "norm_eps", "block_scale_factor"):
        value = getattr(c, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise _wrong(name, value, "a positive number")
    if not isinstance(c.dropout, (int, float)) or not 0 <= c.dropout < 1:
        raise _wrong("dropout", c.dropout, "a number in [0, 1)")
    if not isinstance(c.freq_shift, (int, float)) or isinstance(c.freq_shift, bool):
        raise _wrong("freq_shift", c.freq_shift, "a number")
    for name in ("center_input_sample", "flip_sin_to_cos", "add_attention", "resnet_resample_shortcut"):
        if not isinstance(getattr(c, name), bool):
            raise _wrong(name, getattr(c, name), "true or false")
    size = c.sample_size
    sizes: tuple[Any, ...] = size if isinstance(size, tuple) else (size, size)
    if size is not None and not (all(_is_int(s) and s > 0 for s in sizes) and len(sizes) == 2):
        raise _wrong("sample_size", size, "a positive integer, a pair of them, or null")


def _check_names(c: UNetConfig) -> None:
    choices: dict[str, tuple[Any, ...]] = {
        "time_embedding_type": ("positional", "fourier", "learned"),
        "mid_block_type": ("UNetMidBlock2D", None),
        "downsample_type": ("conv", "resnet"),
        "upsample_type": ("conv", "resnet"),
        "act_fn": tuple(a for a in ACTIVATIONS if a != "none"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None, "timestep", "identity"),
        "downsample_padding": (0, 1),
        "up_attention": ("all", "last"),
    }
    for name, allowed in choices.items():
        value = getattr(c, name)
        if isinstance(value, bool) or value not in allowed:
            raise _wrong(name, value, "one of " + ", ".join(repr(a) for a in allowed))
    if c.time_embedding_type == "learned" and c.num_train_timesteps is None:
        raise _wrong("num_train_timesteps", None, "given when time_embedding_type is 'learned'")


def _check_blocks(c: UNetConfig) -> None:
    if not c.block_out_channels or not all(_is_int(n) and n > 0 for n in c.block_out_channels):
        raise _wrong("block_out_channels", c.block_out_channels, "a list of positive integers")
    for name, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        value = getattr(c, name)
        if len(value) != c.levels:
            raise _wrong(name, value, f"as long as block_out_channels ({c.levels})")
        for kind in value:
            if kind not in allowed:
                raise _wrong(name, kind, "made of " + ", ".join(allowed))
    down = [kind in SKIP_DOWN for kind in c.down_block_types[:-1]]
    up = [kind in SKIP_UP for kind in c.up_block_types]
    if down != sorted(down, reverse=True) or up != sorted(up):
        # the image beside the network would be of another size than the feature map that it joins
        raise ValueError(
            "UNetConfig needs Skip blocks before all others on the way down, and behind them on the way up; got "
            f"{', '.join(c.down_block_types)} and {', '.join(c.up_block_types)}"
        )
    for name, used in (("in_channels", any(down)), ("out_channels", any(up[:-1]))):
        if used and getattr(c, name) != 3:
            raise _wrong(name, getattr(c, name), "3 with Skip blocks, whose side path is RGB")


def _check_channels(c: UNetConfig) -> None:
    attended = {n for n, kind in zip(c.block_out_channels, c.down_block_types) if kind.startswith("Attn")}
    attended |= {n for n, kind in zip(reversed(c.block_out_channels), c.up_block_types) if kind.startswith("Attn")}
    if c.mid_block_type is not None and c.add_attention:
        attended.add(c.block_out_channels[-1])
    for channels in sorted(attended):
        if c.num_attention_heads is not None and channels % c.num_attention_heads:
            raise _wrong("num_attention_heads", c.num_attention_heads, f"a divisor of the {channels} channels")
        if c.head_dim(channels) > channels:
            raise _wrong("attention_head_dim", c.attention_head_dim, f"at most the {channels} channels it divides")
    if c.attn_norm_num_groups is not None and c.block_out_channels[-1] % c.attn_norm_num_groups:
        raise _wrong("attn_norm_num_groups", c.attn_norm_num_groups, f"a divisor of {c.block_out_channels[-1]}")
    for channels, groups, kind in sorted(set(_norms(c))):
        if kind and (groups == 0 or channels % groups):
            raise _wrong(
                "block_out_channels", c.block_out_channels, f"such that {kind} can part {channels} in {groups} groups"
            )
        if groups == 0 or channels % groups:
            raise _wrong(
                "norm_num_groups",
                c.norm_num_groups,
                f"a divisor of every width it normalises; {channels} is not a multiple",
            )


def _norms(c: UNetConfig) -> Iterator[tuple[int, int, str]]:
    """(channels, groups, kind of the Skip block or "") of every norm but that of the middle's attention."""
    for channels in (c.block_out_channels[0], c.block_out_channels[-1]):
        yield channels, c.groups(channels), ""
    sides = (
        (c.down_block_types, c.block_out_channels, c.down_inputs),
        (
            c.up_block_types,
            c.block_out_channels[::-1],
            c.up_inputs,
        ),
    )
    for kinds, widths, inputs in sides:
        for i, (kind, channels) in enumerate(zip(kinds, widths)):
            named = kind if kind in SKIP_DOWN + SKIP_UP else ""
            yield channels, c.groups(channels, kind), named
            yield from ((h + skip, c.groups(h, kind, skip), named) for h, skip in inputs(i))
            if named and kind.startswith("Attn"):
                yield channels, SKIP_ATTENTION_GROUPS, named
