"""Who computes the U-Net: the sets of operations, and what their calls cost."""

from .records import Record, recording
from .sets import Feature, Ops, cpu, reference, triton, winograd

__all__ = ["Feature", "Ops", "Record", "cpu", "recording", "reference", "triton", "winograd"]
