"""One step of training (Ho et al. 2020, Algorithm 1), and the batch that it takes.

Every random draw of step k comes from generators seeded by (seed, k), and the order of the images by
(seed, epoch). So a step is a function of the weights before it, the settings, the data and k alone; no random
state is saved, and a resumed run repeats the uninterrupted one bit for bit on the same machine.

Several processes take contiguous parts of that same batch, with the images, flips, labels, timesteps and noise that
one process alone would draw, and average their gradients: the step is that of one process but for the order of sums.
Dropout alone differs, since each process draws the masks of its own part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoints.express import for_diffusers
from ..config import UNetConfig
from ..data import DataError, ImageData
from ..diffusion import training_loss
from ..distributed import World
from ..presets import TrainConfig, learning_rate
from ..schedule import Schedule
from ..unet import UNet
from . import state as train_state
from .ema import EMA

# Independent streams of random numbers, each indexed by the step (ORDER: by the epoch).
INIT, ORDER, FLIP, LABEL, DIFFUSION, DROPOUT = range(6)
ALONE = World()


@dataclass(frozen=True)
class Batch:
    """What step k trains on, on the device: of several processes, this one's part of it."""

    x0: Tensor  # [N, C, H, W] in [-1, 1]
    labels: Tensor | None  # [N]


def stream_seed(seed: int, stream: int, index: int, rank: int = 0) -> int:
    """A 63-bit seed for one stream at one index; unrelated for any two different arguments."""
    entropy = [seed, stream, index] if rank == 0 else [seed, stream, index, rank]
    words = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def generator(seed: int, stream: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one stream at one index, on ``device``."""
    return torch.Generator(device).manual_seed(stream_seed(seed, stream, index))


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:  # [count] int64, not to be changed
    """The shuffled images of one epoch."""
    return torch.randperm(count, generator=generator(seed, ORDER, epoch)).numpy()


def batch_index(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:  # [batch_size] int64
    """The images of 0-based ``step``: the next ones of an endless row of shuffled epochs."""
    position, end = step * batch_size, (step + 1) * batch_size
    parts = []
    while position < end:
        epoch, start = divmod(position, count)
        parts.append(epoch_order(count, seed, epoch)[start : start + end - position])
        position += len(parts[-1])
    return np.concatenate(parts)


def make_batch(data: ImageData, config: TrainConfig, step: int, device: torch.device, world: World = ALONE) -> Batch:
    """Images, flips and dropped labels of ``step``: a function of its arguments alone.

    The draws are those of the whole batch, of which a process keeps its part.
    """
    index = batch_index(len(data), config.batch_size, config.seed, step)
    count, part = len(index), world.part(len(index))
    pixels = torch.from_numpy(data.batch(index[part]))
    if config.flip:
        mirrored = (torch.rand(count, generator=generator(config.seed, FLIP, step)) < 0.5)[part]
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    labels = None
    if data.labels is not None:
        labels = torch.from_numpy(data.labels[index[part]])
        if config.label_dropout > 0:
            dropped = torch.rand(count, generator=generator(config.seed, LABEL, step)) < config.label_dropout
            labels = labels.masked_fill(dropped[part], data.num_classes)
        labels = labels.to(device, non_blocking=True)
    x0 = pixels.to(device, non_blocking=True).float() / 127.5 - 1
    return Batch(x0, labels)


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype that matrix products run in; weights, EMA and optimizer stay fp32."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def check_fit(data: ImageData, model: UNetConfig, schedule: Schedule, config: TrainConfig) -> None:
    """Raises ValueError if images, classes, network and schedule do not belong together."""
    _check_images(data, model)
    _check_classes(data, model, config)
    if schedule.learned != "fixed" or model.out_channels != model.in_channels:
        raise ValueError(
            f"L_simple trains no variance: the schedule's must be fixed and the model's out_channels its in_channels "
            f"{model.in_channels}; got variance_type {schedule.variance_type!r} and {model.out_channels}"
        )
    if model.time_embedding_type == "fourier":
        raise ValueError(
            "training needs time_embedding_type 'positional' or 'learned': 'fourier' takes the log of t = 0"
        )
    if model.time_embedding_type == "learned" and (model.num_train_timesteps or 0) < schedule.num_train_timesteps:
        raise ValueError(
            f"a learned time embedding needs num_train_timesteps of at least the schedule's "
            f"{schedule.num_train_timesteps}; got {model.num_train_timesteps}"
        )
    with torch.device("meta"):  # results are saved in diffusers' layout: said now where that cannot be
        for_diffusers(UNet(model), schedule)


def _check_images(data: ImageData, model: UNetConfig) -> None:
    channels, height, width = data.image_shape
    if model.in_channels != channels:
        raise DataError(f"the model's in_channels must be the data's channels {channels}; got {model.in_channels}")
    if model.image_size not in (None, (height, width)):
        raise DataError(
            f"the model's sample_size must be the data's {height}x{width}; got {model.sample_size}. Give image_size "
            "(--image-size) to scale and crop the images"
        )
    multiple = 2 ** (model.levels - 1)
    if height % multiple or width % multiple:
        raise DataError(
            f"a model of {model.levels} levels needs images whose sides are multiples of {multiple}; "
            f"got {height}x{width}. Give image_size to scale and crop them"
        )


def _check_classes(data: ImageData, model: UNetConfig, config: TrainConfig) -> None:
    if model.class_embed_type is not None:
        raise ValueError(f"training needs class_embed_type None; got {model.class_embed_type!r}")
    classes = model.num_class_embeds
    if classes is None:
        if config.label_dropout > 0:
            raise ValueError("label_dropout needs a model with num_class_embeds = the data's classes + 1; it has none")
        return
    if data.labels is None:
        raise DataError(f"a model with num_class_embeds={classes} needs labelled data; {data.source} has no labels")
    if config.label_dropout > 0 and classes != data.num_classes + 1:
        raise ValueError(
            f"with label_dropout, num_class_embeds must be the data's {data.num_classes} classes + 1 (the null "
            f"class, index {data.num_classes}); got {classes}"
        )
    if classes < data.num_classes:
        raise ValueError(f"num_class_embeds must be at least the data's {data.num_classes} classes; got {classes}")


class Trainer:
    """Model, EMA and optimizer, and the step that moves them."""

    def __init__(
        self,
        data: ImageData,
        model_config: UNetConfig,
        schedule: Schedule,
        config: TrainConfig,
        device: torch.device,
        init_from: nn.Module | None = None,
        world: World = ALONE,
    ):
        check_fit(data, model_config, schedule, config)
        if config.batch_size < world.size:
            raise ValueError(
                f"batch_size is that of all processes together, and each needs an image of it; got batch_size "
                f"{config.batch_size} for {world.size} processes"
            )
        self.data, self.schedule, self.config, self.device, self.world = data, schedule, config, device, world
        torch.manual_seed(stream_seed(config.seed, INIT, 0))
        model = UNet(model_config)
        if init_from is not None:
            model.load_state_dict(init_from.state_dict())
        # cuDNN's half-precision convolutions want NHWC. oneDNN was as fast with either at 16x16, so that a CPU
        # keeps the plain layout.
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.model = model.to(device, memory_format=self.layout).train()  # type: ignore[call-overload]
        self.ema = EMA(self.model, config.ema_decay)
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = kind(
            self.model.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.dtype = resolve_precision(config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.network: nn.Module = self.model  # what is called: around the model, where gradients are averaged

    def connect(self) -> None:
        """From here on, gradients are averaged over all processes, which call this and each `step` together."""
        if self.world.size == 1:
            return
        index = [self.device] if self.device.type == "cuda" else None
        self.network = DistributedDataParallel(self.model, device_ids=index, gradient_as_bucket_view=True)
        # After its first backward pass DDP lays its buckets out anew, by the order in which gradients came. Where an
        # element lies decides the order of its sum over three and more processes, so that this happens before step
        # one: a resumed run then sums as the uninterrupted one did.
        x0 = torch.zeros(1, *self.data.image_shape, device=self.device).contiguous(memory_format=self.layout)
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._loss(x0, zero, torch.zeros_like(x0), zero).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, k: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Step ``k`` (0-based) of Algorithm 1 -> loss and gradient norm before clipping, 0-dim on the device.

        The losses of all processes add up to that of the whole batch; the norm is the averaged gradient's.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, k)
        torch.manual_seed(stream_seed(self.config.seed, DROPOUT, k, self.world.rank))
        x0 = batch.x0.contiguous(memory_format=self.layout)
        count = len(x0) if self.world.size == 1 else self.config.batch_size
        t, noise = self._draw(k, count, x0)
        loss = self._loss(x0, t, noise, batch.labels)
        self.optimizer.zero_grad(set_to_none=True)
        # DDP averages over processes, which may have unequal parts of the batch.
        weight = len(x0) * self.world.size / count
        self.scaler.scale(loss if weight == 1 else loss * weight).backward()
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.model, k)
        loss = loss.detach()
        return loss if len(x0) == count else loss * (len(x0) / count), norm

    def _draw(self, k: int, count: int, x0: Tensor) -> tuple[Tensor, Tensor]:
        """t [N] and noise like x0, of this process' part of ``count`` images."""
        draw, part = generator(self.config.seed, DIFFUSION, k, self.device), self.world.part(count)
        t = torch.randint(0, self.schedule.num_train_timesteps, (count,), generator=draw, device=self.device)
        noise = torch.randn((count, *x0.shape[1:]), generator=draw, device=self.device)
        return t[part], noise[part]

    def _loss(self, x0: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        labels = labels if self.model.config.num_class_embeds is not None else None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return training_loss(self.network, self.schedule, x0, t=t, noise=noise, labels=labels)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the run, as plain values: what a resumed run must have again."""
        return train_state.plain(
            {
                "train": self.config.to_dict(),
                "model": self.model.config.to_dict(),
                "schedule": self.schedule.to_dict(),
                "data": {"digest": self.data.digest(), "images": len(self.data)},
                "precision": {"dtype": str(self.dtype)},
            }
        )

    def state(self) -> dict[str, Any]:
        """The tensors that change."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` returned."""
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
