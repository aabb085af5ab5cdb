"""How many images are drawn together: chosen by what fits and what is fast, and halved where memory ends.

An image is a function of its seed and id, so that the size of the batch it is drawn in is a matter of time and memory
alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..ops import Ops
from ..step_table import StepTable
from ..unet import UNet
from .prepared import prepare
from .program import StepProgram

DEFAULT_BATCH = 64  # for a callable, whose cost is not known
MOST_ON_A_GPU = 2048  # a step is long enough by then for launches and the last wave of blocks not to matter
MOST_ON_A_CPU = 128  # beyond it, results of a step fall out of every cache
SHARE = 0.8  # of the free memory, for a plan does not know of fragments, graphs and what others take meanwhile

# What a step costs on a CPU besides its images, as the FLOPs that could be done meanwhile: calls, and weights that are
# read once a step. Fitted to the bundled network and CIFAR-10's (float32, the set "cpu", one thread with AVX-512).
CALLS_FLOPS = 1e9
WEIGHT_BYTE_FLOPS = 25.0
WORTH = 0.05  # share of a step that may go to this


def choose(
    model: UNet | Callable[..., object],
    table: StepTable,
    image_shape: tuple[int, int, int],  # (C, H, W)
    dtype: torch.dtype,
    device: torch.device,
    ops: Ops,
    guidance_scale: float | None = None,
) -> int:
    """Images to draw together, by the plan of the network's memory.

    On a GPU: as many as fit into 80% of the free memory, the largest power of two up to 2048. On a CPU, where memory
    grows with the batch and speed does not: the smallest power of two at which what a step costs besides its images is
    5% of it, if that fits, up to 128. A callable has no plan: 64. Where the plan errs, `Limit` halves.
    """
    if not isinstance(model, UNet):
        return DEFAULT_BATCH
    from ..inspection import model_cost  # what counts FLOPs in torch imports Triton

    with torch.device("meta"):
        ghost = UNet(model.config).eval()
    passes = 1 if guidance_scale is None else 2
    cost = model_cost(ghost.to(dtype), *image_shape[1:])
    room = int(SHARE * free_bytes(device))
    wanted = MOST_ON_A_GPU if device.type != "cpu" else fast_batch(passes * cost["flops"], cost["parameters"])
    if ops.placed is not None:  # results lie in an arena, whose size is known beforehand
        return _largest(wanted, room, _planned(ghost, table, image_shape, dtype, ops, guidance_scale))
    return _largest(wanted, room, lambda n: n * passes * cost["activation_bytes"])


def fast_batch(flops: int, parameters: int) -> int:
    """The smallest power of two, up to 128, whose images are 95% of a step's work on a CPU; ``flops`` of an image."""
    besides = CALLS_FLOPS + WEIGHT_BYTE_FLOPS * 4 * parameters
    needed = (1 - WORTH) / WORTH * besides / max(flops, 1)
    size = 1
    while size < needed and size < MOST_ON_A_CPU:
        size *= 2
    return size


def _largest(wanted: int, room: int, planned: Callable[[int], int]) -> int:
    """``wanted``, halved until the bytes planned for it fit; 1 if nothing does: then trying will tell."""
    while wanted > 1 and planned(wanted) > room:
        wanted //= 2
    return wanted


def _planned(
    ghost: UNet,
    table: StepTable,
    image_shape: tuple[int, int, int],
    dtype: torch.dtype,
    ops: Ops,
    guidance_scale: float | None,
) -> Callable[[int], int]:
    """Bytes that grow with the batch, of a step program over shapes alone."""
    prepared = prepare(ghost, dtype, "meta", ops)
    return lambda n: StepProgram(prepared, table, n, image_shape, guidance_scale=guidance_scale).memory.activations


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: on a GPU what the driver has left and torch's cache holds unused, on a CPU what
    the system and the container's limit leave."""
    if device.type == "cuda":
        left, _ = torch.cuda.mem_get_info(device)
        return left + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [size for size in (_available(), _container_left()) if size is not None]
    return min(found) if found else 2**31


def _available(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:  # where there is no such file, half of all memory is a guess on the safe side
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _container_left(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the control group may still take, by version 2 or 1; None without a limit."""
    names = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for most, used in names:
        try:
            return max(0, int((root / most).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # no such file, or the word "max"
            continue
    return None


_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "bad_alloc")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ended, on a GPU or a CPU, here or in what the error came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


class Limit:
    """The most images that memory was found to hold at once; no limit until it was found too small."""

    def __init__(self) -> None:
        self.size: int | None = None
        self._began: int | None = None  # the size that did not fit, until the smaller one is known to

    def of(self, wanted: int) -> int:
        """``wanted``, or as much of it as fits."""
        return wanted if self.size is None else min(wanted, self.size)

    def run(
        self,
        rows: Sequence[int],
        batch: Callable[[int], int],  # rows to draw -> images that the batch then has, padding included
        draw: Callable[[Sequence[int]], None],
        release: Callable[[], None],  # frees what earlier batches hold
    ) -> None:
        """``draw`` all rows, in parts that fit: half as many, and again, where memory ends.

        One warning names the size that did fit. Raises torch.OutOfMemoryError, in one line, if one image does not.
        """
        done = 0
        while done < len(rows):
            part = rows[done : done + self.of(len(rows))]
            size = batch(len(part))
            reason = None
            try:
                draw(part)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if reason is None:
                done += len(part)
                self._announce()
            else:  # the error is gone by now, and with its frames the tensors that they held
                release()
                self._halve(size, reason)

    def _halve(self, size: int, reason: str) -> None:
        if size == 1:
            raise torch.OutOfMemoryError(
                f"memory must hold one image at a time, and does not; free some, use a device with more or "
                f"dtype=torch.bfloat16: {reason}"
            )
        self._began = self._began or size
        self.size = size // 2

    def _announce(self) -> None:
        if self._began is not None:
            warnings.warn(
                f"out of memory with {self._began} images at a time; going on with {self.size} (the same images)",
                RuntimeWarning,
                stacklevel=4,
            )
            self._began = None
