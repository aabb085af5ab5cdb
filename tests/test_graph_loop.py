"""The WHILE graph, built from a stand-in for cuda-bindings that runs what it was told to build.

It knows the signatures of cuda-bindings 12 and 13, and refuses handles of the wrong type, graphs that are gone and
nodes that are not in the graph. That a driver takes the same calls is for test_gpu_graphs.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TINY, unet

from ddpm_fast.graphs import loop as graph_loop
from ddpm_fast.graphs.loop import Bindings, LoopUnavailable, WhileGraph
from ddpm_fast.inspection import diagnose, diagnose_text
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule

CAPABILITY = (9, 0)


class Status(IntEnum):
    OK = 0
    cudaErrorNotSupported = 801


class _Handle(int):
    """An address in a type of its own, as both modules have for each kind of object."""


class Fake:
    """runtime, driver and nvrtc in one store of graphs; ``fail`` names a function that returns an error."""

    def __init__(self, major: int = 13, fail: str | None = None, version: int = 13000, log: bytes = b""):
        self.fail, self.version, self.log, self.major = fail, version, log, major
        self.graphs: dict[int, list[SimpleNamespace]] = {}  # address -> nodes
        self.conditions: dict[int, list[int]] = {}  # handle -> [value, default]
        self.executables: dict[int, int] = {}
        self.programs: set[int] = set()
        self.next, self.launches, self.sources, self.options = 100, 0, [], []
        self.launched_on: list[int] = []
        types = {name: type(name, (_Handle,), {}) for name in ("cudaGraphNode_t", "cudaGraph_t", "cudaGraphExec_t")}
        self.runtime = SimpleNamespace(
            **types,
            cudaGraphConditionalHandleFlags=SimpleNamespace(cudaGraphCondAssignDefault=1),
            cudaGraphNodeType=SimpleNamespace(cudaGraphNodeTypeConditional=13),
            cudaGraphConditionalNodeType=SimpleNamespace(cudaGraphCondTypeIf=0, cudaGraphCondTypeWhile=1),
            cudaGraphNodeParams=lambda: SimpleNamespace(conditional=SimpleNamespace()),
        )
        self.driver = SimpleNamespace(
            CUgraph=type("CUgraph", (_Handle,), {}),
            CUgraphNode=type("CUgraphNode", (_Handle,), {}),
            CUfunction=type("CUfunction", (_Handle,), {}),
            CUDA_KERNEL_NODE_PARAMS=SimpleNamespace,
        )
        self.nvrtc = SimpleNamespace()
        for name in dir(self):
            for prefix, module in (("cu_", self.driver), ("cuda_", self.runtime), ("nvrtc_", self.nvrtc)):
                if name.startswith(prefix):
                    api = prefix[:-1] + name.removeprefix(prefix)
                    setattr(module, api, self._function(api, getattr(self, name)))

    def _function(self, name: str, body: Any) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            if name == self.fail:
                return (Status.cudaErrorNotSupported, None)
            value = body(*args)
            return (Status.OK,) if value is None else (Status.OK, value)

        return call

    def new(self, kind: Any = _Handle) -> Any:
        self.next += 1
        return kind(self.next)

    @property
    def bindings(self) -> Bindings:
        return Bindings(self.runtime, self.driver, self.nvrtc, self.major)

    # --- graphs ---

    def cuda_DriverGetVersion(self) -> int:
        return self.version

    def cuda_GraphCreate(self, flags: int) -> Any:
        graph = self.new(self.runtime.cudaGraph_t)
        self.graphs[int(graph)] = []
        return graph

    def cuda_GraphDestroy(self, graph: Any) -> None:
        del self.graphs[int(graph)]

    def cuda_GraphConditionalHandleCreate(self, graph: Any, default: int, flags: int) -> Any:
        assert int(graph) in self.graphs
        handle = self.new()
        self.conditions[int(handle)] = [0xBAD, default if flags == 1 else 0xBAD]
        return handle

    def _add(self, graph: Any, after: list[Any] | None, count: int, **node: Any) -> int:
        nodes = self.graphs[int(graph)]
        after = after or []
        assert len(after) == count and all(any(int(a) == n.address for n in nodes) for a in after)
        assert len(after) == len(nodes), "a chain: each node after the one before it"
        nodes.append(SimpleNamespace(address=self.new(), **node))
        return nodes[-1].address

    def cuda_GraphAddNode(self, graph: Any, after: list[Any], *rest: Any) -> Any:
        (count, params) = rest if self.major < 13 else rest[1:]
        assert len(rest) == (2 if self.major < 13 else 3) and (self.major < 13 or rest[0] is None)
        assert all(type(a) is self.runtime.cudaGraphNode_t for a in after)
        assert (params.type, params.conditional.type, params.conditional.size) == (13, 1, 1)
        body = self.new(self.driver.CUgraph)
        self.graphs[int(body)] = []
        params.conditional.phGraph_out = [body]
        loop = SimpleNamespace(handle=int(params.conditional.handle), body=int(body))
        return self.runtime.cudaGraphNode_t(self._add(graph, after, count, loop=loop))

    def cuda_GraphAddChildGraphNode(self, graph: Any, after: Any, count: int, child: Any) -> Any:
        return self.runtime.cudaGraphNode_t(self._add(graph, after, count, child=child))

    def cu_GraphAddKernelNode(self, graph: Any, after: list[Any], count: int, params: Any) -> Any:
        assert type(graph) is self.driver.CUgraph and all(type(a) is self.driver.CUgraphNode for a in after)
        assert type(params.func) is self.driver.CUfunction
        values, types = params.kernelParams
        size = [params.gridDimX, params.gridDimY, params.gridDimZ, params.blockDimX, params.blockDimY, params.blockDimZ]
        assert size == [1] * 6 and params.sharedMemBytes == 0
        assert types == (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)  # as KERNEL declares
        return self.driver.CUgraphNode(self._add(graph, after, count, arguments=values))

    def cuda_GraphInstantiate(self, graph: Any, flags: int) -> Any:
        executable = self.new(self.runtime.cudaGraphExec_t)
        self.executables[int(executable)] = self.graphs[int(graph)]
        return executable

    def cuda_GraphExecDestroy(self, executable: Any) -> None:
        del self.executables[int(executable)]

    def cuda_GraphLaunch(self, executable: Any, stream: int) -> None:
        assert stream == 0, "the default stream, as it is called on every device"
        self.launched_on.append(torch.cuda.current_device())
        self.launches += 1
        for condition in self.conditions.values():
            condition[0] = condition[1]
        self._run(self.executables[int(executable)])

    def _run(self, nodes: list[SimpleNamespace]) -> None:
        for node in nodes:
            if hasattr(node, "arguments"):
                handle, counter, stop, total = node.arguments
                row, end = (ctypes.c_int32.from_address(address).value for address in (counter, stop))
                self.conditions[handle][0] = int(row < end and row < total)  # KERNEL
            elif hasattr(node, "child"):
                node.child()
            else:
                passes = 0
                while self.conditions[node.loop.handle][0]:
                    self._run(self.graphs[node.loop.body])
                    passes += 1
                    assert passes < 1000, "the loop does not end"

    # --- the kernel ---

    def nvrtc_CreateProgram(self, source: bytes, name: bytes, count: int, headers: list[Any], names: list[Any]) -> Any:
        self.sources.append(source)
        program = self.new()
        self.programs.add(int(program))
        return program

    def nvrtc_DestroyProgram(self, program: Any) -> None:
        self.programs.remove(int(program))

    def nvrtc_CompileProgram(self, program: Any, count: int, options: list[bytes]) -> None:
        assert count == len(options)
        self.options = options

    def nvrtc_GetProgramLogSize(self, program: Any) -> int:
        return len(self.log)

    def nvrtc_GetProgramLog(self, program: Any, log: bytearray) -> None:
        log[:] = self.log

    def nvrtc_GetCUBINSize(self, program: Any) -> int:
        return 6

    def nvrtc_GetCUBIN(self, program: Any, binary: bytearray) -> None:
        binary[:] = b"binary"

    def cu_ModuleLoadData(self, image: bytes) -> Any:
        assert image == b"binary"
        return self.new()

    def cu_ModuleGetFunction(self, module: Any, name: bytes) -> Any:
        assert name in graph_loop.KERNEL
        return self.new(self.driver.CUfunction)


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITY)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(graph_loop, "_kernels", {})
    on = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        on.append(wanted.index)
        try:
            yield
        finally:
            on.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: on[-1])


class Step:
    def __init__(self) -> None:
        self.counter = torch.zeros(2, dtype=torch.int32)
        self.stop = torch.zeros(1, dtype=torch.int32)
        self.rows: list[int] = []

    def raw_cuda_graph(self) -> Any:
        return self

    def __call__(self) -> None:
        self.rows.append(int(self.counter[0]))
        self.counter[0] += 1


def build(fake: Fake, step: Step, total: int = 10, index: int = 0) -> WhileGraph:
    return WhileGraph(step, step.counter, step.stop, total, torch.device("cuda", index), fake.bindings)


@pytest.mark.parametrize("major", [12, 13])
def test_the_loop_runs_the_steps_up_to_the_stop_word(major: int) -> None:
    fake, step = Fake(major), Step()
    loop = build(fake, step)
    for start, stop, rows in ((0, 4, [0, 1, 2, 3]), (4, 5, [4]), (5, 5, []), (7, 3, []), (8, 99, [8, 9]), (10, 99, [])):
        step.counter[0], step.stop[0], step.rows = start, stop, []
        loop.replay()
        assert step.rows == rows
    assert fake.launches == 6


def test_a_launch_is_on_the_graph_s_own_device() -> None:
    """Another device may be the current one, and its default stream has the same name."""
    fake, step = Fake(), Step()
    loop = build(fake, step, index=1)
    step.stop[0] = 3
    loop.replay()
    assert fake.launched_on == [1] and step.rows == [0, 1, 2]
    assert torch.cuda.current_device() == 0


def test_one_kernel_a_device_and_nothing_left_behind() -> None:
    fake, step = Fake(), Step()
    loops = [build(fake, step), build(fake, step)]
    assert fake.sources == [graph_loop.KERNEL] and fake.options == [b"--gpu-architecture=sm_90"]
    assert fake.programs == set()
    assert len(fake.executables) == 2 and len(fake.graphs) == 2  # bodies; both templates are gone
    for loop in loops:
        loop.reset()
        loop.reset()
    assert fake.executables == {}
    with pytest.raises(RuntimeError, match=r"must not be launched after reset\(\)"):
        loops[0].replay()


@pytest.mark.parametrize(
    "function",
    [
        "cudaGraphCreate",
        "cudaGraphConditionalHandleCreate",
        "cudaGraphAddNode",
        "cudaGraphAddChildGraphNode",
        "cudaGraphInstantiate",
        "cuGraphAddKernelNode",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "nvrtcCreateProgram",
        "nvrtcGetCUBIN",
    ],
)
def test_a_refused_call_is_named_and_frees_the_rest(function: str) -> None:
    fake = Fake(fail=function)
    with pytest.raises(LoopUnavailable, match=rf"^{function} failed: cudaErrorNotSupported \(801\)$"):
        build(fake, Step())
    assert fake.executables == {} and fake.programs == set()
    templates = [nodes for nodes in fake.graphs.values() if any(hasattr(node, "loop") for node in nodes)]
    assert templates == []


def test_a_source_that_does_not_compile_says_the_compiler_s_words() -> None:
    fake = Fake(fail="nvrtcCompileProgram", log=b"identifier is undefined\n\0")
    with pytest.raises(LoopUnavailable, match=r"NVRTC cannot compile the loop's condition: identifier is undefined"):
        build(fake, Step())
    assert fake.programs == set()


def test_a_missing_symbol_is_a_reason_not_a_traceback() -> None:
    fake = Fake()

    def missing(flags: int) -> Any:
        raise RuntimeError("Function cudaGraphCreate not found")

    fake.runtime.cudaGraphCreate = missing
    with pytest.raises(LoopUnavailable, match="cudaGraphCreate cannot be called: Function cudaGraphCreate not found"):
        build(fake, Step())


def test_a_launch_that_fails() -> None:
    fake, step = Fake(), Step()
    loop = build(fake, step)
    fake.fail = "cudaGraphLaunch"
    with pytest.raises(RuntimeError, match=r"cudaGraphLaunch of the sampling loop failed: cudaErrorNotSupported \(801"):
        loop.replay()


def _install(monkeypatch: pytest.MonkeyPatch, fake: Fake | None) -> None:
    import sys

    package = None if fake is None else SimpleNamespace(bindings=None)
    names = {"cuda": package, "cuda.bindings": None}
    if fake is not None:
        module: Any = SimpleNamespace(__version__=f"{fake.major}.0.3", **fake.bindings._asdict())
        package.bindings = module  # type: ignore[union-attr]
        names["cuda.bindings"] = module
    for name, value in names.items():
        monkeypatch.setitem(sys.modules, name, value)  # None: the import fails


def test_which_machines_can(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, Fake(major=12, version=12040))
    assert graph_loop.bindings().major == 12
    _install(monkeypatch, Fake(version=12020))
    with pytest.raises(LoopUnavailable, match=r"a driver for CUDA 12.4 or newer; got one for 12.2; update it"):
        graph_loop.bindings()
    _install(monkeypatch, Fake(version=0))
    with pytest.raises(LoopUnavailable, match="or newer; got none; install one"):
        graph_loop.bindings()
    _install(monkeypatch, None)
    with pytest.raises(LoopUnavailable, match=r"cuda-bindings cannot be imported .*; install cuda-bindings"):
        graph_loop.bindings()


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (
            None,
            "cuda-bindings cannot be imported (import of cuda.bindings halted; None in sys.modules); "
            "install cuda-bindings",
        ),
        (
            Fake(version=12020),
            "conditional graph nodes need a driver for CUDA 12.4 or newer; got one for 12.2; update it",
        ),
        (
            Fake(fail="nvrtcCompileProgram", log=b"sm_90 is unknown\n\0"),
            "NVRTC cannot compile the loop's condition: sm_90 is unknown",
        ),
        (Fake(), None),
    ],
    ids=["no bindings", "old driver", "old compiler", "can"],
)
def test_doctor_says_of_each_gpu_why_it_has_no_loop(
    fake: Fake | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the words of the function that builds the loop."""
    _install(monkeypatch, fake)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="Made up", major=9, minor=0, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    facts = diagnose()
    text = diagnose_text(facts).splitlines()
    assert facts["why_no_graph_loop"] == {"cuda:0": reason, "cuda:1": reason}
    for i in range(2):
        (line,) = (line for line in text if line.startswith(f"- cuda:{i}: "))
        assert line.endswith(reason or "a whole trajectory is one launch (graph=loop)")
    if reason is None:
        assert WhileGraph(Step(), *torch.zeros(2, 1, dtype=torch.int32), 1, torch.device("cuda", 0))
        return
    with pytest.raises(LoopUnavailable) as refused:
        WhileGraph(Step(), *torch.zeros(2, 1, dtype=torch.int32), 1, torch.device("cuda", 0))
    assert " ".join(str(refused.value).split()) == reason


def test_without_a_gpu_doctor_says_what_a_sampler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (reason,) = diagnose()["why_no_graph_loop"].values()
    model, schedule = unet(TINY), Schedule(num_train_timesteps=2)
    with pytest.raises(ValueError) as refused:
        Sampler(model, schedule, 1, device="cpu", graph="loop").sample(1)
    assert reason in str(refused.value)
