"""What a GPU does over time, as NVIDIA's management library says: a thread that samples it beside the work.

`Watch` is a block; after it, `series` holds one `Series` a device. What a GPU, a MIG instance or missing
permissions do not give is None in every sample, with the reason in `Series.missing`. Without the library or a
driver nothing is sampled, and `Watch.reason` says why in one line.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

import torch

from .nvml_devices import Identity, find_handle, text, torch_identity

INTERVAL_S = 0.05  # between samples; NVML's own averages are over a sixth of a second to a second


@dataclass(frozen=True)
class Sample:
    """One look at a GPU. None: not given, or not this time."""

    seconds: float  # since the watch began
    sm_percent: float | None = None  # of NVML's last period in which a kernel ran
    memory_percent: float | None = None  # of it in which device memory was read or written
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    memory_bytes: float | None = None  # in use on the device, by all processes
    throttle: tuple[str, ...] | None = None  # why the clocks are not higher


FIELDS = tuple(f.name for f in fields(Sample) if f.name != "seconds")


@dataclass(frozen=True)
class Series:
    """One device's samples, in the order of time."""

    device: str  # torch's name: "cuda:0"
    name: str
    uuid: str | None
    mig: bool  # an instance of a shared GPU
    samples: tuple[Sample, ...]
    seconds: float  # from begin to end of the watch, or to the loss of the device
    missing: Mapping[str, str]  # field -> why it is None throughout
    energy_j: float | None
    energy_source: str  # "energy counter", "integral of power", or why there is none
    lost: str | None = None  # why the samples end early
    notes: tuple[str, ...] = ()

    def values(self, field: str) -> list[tuple[float, float]]:
        """(seconds, value) where the field was given."""
        found = ((s.seconds, getattr(s, field)) for s in self.samples)
        return [(t, float(v)) for t, v in found if v is not None]

    def mean(self, field: str) -> float | None:
        """Over time, by trapezoids; of one sample, its value."""
        points = self.values(field)
        if len(points) < 2:
            return points[0][1] if points else None
        return integral(points) / (points[-1][0] - points[0][0])

    def maximum(self, field: str) -> float | None:
        return max((v for _, v in self.values(field)), default=None)

    def idle_gaps(self) -> list[tuple[float, float]]:
        """Stretches (begin, end) in seconds at 0 % SM utilisation: from such a sample to the next that is not."""
        gaps: list[tuple[float, float]] = []
        begin: float | None = None
        for t, percent in self.values("sm_percent"):
            if percent == 0 and begin is None:
                begin = t
            elif percent > 0 and begin is not None:
                gaps.append((begin, t))
                begin = None
        if begin is not None and self.seconds > begin:
            gaps.append((begin, self.seconds))
        return gaps

    def throttled(self) -> dict[str, float]:
        """Reason -> share of the samples that gave it."""
        seen = [s.throttle for s in self.samples if s.throttle is not None]
        reasons = sorted({reason for reasons in seen for reason in reasons})
        return {reason: sum(reason in s for s in seen) / len(seen) for reason in reasons}


def integral(points: Sequence[tuple[float, float]]) -> float:
    """Of (x, y) by trapezoids."""
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))


class Watch:
    """Samples ``devices`` in a thread while the block runs.

    devices: torch devices; "cuda" is the current one. library: pynvml, or one with its functions. identify: torch's
    device number -> `Identity`. Never raises for what NVML lacks; ``reason`` is None, or why nothing was sampled.
    """

    def __init__(
        self,
        devices: Sequence[torch.device | str],
        interval_s: float = INTERVAL_S,
        library: Any = None,
        identify: Callable[[int], Identity] = torch_identity,
        environment: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.reason: str | None = None
        self.series: tuple[Series, ...] = ()
        self._devices = [torch.device(d) for d in devices]
        self._interval, self._library, self._identify, self._clock = interval_s, library, identify, clock
        self._environment = os.environ if environment is None else environment
        self._gpus: list[WatchedGpu] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.began = 0.0  # on ``clock``

    def __enter__(self) -> Watch:
        if self._library is None:
            try:
                import pynvml
            except ImportError:
                self.reason = "NVML is not read: nvidia-ml-py is not installed"
                return self
            self._library = pynvml
        library = self._library
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            self.reason = f"NVML is not available: {error}"
            self._library = None
            return self
        self.began = self._clock()
        for device in self._devices:
            index = torch.cuda.current_device() if device.index is None else device.index
            try:
                handle, how = find_handle(library, index, self._identify(index), self._environment)
                self._gpus.append(WatchedGpu(library, f"cuda:{index}", handle, how))
            except library.NVMLError as error:
                self.reason = f"NVML does not know cuda:{index}: {error}"
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._library is None:
            return
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        now = self._clock() - self.began
        self.series = tuple(gpu.finish(now) for gpu in self._gpus)
        with contextlib.suppress(self._library.NVMLError):  # a lost GPU may take the library along
            self._library.nvmlShutdown()

    def _run(self) -> None:
        while True:
            for gpu in self._gpus:
                gpu.read(self._clock() - self.began)
            if self._stop.wait(self._interval):
                return


class WatchedGpu:
    """One device while it is watched."""

    def __init__(self, library: Any, device: str, handle: Any, how: str):
        self.library, self.device = library, device
        self.missing: dict[str, str] = {}
        self.notes: list[str] = []
        self.samples: list[Sample] = []
        self.lost: str | None = None
        self._lost_at = 0.0
        is_mig = self._ask(lambda: library.nvmlDeviceIsMigDeviceHandle(handle))
        self.mig = bool(getattr(is_mig, "value", is_mig))
        whole = library.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if self.mig else handle
        self.name = text(self._ask(lambda: library.nvmlDeviceGetName(handle)) or "a GPU without a name")
        uuid = self._ask(lambda: library.nvmlDeviceGetUUID(handle))
        self.uuid = None if uuid is None else text(uuid)
        self._readers = _readers(library, handle, whole)
        if how == "index":
            self.notes.append("matched by number, for want of a uuid: NVML may count the GPUs in another order")
        if self.mig:
            self.missing["power_w"] = "NVML states it for the whole GPU, which MIG instances share"
            self.notes.append("clocks, temperature and throttle reasons are those of the whole GPU")
        elif (self._ask(lambda: library.nvmlDeviceGetMigMode(handle)) or [0])[0]:
            self.notes.append("the GPU is in MIG mode, and which instance this is could not be told")
        self._energy = handle if not self.mig else None
        self._energy_began = self._counter()

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self.library.NVMLError:
            return None

    def _counter(self) -> float | None:
        """Joules since the driver was loaded."""
        if self._energy is None:
            return None
        millijoules = self._ask(lambda: self.library.nvmlDeviceGetTotalEnergyConsumption(self._energy))
        return None if millijoules is None else millijoules / 1e3

    def read(self, now: float) -> None:
        if self.lost is not None:
            return
        values: dict[str, Any] = {}
        for names, reader in self._readers.items():
            if any(name in self.missing for name in names):
                continue
            try:
                values |= dict(zip(names, reader()))
            except self.library.NVMLError as error:
                kind = type(error).__name__.removeprefix("NVMLError_")
                if kind in ("GpuIsLost", "ResetRequired"):
                    self.lost, self._lost_at = f"{self.device} was lost: {error}", now
                    return
                if kind in ("NotSupported", "NoPermission", "FunctionNotFound", "InvalidArgument"):
                    self.missing |= dict.fromkeys(names, str(error))
            except (AttributeError, TypeError) as error:  # an older or newer binding
                self.missing |= dict.fromkeys(names, f"this nvidia-ml-py: {error}")
        self.samples.append(Sample(now, **values))

    def finish(self, now: float) -> Series:
        end = now if self.lost is None else self._lost_at
        energy, source = self._energy_used()
        return Series(
            self.device,
            self.name,
            self.uuid,
            self.mig,
            tuple(self.samples),
            end,
            self.missing,
            energy,
            source,
            self.lost,
            tuple(self.notes),
        )

    def _energy_used(self) -> tuple[float | None, str]:
        after = self._counter() if self.lost is None else None
        if self._energy_began is not None and after is not None:
            return after - self._energy_began, "energy counter"
        power = [(s.seconds, s.power_w) for s in self.samples if s.power_w is not None]
        if len(power) > 1:
            return integral(power), "integral of power"
        return None, self.missing.get("power_w", "too few samples of power")


def _readers(library: Any, handle: Any, whole: Any) -> dict[tuple[str, ...], Callable[[], Sequence[Any]]]:
    """Fields -> what asks for them. ``whole``: the GPU that a MIG instance is part of, else the handle."""

    def utilisation() -> Sequence[Any]:
        rates = library.nvmlDeviceGetUtilizationRates(handle)
        return rates.gpu, rates.memory

    def reasons() -> Sequence[Any]:
        try:
            mask = library.nvmlDeviceGetCurrentClocksEventReasons(whole)
        except (AttributeError, library.NVMLError_FunctionNotFound):  # the name before driver 535
            mask = library.nvmlDeviceGetCurrentClocksThrottleReasons(whole)
        return (tuple(name for bit, name in throttle_reasons(library).items() if mask & bit),)

    return {
        ("sm_percent", "memory_percent"): utilisation,
        ("sm_mhz",): lambda: (library.nvmlDeviceGetClockInfo(whole, library.NVML_CLOCK_SM),),
        ("memory_mhz",): lambda: (library.nvmlDeviceGetClockInfo(whole, library.NVML_CLOCK_MEM),),
        ("power_w",): lambda: (library.nvmlDeviceGetPowerUsage(handle) / 1e3,),
        ("temperature_c",): lambda: (library.nvmlDeviceGetTemperature(whole, library.NVML_TEMPERATURE_GPU),),
        ("memory_bytes",): lambda: (library.nvmlDeviceGetMemoryInfo(handle).used,),
        ("throttle",): reasons,
    }


_REASONS = {
    "GpuIdle": "idle",
    "ApplicationsClocksSetting": "clocks set by the user",
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SyncBoost": "sync boost",
    "SwThermalSlowdown": "thermal, software",
    "HwThermalSlowdown": "thermal, hardware",
    "HwPowerBrakeSlowdown": "power brake",
    "DisplayClockSetting": "display clocks",
}


def throttle_reasons(library: Any) -> dict[int, str]:
    """Bit -> what it means."""
    found: dict[int, str] = {}
    for name, meaning in _REASONS.items():
        for prefix in ("nvmlClocksEventReason", "nvmlClocksThrottleReason"):
            bit = getattr(library, prefix + name, None)
            if bit is not None:
                found[int(bit)] = meaning
    return found
