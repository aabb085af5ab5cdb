"""One sampling step as a program over static buffers: what the loop repeats, eagerly or as a graph.

A program is made for one batch shape. Row, seed, ids and labels are on the device, and a step touches nothing
else, so the same program is right for every step, seed and batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..diffusion import output_tensor
from ..kernels.reference import CLIP, INITIAL_STEP, KO, KX, philox_normal, threshold
from ..ops import Ops, reference
from ..ops.buffers import Arena, Memory, plan
from ..step_table import StepTable
from ..unet import UNet
from .prepared import weight_bytes
from .time_rows import ClassRows, TableRows


class MemoryUse(NamedTuple):
    """Bytes that a program needs on the device."""

    arena: int  # the network's intermediate results
    outside: int  # beside it, the most that torch's own operations hold at one moment
    static: int  # x_t, its low-precision copy, counter, seed, ids, labels, noise
    tables: int  # steps and time
    weights: int

    @property
    def activations(self) -> int:
        """All that grows with the batch."""
        return self.arena + self.outside + self.static


class Runner(Protocol):
    def advance(self, k: int) -> None:
        """Run the next ``k`` steps."""


class EagerRunner:
    """Steps launched one by one by the host."""

    def __init__(self, program: Program):
        self.program = program

    def advance(self, k: int) -> None:
        for _ in range(k):
            self.program.step()


class Program:
    """The static buffers, and a step around `predict`, which a subclass gives."""

    def __init__(
        self,
        table: StepTable,
        batch_size: int,
        image_shape: tuple[int, int, int],
        device: torch.device | str,
        ops: Ops,
        given_noise: bool = False,  # z is written to `noise` before each step, not drawn by the step
    ):
        self.table, self.batch_size, self.image_shape, self.ops = table, batch_size, image_shape, ops
        self.device = torch.device(device)
        shape = (batch_size, *image_shape)
        with torch.inference_mode(False):
            # The fused kernels read x_t pixel by pixel of one channel; oneDNN wants the channels of one pixel.
            plain = self.device.type == "cpu" and ops.initial_noise is None
            layout = torch.channels_last if plain else torch.contiguous_format
            self.x = torch.empty(shape, dtype=torch.float32, device=self.device, memory_format=layout).zero_()
            self.low: Tensor | None = None
            self.noise = torch.zeros_like(self.x) if given_noise else None
            self.counter = torch.zeros(2, dtype=torch.int32, device=self.device)
            self.seed = torch.zeros(1, dtype=torch.int64, device=self.device)
            self.ids = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
            self.rows = table.rows.to(self.device, torch.float32)
        self._compiled = False

    @property
    def steps(self) -> int:
        """Steps from x_T to x_0."""
        return len(self.table)

    @torch.inference_mode()
    def begin(
        self,
        seed: int = 0,
        ids: Tensor | Sequence[int] | None = None,  # [N]; None: 0 to N - 1
        labels: Tensor | None = None,  # [N]
        x: Tensor | None = None,  # [N, C, H, W]: x_T from elsewhere; None: drawn by (seed, id)
    ) -> None:
        """Be at the first step of a new batch: write seed, ids and labels, reset the counter, draw x_T."""
        if not self._compiled:
            self.compile_ahead()
            self._compiled = True
        self.seed.fill_((seed + 2**63) % 2**64 - 2**63)
        if not isinstance(ids, Tensor):
            ids = torch.tensor(list(range(self.batch_size) if ids is None else ids), device="cpu")
        self.ids.copy_(ids, non_blocking=True)  # the host does not wait for the batch before
        self.counter.zero_()
        self.label(labels)
        low = None if self.low is None else self.low[: self.batch_size]
        if x is None and self.ops.initial_noise is not None:
            self.ops.initial_noise(self.x, self.seed, self.ids, low)
            return
        step = torch.full((1,), INITIAL_STEP, dtype=torch.int64, device=self.device)
        self.x.copy_(philox_normal(self.seed, self.ids, step, self.image_shape) if x is None else x)
        if low is not None:
            low.zero_()
            low[:, : self.x.shape[1]].copy_(self.x)

    def compile_ahead(self) -> None:
        """Before the first batch: compile what it will launch, where that can be known."""

    def label(self, labels: Tensor | None) -> None:
        """Write the labels of the batch."""

    def predict(self) -> Tensor:
        """The network's output at x_t: [N, C or 2C, H, W]."""
        raise NotImplementedError

    @torch.inference_mode()
    def step(self) -> None:
        """x_t -> x_{t-1} (Algorithm 2, lines 3 and 4), in place; the counter advances on the device."""
        self.advance(self.predict())

    def advance(self, out: Tensor) -> None:
        self.check_output(out)
        self.ops.sampler_step(
            self.x,
            out,
            self.rows,
            self.counter,
            self.seed,
            self.ids,
            variance=self.table.variance,
            x_prev=self.x,
            low=None if self.low is None else self.low[: self.batch_size],
            noise=self.noise,
            thresholding=self.table.thresholding,
        )

    def check_output(self, out: Tensor) -> None:
        n, c, h, w = self.x.shape
        wanted = c * (1 if self.table.variance == "fixed" else 2)
        allowed = {wanted, 2 * c} if self.table.learned else {wanted}
        if out.shape not in {(n, channels, h, w) for channels in allowed}:
            raise ValueError(
                f"the model's output must be [{n}, {wanted}, {h}, {w}] for a schedule with "
                f"{'a learned' if self.table.learned else 'fixed'} variance_type; got {list(out.shape)}"
            )

    @property
    def memory(self) -> MemoryUse:
        held = (self.x, self.low, self.noise, self.counter, self.seed, self.ids)
        return MemoryUse(0, 0, _bytes(*held), _bytes(self.rows), 0)


class CallableProgram(Program):
    """A step around any f(x, t[, labels]) -> out: a tensor, a tuple that starts with one, or ``.sample``.

    A model whose ``self_condition`` is true is called f(x, t, x0), where x0 is the (clipped) x_0 predicted at the
    step before, and zeros at the first (Chen et al. 2022).

    Weights of an `nn.Module` may be replaced between batches. Those that any other callable holds may be written, and
    not replaced: a captured step reads them where they were.
    """

    def __init__(self, model: Callable[..., Any], *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model = model
        with torch.inference_mode(False):
            self.times = self.table.times().to(self.device)
            self._now = self.times[:1].clone()
            self._t = self._now.repeat(self.batch_size)
            self.labels: Tensor | None = None
            self.x0 = torch.zeros_like(self.x) if getattr(model, "self_condition", False) is True else None
            self._row = self.rows[:1].clone()
        self.weights = _addresses(model)

    def state(self) -> list[Tensor | None]:
        """Beside x and the counter, what a step writes and a later one reads."""
        return [self.low, self.x0]

    @torch.inference_mode()
    def begin(self, *args: Any, **kwargs: Any) -> None:
        super().begin(*args, **kwargs)
        self.weights = _addresses(self.model)
        if self.x0 is not None:
            self.x0.zero_()

    def label(self, labels: Tensor | None) -> None:
        if self.x0 is not None and labels is not None:
            raise ValueError("a model with self_condition is called f(x, t, x0): it takes no labels")
        kept = self.labels
        if labels is None or kept is None or (kept.shape, kept.dtype) != (labels.shape, labels.dtype):
            self.labels = None if labels is None else labels.to(self.device, copy=True)
        else:
            kept.copy_(labels)

    def predict(self) -> Tensor:
        torch.index_select(self.times, 0, self.counter[:1], out=self._now)
        self._t.copy_(self._now.expand_as(self._t))
        third = self.labels if self.x0 is None else self.x0
        out = self.model(self.x, self._t) if third is None else self.model(self.x, self._t, third)
        out = output_tensor(out)
        if self.x0 is not None:
            self._predict_x0(out)
        return out

    def _predict_x0(self, out: Tensor) -> None:
        assert self.x0 is not None
        torch.index_select(self.rows, 0, self.counter[:1], out=self._row)
        row = self._row[0]
        torch.mul(self.x, row[KX], out=self.x0)
        self.x0.addcmul_(out[:, : self.x.shape[1]].to(self.x0.dtype), row[KO])
        if self.table.thresholding is None:
            torch.clamp(self.x0, -row[CLIP], row[CLIP], out=self.x0)
        else:
            self.x0.copy_(threshold(self.x0, *self.table.thresholding))


class StepProgram(Program):
    """A step around a prepared U-Net: its results in one arena where the set can, two kernels in one where it has them.

    guidance_scale: classifier-free guidance (Ho and Salimans 2022), out = null + s (cond - null) over a batch of
    2N, of a model trained with label dropout, whose last class is "none"; a learned variance is cond's.
    Raises ValueError for an image shape or a guidance that the model does not take.
    """

    def __init__(
        self,
        prepared: UNet,  # from `prepared.prepare`
        table: StepTable,
        batch_size: int,
        image_shape: tuple[int, int, int],  # (C, H, W)
        given_noise: bool = False,
        guidance_scale: float | None = None,
        arena: bool = True,  # False: every result a new tensor
    ):
        ops = prepared.ops or reference()
        super().__init__(table, batch_size, image_shape, prepared.device, ops, given_noise)
        prepared.check_input(torch.empty(1, *image_shape, device="meta"))
        if guidance_scale is not None and (
            prepared.class_embedding is None or prepared.config.num_class_embeds is None
        ):
            raise ValueError("guidance_scale needs a model with classes (num_class_embeds); this one has none")
        self.prepared, self.guidance_scale = prepared, guidance_scale
        config, images = prepared.config, batch_size * (1 if guidance_scale is None else 2)
        with torch.inference_mode(False), torch.no_grad():
            if ops.initial_noise is not None or guidance_scale is not None:
                channels = ops.input_channels(image_shape[0], prepared.dtype)
                shape = (images, channels, *image_shape[1:])
                layout = torch.channels_last
                self.low = torch.empty(shape, dtype=prepared.dtype, device=self.device, memory_format=layout).zero_()
            times = table.times().to(self.device)
            if prepared.class_embedding is None:
                self.time: TableRows | ClassRows = TableRows(prepared, times, self.counter)
            else:
                self.time = ClassRows(prepared, times, self.counter, images)
            self._guided: Tensor | None = None
            if guidance_scale is not None:
                shape = (images, config.out_channels, *image_shape[1:])
                self._guided = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self._fused = (
            ops.conv_step is not None
            and "step_weight" in prepared.conv_out.__dict__
            and prepared.dtype != torch.float64
            and config.ends_in_conv_out
            and guidance_scale is None
            and table.thresholding is None
            and not given_noise
        )
        self.plan = plan(self._dry_run) if arena and ops.placed is not None else None
        self._arena: Arena | None = None
        if self.plan is not None and ops.placed is not None and self.device.type != "meta":
            with torch.inference_mode(False):
                self._arena = Arena(self.plan, self.device)
            self._network_ops = ops.placed(self._arena)
        else:
            self._network_ops = ops

    def _dry_run(self, memory: Memory) -> object:
        assert self.ops.placed is not None
        with torch.inference_mode():
            result = self._network(self.ops.placed(memory))
            return self.ops.leave(result) if self._fused else result  # the last convolution reads all of it

    def _network(self, ops: Ops) -> Any:
        """The output, or, where the last convolution and the step are one launch, what they read."""
        x = self.x.to(self.prepared.dtype) if self.low is None else self.low
        run = self.prepared.features if self._fused else self.prepared.run
        return run(x, self.time.now(ops), ops)

    def compile_ahead(self) -> None:
        if self.ops.compile_ahead is not None and self.device.type == "cuda":
            self.ops.compile_ahead(self._launch_all)

    def _launch_all(self) -> None:
        assert self.ops.initial_noise is not None
        self.ops.initial_noise(self.x, self.seed, self.ids, None if self.low is None else self.low[: self.batch_size])
        self.step()

    def label(self, labels: Tensor | None) -> None:
        if isinstance(self.time, ClassRows):
            if labels is None:
                raise ValueError("this model is class-conditional: pass labels")
            labels = labels.to(self.device)
            if self.guidance_scale is not None:
                classes = self.prepared.config.num_class_embeds
                assert classes is not None
                labels = torch.cat((labels, torch.full_like(labels, classes - 1)))
            self.time.label(labels)
        elif labels is not None:
            raise ValueError("this model has no classes, so it takes no labels")

    @torch.inference_mode()
    def step(self) -> None:
        if self._arena is not None:
            self._arena.start()
        if self.guidance_scale is not None:
            assert self.low is not None
            self.low[self.batch_size :].copy_(self.low[: self.batch_size])
        result = self._network(self._network_ops)
        if not self._fused:
            self.advance(self._combined(result))
            return
        assert self.ops.conv_step is not None
        last = self.prepared.conv_out
        self.ops.conv_step(
            result,
            last.__dict__["step_weight"],
            last.bias,
            self.x,
            self.rows,
            self.counter,
            self.seed,
            self.ids,
            variance=self.table.variance,
            x_prev=self.x,
            low=self.low,
        )

    def _combined(self, out: Tensor) -> Tensor:
        """Of a doubled batch the guided output, in float32: a large scale would multiply the rounding."""
        if self.guidance_scale is None:
            return out
        assert self._guided is not None
        self._guided.copy_(out)
        c, n = self.image_shape[0], self.batch_size
        cond, null = self._guided[:n], self._guided[n:]
        cond[:, :c].sub_(null[:, :c]).mul_(self.guidance_scale).add_(null[:, :c])
        return cond

    @property
    def memory(self) -> MemoryUse:
        base = super().memory
        arena, outside = (0, 0) if self.plan is None else (self.plan.size, self.plan.outside)
        tables, static = self.time.tables(), self.time.static()
        return MemoryUse(
            arena,
            outside,
            base.static + _bytes(self._guided, *static),
            base.tables + _bytes(*tables),
            weight_bytes(self.prepared),
        )


def _addresses(model: object) -> tuple[int, ...]:
    """Where a module's weights are."""
    if not isinstance(model, nn.Module):
        return ()
    return tuple(_address(t) for t in (*model.parameters(), *model.buffers()))


def _address(t: Tensor) -> int:
    try:
        return t.data_ptr()
    except RuntimeError:  # a subclass of Tensor whose values lie in other tensors
        return id(t)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
