"""The sampling loop as CUDA graphs: one step, chunks of steps, or the whole trajectory."""

from .capture import GraphCaptureError
from .runners import GRAPHS, GraphCache, Runner, runner, why_no_graph, why_no_loop

__all__ = ["GRAPHS", "GraphCache", "GraphCaptureError", "Runner", "runner", "why_no_graph", "why_no_loop"]
