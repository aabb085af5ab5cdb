"""pynvml with made-up GPUs: its function names, its signatures, its errors and constants; the readings are scripted."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml

Reading = Any  # a value, a sequence of them (the last one stays), or an NVMLError to raise


def error(code: int) -> pynvml.NVMLError:
    """As the library raises it: NVMLError(code) is of the code's own class."""
    return pynvml.NVMLError(code)


NOT_SUPPORTED = error(pynvml.NVML_ERROR_NOT_SUPPORTED)
NO_PERMISSION = error(pynvml.NVML_ERROR_NO_PERMISSION)
LOST = error(pynvml.NVML_ERROR_GPU_IS_LOST)
NO_FUNCTION = error(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
UNKNOWN = error(pynvml.NVML_ERROR_UNKNOWN)


@dataclass(eq=False)
class Board:
    """One GPU, or an instance of one; it is its own handle."""

    uuid: str
    pci: str = "00000000:01:00.0"
    name: str = "Made-up GPU"
    utilisation: Reading = (90, 40)  # percent of SM, of memory
    sm_mhz: Reading = 1500
    memory_mhz: Reading = 2000
    power_mw: Reading = 250_000
    temperature: Reading = 50
    memory: Reading = 1 << 30
    reasons: Reading = 0
    old_reasons: Reading = field(default_factory=lambda: NOT_SUPPORTED)
    energy_mj: Reading = field(default_factory=lambda: NOT_SUPPORTED)
    mig_mode: Reading = field(default_factory=lambda: NOT_SUPPORTED)
    parent: Board | None = None  # of a MIG instance
    asked: dict[str, int] = field(default_factory=dict)

    def read(self, name: str) -> Any:
        """The reading's next value."""
        turn = self.asked.get(name, 0)
        self.asked[name] = turn + 1
        value = getattr(self, name)
        if isinstance(value, list):
            value = value[min(turn, len(value) - 1)]
        if isinstance(value, pynvml.NVMLError):
            raise value
        return value


class Library:
    """What the reader may call. A function that is not here is not part of the recording, and fails the test."""

    def __init__(self, *boards: Board):
        self.boards, self.open = boards, 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvmlDevice") or name.startswith("nvmlSystem"):
            raise AssertionError(f"{name} was called and is not recorded")
        return getattr(pynvml, name)

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return sum(board.parent is None for board in self.boards)

    def nvmlDeviceGetHandleByIndex(self, index):
        whole = [board for board in self.boards if board.parent is None]
        if index >= len(whole):
            raise error(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return whole[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._find(lambda board: board.uuid == uuid)

    def nvmlDeviceGetHandleByPciBusId(self, pciBusId):
        return self._find(lambda board: board.pci == pciBusId and board.parent is None)

    def _find(self, wanted: Callable[[Board], bool]) -> Board:
        for board in self.boards:
            if wanted(board):
                return board
        raise error(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle):
        return handle.uuid

    def nvmlDeviceGetName(self, handle):
        return handle.name

    def nvmlDeviceIsMigDeviceHandle(self, device):
        return ctypes.c_uint(device.parent is not None)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, migDevice):
        return migDevice.parent

    def nvmlDeviceGetMigMode(self, device):
        return device.read("mig_mode")

    def nvmlDeviceGetUtilizationRates(self, handle):
        gpu, memory = handle.read("utilisation")
        return SimpleNamespace(gpu=gpu, memory=memory)

    def nvmlDeviceGetClockInfo(self, handle, type):
        return handle.read({pynvml.NVML_CLOCK_SM: "sm_mhz", pynvml.NVML_CLOCK_MEM: "memory_mhz"}[type])

    def nvmlDeviceGetPowerUsage(self, handle):
        return handle.read("power_mw")

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return handle.read("temperature")

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        return SimpleNamespace(used=handle.read("memory"), free=0, total=0)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return handle.read("reasons")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return handle.read("old_reasons")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return handle.read("energy_mj")


def watched(board: Board, times: Sequence[float], end: float | None = None, library: Library | None = None) -> Any:
    """The series of a board that is read at these seconds."""
    from ddpm_fast.profiling.nvml import WatchedGpu

    gpu = WatchedGpu(library or Library(board), "cuda:0", board, "uuid")
    for t in times:
        gpu.read(t)
    return gpu.finish(times[-1] if end is None else end)
