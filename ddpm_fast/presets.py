"""Training settings, and the named sets of them: the bundled model's, and the two of Ho et al. 2020."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .data import DataError, ImageData


@dataclass(frozen=True)
class TrainConfig:
    """Everything besides data, network and schedule that decides a training run.

    The fields of ``ADJUSTABLE`` change only what is recorded, so a resumed run may set them anew.
    """

    batch_size: int = 128
    steps: int = 100_000
    lr: float = 2e-4
    optimizer: str = "adam"  # adam | adamw
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0  # the learning rate rises linearly over them
    lr_schedule: str = "constant"  # constant | cosine (to zero at the end)
    grad_clip: float | None = 1.0  # largest global gradient norm; None: no clipping
    ema_decay: float = 0.9999
    flip: bool = False  # mirror each image with probability 1/2
    precision: str = "auto"  # auto | fp32 | bf16 | fp16
    label_dropout: float = 0.0  # probability that an image's label becomes the null class
    seed: int = 0
    checkpoint_every: int = 1000
    sample_every: int = 1000  # 0: no sample grids
    sample_count: int = 16
    sample_steps: int = 100  # of the sampler, for the grids only
    evaluate_every: int = 0  # steps between Frechet distances to the data, by a process beside training; 0: none
    evaluate_images: int = 1000  # drawn for each
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "ema_decay", "label_dropout"):
            _require(_is_number(getattr(self, name)), name, "a number", getattr(self, name))
        _require(self.grad_clip is None or _is_number(self.grad_clip), "grad_clip", "a number or None", self.grad_clip)
        _require(isinstance(self.flip, bool), "flip", "true or false", self.flip)
        two = isinstance(self.betas, (list, tuple)) and all(map(_is_number, self.betas))
        _require(two, "betas", "two in [0, 1)", self.betas)
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, least in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and value >= least, name, f"a whole number of at least {least}", value)
        _require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        _require(self.lr > 0 and math.isfinite(self.lr), "lr", "positive", self.lr)
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two in [0, 1)", self.betas)
        _require(self.eps > 0, "eps", "positive", self.eps)
        _require(self.grad_clip is None or self.grad_clip > 0, "grad_clip", "positive or None", self.grad_clip)
        _require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        _require(0 <= self.label_dropout < 1, "label_dropout", "in [0, 1)", self.label_dropout)
        for name, allowed in CHOICES.items():
            _require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}", getattr(self, name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values only (a tuple becomes a list), for JSON and checkpoints."""
        return {**asdict(self), "betas": list(self.betas)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_WHOLE_NUMBERS = {
    **dict.fromkeys(("batch_size", "steps", "checkpoint_every", "sample_count", "sample_steps", "log_every"), 1),
    **dict.fromkeys(("warmup_steps", "sample_every", "evaluate_every", "seed"), 0),
    "evaluate_images": 2,
}
CHOICES = {
    "optimizer": ("adam", "adamw"),
    "lr_schedule": ("constant", "cosine"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
}
ADJUSTABLE = frozenset(
    {
        "checkpoint_every",
        "sample_every",
        "sample_count",
        "sample_steps",
        "evaluate_every",
        "evaluate_images",
        "log_every",
    }
)


def _require(holds: bool, name: str, wanted: str, got: object) -> None:
    if not holds:
        raise ValueError(f"TrainConfig.{name} must be {wanted}; got {got!r}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of 0-based ``step``: linear warm-up, then constant, or a half cosine that ends at zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class Preset:
    """A named starting point: keyword arguments of ``UNetConfig`` and ``Schedule``, and a ``TrainConfig``."""

    model: dict[str, Any]
    schedule: dict[str, Any]
    train: TrainConfig
    image_size: int
    data: str | None = None  # where the preset brings its own images
    note: str = field(default="")

    def model_for(self, data: ImageData, label_dropout: float = 0.0, **overrides: Any) -> dict[str, Any]:
        """Keyword arguments of ``UNetConfig`` for these images: size, channels and classes are the data's.

        With ``label_dropout`` there is one class more than the data has: index ``num_classes`` is the null
        class of classifier-free guidance (Ho and Salimans 2022).
        """
        channels, height, width = data.image_shape
        if height != width:
            raise DataError(f"images must be square; got {width}x{height}. Give image_size to scale and crop them")
        model = {**self.model, "sample_size": height, "in_channels": channels, "out_channels": channels}
        if data.num_classes:
            model["num_class_embeds"] = data.num_classes + (1 if label_dropout > 0 else 0)
        return {**model, **overrides}

    def with_train(self, **changes: Any) -> Preset:
        """The same preset with other training settings."""
        return replace(self, train=replace(self.train, **changes))


# What google/ddpm-*'s config.json files say, of the fields that differ from UNet2DModel's defaults.
_GOOGLE = {
    "layers_per_block": 2,
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}

PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        model={
            "block_out_channels": (32, 64, 64),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 16,
            "attention_head_dim": 32,
        },
        schedule={"num_train_timesteps": 1000, "beta_schedule": "linear"},
        train=TrainConfig(
            batch_size=64,
            steps=20_000,
            lr=2e-3,
            optimizer="adamw",
            weight_decay=0.01,
            warmup_steps=200,
            lr_schedule="cosine",
            ema_decay=0.9995,
            precision="bf16",
            checkpoint_every=500,
            sample_every=1000,
        ),
        image_size=16,
        data="avatars:pixel-art",
        note="pixel-art portraits at 16x16; hours on a laptop's processor",
    ),
    "cifar10": Preset(
        model={
            **_GOOGLE,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "dropout": 0.1,
        },
        schedule={"num_train_timesteps": 1000, "beta_schedule": "linear", "variance_type": "fixed_large"},
        train=TrainConfig(
            batch_size=128,
            steps=800_000,
            lr=2e-4,
            warmup_steps=5000,
            grad_clip=1.0,
            ema_decay=0.9999,
            flip=True,
            checkpoint_every=5000,
            sample_every=10_000,
            log_every=100,
        ),
        image_size=32,
        note="Ho et al. 2020, appendix B: CIFAR-10, 35.7 M parameters",
    ),
    "lsun256": Preset(
        model={
            **_GOOGLE,
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        },
        schedule={"num_train_timesteps": 1000, "beta_schedule": "linear", "variance_type": "fixed_small"},
        train=TrainConfig(
            batch_size=64,
            steps=2_400_000,
            lr=2e-5,
            warmup_steps=5000,
            grad_clip=1.0,
            ema_decay=0.9999,
            flip=False,
            checkpoint_every=5000,
            sample_every=10_000,
            log_every=100,
        ),
        image_size=256,
        note="Ho et al. 2020, appendix B: LSUN bedroom, 256x256, 113.7 M parameters",
    ),
}


def preset(name: str) -> Preset:
    """The preset called ``name``; ValueError names the ones there are."""
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}; there are: {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
