"""Compile what a GPU would run, where there is none: every launch inside `compiling` is compiled and not run.

The launches themselves are intercepted, on ``meta`` tensors, so what is compiled is what the launchers would
launch: their launch choices, their specialisations, Triton's own treatment of the arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True)
class Compiled:
    """One specialisation of one kernel for one architecture, and its first launch."""

    kernel: str
    arch: int
    constexprs: dict[str, Any]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    binary: Any  # triton's CompiledKernel

    @property
    def shared_bytes(self) -> int:
        return self.binary.metadata.shared

    @property
    def tensor_columns(self) -> int:
        return getattr(self.binary.metadata, "tmem_size", 0) or 0


class _NoDevice:
    """What Triton asks its driver while it compiles; device numbers are architectures, so caches stay apart."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling(
    arch: int,  # compute capability, 90 for sm_90
    select: Callable[[str, dict[str, Any]], bool] = lambda kernel, constexprs: True,
    progress: Callable[[Compiled], None] = lambda compiled: None,
) -> Iterator[list[Compiled]]:
    """Inside, a launch ``kernel[grid](...)`` compiles for sm_``arch``; the list fills with each kernel once.

    select: whether to compile a launch at all, by its kernel's name and constexprs; asked at every launch.
    progress: called with each new entry. RuntimeError in Triton's interpreter, which compiles nothing.
    """
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    if knobs.runtime.interpret:
        raise RuntimeError("kernels can only be compiled without Triton's interpreter; unset TRITON_INTERPRET")
    found: list[Compiled] = []
    seen: set[int] = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        bound = dict(zip(self.arg_names, args)) | kwargs
        values = {p.name: bound.get(p.name, p.default) for p in self.params if p.is_constexpr}
        if not select(self.__name__, values):
            return None
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(binary) not in seen:
            seen.add(id(binary))
            meta = binary.metadata
            shape = grid(bound) if callable(grid) else grid
            entry = Compiled(self.__name__, arch, values, tuple(shape), meta.num_warps, meta.num_stages, binary)
            found.append(entry)
            progress(entry)
        return binary

    before = driver._active
    driver.set_active(_NoDevice(arch))
    try:
        with mock.patch.object(JITFunction, "run", compile_only), _devices(arch):
            yield found
    finally:
        driver._active = before


@contextmanager
def _devices(arch: int) -> Iterator[None]:
    """Let the launchers take ``meta`` tensors for those of a GPU of this architecture."""
    import importlib

    for name in ("attention", "conv", "norm_act", "sampler_step"):
        importlib.import_module(f"ddpm_fast.kernels.{name}")
    stand_ins = {"require": lambda kernel, *tensors: None, "architecture": lambda *tensors: arch}
    with mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)):
        patches = [
            mock.patch.object(module, name, value)
            for module in [m for key, m in sys.modules.items() if key.startswith("ddpm_fast.kernels.")]
            for name, value in stand_ins.items()
            if hasattr(module, name)
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()
