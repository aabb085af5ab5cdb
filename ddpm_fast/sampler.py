"""Sampler: a trained model and a schedule in, images out, by Algorithm 2 with all its steps."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .arguments import (
    DTYPES,
    batch_size_of,
    check_device,
    check_noise,
    dtype_called,
    dtype_name,
    number,
    shape_of_images,
    whole_labels,
    whole_number,
)
from .classes import labels_needed, null_class
from .engine import CallableProgram, EagerRunner, Program, Runner, StepProgram, batching
from .engine.call import Call, Shown, check_numbers, looked_at, padded, strides
from .engine.choose_ops import choose_ops, expect_device
from .engine.defaults import device_of, image_shape_of, numbered
from .engine.nonfinite import FirstFaults, Unchanged, finite_images, repair
from .engine.prepared import prepare
from .engine.turns import Turns
from .graphs import why_no_graph
from .noise import NoiseSource
from .ops import Ops
from .pixels import to_uint8
from .progress import progress_bar
from .schedule import Schedule
from .step_table import StepTable, step_table
from .unet import UNet

__all__ = ["DTYPES", "GRAPHS", "Sampler", "to_uint8"]
GRAPHS = ("auto", "none", "step", "chunk", "loop")
CACHED_PROGRAMS = 3  # batch shapes whose buffers and graphs are kept


class Sampler:
    """Draws images from a model by a fixed chain of steps.

    Any thread may call `sample`; calls on one Sampler take turns. A Sampler can be copied and pickled: the copy has its
    weights and settings, makes its programs anew and draws the same images.

    Args:
        model: a `UNet`, or any callable f(x, t[, labels]) -> out with x [N, C, H, W] and t [N] (then give image_shape);
            out may be a tuple that starts with the output, or have it as ``.sample``. One whose ``self_condition`` is
            true is called f(x, t, x0), x0 as predicted at the step before.
        schedule: the `Schedule` it was trained with.
        batch_size: images drawn together; "auto" is as many as fit on a GPU, and what is fast on a CPU
            (`batching.choose`). Where memory ends, it is halved.
        steps: how many timesteps (by the schedule's spacing); which ones, descending; or text, OpenAI's rule ("250",
            "10,15,20", "ddim50"); None is all of them.
        method: "ddpm" (Ho et al. 2020, Algorithm 2), "ddim" (Song et al. 2021, with its eta), or for a Score-SDE VP
            model one of `vp_sde.PREDICTORS`; None: the schedule's, with its own eta and steps.
        dtype: of the network, as a torch.dtype or by its name; x_t itself stays float32.
        ops: "reference", "cpu", "winograd", "triton", an `Ops` value, or "auto": fused kernels on a GPU where Triton
            works; on a CPU "winograd" where a batch is long enough to pay for compiling and can be compiled, else
            "cpu"; elsewhere "reference". `ops_reason` says why.
        graph: "auto", "none", "step", "chunk" or "loop"; all but none need a GPU.
        noise: "philox", a function of (seed, id, step); or "torch", a torch.Generator seeded by ``seed``, or a
            generator or list of them: then the stream is that of diffusers' DDPMPipeline.
        image_shape: (C, H, W) in pixels; default the model's own.
        guidance_scale: classifier-free guidance for a `UNet` trained with label dropout, whose last class is "none".
        time_scale: the model is given time_scale * t; None: the schedule's.

    Raises:
        ValueError: for what does not fit together.
        RuntimeError: where the named ops cannot run here.
    """

    def __init__(
        self,
        model: UNet | Callable[..., Any],
        schedule: Schedule,
        batch_size: int | str = 64,
        steps: int | str | Sequence[int] | None = None,
        method: str | None = None,
        eta: float | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str | None = None,
        ops: str | Ops = "auto",
        graph: str = "auto",
        noise: str | torch.Generator | Sequence[torch.Generator] = "philox",
        image_shape: tuple[int, int, int] | None = None,
        guidance_scale: float | None = None,
        time_scale: float | None = None,
    ):
        if not isinstance(schedule, Schedule) or not callable(model):
            raise ValueError(
                f"Sampler needs a model that can be called and a Schedule; got {type(model).__name__} and "
                f"{type(schedule).__name__} (of a diffusers scheduler: Schedule.from_dict(scheduler.config))"
            )
        batch_size, dtype = batch_size_of(batch_size), dtype_called(dtype)
        if graph not in GRAPHS:
            raise ValueError(f"graph must be one of {', '.join(GRAPHS)}; got {graph!r}")
        self._automatic = batch_size == "auto"
        self.schedule, self.dtype, self.noise = schedule, dtype, noise
        self.table: StepTable = step_table(schedule, steps, method, eta, time_scale)
        self.method = schedule.method if method is None else method
        self.device = numbered(check_device(torch.device(device)) if device is not None else device_of(model))
        if graph not in ("auto", "none") and (why_not := why_no_graph(self.device)):
            raise ValueError(f"graph={graph!r} cannot be had: {why_not}; use graph='auto'")
        self.graph = graph
        self.guidance_scale = None if guidance_scale is None else number("guidance_scale", guidance_scale)
        self.image_shape = shape_of_images(image_shape_of(model) if image_shape is None else image_shape)
        batch = batch_size if isinstance(batch_size, int) else None
        self.ops, self.ops_reason = choose_ops(ops, self.device, model, dtype, self.image_shape, batch, len(self.table))
        if isinstance(model, UNet):  # now, not when a set of images has been begun
            model.check_input(torch.empty(1, *self.image_shape, device="meta"))
        expect_device(self.ops, self.device)
        if guidance_scale is not None and not (isinstance(model, UNet) and model.config.num_class_embeds):
            raise ValueError("guidance_scale needs a UNet with classes (num_class_embeds); this model has none")
        self.label_names: Sequence[str] | None = getattr(model, "label_names", None)
        self.model: Any = self._prepared(model, dtype)
        # Kept where it may be needed again: for images that half precision cannot hold.
        self._copied = self.model is not model
        self._original = Unchanged(model) if self._copied and dtype != torch.float32 else None
        self.batch_size: int = batch_size if isinstance(batch_size, int) else self._chosen_batch()
        # Where an image's bits do not depend on its batch, batches of one call are about equal: no padding is drawn.
        self._even = self._automatic and self.ops.initial_noise is not None
        self._limit = batching.Limit()
        self._programs: OrderedDict[tuple[int, bool], tuple[Program, Runner]] = OrderedDict()
        self._turns = Turns("Sampler", self.device)

    @property
    def noise(self) -> str | torch.Generator | Sequence[torch.Generator]:
        """Where noise comes from. What is set here holds from the next call on, for all threads."""
        return self._noise

    @noise.setter
    def noise(self, noise: str | torch.Generator | Sequence[torch.Generator]) -> None:
        check_noise(noise, self._automatic)
        self._noise = noise

    def __getstate__(self) -> dict[str, Any]:
        """Everything but programs and their graphs, which are made anew at the next call."""
        return {**self.__dict__, "_programs": OrderedDict()}

    def __repr__(self) -> str:
        model, noise = self.model, self.noise
        facts = {
            "model": "UNet" if isinstance(model, UNet) else getattr(model, "__name__", type(model).__name__),
            "images": " x ".join(map(str, self.image_shape)),
            "steps": f"{len(self.table)} of {self.schedule.num_train_timesteps}",
            "method": self.method,
            "batch_size": self.batch_size,
            "dtype": dtype_name(self.dtype),
            "device": self.device,
            "ops": f"{self.ops.name} ({self.ops_reason})",
            "graph": self.graph if self.device.type == "cuda" else "none",
            "noise": noise if isinstance(noise, str) else "by generator",
        }
        if self.guidance_scale is not None:
            facts["guidance_scale"] = f"{self.guidance_scale:g}"
        return "Sampler(\n" + "".join(f"  {name}: {value}\n" for name, value in facts.items()) + ")"

    def _prepared(self, model: Any, dtype: torch.dtype) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            if isinstance(model, UNet):
                return prepare(model, dtype, self.device, self.ops)
            # any callable; one that can makes its own copy for this dtype and device
            for_sampling = getattr(model, "for_sampling", None)
            return model if for_sampling is None else for_sampling(dtype, self.device)

    def _own_dtype(self) -> AbstractContextManager[Any]:
        """Without the caller's autocast, which knows nothing of packed weights; a callable is called as the caller
        would call it."""
        return torch.autocast(self.device.type, enabled=False) if self._copied else nullcontext()

    def _chosen_batch(self) -> int:
        model, table, shape = self.model, self.table, self.image_shape
        return batching.choose(model, table, shape, self.dtype, self.device, self.ops, self.guidance_scale)

    @property
    def num_classes(self) -> int | None:
        """Label values the model takes, or None where it takes none."""
        return self.model.config.num_class_embeds if isinstance(self.model, UNet) else None

    @property
    def null_class(self) -> int | None:
        """The label that stands for no class, where the model has one: under guidance, or by the classes' names."""
        return null_class(self.num_classes, self.label_names, self.guidance_scale is not None)

    def checked_labels(
        self, labels: int | Sequence[int] | Tensor | None, n: int
    ) -> Tensor | None:  # [n, ...] on the sampler's device; None for a model without classes
        """``labels`` as `sample` takes them, one an image. ValueError for what the model does not take."""
        if labels is None:
            if self.num_classes is not None:
                raise ValueError(labels_needed(self.num_classes, self.null_class, self.label_names))
            return None
        classes = self.num_classes
        labels = torch.as_tensor(labels, device=self.device) if classes is None else whole_labels(labels, self.device)
        if isinstance(self.model, UNet):
            if self.model.class_embedding is None:
                raise ValueError("this model has no classes, so it takes no labels")
            self.model.check_labels(labels)
            low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
            if classes is not None and not 0 <= low <= high < classes:
                got = f"{low}..{high}" if low < high else low
                raise ValueError(f"labels must be in 0..{classes - 1}; got {got}")
        labels = labels.expand(n) if labels.ndim == 0 else labels
        if len(labels) != n:
            raise ValueError(f"labels must be one number, or one an image; got {len(labels)} for n={n}")
        return labels

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
        check_finite: bool = True,
    ) -> Tensor:  # [n, C, H, W] float32, in [-1, 1] where the schedule clips
        """Draw samples first_id .. first_id + n - 1 of ``seed``: [n, C, H, W] float32 on the sampler's device, in
        [-1, 1] where the schedule clips x_0, as its default does (`to_uint8` makes pixels of them).

        seed: in [-2**63, 2**64); a negative one is the one 2**64 above it, as for torch.manual_seed. first_id: any
        number of 64 bits, negative ones too (ids name noise); files are named by ids from 0 on.

        labels: the class, 0 .. num_classes - 1, of all images, or [n] of each; needed by a `UNet` with classes, and
        for no `UNet` without; under guidance the last class stands for none. One with class_embed_type="identity"
        takes embeddings instead, [n, config.time_width]. Any other callable gets [n, ...] as they are given here.

        callback(step, x) is called with x_T, after every ``interval`` steps and after the last, with the steps
        done and the batch as it stands, [<= batch_size, C, H, W] float32 on the sampler's device; copy it to
        keep it. It, and a progress bar, wait for the device at each interval; without them nothing does before the
        end. A bar alone moves every step on a CPU, and fifty times a batch elsewhere. Where memory ended, a batch
        begins again, smaller, at step 0.

        Images with NaN or infinity are drawn again in float32 if the network ran in another dtype, with a warning;
        RuntimeError names the ids and steps of those that are still not finite. Without check_finite they are
        returned as they are, and the end of the call does not wait for the device.
        """
        n, seed, first_id = (whole_number(*given) for given in (("n", n), ("seed", seed), ("first_id", first_id)))
        check_numbers(n, first_id, seed)
        each_step = callback is not None or self.device.type == "cpu"
        interval = looked_at(interval, len(self.table), each_step)
        watched = interval if progress or callback is not None else len(self.table)
        with self._turns.taken():
            call = self._call(n, seed, self.checked_labels(labels, n), first_id)
            result, finite = self._drawn(call, progress, callback, watched)
            if check_finite and not finite.all():  # waits for the device, once
                rows, times = (~finite).nonzero().flatten().tolist(), self.table.timesteps
                repair(call, rows, result, self.dtype, times, self._draw_watched, self._in_float32)
        return result

    def _call(self, n: int, seed: int, labels: Tensor | None, first_id: int) -> Call:
        generators = self.noise if not isinstance(self.noise, str) else None
        if isinstance(generators, Sequence) and len(generators) not in (1, n):
            raise ValueError(f"a list of generators needs one an image; got {len(generators)} for n={n}")
        if self.noise == "torch":
            generators = torch.Generator(self.device).manual_seed(seed % 2**64)
        return Call(
            n=n,
            seed=seed,
            first_id=first_id,
            labels=labels,
            generators=generators,
            in_step=self.ops.initial_noise is not None or self.device.type != "cpu",
            image_shape=self.image_shape,
            draws=self.table.draws,
            dtype=self.dtype,
            device=self.device,
            unit=self._at_once(n),
        )

    def _drawn(
        self, call: Call, progress: bool, callback: Callable[[int, Tensor], None] | None, interval: int
    ) -> tuple[Tensor, Tensor]:  # [n, C, H, W] float32; [n] bool, which of them are finite
        n = call.n
        with torch.inference_mode(False):  # an ordinary tensor, which may be changed in place and trained on
            result = torch.empty(n, *self.image_shape, dtype=torch.float32, device=self.device)
        finite = torch.ones(n, dtype=torch.bool, device=self.device)
        units = call.units()
        images = f"{n} image{'s' * (n != 1)}"
        with progress_bar(progress, len(units) * len(self.table), "step", images) as bar:
            shown = Shown(bar, callback, len(self.table), progress and self.device.type == "cuda")
            for unit in units:

                def draw(rows: Sequence[int], unit: range = unit) -> None:
                    assert isinstance(rows, range)
                    with shown.batch(first=rows.start == unit.start):
                        x = self._draw(call, unit, rows, shown.look, interval)
                    result[rows.start : rows.stop] = x
                    finite[rows.start : rows.stop] = finite_images(x)

                self._in_parts(call, unit, draw)
        return result, finite

    def _at_once(self, n: int) -> int:
        """Images of a batch, of n in all."""
        return -(-n // -(-n // self.batch_size)) if self._even and n else self.batch_size

    def _in_parts(self, call: Call, rows: Sequence[int], draw: Callable[[Sequence[int]], None]) -> None:
        with self._own_dtype():
            self._limit.run(rows, lambda n: self._shape(call, n), draw, self._release)

    def _release(self) -> None:
        """Free what programs hold."""
        self._programs.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _draw(
        self, call: Call, unit: range, rows: Sequence[int], look: Callable[[int, Tensor], None], interval: int
    ) -> Tensor:  # [len(rows), C, H, W], the program's own buffer
        """x_0 of ``rows``; look(done, x) at the beginning and after every ``interval`` steps."""
        source = call.source(unit, rows)
        program, runner = self._program(self._shape(call, len(rows)), source is not None)
        size, labels = program.batch_size, call.labels_of(rows)
        x_T = None if source is None else padded(source.initial(), size)
        program.begin(call.seed, padded(call.ids(rows), size), None if labels is None else padded(labels, size), x_T)
        x = program.x[: len(rows)]
        look(0, x)
        for done, steps in strides(len(self.table), interval):
            self._advance(program, runner, source, done - steps, steps)
            look(done, x)
        return x

    def _draw_watched(self, call: Call, rows: Sequence[int], result: Tensor) -> dict[int, int]:
        """Draw ``rows`` into ``result``, looking at each step: row -> steps done when it was first not finite."""
        faults = FirstFaults()
        for unit in call.units():

            def draw(part: Sequence[int], unit: range = unit) -> None:
                result[list(part)] = self._draw(call, unit, part, faults.looking_at(part), 1)

            self._in_parts(call, [row for row in rows if row in unit], draw)
        return faults.steps

    def _in_float32(self) -> Callable[[Call, Sequence[int], Tensor], dict[int, int]] | None:
        """`_draw_watched` over float32 weights, or None where there are none or they have been changed."""
        if not self._original:
            return None
        self._release()  # what the smaller dtype held
        other = copy.copy(self)
        other.model, other.dtype = self._prepared(self._original.model, torch.float32), torch.float32
        other.graph, other._original, other._programs = "none", None, OrderedDict()
        return other._draw_watched

    def _advance(self, program: Program, runner: Runner, source: NoiseSource | None, done: int, steps: int) -> None:
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

    def _shape(self, call: Call, n: int) -> int:
        """Images of the program that draws n: its own number on a CPU, where an idle image costs its full time;
        elsewhere that of the whole batch, whose graph and buffers are there already."""
        plain = self.device.type == "cpu" and self.ops.initial_noise is None
        return n if plain else self._limit.of(min(call.n, call.unit))

    def _program(self, size: int, given_noise: bool) -> tuple[Program, Runner]:
        key = (size, given_noise)
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
