"""Graph forms of the sampling loop, on a stand-in for CUDA that records and replays steps (graph_stand_in.py).

What a GPU alone can show is in test_gpu_graphs.py.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graph_stand_in import LoopGraph, RecordedGraph, StandIn, _NoSynchronisation
from torch import Tensor

from ddpm_fast import graphs, ops
from ddpm_fast.engine import CallableProgram, StepProgram
from ddpm_fast.graph_capture import CHUNK_STEPS
from ddpm_fast.graphs import GraphCache, GraphCaptureError, Runner
from ddpm_fast.kernels import reference
from ddpm_fast.prepared import prepare
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table
from ddpm_fast.unet import UNet, UNetConfig

FORMS = ("step", "chunk", "loop")


class Toy:
    """A step program as the engine's: one convolution and a time row for a network, all in static buffers."""

    def __init__(self, steps: int = 7, n: int = 2, dtype: torch.dtype = torch.bfloat16):
        fixed = torch.Generator().manual_seed(1)
        self.device, self.steps = torch.device("cpu"), steps
        self.x = torch.full((n, 3, 6, 5), float("nan"))
        self.low = torch.full((n, 8, 6, 5), float("nan"), dtype=dtype)
        self.counter = torch.zeros(2, dtype=torch.int32)
        self.seed, self.ids = torch.zeros(1, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
        self.table = step_table(Schedule(num_train_timesteps=steps)).rows.float()
        self.times = torch.randn(steps, 3, generator=fixed)
        self.weight = torch.randn(3, 8, 3, 3, generator=fixed).to(dtype) / 6

    def begin(self, seed: int, ids: Tensor) -> None:
        self.seed.fill_(seed)
        self.ids.copy_(ids)
        self.counter.zero_()
        start = torch.full((1,), reference.INITIAL_STEP, dtype=torch.int64)
        self.x.copy_(reference.philox_normal(self.seed, self.ids, start, self.x.shape[1:]))
        self.low.zero_()
        self.low[:, :3] = self.x

    def predict(self) -> Tensor:
        row = self.times.index_select(0, self.counter[:1])[:, :, None, None]
        return torch.nn.functional.conv2d(self.low, self.weight, padding=1).float() + row

    def step(self) -> None:
        reference.sampler_step(
            self.x, self.predict(), self.table, self.counter, self.seed, self.ids, x_prev=self.x, low=self.low
        )

    def buffers(self) -> list[Tensor]:
        return [self.x, self.low, self.counter]


def eager(seed: int, ids: Tensor, steps: int = 7, done: int | None = None, toy: type[Toy] = Toy) -> list[Tensor]:
    """The oracle: a program of its own, stepped by hand."""
    program = toy(steps, len(ids))
    program.begin(seed, ids)
    for _ in range(steps if done is None else done):
        program.step()
    return program.buffers()


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(s.numpy(force=True).tobytes() == t.numpy(force=True).tobytes() for s, t in zip(_plain(a), _plain(b)))


def _plain(tensors: list[Tensor]) -> Iterator[Tensor]:
    return (t.contiguous().view(torch.uint8) for t in tensors)


def make(program: Toy, graph: str, cache: GraphCache | None = None, **faults: Any) -> tuple[Runner, StandIn]:
    backend = StandIn(written=program.buffers, **faults)
    run = graphs.runner(program, graph, backend=backend, cache=GraphCache() if cache is None else cache)
    assert backend.log == []  # labels, say, are not known yet
    assert run.kind in ("none", *FORMS)  # captures
    return run, backend


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    """A warning is an error, but where a test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- the same bits in every form ---


@pytest.mark.parametrize("graph", ["none", *FORMS])
def test_whole_trajectories_equal_eager_bit_for_bit_with_one_capture(graph: str) -> None:
    program = Toy()
    run, backend = make(program, graph)
    captures = len(backend.captured)
    assert run.kind == graph
    for seed, first in ((0, 0), (-5, 17), (2**62, 2**40)):
        ids = torch.arange(first, first + 2)
        program.begin(seed, ids)
        run.advance(7)
        assert same_bits(program.buffers(), eager(seed, ids))
        assert program.x.isfinite().all()
    assert len(backend.captured) == captures == {"none": 0, "step": 1, "chunk": 2, "loop": 1}[graph]


@pytest.mark.parametrize("graph", ["none", *FORMS])
@pytest.mark.parametrize("parts", [(1, 1, 5), (3, 0, 4), (6, 1), (2, 3)])
def test_a_trajectory_in_parts(graph: str, parts: tuple[int, ...]) -> None:
    program, ids = Toy(), torch.tensor([4, 9])
    run, _ = make(program, graph)
    for _ in range(2):  # a word left by the first trajectory must not stop the second
        program.begin(3, ids)
        done = 0
        for k in parts:
            run.advance(k)
            done += k
            assert same_bits(program.buffers(), eager(3, ids, done=done))


@pytest.mark.parametrize("graph", FORMS)
@pytest.mark.parametrize("steps", [1, 2, CHUNK_STEPS, 2 * CHUNK_STEPS + 20])
def test_short_and_long_chains(graph: str, steps: int) -> None:
    program, ids = Toy(steps), torch.tensor([0, 1])
    run, _ = make(program, graph)
    program.begin(1, ids)
    run.advance(steps)
    assert same_bits(program.buffers(), eager(1, ids, steps))


def test_a_part_after_a_whole_trajectory_and_a_whole_one_after_a_part() -> None:
    program, ids = Toy(), torch.tensor([0, 1])
    run, _ = make(program, "loop")
    for k, done in ((7, 7), (2, 2), (7, 7), (7, 7), (3, 3)):
        program.begin(0, ids)
        run.advance(k)
        assert same_bits(program.buffers(), eager(0, ids, done=done))


def test_the_loop_stops_at_the_last_step_whatever_is_asked() -> None:
    program, ids = Toy(), torch.tensor([0, 1])
    run, _ = make(program, "loop")
    program.begin(0, ids)
    run.advance(5)
    run.advance(5)
    assert same_bits(program.buffers(), eager(0, ids))


# --- launches ---


def test_launches() -> None:
    steps = 2 * CHUNK_STEPS + 20
    program, ids = Toy(steps), torch.tensor([0, 1])
    expected = {
        "none": [steps, 3],
        "step": [steps, 3],
        "chunk": [2 + 20, 3],
        "loop": [1, 2],  # a whole trajectory is one launch; a part first writes where to stop
    }
    for graph, (whole, part) in expected.items():
        run, backend = make(program, graph)
        start = len(backend.log)
        program.begin(0, ids)
        run.advance(steps)
        assert run.launches == whole
        program.begin(0, ids)
        run.advance(3)
        assert run.launches == whole + part
        seen = [entry for entry in backend.log[start:] if entry in ("graph", "loop")]
        assert len(seen) == {"none": 0, "loop": 2}.get(graph, whole + part)
        if graph == "loop":
            run.advance(steps)  # the stop word has to go back to the end: one write more
            run.advance(steps)
            assert run.launches == 1 + 2 + 2 + 1
            program.begin(0, ids)
            run.advance(1)  # one step is the captured step
            assert run.launches == 1 + 2 + 2 + 1 + 1


@pytest.mark.parametrize("graph", FORMS)
def test_advancing_asks_the_device_nothing(graph: str) -> None:
    program = Toy()
    run, _ = make(program, graph)
    program.begin(0, torch.tensor([0, 1]))
    with _NoSynchronisation():
        run.advance(2)
        run.advance(5)
    assert int(program.counter[0]) == 7


# --- capture leaves no trace, and takes its steps in order ---


@pytest.mark.parametrize("graph", FORMS)
def test_capture_in_the_middle_of_a_trajectory_puts_everything_back(graph: str) -> None:
    program, ids = Toy(), torch.tensor([0, 1])
    program.begin(8, ids)
    program.step()
    program.x[0, 0, 0, 0] = float("nan")
    program.counter[1] = 3
    before = [t.clone() for t in (*program.buffers(), program.seed, program.ids)]
    run, _ = make(program, graph)
    assert same_bits(before, [*program.buffers(), program.seed, program.ids])
    program.begin(8, ids)
    run.advance(7)
    assert same_bits(program.buffers(), eager(8, ids))


def test_warm_up_and_capture_are_on_the_side_stream_and_in_order() -> None:
    where = []

    class Watched(Toy):
        def step(self) -> None:
            where.append((backend.on_side, "capture" in backend.log))
            super().step()

    program = Watched()
    backend = StandIn(written=program.buffers)
    assert graphs.runner(program, "loop", backend=backend, cache=GraphCache()).kind == "loop"
    assert all(side for side, _ in where)
    warm_up = [captured for _, captured in where].index(True)
    assert warm_up >= 4  # twice three steps before the capture
    assert len(where) == warm_up + 1  # and one step in it; the rest is replays
    assert backend.log[:3] == ["backend", "side stream", "capture"]
    assert backend.log.index("capture") < backend.log.index("loop built") < backend.log.index("loop")
    assert backend.log[-1] == "main stream"


def test_garbage_in_the_buffers_does_not_hide_a_difference() -> None:
    """x and low are NaN before the first trajectory; a check of NaN against NaN would pass anything."""
    program = Toy()
    assert program.x.isnan().all()
    with pytest.warns(UserWarning, match="result differs from the captured step's"):
        run, _ = make(program, "auto", make_loop=_SkippingLoop)
    assert run.kind == "chunk"


# --- which form "auto" and "loop" take ---


def test_auto_takes_the_loop_or_quietly_chunks_and_says_why() -> None:
    run, _ = make(Toy(), "auto")
    assert (run.kind, run.reason) == ("loop", None)
    run, backend = make(Toy(), "auto", no_loop="the driver is for CUDA 12.2")
    assert (run.kind, run.reason) == ("chunk", "the driver is for CUDA 12.2")
    assert backend.log.count("capture") == 2


def test_loop_becomes_chunk_with_a_warning_where_it_cannot_be_had() -> None:
    with pytest.warns(UserWarning, match="graph='loop' becomes 'chunk': the driver is for CUDA 12.2"):
        run, _ = make(Toy(), "loop", no_loop="the driver is for CUDA 12.2")
    assert run.kind == "chunk"


class _SkippingLoop(LoopGraph):
    """Ends one step early, but advances the counter as if not."""

    def replay(self) -> None:
        super().replay()
        self.counter[0] += 1


class _FailingLoop(LoopGraph):
    def replay(self) -> None:
        raise RuntimeError("cudaGraphLaunch failed: cudaErrorInvalidValue (1)")


class _LoopWithoutStop(LoopGraph):
    """Runs to the end whatever the stop word says."""

    def replay(self) -> None:
        self.stop.fill_(self.total)
        super().replay()


@pytest.mark.parametrize("loop", [_SkippingLoop, _LoopWithoutStop])
@pytest.mark.parametrize("graph", ["auto", "loop"])
def test_a_loop_that_differs_becomes_chunk_with_a_warning(loop: type[LoopGraph], graph: str) -> None:
    program, ids = Toy(), torch.tensor([0, 1])
    with pytest.warns(UserWarning, match="over 3 steps the loop's result differs") as caught:
        run, backend = make(program, graph, make_loop=loop)
    assert len(caught) == 1 and run.kind == "chunk" and backend.loops[0].freed
    program.begin(0, ids)
    run.advance(7)
    assert same_bits(program.buffers(), eager(0, ids))


def test_a_loop_that_does_not_launch_becomes_chunk() -> None:
    run, backend = make(Toy(), "auto", make_loop=_FailingLoop)
    assert run.kind == "chunk" and "cudaGraphLaunch failed" in str(run.reason) and backend.loops[0].freed


def test_no_loop_over_a_counter_that_stands_still() -> None:
    class Still(Toy):
        def step(self) -> None:
            super().step()
            self.counter[:1] -= 1

    run, backend = make(Still(), "auto")
    assert run.kind == "chunk" and "must advance the counter as often; it is at 0" in str(run.reason)
    assert "loop built" not in backend.log  # it would never end


def test_auto_steps_where_a_chunk_does_not_fit_and_chunk_says_so() -> None:
    program, ids = Toy(), torch.tensor([0, 1])
    run, _ = make(program, "auto", no_loop="none", fail_capture=1)
    assert run.kind == "step" and run.reason == "7 steps in one graph: CUDA out of memory. Tried to allocate 1 GiB"
    program.begin(0, ids)
    run.advance(7)
    assert same_bits(program.buffers(), eager(0, ids))
    with pytest.raises(GraphCaptureError, match=r"graph='chunk' cannot be captured.*out of memory"):
        make(Toy(), "chunk", fail_capture=1)


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
    assert "operation aten.item.default, at tests/test_graphs.py:" in message
    assert "in predict (scale = 2.0 if float(out.abs().max()) > 100 else 1.0)" in message
    assert message.endswith("synchronizing CUDA operation; sampling without graphs, each kernel launched by the host")
    assert (run.kind, run.launches) == ("none", 14)
    assert str(run.reason) in message
    assert "capture" not in backend.log  # the trial run found it before a capture could break
    assert same_bits(program.buffers(), eager(0, ids, toy=Asking))


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
    with pytest.raises(GraphCaptureError, match=r"at tests/test_graphs.py:\d+ in predict .*not permitted when stream"):
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


# --- the engine's own programs ---


def _unet(classes: int | None = None) -> UNet:
    torch.manual_seed(0)
    return UNet(
        UNetConfig(
            sample_size=8,
            block_out_channels=(16, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=8,
            num_class_embeds=classes,
        )
    )


@pytest.mark.parametrize("classes", [None, 5])
def test_a_prepared_network_as_a_graph(classes: int | None) -> None:
    """What of the network's step the host decides, a replay would repeat: every form against eager steps."""
    prepared = prepare(_unet(classes), torch.float32, torch.device("cpu"), ops.reference())
    table = step_table(Schedule(num_train_timesteps=12), 6)
    outcome = []
    for graph in ("none", *FORMS):
        program = StepProgram(prepared, table, 2, (3, 8, 8))
        backend = StandIn(written=lambda: [program.x, program.counter])
        run = graphs.runner(program, graph, backend=backend, cache=GraphCache())
        for seed, labels in ((0, (1, 4)), (1, (2, 0))):
            program.begin(seed, labels=None if classes is None else torch.tensor(labels))
            run.advance(4)
            run.advance(2)
            outcome.append(program.x.clone())
        assert run.kind == graph
    assert not torch.equal(outcome[0], outcome[1]) and outcome[0].isfinite().all()
    for form in range(1, 4):
        assert same_bits(outcome[2 * form : 2 * form + 2], outcome[:2])


def test_a_callable_model_as_a_graph() -> None:
    table = step_table(Schedule(num_train_timesteps=6))
    labels = torch.tensor([3, 1])

    def model(x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (x * (t / 6 + labels)[:, None, None, None].sin(),)

    outcome = []
    for graph in ("none", *FORMS):
        program = CallableProgram(model, table, 2, (3, 4, 4), "cpu", ops.reference())
        backend = StandIn(written=lambda: [program.x, program.counter])
        run = graphs.runner(program, graph, backend=backend, cache=GraphCache())
        for shift in (0, 2):
            program.begin(0, labels=labels + shift)
            run.advance(6)
            outcome.append(program.x.clone())
        assert run.kind == graph and len(backend.captured) <= 2
    assert not torch.equal(outcome[0], outcome[1])
    for form in range(1, 4):
        assert same_bits(outcome[2 * form : 2 * form + 2], outcome[:2])


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
