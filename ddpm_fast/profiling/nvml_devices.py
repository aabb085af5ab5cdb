"""Which of NVML's devices is torch's cuda:N: by uuid, by PCI bus id, or else by CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch


class Identity(NamedTuple):
    """How torch knows a GPU, whatever CUDA_VISIBLE_DEVICES makes of the numbers."""

    uuid: str | None  # without a prefix
    pci: str | None  # "00000000:65:00.0"


def torch_identity(index: int) -> Identity:
    p = torch.cuda.get_device_properties(index)
    uuid = getattr(p, "uuid", None)
    where = [getattr(p, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    pci = None if None in where else f"{where[0]:08X}:{where[1]:02X}:{where[2]:02X}.0"
    return Identity(None if uuid is None else str(uuid), pci)


def find_handle(
    library: Any,
    index: int,
    identity: Identity,
    environment: Mapping[str, str],
) -> tuple[Any, str]:
    """NVML's handle of torch's CUDA device ``index``, and how it was found. Raises the library's NVMLError."""
    visible = [e.strip() for e in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if e.strip()]
    entry = visible[index] if index < len(visible) else None
    tries: list[tuple[str, Callable[[], Any]]] = []
    if entry is not None and entry.startswith("MIG-"):
        tries.append(("MIG uuid", lambda: library.nvmlDeviceGetHandleByUUID(entry)))
    if identity.uuid is not None:
        for prefix in ("GPU-", "MIG-"):
            full = prefix + identity.uuid.removeprefix(prefix)
            tries.append(("uuid", partial(library.nvmlDeviceGetHandleByUUID, full)))
    if identity.pci is not None:
        tries.append(("PCI bus id", lambda: library.nvmlDeviceGetHandleByPciBusId(identity.pci)))
    for how, attempt in tries:
        try:
            return attempt(), how
        except library.NVMLError:
            continue
    if entry is not None and entry.startswith("GPU-"):
        return _by_short_uuid(library, entry), "uuid"
    number = int(entry) if entry is not None and entry.isdigit() else index
    return library.nvmlDeviceGetHandleByIndex(number), "index"


def _by_short_uuid(library: Any, start: str) -> Any:
    """CUDA_VISIBLE_DEVICES takes the beginning of a uuid too."""
    for i in range(library.nvmlDeviceGetCount()):
        handle = library.nvmlDeviceGetHandleByIndex(i)
        if text(library.nvmlDeviceGetUUID(handle)).startswith(start):
            return handle
    raise library.NVMLError(library.NVML_ERROR_NOT_FOUND)


def text(value: str | bytes) -> str:
    """Older bindings give bytes."""
    return value.decode() if isinstance(value, bytes) else value
