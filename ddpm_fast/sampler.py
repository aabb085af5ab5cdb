"""Sampler: a trained model and a schedule in, images out, by Algorithm 2 with all its steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import ops as ops_module
from .noise import NoiseSource, Philox, TorchNoise
from .ops import Ops
from .schedule import Schedule
from .step_table import StepTable, step_table
from .unet import TimeRows, UNet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Sampler:
    """Draws images from a model by a fixed chain of steps.

    model: a `UNet`, or any callable f(x, t) -> out with x [N, C, H, W] and t [N] (then give image_shape).
    schedule: the `Schedule` it was trained with.
    batch_size: images drawn together. steps: how many timesteps (by the schedule's spacing) or which ones,
    descending; None is all of them. method: "ddpm" (Ho et al. 2020, Algorithm 2) or "ddim" (Song et al. 2021)
    with its eta. dtype: of the network; x_t itself stays float32. noise: "philox", a function of (seed, id,
    step); or "torch", a torch.Generator seeded by ``seed``, or a generator or list of them: then the stream is
    that of diffusers' DDPMPipeline. ops: "auto", "reference", or an `Ops` value. graph: "auto" or "none".
    image_shape: (C, H, W) in pixels; default the model's own.

    Raises ValueError for what does not fit together.
    """

    def __init__(
        self,
        model: UNet | Callable[..., Any],
        schedule: Schedule,
        batch_size: int = 64,
        steps: int | Sequence[int] | None = None,
        method: str = "ddpm",
        eta: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        ops: str | Ops = "auto",
        graph: str = "auto",
        noise: str | torch.Generator | Sequence[torch.Generator] = "philox",
        image_shape: tuple[int, int, int] | None = None,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer; got {batch_size!r}")
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype}")
        if graph not in ("auto", "none"):
            raise ValueError(f"graph must be 'auto' or 'none'; got {graph!r}")
        if isinstance(noise, str) and noise not in ("philox", "torch"):
            raise ValueError(f"noise must be 'philox', 'torch' or a torch.Generator; got {noise!r}")
        self.schedule, self.batch_size, self.dtype, self.noise = schedule, batch_size, dtype, noise
        self.table: StepTable = step_table(schedule, steps, method, eta)
        self.ops = _choose_ops(ops)
        self.device = torch.device(device) if device is not None else _device_of(model)
        self.image_shape = image_shape or _image_shape(model)
        self.model = _inference_copy(model, dtype, self.device)
        self._rows = self.table.rows.to(self.device, torch.float32)
        self._counter = torch.zeros(2, dtype=torch.int32, device=self.device)
        self._times: Tensor | None = None

    @property
    def num_classes(self) -> int | None:
        """Label values the model takes, or None where it takes none."""
        return self.model.config.num_class_embeds if isinstance(self.model, UNet) else None

    @torch.inference_mode()
    def sample(
        self,
        n: int,
        seed: int = 0,
        labels: int | Sequence[int] | Tensor | None = None,  # one for all, or [n]
        first_id: int = 0,
        progress: bool = False,
        callback: Callable[[int, Tensor], None] | None = None,
        interval: int = 1,
    ) -> Tensor:  # [n, C, H, W] float32, in [-1, 1] where the schedule clips
        """Draw samples first_id .. first_id + n - 1 of ``seed``.

        callback(step, x) is called with x_T, after every ``interval`` steps and after the last, with the steps
        done and the batch as it stands, [<= batch_size, C, H, W] float32 on the sampler's device; copy it to
        keep it.
        """
        if n < 0:
            raise ValueError(f"n must be 0 or more; got {n}")
        if interval < 1:
            raise ValueError(f"interval must be 1 or more; got {interval}")
        all_labels = self._labels(labels, n)
        generators = self.noise if not isinstance(self.noise, str) else None
        if self.noise == "torch":
            generators = torch.Generator(self.device).manual_seed(seed)
        result = torch.empty(n, *self.image_shape, device=self.device)
        batches = [(i, min(i + self.batch_size, n)) for i in range(0, n, self.batch_size)]
        with _progress_bar(progress, len(batches) * len(self.table), n) as bar:
            for start, stop in batches:
                source = self._source(seed, first_id + start, stop - start, generators, slice(start, stop))
                x = source.initial()
                if self.device.type == "cpu":
                    x = x.contiguous(memory_format=torch.channels_last)
                if callback is not None:
                    callback(0, x)
                batch_labels = None if all_labels is None else all_labels[start:stop]
                for done in self._steps(x, source, batch_labels):
                    if done % interval == 0 or done == len(self.table):
                        bar.update(min(interval, (done - 1) % interval + 1))
                        if callback is not None:
                            callback(done, x)
                result[start:stop] = x
        return result

    def _steps(self, x: Tensor, source: NoiseSource, labels: Tensor | None) -> Iterator[int]:
        """Algorithm 2, lines 2 to 5, on x in place; yields the number of steps done."""
        seed = ids = torch.zeros(1, dtype=torch.int64, device=self.device)
        if isinstance(source, Philox):
            seed, ids = source.seed, source.ids
        self._counter.zero_()
        total = len(self.table)
        for i in range(total):
            z = source.step(i, total)
            out = self._predict(x, i, labels)
            self.ops.sampler_step(
                x,
                out,
                self._rows,
                self._counter,
                seed,
                ids,
                variance=self.table.variance,
                x_prev=x,
                noise=z,
                thresholding=self.table.thresholding,
            )
            yield i + 1

    def _predict(self, x: Tensor, i: int, labels: Tensor | None) -> Tensor:
        """The network's output at step i: [N, C or 2C, H, W]; of a learned variance not read, C."""
        t = self.table.timesteps[i]
        if isinstance(self.model, UNet):
            out = self.model.run(x.to(self.dtype), self._time_rows(t, len(x), labels), self.ops)
        else:
            times = torch.full((len(x),), t, device=self.device)
            out = self.model(x, times) if labels is None else self.model(x, times, labels)
            if isinstance(out, (tuple, list)):
                out = out[0]
            out = getattr(out, "sample", out)
        wanted = x.shape[1] * (1 if self.table.variance == "fixed" else 2)
        if out.shape[1] == 2 * wanted and self.schedule.learned != "fixed":
            out = out[:, :wanted]  # DDIM with a learned-variance network
        if out.shape != (len(x), wanted, *x.shape[2:]):
            raise ValueError(
                f"the model's output must be [{len(x)}, {wanted}, {x.shape[2]}, {x.shape[3]}] for "
                f"variance_type={self.schedule.variance_type!r}; got {list(out.shape)}"
            )
        return out

    def _time_rows(self, t: int, n: int, labels: Tensor | None) -> TimeRows:
        model = self.model
        assert isinstance(model, UNet)
        if labels is not None:
            times = torch.full((n,), t, device=self.device)
            return TimeRows(model.embed(times, labels), t=times)
        timesteps = torch.tensor(self.table.timesteps, device=self.device)
        if self._times is None:
            self._times = model.time_table(timesteps)
        return TimeRows(table=self._times, row=self._counter, t=timesteps)

    def _source(self, seed: int, first_id: int, n: int, generators: Any, part: slice) -> NoiseSource:
        if generators is None:
            ids = torch.arange(first_id, first_id + n, dtype=torch.int64, device=self.device)
            key = torch.tensor([(seed + 2**63) % 2**64 - 2**63], dtype=torch.int64, device=self.device)
            return Philox(key, ids, self.image_shape)
        if isinstance(generators, Sequence) and len(generators) > 1:
            generators = generators[part]
        draws = [t > 0 for t in self.table.timesteps]
        return TorchNoise(generators, (n, *self.image_shape), draws, self.dtype, self.device)

    def _labels(self, labels: int | Sequence[int] | Tensor | None, n: int) -> Tensor | None:
        if labels is None:
            if self.num_classes is not None:
                raise ValueError(f"this model has {self.num_classes} classes: pass labels (an int, or one an image)")
            return None
        labels = torch.as_tensor(labels, device=self.device)
        if labels.ndim == 0:
            labels = labels.expand(n)
        if len(labels) != n:
            raise ValueError(f"labels must be one number, or one an image; got {len(labels)} for n={n}")
        if isinstance(self.model, UNet):
            if self.model.class_embedding is None:
                raise ValueError("this model has no classes, so it takes no labels")
            classes = self.num_classes
            low, high = (int(labels.min()), int(labels.max())) if n else (0, 0)
            if classes is not None and not 0 <= low <= high < classes:
                raise ValueError(f"labels must be in 0..{classes - 1}; got {low}..{high}")
        return labels


def to_uint8(x: Tensor) -> Tensor:
    """Images [n, C, H, W] in [-1, 1] -> [n, H, W, C] uint8, rounded half to even as diffusers and Pillow do."""
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _choose_ops(ops: str | Ops) -> Ops:
    if isinstance(ops, Ops):
        return ops
    if ops in ("auto", "reference"):
        return ops_module.reference()
    raise ValueError(f"ops must be 'auto', 'reference' or an Ops value; got {ops!r}")


def _device_of(model: object) -> torch.device:
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if first is None else first.device


def _image_shape(model: object) -> tuple[int, int, int]:
    if isinstance(model, UNet) and model.config.image_size is not None:
        return (model.config.in_channels, *model.config.image_size)
    raise ValueError("image_shape=(C, H, W) is needed: the model does not state its image size")


def _inference_copy(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    if not isinstance(model, UNet):
        return model
    model = copy.deepcopy(model).to(device, dtype).eval().requires_grad_(False)
    return model.to(memory_format=torch.channels_last) if device.type == "cpu" else model


@contextmanager
def _progress_bar(wanted: bool, total: int, n: int) -> Iterator[Any]:
    with tqdm(total=total, disable=not wanted, unit="step", desc=f"{n} image{'s' * (n != 1)}") as bar:
        yield bar
