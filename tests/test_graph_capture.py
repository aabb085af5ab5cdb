"""Which steps cannot be captured and what becomes of them, how long graphs are kept, and what may be asked for."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graph_stand_in import RecordedGraph, StandIn
from torch import Tensor
from toy_program import FORMS, Toy, eager, make, same_bits

from ddpm_fast import graphs
from ddpm_fast.graphs import GraphCache, GraphCaptureError


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """A warning is an error, but where a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- what cannot be captured ---


class Asking(Toy):
    """Reads a value on the host."""

    def predict(self) -> Tensor:
        out = super().predict()
        scale = 2.0 if float(out.abs().max()) > 100 else 1.0
        return out * scale


class Baked(Toy):
    """Takes its time row by a number that the host counts; of three steps, so that trial runs agree."""

    at = 0

    def begin(self, seed: int, ids: Tensor) -> None:
        super().begin(seed, ids)
        self.at = 0

    def predict(self) -> Tensor:
        row = self.times[self.at % self.steps][None, :, None, None]
        self.at += 1
        return torch.nn.functional.conv2d(self.low, self.weight, padding=1).float() + row


class Drawing(Toy):
    """Noise of torch's own generator: no two runs agree."""

    def predict(self) -> Tensor:
        return super().predict() + torch.randn(3, 1, 1)


def test_a_capture_failure_names_the_operation_and_runs_eagerly_with_one_warning() -> None:
    program, ids = Asking(), torch.tensor([0, 1])
    with pytest.warns(UserWarning) as caught:
        run, backend = make(program, "auto")
        for _ in range(2):
            program.begin(0, ids)
            run.advance(3)
            run.advance(4)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "operation aten.item.default, at tests/test_graph_capture.py:" in message
    assert "in predict (scale = 2.0 if float(out.abs().max()) > 100 else 1.0)" in message
    assert message.endswith("synchronizing CUDA operation; sampling without graphs, each kernel launched by the host")
    assert (run.kind, run.launches) == ("none", 14)
    assert str(run.reason) in message
    assert "capture" not in backend.log  # the trial run found it before a capture could break
    assert same_bits(program.buffers(), eager(0, ids, toy=Asking))


def test_nothing_of_a_step_that_failed_stays_in_memory() -> None:
    """Nor waits there for Python's garbage collection, which knows nothing of how much memory a GPU has."""
    seen = []

    class Holding(Asking):
        def predict(self) -> Tensor:
            held = torch.ones(3)
            seen.append(weakref.ref(held))
            return super().predict() * held.sum()

    program = Holding()
    gc.collect()
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="without graphs"):
            make(program, "auto")
        assert len(seen) >= 3 and all(ref() is None for ref in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("graph", FORMS)
def test_an_explicit_graph_raises_and_leaves_the_program_as_it_was(graph: str) -> None:
    program = Asking()
    program.begin(0, torch.tensor([0, 1]))
    before = [t.clone() for t in program.buffers()]
    cache = GraphCache()
    with pytest.raises(GraphCaptureError, match=r"operation aten\.item\.default"):
        make(program, graph, cache)
    assert same_bits(program.buffers(), before) and len(cache) == 0


def test_a_failure_that_only_capture_shows_names_its_place() -> None:
    class Choosing(Toy):
        def predict(self) -> Tensor:
            if "capture" in backend.log and not diagnosing():
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            return super().predict()

    def diagnosing() -> bool:
        return len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()) > 1

    program = Choosing()
    backend = StandIn(written=program.buffers)
    with pytest.raises(
        GraphCaptureError, match=r"at tests/test_graph_capture.py:\d+ in predict .*not permitted when stream"
    ):
        graphs.runner(program, "step", backend=backend, cache=GraphCache()).advance(1)


def test_running_out_of_memory_in_capture_is_a_capture_failure() -> None:
    with pytest.warns(UserWarning, match="the step cannot be captured: .*: CUDA out of memory"):
        run, _ = make(Toy(), "auto", fail_capture=0)
    assert run.kind == "none"


def test_a_step_that_follows_the_host_is_found_out() -> None:
    program, ids = Baked(3), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="changes with the host from step to step"):
        run, backend = make(program, "auto")
    assert run.kind == "none" and backend.captured[0].freed
    program.begin(0, ids)
    run.advance(3)
    assert same_bits(program.buffers(), eager(0, ids, 3, toy=Baked))


def test_a_step_that_no_two_runs_of_agree_is_still_captured() -> None:
    assert make(Drawing(), "step")[0].kind == "step"


def test_a_failing_model_is_not_a_capture_failure() -> None:
    class Broken(Toy):
        def predict(self) -> Tensor:
            raise ValueError("labels are missing")

    with pytest.raises(ValueError, match=r"^labels are missing$"):
        make(Broken(), "auto")


# --- what lies around a capture ---


def test_capturing_draws_nothing_of_torch_s_own_generator() -> None:
    """A model with dropout left on, say, draws the same numbers with a graph as without."""
    ids = torch.tensor([0, 1])
    torch.manual_seed(5)
    want = eager(0, ids, toy=Drawing)
    program = Drawing()
    torch.manual_seed(5)
    program.begin(0, ids)
    run, _ = make(program, "step")
    run.advance(7)
    assert same_bits(program.buffers(), want)


class Casting(Toy):
    """float32 weights, that autocast casts."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.layer = torch.nn.Conv2d(8, 3, 3, padding=1, bias=False)
        self.layer.weight.data.copy_(self.weight)

    def predict(self) -> Tensor:
        return self.layer(self.low.float()).float()


def test_with_and_without_autocast_are_two_captures() -> None:
    ids = torch.tensor([0, 1])
    program, other = Casting(), Casting()
    run, backend = make(program, "step")
    for cast in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            program.begin(0, ids)
            run.advance(7)
            other.begin(0, ids)
            for _ in range(7):
                other.step()
        assert same_bits(program.buffers(), other.buffers())
    assert len(backend.captured) == 3


# --- the cache ---


def freed(backend: StandIn) -> list[bool]:
    return [graph.freed for graph in backend.captured]


def test_no_capture_for_a_known_program_and_one_for_a_new_shape() -> None:
    cache = GraphCache()
    small, large = Toy(n=1), Toy(n=4)
    backends = {}
    for program in (small, large, small, large):
        run, backends[program] = make(program, "loop", cache)
        program.begin(0, torch.arange(len(program.x)))
        run.advance(7)
        assert same_bits(program.buffers(), eager(0, torch.arange(len(program.x))))
    assert len(cache) == 2
    assert all(backend.captured == [] for backend in backends.values())  # the second runners captured nothing


def test_the_program_used_longest_ago_is_freed_and_captured_anew_when_it_returns() -> None:
    cache = GraphCache(size=2)
    programs = [Toy() for _ in range(3)]
    (a, of_a), (b, of_b) = make(programs[0], "step", cache), make(programs[1], "step", cache)
    programs[0].begin(0, torch.tensor([0, 1]))
    a.advance(1)  # a is now the one used last
    c, of_c = make(programs[2], "step", cache)
    assert (freed(of_a), freed(of_b), freed(of_c)) == ([False], [True], [False])
    assert of_b.log[-1] == "synchronize"  # before memory that a graph may still be using goes to others
    programs[1].begin(0, torch.tensor([0, 1]))
    b.advance(7)
    assert freed(of_b) == [True, False] and freed(of_a) == [True] and len(cache) == 2
    assert same_bits(programs[1].buffers(), eager(0, torch.tensor([0, 1])))
    assert c.kind == "step"


def test_a_capture_frees_the_oldest_first() -> None:
    cache = GraphCache(size=1)
    old, of_old = make(Toy(), "step", cache)

    class Checking(Toy):
        def step(self) -> None:
            assert freed(of_old) == [True]
            super().step()

    make(Checking(), "step", cache)
    assert old.kind == "step"


def test_moved_buffers_are_captured_anew() -> None:
    program, ids = Toy(), torch.tensor([0, 1])
    run, backend = make(program, "loop")
    program.low = program.low.clone()
    program.begin(0, ids)
    run.advance(7)
    assert freed(backend) == [True, False] and backend.loops[0].freed and not backend.loops[1].freed
    assert same_bits(program.buffers(), eager(0, ids))


def test_a_buffer_that_comes_later_is_captured_too() -> None:
    """Labels, say, which the first batch had none of."""

    class Labelled(Toy):
        labels: Tensor | None = None

        def predict(self) -> Tensor:
            out = super().predict()
            return out if self.labels is None else out + self.labels[:, None, None, None]

    class AlwaysLabelled(Labelled):
        labels = torch.tensor([1.0, 2.0])

    program, ids = Labelled(), torch.tensor([0, 1])
    run, backend = make(program, "step")
    program.labels = torch.tensor([1.0, 2.0])
    program.begin(0, ids)
    run.advance(7)
    assert len(backend.captured) == 2
    assert same_bits(program.buffers(), eager(0, ids, toy=AlwaysLabelled))


def test_a_program_names_more_state_itself() -> None:
    class Carrying(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.carried = torch.zeros(1)

        def state(self) -> list[Tensor]:
            return [self.x, self.counter, self.low, self.carried]

        def step(self) -> None:
            super().step()
            self.carried += 1

    program = Carrying()
    make(program, "loop")
    assert program.carried.item() == 0


def test_a_dead_program_is_freed_and_close_frees_at_once() -> None:
    cache = GraphCache()
    program = Toy()
    run, backend = make(program, "chunk", cache)
    graph_refs = [weakref.ref(graph) for graph in backend.captured]
    backend.captured.clear()
    backend.written = None
    backend.loops.clear()
    del program, run, backend
    _forget_recorded_steps(graph_refs)
    gc.collect()
    assert len(cache) == 0
    run, backend = make(Toy(), "loop", cache)
    run.close()
    run.close()
    assert len(cache) == 0 and freed(backend) == [True] and backend.loops[0].freed
    with pytest.raises(RuntimeError, match="this runner is closed"):
        run.advance(1)


def _forget_recorded_steps(graphs: list[weakref.ref[RecordedGraph]]) -> None:
    """A CUDA graph keeps no Python object of the step; a recording may."""
    for ref in graphs:
        graph = ref()
        if graph is not None:
            graph.calls = []


def test_a_failed_capture_frees_what_it_had() -> None:
    backend = StandIn(fail_capture=1)
    program = Toy()
    backend.written = program.buffers
    with pytest.raises(GraphCaptureError):
        graphs.runner(program, "chunk", backend=backend, cache=GraphCache()).advance(1)
    assert freed(backend) == [True]


# --- what may be asked ---


def test_errors() -> None:
    program = Toy()
    with pytest.raises(ValueError, match="graph must be one of auto, none, step, chunk, loop; got 'whole'"):
        graphs.runner(program, "whole")
    for graph in FORMS:
        with pytest.raises(ValueError, match=f"graph='{graph}' cannot be had: CUDA graphs need a CUDA device; got"):
            graphs.runner(program, graph)
    run, _ = make(program, "step")
    for k in (-1, 8):
        with pytest.raises(ValueError, match=rf"advance\(k\) needs k in 0..7, the program's steps; got {k}"):
            run.advance(k)


@pytest.mark.parametrize("graph", ["auto", "none"])
def test_on_the_cpu_steps_are_eager(graph: str) -> None:
    program, ids = Toy(), torch.tensor([5, 6])
    run = graphs.runner(program, graph)
    program.begin(2, ids)
    run.advance(4)
    run.advance(3)
    assert (run.kind, run.launches) == ("none", 7)
    assert same_bits(program.buffers(), eager(2, ids))


def test_a_program_that_needs_the_host_is_not_captured() -> None:
    class Fed(Toy):
        host_bound = "its noise comes from a torch.Generator"

    run, backend = make(Fed(), "auto")
    assert (run.kind, run.reason, backend.log) == ("none", "its noise comes from a torch.Generator", [])
    with pytest.raises(ValueError, match=r"graph='step' cannot be had: its noise comes from a torch.Generator; use"):
        make(Fed(), "step")


def test_buffers_made_in_inference_mode_run_outside_it() -> None:
    with torch.inference_mode():
        program = Toy()
    with torch.inference_mode():
        program.begin(0, torch.tensor([0, 1]))
    run, _ = make(program, "loop")
    run.advance(3)
    run.advance(4)
    assert same_bits(program.buffers(), eager(0, torch.tensor([0, 1])))
