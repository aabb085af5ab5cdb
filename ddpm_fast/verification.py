"""Is it right here? A set of operations and a dtype, held to a float64 reference on the same noise.

The house rule (`house_rule`) judges single steps from the reference's own x_t, where errors do not compound; torch's
error is the larger of its two memory layouts. A float64 truth that is not finite judges nobody: the network or its
chain diverges whoever computes it, and that is what the user is told. How far a whole chain drifts is shown beside the
verdict and not judged.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check_seed
from .checkpoints import Checkpoint
from .engine import CallableProgram, Program, StepProgram
from .house_rule import FLOOR, Error, error, full_float32, within, worst
from .kernels.reference import CLIP, INITIAL_STEP, KO, KX, philox_normal, sampler_step, threshold
from .ops import Ops
from .progress import progress_bar
from .sampler import Sampler
from .stages import stage
from .unet import UNet


class Pair(NamedTuple):
    """One result against the truth: ours, and torch's in the same dtype."""

    ours: Error
    torch: Error

    @property
    def ok(self) -> bool:
        return within(self.ours, self.torch)


@dataclass(frozen=True)
class Probe:
    """One step of the chain, from the reference's x_t."""

    step: int
    timestep: int
    output: Pair  # of the network
    x: Pair  # x_{t-1}

    @property
    def ok(self) -> bool:
        return self.output.ok and self.x.ok


@dataclass(frozen=True)
class Report:
    source: str
    ops: str
    dtype: str
    device: str
    n: int
    steps: int
    probes: tuple[Probe, ...]
    final: Pair  # images at the end of a chain of each one's own; PSNR over [-1, 1]; not judged
    exact: dict[str, bool]  # what must be equal bit for bit, where it was looked at

    @property
    def ok(self) -> bool:
        finite = math.isfinite(self.final.ours.largest)
        return finite and all(p.ok for p in self.probes) and all(self.exact.values())

    def facts(self) -> dict[str, Any]:
        """JSON-ready; an infinite number is null."""
        probes = [{**_plain(asdict(p)), "ok": p.ok} for p in self.probes]
        return {
            "ok": self.ok,
            **{k: getattr(self, k) for k in ("source", "ops", "dtype", "device", "n", "steps", "exact")},
            "floor": FLOOR,
            "probes": probes,
            "final": _plain(self.final),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verify(
    checkpoint: Checkpoint,
    dtype: torch.dtype | str = torch.float32,
    ops: str | Ops = "auto",
    device: torch.device | str = "cpu",
    n: int = 4,  # images
    seed: int = 0,
    label: int | None = None,  # class of all images; None: they differ, where the model has classes
    steps: int | None = 20,  # of the chain; None: all
    probes: int | None = 8,  # steps of it that are judged; None: all
    progress: bool = False,
) -> Report:
    """Run a chain three ways: in float64, in torch as it is in ``dtype``, and by `Sampler`'s own steps.

    On a GPU also: graph against eager, and for the fused set a batch of n against n of one. ValueError for what
    does not fit together.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    check_seed(seed)
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1; got {probes}")
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"verify needs float64, on cpu or cuda; got {device}")
    model, schedule = checkpoint.model, checkpoint.schedule
    if steps is not None:
        steps = min(steps, schedule.num_train_timesteps)
    options: dict[str, Any] = {"steps": steps, "dtype": dtype, "device": device, "ops": ops}
    with full_float32():
        sampler = Sampler(model, schedule, batch_size=n, graph="none", **options)
        labels = _labels(sampler, model, n, label)
        chains = _Chains(model, sampler, n, seed, labels)
        judged, final = chains.run(_spread(len(sampler.table), probes), progress)
        exact = {}
        if device.type == "cuda":
            graph = Sampler(model, schedule, batch_size=n, **options)
            exact["graph equals eager"] = torch.equal(graph.sample(n, seed, labels, check_finite=False), chains.ours)
            if sampler.ops.initial_noise is not None:
                exact[f"a batch of {n} equals {n} of 1"] = same_in_any_batch(sampler, n, seed, labels)
    return Report(
        source=checkpoint.source,
        ops=sampler.ops.name,
        dtype=str(sampler.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        n=n,
        steps=len(sampler.table),
        probes=tuple(judged),
        final=final,
        exact=exact,
    )


def same_in_any_batch(sampler: Sampler, n: int, seed: int = 0, labels: Tensor | None = None) -> bool:
    """Whether each of n images has the same bits drawn alone."""
    together = sampler.sample(n, seed, labels, check_finite=False)

    def alone(i: int) -> Tensor:
        return sampler.sample(1, seed, None if labels is None else labels[i : i + 1], i, check_finite=False)

    return all(torch.equal(together[i : i + 1], alone(i)) for i in range(n))


class _Chains:
    """The three ways of taking one step."""

    def __init__(self, model: UNet, sampler: Sampler, n: int, seed: int, labels: Tensor | None):
        self.sampler, self.n, self.seed, self.labels = sampler, n, seed, labels
        self.table, self.device = sampler.table, sampler.device
        self.truth = copy.deepcopy(model).to(self.device, torch.float64).eval()
        self.plain = copy.deepcopy(model).to(self.device, sampler.dtype).eval()
        self.channels_last = copy.deepcopy(self.plain)
        torch.nn.Module.to(self.channels_last, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.program: Program
        if isinstance(sampler.model, UNet):
            self.program = StepProgram(sampler.model, sampler.table, n, sampler.image_shape)
        else:
            where = sampler.image_shape, self.device, sampler.ops
            self.program = CallableProgram(sampler.model, sampler.table, n, *where)
        self.self_condition = getattr(model, "self_condition", False)
        self.ids = torch.arange(n, device=self.device)
        self.times = self.table.times()

    @torch.inference_mode()
    def run(self, judged: list[int], progress: bool = False) -> tuple[list[Probe], Pair]:
        x = theirs = self.noise(INITIAL_STEP)
        third = their_third = torch.zeros_like(x) if self.self_condition else self.labels
        probes = []
        with progress_bar(progress, len(self.table), "step", "against float64") as bar:
            for i in range(len(self.table)):
                out = self.network(self.truth, i, x, third)
                after = self.step(i, x, out)
                self.expect_finite(i, out, after)
                if i in judged:
                    probes.append(self.probe(i, x, third, out, after))
                their_out = self.network(self.plain, i, theirs, their_third)
                if self.self_condition:
                    third, their_third = self.x0(i, x, out), self.x0(i, theirs, their_out)
                # Kept in float32 between steps, as by every chain here.
                x, theirs = after.float(), self.step(i, theirs, their_out)
                bar.update()
        with stage("drawing the images by the operations themselves"):
            self.ours = self.sampler.sample(self.n, self.seed, self.labels, check_finite=False)  # judged as it is
        return probes, Pair(error(self.ours, after, 2.0), error(theirs, after, 2.0))

    def expect_finite(self, i: int, out: Tensor, after: Tensor) -> None:
        for what, value in (("the network's output", out), ("x after the step", after)):
            if not value.isfinite().all():
                raise ValueError(
                    f"{what} is not finite in float64, at step {i} (timestep {self.table.timesteps[i]}): this model or "
                    "its chain diverges whoever computes it, so no operations can be judged by it"
                )

    def probe(self, i: int, x: Tensor, third: Tensor | None, out: Tensor, after: Tensor) -> Probe:
        # In both memory layouts, whose sums torch orders differently: the worse is what the dtype can do.
        same = [self.network(m, i, x, third) for m in (self.plain, self.channels_last)]
        mine, my_x = self.own_step(i, x, third)
        return Probe(
            i,
            self.table.timesteps[i],
            Pair(error(mine, out), worst(error(y, out) for y in same)),
            Pair(error(my_x, after), worst(error(self.step(i, x, y), after) for y in same)),
        )

    def own_step(self, i: int, x: Tensor, third: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and x_{t-1} of the program that `Sampler` runs."""
        program, ops = self.program, self.program.ops
        program.begin(self.seed, self.ids, self.labels, x)
        program.counter[0] = i
        if isinstance(program, CallableProgram):
            if program.x0 is not None and third is not None:
                program.x0.copy_(third)
            out = program.predict().clone()
            program.advance(out)
            return out, program.x.clone()
        assert isinstance(program, StepProgram)
        low = program.x.to(self.sampler.dtype) if program.low is None else program.low
        out = program.prepared.run(low, program.time.now(ops), ops).clone()
        program.step()
        return out, program.x.clone()

    def noise(self, step: int) -> Tensor:
        return philox_normal(
            torch.tensor([self.seed], device=self.device),
            self.ids,
            torch.tensor([step], device=self.device),
            self.sampler.image_shape,
        )

    def network(self, model: UNet, i: int, x: Tensor, third: Tensor | None) -> Tensor:
        """third: the labels, or x_0 as predicted at the step before for a model that conditions on itself."""
        wide = model.dtype == torch.float64
        t = self.times[i].double() if wide else self.times[i]
        layout = torch.channels_last if model is self.channels_last else torch.contiguous_format
        return model(x.to(model.dtype, memory_format=layout), t, third)

    def x0(self, i: int, x: Tensor, out: Tensor) -> Tensor:
        """The clipped x_0 of step i, float32."""
        row = self.table.rows[i].tolist()
        x0 = row[KX] * x.to(out.dtype if out.dtype == torch.float64 else x.dtype) + row[KO] * out[:, : x.shape[1]]
        limit = self.table.thresholding
        return (x0.clamp(-row[CLIP], row[CLIP]) if limit is None else threshold(x0, *limit)).float()

    def step(self, i: int, x: Tensor, out: Tensor) -> Tensor:
        """x_{t-1}: in float64 of a float64 output, else in float32 as the samplers do."""
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        return sampler_step(
            x.to(wide),
            out,
            self.table.rows.to(self.device, wide),
            torch.tensor([i, 0], dtype=torch.int32, device=self.device),
            torch.tensor([self.seed], device=self.device),
            self.ids,
            variance=self.table.variance,
            noise=self.noise(i),
            thresholding=self.table.thresholding,
        )


def _spread(total: int, wanted: int | None) -> list[int]:
    """``wanted`` of ``total`` steps, the last among them, and of two or more the first."""
    count = total if wanted is None else min(wanted, total)
    return [total - 1] if count == 1 else [round(i * (total - 1) / (count - 1)) for i in range(count)]


def _labels(sampler: Sampler, model: UNet, n: int, label: int | None) -> Tensor | None:
    if model.class_embedding is not None and model.config.class_embed_type == "identity":
        raise ValueError("verify has no labels for a model that takes class embeddings themselves")
    if label is not None or model.class_embedding is None:
        return sampler.checked_labels(label, n)
    classes = model.config.num_class_embeds or model.config.num_train_timesteps or 1000
    return torch.arange(n, device=sampler.device) % classes


def report_text(r: Report) -> str:
    """The report for a person."""
    lines = [
        f"{r.source}: {r.ops} in {r.dtype} on {r.device}, {r.n} image{'s' * (r.n != 1)}, {r.steps} steps",
        f"error against float64, over max(rms, |truth|); allowed: twice torch's in {r.dtype}, plus {FLOOR:.1e}",
        "",
        f"{'':>14}  {'network output':^42}  {'x after the step':^42}",
        f"{'step':>5} {'t':>8}  " + "  ".join(["largest (torch)     RMS (torch)         PSNR"] * 2),
    ]
    for p in r.probes:
        lines.append(f"{p.step:>5} {p.timestep:>8}  {_cells(p.output)}  {_cells(p.x)}{'' if p.ok else '  TOO LARGE'}")
    lines += ["", f"final images   {_cells(r.final)}  free-running, over 2 for PSNR; not judged"]
    lines += [f"{what:<40} {'yes, bit for bit' if holds else 'NO'}" for what, holds in r.exact.items()]
    return "\n".join([*lines, "", "within the house rule" if r.ok else "NOT within the house rule"])


def _cells(p: Pair) -> str:
    pairs = (f"{a:.2e} ({b:.2e})" for a, b in ((p.ours.largest, p.torch.largest), (p.ours.rms, p.torch.rms)))
    return "  ".join([*(f"{cell:<19}" for cell in pairs), f"{p.ours.psnr:5.1f}"])
