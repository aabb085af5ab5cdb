"""A captured step as the body of a loop that runs on the GPU: one launch for any number of steps.

A conditional WHILE node (CUDA 12.4 and newer) runs its body graph for as long as a value says so that device
code sets. The body is the captured step, as a child graph, and one thread that compares the step counter with
the word that says where to stop. torch has no WHILE node, so this is built through cuda-bindings, an optional
package that torch's CUDA builds bring. Nothing here runs at import.

Source: CUDA Programming Guide, "Conditional graph nodes".
"""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

CUDA_VERSION = 12040  # of the driver: the first with WHILE nodes whose condition kernels can set

# The value is read before each pass, the first included: a launch with nothing left to do does nothing. ``total``
# holds whatever ``stop`` says, for the step past the last would read behind the table.
KERNEL = b"""
typedef __device_builtin__ unsigned long long cudaGraphConditionalHandle;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(cudaGraphConditionalHandle, unsigned int);
extern "C" __global__ void more_steps(cudaGraphConditionalHandle handle, const int* counter, const int* stop, int total)
{
    cudaGraphSetConditional(handle, *counter < *stop && *counter < total);
}
"""
_KERNEL_NAME = b"more_steps"


class LoopUnavailable(RuntimeError):
    """This machine or this step cannot loop on the device; the message says why."""


class Bindings(NamedTuple):
    """The modules of cuda-bindings, and its major version."""

    runtime: Any
    driver: Any
    nvrtc: Any
    major: int


def bindings() -> Bindings:
    """cuda-bindings, with a driver that has WHILE nodes; LoopUnavailable where either is missing."""
    if torch.version.hip is not None:
        raise LoopUnavailable("ROCm has no conditional graph nodes")
    try:
        import cuda.bindings
        from cuda.bindings import driver, nvrtc, runtime
    except Exception as error:  # a package whose libraries do not load raises more than ImportError
        raise LoopUnavailable(f"cuda-bindings cannot be imported ({error}); install cuda-bindings") from None
    found = Bindings(runtime, driver, nvrtc, int(cuda.bindings.__version__.split(".")[0]))
    version = _call(runtime, "cudaDriverGetVersion")
    if version < CUDA_VERSION:
        raise LoopUnavailable(
            f"conditional graph nodes need a driver for CUDA {_dotted(CUDA_VERSION)} or newer; "
            f"got {f'one for {_dotted(version)}; update it' if version else 'none; install one'}"
        )
    return found


class WhileGraph:
    """``while counter[0] < min(stop[0], total): step``, as one executable graph.

    step: what `torch.cuda.CUDAGraph(keep_graph=True)` captured. It is copied in, but its memory pool stays its
    own: it has to outlive this graph. counter, stop: int32, at least one word each, on ``device``, at these
    addresses for as long as this graph is launched. The step must advance counter[0]; the loop ends on nothing else.

    Raises LoopUnavailable where the driver, the toolkit or the step does not allow it.
    """

    def __init__(
        self,
        step: Any,
        counter: Tensor,
        stop: Tensor,
        total: int,
        device: torch.device,
        cuda: Bindings | None = None,
    ):
        self.device = device
        self._tensors = counter, stop  # their addresses are in the graph
        self._cuda = bindings() if cuda is None else cuda
        self._executable: Any = None
        runtime = self._cuda.runtime
        with ExitStack() as cleanup:
            kernel = _kernel(self._cuda, device)
            graph = _call(runtime, "cudaGraphCreate", 0)
            cleanup.callback(runtime.cudaGraphDestroy, graph)
            flag = int(runtime.cudaGraphConditionalHandleFlags.cudaGraphCondAssignDefault)
            handle = _call(runtime, "cudaGraphConditionalHandleCreate", graph, 0, flag)
            arguments = (int(handle), counter.data_ptr(), stop.data_ptr(), total)
            first = self._add_condition(graph, None, kernel, arguments)
            body = self._add_while(graph, first, handle)
            pass_ = _call(runtime, "cudaGraphAddChildGraphNode", body, None, 0, step.raw_cuda_graph())
            self._add_condition(body, pass_, kernel, arguments)
            self._executable = _call(runtime, "cudaGraphInstantiate", graph, 0)

    def _add_condition(self, graph: Any, after: Any, kernel: Any, arguments: tuple[int, int, int, int]) -> Any:
        """One thread of `KERNEL`, after node ``after`` or first of all. Returns its node, the runtime's."""
        runtime, driver = self._cuda.runtime, self._cuda.driver
        node = driver.CUDA_KERNEL_NODE_PARAMS()
        node.func = kernel
        node.gridDimX = node.gridDimY = node.gridDimZ = 1
        node.blockDimX = node.blockDimY = node.blockDimZ = 1
        node.sharedMemBytes = 0
        node.kernelParams = arguments, (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
        # Runtime and driver name one graph and one node by one address, each in a type of its own.
        dependencies = [] if after is None else [driver.CUgraphNode(int(after))]
        graph = driver.CUgraph(int(graph))
        added = _call(driver, "cuGraphAddKernelNode", graph, dependencies, len(dependencies), node)
        return runtime.cudaGraphNode_t(int(added))

    def _add_while(self, graph: Any, after: Any, handle: Any) -> Any:
        """The WHILE node, after node ``after``. Returns its body, an empty graph."""
        runtime = self._cuda.runtime
        node = runtime.cudaGraphNodeParams()
        node.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
        node.conditional.handle = handle
        node.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile
        node.conditional.size = 1
        edges = (None,) if self._cuda.major >= 13 else ()  # CUDA 13 put the edges' data before their number
        _call(runtime, "cudaGraphAddNode", graph, [after], *edges, 1, node)
        return node.conditional.phGraph_out[0]

    def replay(self) -> None:
        """Launch on the device's current stream; returns at once. RuntimeError when the launch fails."""
        if self._executable is None:
            raise RuntimeError("a loop graph must not be launched after reset(); build it again")
        with torch.cuda.device(self.device):  # stream 0 is the current device's, whichever device the graph is on
            stream = torch.cuda.current_stream().cuda_stream
            (status, *_) = self._cuda.runtime.cudaGraphLaunch(self._executable, stream)
        if int(status):
            raise RuntimeError(f"cudaGraphLaunch of the sampling loop failed: {_name(status)}")

    def reset(self) -> None:
        """Free the graph, which must have finished running."""
        executable, self._executable = self._executable, None
        if executable is not None:
            self._cuda.runtime.cudaGraphExecDestroy(executable)


_kernels: dict[int | None, Any] = {}  # device index -> the loaded function: one small module a device, kept


def _kernel(cuda: Bindings, device: torch.device) -> Any:
    """`KERNEL` as a function of the device's primary context, which torch has made current."""
    if device.index not in _kernels:
        # A binary rather than PTX: the driver may be older than the compiler, and then refuses its PTX.
        module = _call(cuda.driver, "cuModuleLoadData", compile_kernel(cuda, torch.cuda.get_device_capability(device)))
        _kernels[device.index] = _call(cuda.driver, "cuModuleGetFunction", module, _KERNEL_NAME)
    return _kernels[device.index]


def compile_kernel(cuda: Bindings, capability: tuple[int, int]) -> bytes:
    """`KERNEL` as a binary for one architecture, such as (9, 0). LoopUnavailable when it does not compile."""
    nvrtc = cuda.nvrtc
    with ExitStack() as cleanup:
        program = _call(nvrtc, "nvrtcCreateProgram", KERNEL, b"more_steps.cu", 0, [], [])
        cleanup.callback(nvrtc.nvrtcDestroyProgram, program)
        options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}".encode()]
        (status, *_) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status):
            log = bytearray(_call(nvrtc, "nvrtcGetProgramLogSize", program))
            _call(nvrtc, "nvrtcGetProgramLog", program, log)
            text = bytes(log).rstrip(b"\0").decode(errors="replace")
            raise LoopUnavailable(f"NVRTC cannot compile the loop's condition: {text}")
        binary = bytearray(_call(nvrtc, "nvrtcGetCUBINSize", program))
        _call(nvrtc, "nvrtcGetCUBIN", program, binary)
    return bytes(binary)


def _call(module: Any, function: str, *arguments: Any) -> Any:
    """What the function returns beside its status; LoopUnavailable for any other status than success."""
    try:
        status, *values = getattr(module, function)(*arguments)
    except Exception as error:  # cuda-bindings raises where a library or one of its symbols is missing
        raise LoopUnavailable(f"{function} cannot be called: {error}") from error
    if int(status):
        raise LoopUnavailable(f"{function} failed: {_name(status)}")
    return values[0] if values else None


def _name(status: Any) -> str:
    return f"{getattr(status, 'name', status)} ({int(status)})"


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
