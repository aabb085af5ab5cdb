"""Sampler: a trained model and a schedule in, images out, by Algorithm 2 with all its steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .choose_ops import choose_ops
from .engine import CallableProgram, EagerRunner, Program, Runner, StepProgram
from .noise import Philox, TorchNoise
from .ops import Ops
from .prepared import prepare
from .schedule import Schedule
from .step_table import StepTable, step_table
from .unet import UNet

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRAPHS = ("auto", "none", "step", "chunk", "loop")
CACHED_PROGRAMS = 3  # batch shapes whose buffers and graphs are kept


class Sampler:
    """Draws images from a model by a fixed chain of steps.

    model: a `UNet`, or any callable f(x, t[, labels]) -> out with x [N, C, H, W] and t [N] (then give
    image_shape); out may be a tuple that starts with the output, or have it as ``.sample``. One whose
    ``self_condition`` is true is called f(x, t, x0), x0 as predicted at the step before.
    schedule: the `Schedule` it was trained with.
    batch_size: images drawn together. steps: how many timesteps (by the schedule's spacing); which ones,
    descending; or text, OpenAI's rule ("250", "10,15,20", "ddim50"); None is all of them. method: "ddpm" (Ho et
    al. 2020, Algorithm 2) or "ddim" (Song et al. 2021) with its eta. time_scale: the model is given
    time_scale * t; None: the schedule's. guidance_scale: classifier-free guidance for a `UNet`
    trained with label dropout, whose last class stands for none.
    dtype: of the network; x_t itself stays float32. noise: "philox", a function of (seed, id, step); or "torch",
    a torch.Generator seeded by ``seed``, or a generator or list of them: then the stream is that of diffusers'
    DDPMPipeline. ops: "auto" (fused kernels on a GPU with Triton, "cpu" on a CPU, else "reference"), "reference",
    "cpu", "triton", or an `Ops` value. graph: "auto", "none", "step", "chunk" or "loop"; all but none need a GPU.
    image_shape: (C, H, W) in pixels; default the model's own.

    Raises ValueError for what does not fit together.
    """

    def __init__(
        self,
        model: UNet | Callable[..., Any],
        schedule: Schedule,
        batch_size: int = 64,
        steps: int | str | Sequence[int] | None = None,
        method: str | None = None,
        eta: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        ops: str | Ops = "auto",
        graph: str = "auto",
        noise: str | torch.Generator | Sequence[torch.Generator] = "philox",
        image_shape: tuple[int, int, int] | None = None,
        guidance_scale: float | None = None,
        time_scale: float | None = None,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer; got {batch_size!r}")
        if dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype}")
        if graph not in GRAPHS:
            raise ValueError(f"graph must be one of {', '.join(GRAPHS)}; got {graph!r}")
        if isinstance(noise, str) and noise not in ("philox", "torch"):
            raise ValueError(f"noise must be 'philox', 'torch' or a torch.Generator; got {noise!r}")
        self.schedule, self.batch_size, self.dtype, self.noise = schedule, batch_size, dtype, noise
        self.table: StepTable = step_table(schedule, steps, method, eta, time_scale)
        self.device = torch.device(device) if device is not None else _device_of(model)
        if graph not in ("auto", "none") and self.device.type != "cuda":
            raise ValueError(f"graph={graph!r} needs a CUDA device; this sampler is on {self.device}; use graph='auto'")
        self.graph, self.guidance_scale = graph, guidance_scale
        self.ops = choose_ops(ops, self.device)
        self.image_shape = image_shape or _image_shape(model)
        if guidance_scale is not None and not (isinstance(model, UNet) and model.config.num_class_embeds):
            raise ValueError("guidance_scale needs a UNet with classes (num_class_embeds); this model has none")
        self.model: Any
        if isinstance(model, UNet):
            self.model = prepare(model, dtype, self.device, self.ops)
        else:  # any callable; one that can makes its own copy for this dtype and device
            for_sampling = getattr(model, "for_sampling", None)
            self.model = model if for_sampling is None else for_sampling(dtype, self.device)
        self._programs: OrderedDict[tuple[int, bool], tuple[Program, Runner]] = OrderedDict()

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
        interval: int | None = None,  # steps; None: 1 with a callback, and for a bar alone what costs nothing
    ) -> Tensor:  # [n, C, H, W] float32, in [-1, 1] where the schedule clips
        """Draw samples first_id .. first_id + n - 1 of ``seed``.

        callback(step, x) is called with x_T, after every ``interval`` steps and after the last, with the steps
        done and the batch as it stands, [<= batch_size, C, H, W] float32 on the sampler's device; copy it to
        keep it. It, and a progress bar, wait for the device at each interval; without them nothing does. A bar
        alone moves every step on a CPU, and fifty times a batch elsewhere.
        """
        if n < 0:
            raise ValueError(f"n must be 0 or more; got {n}")
        if interval is None:
            each_step = callback is not None or self.device.type == "cpu"
            interval = 1 if each_step else max(1, len(self.table) // 50)
        if interval < 1:
            raise ValueError(f"interval must be 1 or more; got {interval}")
        all_labels = self._labels(labels, n)
        generators = self.noise if not isinstance(self.noise, str) else None
        if isinstance(generators, Sequence) and len(generators) not in (1, n):
            raise ValueError(f"a list of generators needs one an image; got {len(generators)} for n={n}")
        if self.noise == "torch":
            generators = torch.Generator(self.device).manual_seed(seed)
        result = torch.empty(n, *self.image_shape, device=self.device)
        batches = [(i, min(i + self.batch_size, n)) for i in range(0, n, self.batch_size)]
        watched = interval if progress or callback is not None else len(self.table)
        with _progress_bar(progress, len(batches) * len(self.table), n) as bar:
            for start, stop in batches:
                source = self._source(seed, first_id + start, stop - start, generators, slice(start, stop))
                program, runner = self._program(min(n, self.batch_size), stop - start, source is not None)
                batch_labels = None if all_labels is None else _padded(all_labels[start:stop], program.batch_size)
                ids = torch.arange(first_id + start, first_id + start + program.batch_size)
                x_T = None if source is None else _padded(source.initial(), program.batch_size)
                program.begin(seed, ids, batch_labels, x_T)
                x = program.x[: stop - start]
                if callback is not None:
                    callback(0, x)
                for done, steps in _strides(len(self.table), watched):
                    self._advance(program, runner, source, done - steps, steps)
                    if progress and self.device.type == "cuda":
                        torch.cuda.current_stream(self.device).synchronize()
                    bar.update(steps)
                    if callback is not None:
                        callback(done, x)
                result[start:stop] = x
        return result

    def _advance(
        self, program: Program, runner: Runner, source: Philox | TorchNoise | None, done: int, steps: int
    ) -> None:
        """The next steps, with noise from the host where it is not drawn in the step."""
        if source is None:
            runner.advance(steps)
            return
        assert program.noise is not None
        for i in range(done, done + steps):
            z = source.step(i, len(self.table))
            assert z is not None
            program.noise[: len(z)].copy_(z)
            runner.advance(1)

    def _program(self, largest: int, n: int, given_noise: bool) -> tuple[Program, Runner]:
        """The program of a batch of n images: of its own shape on a CPU, where an idle image costs its full time;
        elsewhere of the whole batch's, whose graph and buffers are there already."""
        plain = self.device.type == "cpu" and self.ops.initial_noise is None
        key = (n if plain else largest, given_noise)
        if key in self._programs:
            self._programs.move_to_end(key)
            return self._programs[key]
        while len(self._programs) >= CACHED_PROGRAMS:
            self._programs.popitem(last=False)
        program: Program
        if isinstance(self.model, UNet):
            program = StepProgram(
                self.model, self.table, key[0], self.image_shape, given_noise, guidance_scale=self.guidance_scale
            )
        else:
            program = CallableProgram(
                self.model, self.table, key[0], self.image_shape, self.device, self.ops, given_noise
            )
        self._programs[key] = program, self._runner(program)
        return self._programs[key]

    def _runner(self, program: Program) -> Runner:
        if self.graph == "none" or self.device.type != "cuda":
            return EagerRunner(program)
        from . import graphs

        # Noise from the host comes step by step, so a graph of several steps would never run.
        stepwise = program.noise is not None and self.graph in ("chunk", "loop")
        return graphs.runner(program, "step" if stepwise else self.graph)

    def _source(self, seed: int, first_id: int, n: int, generators: Any, part: slice) -> Philox | TorchNoise | None:
        """Where the host takes noise from; None: the step draws it itself."""
        if generators is None:
            if self.ops.initial_noise is not None or self.device.type != "cpu":
                return None
            ids = torch.arange(first_id, first_id + n, dtype=torch.int64, device=self.device)
            key = torch.tensor([(seed + 2**63) % 2**64 - 2**63], dtype=torch.int64, device=self.device)
            return Philox(key, ids, self.image_shape)
        if isinstance(generators, Sequence) and len(generators) > 1:
            generators = generators[part]
        return TorchNoise(generators, (n, *self.image_shape), self.table.draws, self.dtype, self.device)

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


def to_uint8(x: Tensor, truncate: bool = False) -> Tensor:
    """Images [n, C, H, W] in [-1, 1] -> [n, H, W, C] uint8, rounded half to even as diffusers and Pillow do.

    truncate: as OpenAI's and Ho et al.'s scripts instead, (x + 1) * 127.5 without its fraction.
    """
    if truncate:
        return ((x.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _device_of(model: object) -> torch.device:
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if first is None else first.device


def _image_shape(model: object) -> tuple[int, int, int]:
    if isinstance(model, UNet) and model.config.image_size is not None:
        return (model.config.in_channels, *model.config.image_size)
    shape = getattr(model, "image_shape", None)
    if shape is not None:
        return shape
    raise ValueError("image_shape=(C, H, W) is needed: the model does not state its image size")


def _padded(values: Tensor, n: int) -> Tensor:
    """[m, ...] -> [n, ...]: the last one repeated, for the images of a partial batch that are thrown away."""
    return torch.cat((values, values[-1:].expand(n - len(values), *values.shape[1:]))) if len(values) < n else values


def _strides(total: int, interval: int) -> Iterator[tuple[int, int]]:
    """(steps done, steps of this stride): at each multiple of ``interval`` and at the end."""
    done = 0
    while done < total:
        steps = min(interval, total - done)
        done += steps
        yield done, steps


@contextmanager
def _progress_bar(wanted: bool, total: int, n: int) -> Iterator[Any]:
    with tqdm(total=total, disable=not wanted, unit="step", desc=f"{n} image{'s' * (n != 1)}") as bar:
        yield bar
