"""The NVML reader against made-up GPUs behind pynvml's signatures, and the real library without a driver."""

from __future__ import annotations

import inspect
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from nvml_stand_in import LOST, NO_FUNCTION, NO_PERMISSION, NOT_SUPPORTED, UNKNOWN, Board, Library, watched

from ddpm_fast.profiling.nvml import FIELDS, Watch, integral
from ddpm_fast.profiling.nvml_devices import Identity, find_handle, torch_identity

A, B = Board("GPU-aaaa-1", "00000000:01:00.0"), Board("GPU-bbbb-2", "00000000:41:00.0")


def test_the_stand_in_has_the_real_signatures():
    functions = {name: f for name, f in inspect.getmembers(Library(), inspect.ismethod) if name.startswith("nvml")}
    assert len(functions) > 15
    for name, function in functions.items():
        assert inspect.signature(function) == inspect.signature(getattr(pynvml, name)), name


def test_errors_of_the_stand_in_are_the_library_s_own():
    assert type(NOT_SUPPORTED) is pynvml.NVMLError_NotSupported and type(LOST) is pynvml.NVMLError_GpuIsLost


# --- readings ---


def test_units_and_names():
    reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksEventReasonHwThermalSlowdown
    board = Board("GPU-1", utilisation=(93, 41), power_mw=312_500, temperature=61, memory=7 << 30, reasons=reasons)
    s = watched(board, [0.0, 1.0])
    sample = s.samples[0]
    assert (sample.sm_percent, sample.memory_percent, sample.sm_mhz, sample.memory_mhz) == (93, 41, 1500, 2000)
    assert (sample.power_w, sample.temperature_c, sample.memory_bytes) == (312.5, 61, 7 << 30)
    assert sample.throttle == ("power cap", "thermal, hardware")
    assert (s.name, s.uuid, s.mig, s.missing, s.lost, s.notes) == ("Made-up GPU", "GPU-1", False, {}, None, ())


def test_energy_is_the_counter_where_there_is_one():
    s = watched(Board("GPU-1", energy_mj=[5_000_000, 5_400_500]), [0.0, 1.0])
    assert (s.energy_j, s.energy_source) == (400.5, "energy counter")


def test_energy_is_the_integral_of_power_otherwise():
    """100 to 300 W within a second, then two seconds of 300 W: 200 + 600 J."""
    s = watched(Board("GPU-1", power_mw=[100_000, 300_000, 300_000]), [0.0, 1.0, 3.0])
    assert (s.energy_j, s.energy_source) == (800.0, "integral of power")
    assert s.mean("power_w") == pytest.approx(800 / 3) and s.maximum("power_w") == 300
    assert integral([(0, 1), (2, 1), (3, 3)]) == 4
    one = watched(Board("GPU-1"), [0.0])
    assert (one.energy_j, one.energy_source, one.mean("power_w")) == (None, "too few samples of power", 250)


def test_idle_gaps_are_stretches_at_zero():
    busy = [(50, 9), (0, 0), (0, 0), (10, 1), (0, 0)]
    s = watched(Board("GPU-1", utilisation=busy), [0.0, 1.0, 2.0, 3.0, 4.0], end=5.0)
    assert s.idle_gaps() == [(1.0, 3.0), (4.0, 5.0)]
    assert watched(Board("GPU-1"), [0.0, 1.0]).idle_gaps() == []


def test_throttle_reasons_as_a_share_of_samples():
    cap, idle = pynvml.nvmlClocksEventReasonSwPowerCap, pynvml.nvmlClocksEventReasonGpuIdle
    s = watched(Board("GPU-1", reasons=[idle, cap, cap, cap | idle]), [0.0, 1.0, 2.0, 3.0])
    assert s.throttled() == {"idle": 0.5, "power cap": 0.75}


# --- what is not given ---


@pytest.mark.parametrize("why", [NOT_SUPPORTED, NO_PERMISSION])
@pytest.mark.parametrize(
    ("reading", "fields"),
    [
        ("utilisation", ("sm_percent", "memory_percent")),
        ("sm_mhz", ("sm_mhz",)),
        ("memory_mhz", ("memory_mhz",)),
        ("power_mw", ("power_w",)),
        ("temperature", ("temperature_c",)),
        ("memory", ("memory_bytes",)),
        ("reasons", ("throttle",)),
    ],
)
def test_a_field_without_support_is_none_with_a_reason(reading: str, fields: tuple[str, ...], why: Exception):
    board = Board("GPU-1", **{reading: why})
    s = watched(board, [0.0, 1.0, 2.0])
    assert s.missing == dict.fromkeys(fields, str(why)) and len(s.samples) == 3
    for field in FIELDS:
        given = [getattr(sample, field) is not None for sample in s.samples]
        assert given == [field not in fields] * 3
    assert board.asked[reading] == 1  # and it is not asked again
    if reading == "power_mw":
        assert (s.energy_j, s.energy_source) == (None, str(why))


def test_an_error_that_passes_costs_one_value():
    s = watched(Board("GPU-1", power_mw=[100_000, UNKNOWN, 300_000]), [0.0, 1.0, 2.0])
    assert s.values("power_w") == [(0.0, 100.0), (2.0, 300.0)] and s.missing == {} and s.energy_j == 400


def test_a_binding_without_a_function_is_no_error():
    class Old(Library):
        def nvmlDeviceGetPowerUsage(self, handle):
            return pynvml.nvmlNoSuchFunction(handle)

    s = watched(board := Board("GPU-1"), [0.0], library=Old(board))
    assert "nvmlNoSuchFunction" in s.missing["power_w"] and s.samples[0].sm_mhz == 1500


def test_an_older_driver_knows_throttle_reasons_by_their_older_name():
    brake = pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    s = watched(Board("GPU-1", reasons=NO_FUNCTION, old_reasons=brake), [0.0])
    assert s.samples[0].throttle == ("power brake",) and s.missing == {}


def test_a_device_lost_mid_run_keeps_what_was_read():
    board = Board("GPU-1", sm_mhz=[1500, 1500, LOST], power_mw=[100_000, 100_000], energy_mj=[0, LOST])
    s = watched(board, [0.0, 2.0, 3.0, 4.0], end=9.0)
    assert [x.seconds for x in s.samples] == [0.0, 2.0] and s.seconds == 3.0
    assert s.lost == f"cuda:0 was lost: {LOST}"
    assert (s.energy_j, s.energy_source) == (200.0, "integral of power")
    assert board.asked["sm_mhz"] == 3  # not asked after the loss


# --- which GPU ---


def test_torch_s_devices_by_uuid_and_by_bus():
    library = Library(A, B)  # NVML's order; torch sees them the other way round
    for environment in ({}, {"CUDA_VISIBLE_DEVICES": "1,0"}):
        assert find_handle(library, 0, Identity("bbbb-2", None), environment) == (B, "uuid")
        assert find_handle(library, 1, Identity("GPU-aaaa-1", None), environment) == (A, "uuid")
    assert find_handle(library, 0, Identity("unknown", B.pci), {}) == (B, "PCI bus id")
    assert find_handle(library, 0, Identity(None, B.pci), {}) == (B, "PCI bus id")


@pytest.mark.parametrize(
    ("visible", "index", "found"),
    [("", 1, (B, "index")), ("1,0", 0, (B, "index")), (" 1 ", 0, (B, "index")), ("GPU-bb", 0, (B, "uuid"))],
)
def test_without_an_identity_by_what_is_visible(visible: str, index: int, found: tuple[Board, str]):
    assert find_handle(Library(A, B), index, Identity(None, None), {"CUDA_VISIBLE_DEVICES": visible}) == found


def test_an_unknown_device_is_the_library_s_error():
    for visible in ("GPU-cc", "7"):
        with pytest.raises(pynvml.NVMLError):
            find_handle(Library(A, B), 0, Identity(None, None), {"CUDA_VISIBLE_DEVICES": visible})


def test_torch_s_properties_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch):
    properties = SimpleNamespace(uuid="12ab", pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert torch_identity(0) == ("12ab", "00000000:C1:02.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="older torch"))
    assert torch_identity(0) == (None, None)


def test_a_mig_instance_has_its_memory_and_the_gpu_s_clocks():
    whole = Board("GPU-1", sm_mhz=1234, memory=NO_PERMISSION, power_mw=400_000)
    part = Board("MIG-7", parent=whole, utilisation=NOT_SUPPORTED, memory=5 << 30, energy_mj=[0, 10**6])
    library = Library(whole, part)
    visible = {"CUDA_VISIBLE_DEVICES": "MIG-7"}
    assert find_handle(library, 0, Identity("1", None), visible) == (part, "MIG uuid")
    assert find_handle(library, 0, Identity("7", None), {}) == (part, "uuid")
    s = watched(part, [0.0, 1.0], library=library)
    sample = s.samples[0]
    assert s.mig and (sample.memory_bytes, sample.sm_mhz) == (5 << 30, 1234)
    assert sample.sm_percent is None and s.missing["sm_percent"] == str(NOT_SUPPORTED)
    assert sample.power_w is None and "whole GPU" in s.missing["power_w"]
    assert s.energy_j is None and s.energy_source == s.missing["power_w"]  # nor what other instances used
    assert any("those of the whole GPU" in note for note in s.notes)


def test_a_gpu_in_mig_mode_without_a_known_instance_is_noted():
    assert any("MIG mode" in note for note in watched(Board("GPU-1", mig_mode=[[1, 1]]), [0.0]).notes)
    assert watched(Board("GPU-1", mig_mode=[[0, 0]]), [0.0]).notes == ()


# --- the thread ---


def watch(library: Any, devices: list[str], **more: Any) -> Watch:
    identities = {0: Identity("aaaa-1", None), 1: Identity("bbbb-2", None)}
    return Watch(devices, 0.002, library, identities.__getitem__, {}, **more)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_several_gpus_beside_the_work():
    a, b = Board("GPU-aaaa-1", sm_mhz=1100), Board("GPU-bbbb-2", sm_mhz=[1200, 1200, LOST])
    library = Library(a, b)
    with watch(library, ["cuda:1", "cuda:0"]) as w:
        assert library.open == 1
        wait_for(lambda: a.asked.get("sm_mhz", 0) > 5)
    assert library.open == 0 and w.reason is None
    first, second = w.series
    assert (first.device, first.uuid, len(first.samples)) == ("cuda:1", "GPU-bbbb-2", 2) and first.lost
    assert (second.device, second.samples[-1].sm_mhz) == ("cuda:0", 1100) and len(second.samples) > 4
    times = [s.seconds for s in second.samples]
    assert times == sorted(times) and second.seconds >= times[-1] and second.lost is None
    assert not [t for t in threading.enumerate() if t.name == "nvml"]


def test_work_that_fails_ends_the_thread_too():
    library = Library(A)
    with pytest.raises(KeyError), watch(library, ["cuda:0"]):
        raise KeyError
    assert library.open == 0 and not [t for t in threading.enumerate() if t.name == "nvml"]


def test_a_device_that_nvml_does_not_know_is_said():
    with watch(Library(), ["cuda:0"]) as w:
        pass
    assert w.series == () and w.reason is not None and w.reason.startswith("NVML does not know cuda:0: ")


def test_a_short_watch_has_one_sample():
    with watch(Library(A), ["cuda:0"]) as w:
        pass
    assert len(w.series[0].samples) >= 1


# --- no NVML ---


def test_without_a_driver_the_real_library_s_error_is_one_line():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        missing = error
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has an NVIDIA driver")
    assert isinstance(missing, (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded))
    done = []
    with Watch(["cuda:0"]) as w:
        done.append(True)
    assert done and w.series == () and w.reason == f"NVML is not available: {missing}" and "\n" not in w.reason


def test_without_the_package_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Watch(["cuda:0"]) as w:
        pass
    assert w.series == () and w.reason == "NVML is not read: nvidia-ml-py is not installed"
