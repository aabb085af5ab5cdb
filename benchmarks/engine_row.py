"""One batch size of `benchmarks.engine`: forms made one by one, timed in turns, and the kernels of a step."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import kernel_times
from ddpm_fast import ops
from ddpm_fast.benchmarking.providers import Case, chosen
from ddpm_fast.benchmarking.timing import clock_for, compare
from ddpm_fast.checkpoints import Checkpoint
from ddpm_fast.engine import StepProgram
from ddpm_fast.planning import records
from ddpm_fast.profiling.nvml import FIELDS, Watch
from ddpm_fast.roofline import Roofs, roofs
from ddpm_fast.sampler import DTYPES, Sampler

GRAPHS = ("none", "step", "chunk", "loop")
RIVAL = "torch.compile"
PDL = "auto, pdl"  # the best form with programmatic dependent launches, an option that is off unless asked for


def sampler(ckpt: Checkpoint, form: str, batch: int, args: argparse.Namespace, steps: int) -> Sampler:
    graph, _, pdl = form.partition(", ")
    return Sampler(
        ckpt.model,
        ckpt.schedule,
        batch_size=batch,
        steps=steps,
        dtype=DTYPES[args.dtype],
        device=args.device,
        graph=graph,
        ops=ops.triton(pdl=True) if pdl else "auto",
    )


def compiled(ckpt: Checkpoint, batch: int, args: argparse.Namespace) -> Callable[[], object]:
    """diffusers' U-Net as fast as torch makes it (`benchmarking.peers`), in its own loop."""
    (provider,) = chosen(["diffusers-compile"])
    case = Case(ckpt.model, ckpt.schedule, batch, args.steps, args.device)
    made = provider.make(case, DTYPES[args.dtype])
    return lambda: made.chain(0)


def missing_rival(args: argparse.Namespace) -> str | None:
    (provider,) = chosen(["diffusers-compile"])
    return provider.missing(args.device, DTYPES[args.dtype])


class Row:
    """One batch size. ``facts`` grows as it is measured, and is JSON-ready at any time."""

    def __init__(self, ckpt: Checkpoint, batch: int, args: argparse.Namespace):
        self.ckpt, self.batch, self.args = ckpt, batch, args
        self.cuda = args.device.type == "cuda"
        self.ready: dict[str, Callable[[], object]] = {}
        self.ours: dict[str, Sampler] = {}
        self.eager: Tensor | None = None
        self.facts: dict[str, Any] = {
            "batch": batch,
            "ms_a_step": {},
            "failed": {},  # variant -> why
            "exact": {},  # whether the images have eager's bits
            "ran_as": {},  # form that was asked for -> form that ran, where it is another
            "first_call_s": {},  # compilation, autotuning and capture included
            "peak_mib": {},  # allocated by torch while one variant alone was made and run
        }

    def measure(self) -> None:
        graphs = () if not self.cuda else ("auto",) if self.args.compiled else (*GRAPHS[1:], PDL)
        for graph in ("none", *graphs):
            self._ready(graph, partial(self._own, graph))
        if self.args.compiled and missing_rival(self.args) is None:
            self._ready(RIVAL, partial(compiled, self.ckpt, self.batch, self.args))
        if "none" in self.ready:
            self._alone()
        if not self.ready:
            return
        self._time()
        self._try("chain", self._chain)
        self.ready, self.ours = {}, {}  # their memory is the next batch size's

    def profile(self) -> None:
        """Every kernel of a step, in `facts` too. After all loops are built: CUDA has crashed on building one once
        its profiler had run (pytorch issue 134308)."""
        if not self.args.compiled:
            self._try("kernels", self._kernels)

    def _try(self, name: str, stage: Callable[[], None]) -> None:
        if self.facts.get("best_graph") is not None:
            try:
                stage()
            except Exception as error:  # what has been measured stays
                self.facts["failed"][name] = line(error)

    def _own(self, graph: str) -> Callable[[], object]:
        made = self.ours[graph] = sampler(self.ckpt, graph, self.batch, self.args, self.args.steps)
        return lambda: made.sample(self.batch, check_finite=False)

    def _ready(self, name: str, make: Callable[[], Callable[[], object]]) -> None:
        """Make a variant and run it once, alone; what fails, or has other bits than eager, is not timed."""
        facts, before = self.facts, 0
        try:
            if self.cuda:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began = time.perf_counter()
            run = make()
            result = run()
            if self.cuda:
                torch.cuda.synchronize()
                facts["peak_mib"][name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            facts["first_call_s"][name] = time.perf_counter() - began
            if name in self.ours:
                self._compare(name, result)
        except Exception as error:
            facts["failed"][name] = line(error)
            self.ours.pop(name, None)
            return
        if facts["exact"].get(name, True):
            self.ready[name] = run
        else:
            facts["failed"][name] = "its images are not those of eager steps, so it is not timed"

    def _compare(self, name: str, images: Any) -> None:
        kinds = [getattr(runner, "kind", "none") for _, runner in self.ours[name]._programs.values()]
        if kinds and kinds[-1] != name.partition(", ")[0]:
            self.facts["ran_as"][name] = kinds[-1]
        if self.eager is None:
            if not images.isfinite().all():
                raise RuntimeError("its images are not finite")
            self.eager = images.clone()
        else:
            self.facts["exact"][name] = torch.equal(images, self.eager)

    def _alone(self) -> None:
        """The batch's last image, drawn in a batch of one: the same bits, on the fused set."""
        ours = self.ours["none"]
        if self.eager is None or ours.ops.name != "triton":
            return
        one = sampler(self.ckpt, "none", 1, self.args, self.args.steps)
        image = one.sample(1, first_id=self.batch - 1, check_finite=False)
        same = self.facts["exact"]["last image alone"] = torch.equal(image, self.eager[-1:])
        if not same:  # it is as near to the truth as the check says, so it is timed, but a promise is broken
            self.facts["failed"]["last image alone"] = "its bits depend on its batch"

    def _time(self) -> None:
        args, rounds = self.args, (self.args.rounds, self.args.rounds)
        watch = Watch([args.device]) if self.cuda else None
        if watch is not None:
            watch.__enter__()
        try:
            timed = compare(self.ready, clock=clock_for(args.device), rounds=rounds, repeat=False)
        finally:
            if watch is not None:
                watch.__exit__(None, None, None)
        ms = {name: timed[name].median_ms / args.steps for name in self.ready}
        self.facts["ms_a_step"] = ms
        self.facts["samples_ms"] = {name: list(timed[name].samples_ms) for name in self.ready}
        if watch is not None:
            self.facts["gpu"] = _watched(watch)
        own = {n: m for n, m in ms.items() if n in self.ours and n != PDL}
        if own:
            best = min(own, key=own.__getitem__)
            chain = self.ckpt.schedule.num_train_timesteps
            self.facts |= {
                "best_graph": best,
                "images_per_s": self.batch * 1e3 / (own[best] * chain),
                "extrapolated": args.steps < chain,
            }
            if RIVAL in ms:
                self.facts["times_torch_compile"] = ms[RIVAL] / own[best]
            if PDL in ms:
                self.facts["times_with_pdl"] = own[best] / ms[PDL]

    def _chain(self) -> None:
        """A whole chain in the best form, twice; the second is kept."""
        facts, chain = self.facts, self.ckpt.schedule.num_train_timesteps
        if not facts["extrapolated"] or facts["ms_a_step"][facts["best_graph"]] * chain > 1e3 * self.args.chain_seconds:
            return
        whole = sampler(self.ckpt, facts["best_graph"], self.batch, self.args, chain)
        clock = clock_for(self.args.device)
        ms = [clock(lambda: whole.sample(self.batch, check_finite=False)) for _ in range(2)][-1]
        facts |= {"chain_s": ms / 1e3, "images_per_s": self.batch * 1e3 / ms, "extrapolated": False}

    def _kernels(self) -> None:
        """Every kernel of an eager step beside its roof."""
        if not self.cuda:
            return
        ours = sampler(self.ckpt, "none", self.batch, self.args, self.args.steps)
        program = StepProgram(ours.model, ours.table, self.batch, ours.image_shape)

        def step() -> None:  # always the first of the chain: the counter must not run off the table
            program.counter.zero_()
            program.step()

        program.begin(0)
        torch.cuda.synchronize()
        found = kernel_times.kernels(step)
        self.facts |= kernel_facts(found, program, ours, roofs(self.args.device, DTYPES[self.args.dtype]))


def kernel_facts(found: Sequence[kernel_times.Kernel], program: StepProgram, of: Sampler, at: Roofs) -> dict[str, Any]:
    """Of a row: launches as seen and as planned, every kernel in order, and equal launches with their roofs."""
    plan, model = program.plan, program.prepared
    cuts = {} if plan is None else {"parts": plan.parts, "again": plan.again}
    planned = records(model.config, of.table, program.batch_size, of.dtype, **cuts)
    laid = kernel_times.by_launch(planned, found, kernel_times.our_names())
    facts: dict[str, Any] = {
        "launches_a_step": len(found),
        "planned_launches": sum(r.cost.launches for r in planned),
        "kernel_us": sum(k.us for k in found),
        "kernels": [[k.name, k.us, k.gap_us] for k in found],
        "roofs": at.facts(),
        "launches": None,
    }
    if laid is not None:
        rows = kernel_times.facts(laid[0], at)
        facts |= {"launches": rows, "roof_us": sum(r["roof_us"] for r in rows), "beside_us": sum(k.us for k in laid[1])}
    return facts


def _watched(watch: Watch) -> dict[str, Any]:
    """Clocks, power and utilisation while the rounds ran."""
    if not watch.series:
        return {"note": watch.reason}
    s, names = watch.series[0], [n for n in FIELDS if n != "throttle"]
    return {"mean": {n: s.mean(n) for n in names}, "throttled": s.throttled(), "missing": dict(s.missing)}


def line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
