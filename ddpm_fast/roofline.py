"""What this device can do, measured: copy bandwidth, and the peaks of matrix product and convolution in a dtype.

    roofs(torch.device("cpu"), torch.float32)    # a few seconds the first time, then from a file

Each roof is the best that torch reaches over a few shapes that suit the device, by the shortest of many runs: a
roof is what is possible, and another process can only take from it. They are measured, never quoted, so a share of
a roof can exceed 1 where an operation does better than the best of those shapes, or does fewer FLOPs than it counts
(Winograd's convolutions do).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import DTYPES, dtype_called
from .benchmarking.environment import device_name
from .benchmarking.timing import Clock, Run, clock_for
from .house_rule import full_float32
from .ops.compiled import user_cache
from .stages import stage
from .whole_files import whole_file

BUDGET_S = 3.0  # for all roofs of one dtype
LEAST_RUNS = 3
CONVOLUTIONS = frozenset(("conv", "upsample_conv", "conv_step"))
RATES = ("copy_bytes_per_s", "gemm_flops_per_s", "conv_flops_per_s")
_CACHE = "roofs.json"
_LAYOUT = 1  # of the file's entries; another number makes them be measured anew


@dataclass(frozen=True)
class Roofs:
    """Of one device, dtype and number of threads."""

    device: str
    dtype: str
    threads: int | None  # of a CPU
    torch: str
    copy_bytes_per_s: float  # read and written
    gemm_flops_per_s: float  # two a multiply-add
    conv_flops_per_s: float  # 3x3, channels_last

    def flops_per_s(self, operation: str) -> float:
        """The roof of an operation by its name in kernels/reference.py: convolution's, or the matrix product's."""
        return self.conv_flops_per_s if operation in CONVOLUTIONS else self.gemm_flops_per_s

    def seconds(self, operation: str, flops: float, bytes_moved: float) -> float:
        """The least time at the roofs: the larger of compute and traffic."""
        return max(flops / self.flops_per_s(operation), bytes_moved / self.copy_bytes_per_s)

    def share(self, operation: str, flops: float, bytes_moved: float, seconds: float) -> float:
        """Of the roof that bounds the operation: 1 at the roof."""
        return self.seconds(operation, flops, bytes_moved) / seconds

    def facts(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def roofs(
    device: torch.device | str,
    dtype: torch.dtype | str,
    refresh: bool = False,  # measure again, and keep the higher of each: other processes can only lower a roof
    cache: Path | None = None,  # default: `cache_file`
    clock: Clock | None = None,
    budget_s: float | None = None,  # default: `BUDGET_S`
) -> Roofs:
    """The roofs of ``device`` in ``dtype`` with the threads that torch has now, from the cache or measured.

    RuntimeError for a dtype that the device cannot multiply.
    """
    device, dtype = torch.device(device), dtype_called(dtype, (*DTYPES.values(), torch.float64))
    cache = cache_file() if cache is None else cache
    key = _key(device, dtype)
    known = _read(cache)
    if not refresh and key in known:
        return Roofs(**known[key])
    found = measure(
        device, dtype, clock_for(device) if clock is None else clock, BUDGET_S if budget_s is None else budget_s
    )
    known = _read(cache)
    if key in known:
        best = {name: max(getattr(found, name), known[key][name]) for name in RATES}
        found = replace(found, **best)
    _write(cache, {**known, key: found.facts()})
    return found


def measure(device: torch.device, dtype: torch.dtype, clock: Clock, budget_s: float = BUDGET_S) -> Roofs:
    """Measure now. A third of the budget goes to each roof, shared by its shapes. float32 is without TF32."""
    with stage(f"measuring this device's peak rates in {_name(dtype)}"), full_float32(), _cudnn_chooses():
        rates = _rates(device, dtype, clock, budget_s)
    return Roofs(
        device=device_name(device),
        dtype=_name(dtype),
        threads=_threads(device),
        torch=torch.__version__,
        copy_bytes_per_s=rates["copy"],
        gemm_flops_per_s=rates["gemm"],
        conv_flops_per_s=rates["conv"],
    )


def _rates(device: torch.device, dtype: torch.dtype, clock: Clock, budget_s: float) -> dict[str, float]:
    """Bytes or FLOP/s of each roof: its best shape, by the shortest run."""
    rates: dict[str, float] = {}
    for name, candidates in (("copy", _copies), ("gemm", _products), ("conv", _convolutions)):
        shapes = _SHAPES[name][device.type == "cuda"]
        for shape in shapes:
            work, run = candidates(device, dtype, shape)
            rate = work / (_shortest_ms(run, clock, budget_s / 3 / len(shapes)) / 1e3)
            rates[name] = max(rate, rates.get(name, 0.0))
    return rates


@contextmanager
def _cudnn_chooses() -> Iterator[None]:
    """cuDNN tries its algorithms for each convolution, in place of a guess."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


# Candidates, for a CPU and for a GPU. Copies: MiB, several times any cache. Products: M, N, K. Convolutions: N, C, H,
# with as many output channels; those of a DDPM U-Net, in batches large enough to fill the device.
_SHAPES: dict[str, tuple[list[Any], list[Any]]] = {
    "copy": ([64, 256], [1024]),
    "gemm": ([(1024, 1024, 1024), (256, 4096, 1024), (2048, 2048, 512)], [(8192, 8192, 8192), (16384, 4096, 2304)]),
    "conv": (
        [(4, 128, 32), (4, 256, 16), (16, 256, 16), (4, 256, 32), (16, 256, 8)],
        [(256, 128, 32), (512, 256, 16), (64, 256, 32)],
    ),
}


def _copies(device: torch.device, dtype: torch.dtype, mib: int) -> tuple[float, Run]:
    source = torch.ones(mib << 18, device=device)  # float32: bytes do not know their dtype
    target = torch.empty_like(source)
    return 2.0 * (mib << 20), lambda: target.copy_(source)


def _products(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[float, Run]:
    m, n, k = shape
    a, b = _random(device, dtype, m, k), _random(device, dtype, n, k).t()
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2.0 * m * n * k, lambda: torch.mm(a, b, out=out)


def _convolutions(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> tuple[float, Run]:
    n, c, h = shape
    x = _random(device, dtype, n, c, h, h).contiguous(memory_format=torch.channels_last)
    weight = _random(device, dtype, c, c, 3, 3).contiguous(memory_format=torch.channels_last)
    return 2.0 * n * h * h * c * c * 9, _prepacked(x, weight) or (lambda: F.conv2d(x, weight, None, 1, 1))


def _prepacked(x: Tensor, weight: Tensor) -> Run | None:
    """On a CPU with oneDNN, the convolution over weights in oneDNN's own layout; None elsewhere."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, list(x.shape))
        call: Callable[..., Tensor] = torch.ops.mkldnn._convolution_pointwise
        arguments: tuple[Any, ...] = (x, packed, None, [1, 1], [1, 1], [1, 1], 1, "none", [], "")
        call(*arguments)
    except (RuntimeError, AttributeError, NotImplementedError):  # a torch or a dtype without it
        return None
    return lambda: call(*arguments)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


@torch.inference_mode()
def _shortest_ms(run: Run, clock: Clock, budget_s: float) -> float:
    """The least of as many single runs as fit into the budget, after one unmeasured."""
    clock(run)
    best, spent, done = float("inf"), 0.0, 0
    while done < LEAST_RUNS or spent < budget_s * 1e3:
        ms = clock(run)
        best, spent, done = min(best, ms), spent + ms, done + 1
    return best


def cache_file() -> Path:
    """Where measured roofs are kept: ddpm_fast/roofs.json in the user's cache, $XDG_CACHE_HOME or ~/.cache."""
    return user_cache() / "ddpm_fast" / _CACHE


def _key(device: torch.device, dtype: torch.dtype) -> str:
    parts = (device_name(device), _name(dtype), f"{_threads(device)} threads", f"torch {torch.__version__}", _LAYOUT)
    return " | ".join(map(str, parts))


def _threads(device: torch.device) -> int | None:
    return torch.get_num_threads() if device.type == "cpu" else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(cache: Path) -> dict[str, Any]:
    """The file's entries; none where it is missing, broken, or of another layout."""
    try:
        entries = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    wanted = set(Roofs.__dataclass_fields__)
    if not isinstance(entries, dict):
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, dict) and set(v) == wanted}


def _write(cache: Path, entries: dict[str, Any]) -> None:
    """Keep them, where the folder can be written to: a cache is no reason to fail."""
    try:
        with whole_file(cache) as file:
            file.write(json.dumps(entries, indent=1, sort_keys=True).encode())
    except OSError:
        pass


def roofs_text(found: list[Roofs]) -> str:
    """For a person."""
    first = found[0]
    threads = "" if first.threads is None else f", {first.threads} thread{'s' * (first.threads != 1)}"
    lines = [f"measured on {first.device}{threads}, torch {first.torch}"]
    for r in found:
        lines.append(
            f"  {r.dtype:<9} copy {r.copy_bytes_per_s / 1e9:8.1f} GB/s   product {r.gemm_flops_per_s / 1e12:8.3f} "
            f"TFLOP/s   3x3 convolution {r.conv_flops_per_s / 1e12:8.3f} TFLOP/s"
        )
    return "\n".join(lines)
