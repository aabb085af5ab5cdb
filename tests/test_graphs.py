"""Graph forms of the sampling loop, on a stand-in for CUDA that records and replays steps (graph_stand_in.py).

What a GPU alone can show is in test_gpu_graphs.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from graph_stand_in import LoopGraph, NoSynchronisation, StandIn
from torch import Tensor
from toy_program import FORMS, Toy, eager, make, same_bits

from ddpm_fast import graphs, ops
from ddpm_fast.engine import CallableProgram, StepProgram
from ddpm_fast.engine.prepared import prepare
from ddpm_fast.graphs import GraphCache, GraphCaptureError
from ddpm_fast.graphs.capture import CHUNK_STEPS
from ddpm_fast.schedule import Schedule
from ddpm_fast.step_table import step_table
from ddpm_fast.unet import UNet, UNetConfig


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
    with NoSynchronisation():
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


def test_auto_captures_one_step_where_the_host_writes_each_steps_noise() -> None:
    program = Toy()
    program.noise = torch.zeros_like(program.x)  # type: ignore[attr-defined]
    run, backend = make(program, "auto")
    assert (run.kind, backend.log.count("capture")) == ("step", 1)


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


def test_weights_that_were_replaced_are_captured_anew() -> None:
    """By `load_state_dict(assign=True)`, say, or an average swapped in; weights written in place need no capture."""
    table = step_table(Schedule(num_train_timesteps=6))
    net = torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(x)

    graphed, plain = (CallableProgram(Net(), table, 2, (3, 4, 4), "cpu", ops.reference()) for _ in range(2))
    backend = StandIn(written=lambda: [graphed.x, graphed.counter])
    run = graphs.runner(graphed, "step", backend=backend, cache=GraphCache())
    changes = (lambda: None, lambda: net.weight.mul_(2), lambda: net.load_state_dict(_halved(net), assign=True))
    outcomes = []
    for change, captures in zip(changes, (1, 1, 2)):
        change()
        for program in (graphed, plain):
            program.begin(0)
        run.advance(6)
        for _ in range(6):
            plain.step()
        assert torch.equal(graphed.x, plain.x)
        assert len(backend.captured) == captures
        outcomes.append(graphed.x.clone())
    assert not torch.equal(outcomes[0], outcomes[1]) and not torch.equal(outcomes[1], outcomes[2])


def _halved(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value / 2 for name, value in net.state_dict().items()}
