"""The sampling loop as CUDA graphs: one step, chunks of steps, or the whole trajectory."""

from .capture import GraphCaptureError
from .runners import GRAPHS, GraphCache, Runner, runner

__all__ = ["GRAPHS", "GraphCache", "GraphCaptureError", "Runner", "runner"]
