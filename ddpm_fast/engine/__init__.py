"""What lies between a U-Net and its sampler: the prepared copy, one step over static buffers, the batch."""

from .program import CallableProgram, EagerRunner, Program, Runner, StepProgram

__all__ = ["CallableProgram", "EagerRunner", "Program", "Runner", "StepProgram"]
