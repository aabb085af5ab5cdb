"""What a compiled kernel is made of, read from its cubin: resources, matrix instructions, widths of memory access.

The disassembler is the cuobjdump inside the triton package (triton/backends/nvidia/bin); no CUDA toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Mnemonics of the matrix units: warp-wide, warpgroup-wide (sm_90), and tensor-memory (tcgen05, sm_100).
MATRIX = {"HMMA": "HMMA", "HGMMA": "HGMMA", "UTCHMMA": "tcgen05", "UTCQMMA": "tcgen05"}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[\w]+)*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536
    tensor_columns: int = 0  # of tensor memory


LIMITS = {
    80: Limits(64, 32, 164 * 1024),
    86: Limits(48, 16, 100 * 1024),
    89: Limits(48, 24, 100 * 1024),
    90: Limits(64, 32, 228 * 1024),
    100: Limits(64, 32, 228 * 1024, tensor_columns=512),
    120: Limits(48, 24, 100 * 1024),
}
RESERVED_SHARED = 1024  # bytes a block that the system keeps, compute capability 8.0 and above
SCHEDULERS = 4  # of a multiprocessor; each owns a quarter of the registers
WARP_REGISTERS = 256  # the unit in which a warp's registers are given out


@dataclass(frozen=True)
class Binary:
    """Counts are static: instructions in the binary, not executed ones. Widths are bytes a thread."""

    registers: int
    stack: int  # bytes a thread
    spills: int  # bytes a thread stored and loaded because registers ran out
    static_shared: int  # bytes
    matrix: dict[str, int]  # "HMMA", "HGMMA", "tcgen05" -> instructions
    bulk_loads: int  # UTMALDG: bulk-tensor copies into shared memory
    async_copies: dict[int, int]  # width -> LDGSTS (cp.async) instructions
    loads: dict[int, int]  # width -> LDG instructions
    stores: dict[int, int]


def binaries() -> Path:
    """The folder of triton's own CUDA tools; FileNotFoundError where this triton has none (macOS, AMD, CPU)."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for tool in ("cuobjdump", "ptxas"):
        if not (folder / tool).exists():
            raise FileNotFoundError(f"reading kernels needs triton's own {tool}; {folder / tool} is missing; use Linux")
    return folder


def read(cubin: bytes, ptx: str, arch: int) -> Binary:
    """Disassemble one cubin with one kernel; ``ptx`` and ``arch`` tell spills from other use of the stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        resources = _run("cuobjdump", "-res-usage", str(path))
        code = _run("cuobjdump", "-sass", str(path))
    found = _RESOURCES.search(resources)
    if found is None:
        raise ValueError(f"cuobjdump names no resources of the kernel; it said: {resources[:200]!r}")
    registers, stack, static_shared = map(int, found.groups())
    seen = Counter(_INSTRUCTION.findall(code))
    if not seen:
        raise ValueError("cuobjdump disassembled no instruction; is the cubin of another architecture?")
    local = sum(n for (name, _), n in seen.items() if name in ("LDL", "STL"))
    return Binary(
        registers=registers,
        stack=stack,
        spills=_spilled(ptx, arch) if local else 0,
        static_shared=static_shared,
        matrix=_matrix(seen),
        bulk_loads=sum(n for (name, _), n in seen.items() if name == "UTMALDG"),
        async_copies=_widths(seen, "LDGSTS"),
        loads=_widths(seen, "LDG"),
        stores=_widths(seen, "STG"),
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(binaries() / tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _spilled(ptx: str, arch: int) -> int:
    """Bytes of spill stores and loads, from ptxas: the stack may also hold arrays, of a slow sine for one."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = Path(get_ptxas(arch).path).name  # which of its two reads the PTX that it writes is triton's to know
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        said = _run(tool, "-v", f"--gpu-name=sm_{arch}{suffix}", str(source), "-o", str(target))
    return sum(int(stores) + int(loads) for _, stores, loads in _SPILLS.findall(said))


def _matrix(seen: Counter[tuple[str, str]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for (name, _), n in seen.items():
        if name in MATRIX:
            counts[MATRIX[name]] += n
    return dict(counts)


def _widths(seen: Counter[tuple[str, str]], mnemonic: str) -> dict[int, int]:
    """Bytes a thread -> instructions; a memory access without a width in its name moves 4 bytes."""
    counts: Counter[int] = Counter()
    for (name, modifiers), n in seen.items():
        if name == mnemonic:
            parts = modifiers.split(".")
            bits = next((int(p) for p in parts if p in ("64", "128", "256")), None)
            small = next((int(p[1:]) for p in parts if p in ("U8", "S8", "U16", "S16")), None)
            counts[(bits or small or 32) // 8] += n
    return dict(sorted(counts.items(), reverse=True))


def blocks_per_multiprocessor(arch: int, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> int:
    """Thread blocks that fit one multiprocessor at once, by registers, shared and tensor memory, and slots."""
    limit = LIMITS[arch]
    unit = -(-registers * 32 // WARP_REGISTERS) * WARP_REGISTERS
    by_registers = limit.registers // SCHEDULERS // unit * SCHEDULERS // warps
    by_shared = limit.shared_bytes // (shared + RESERVED_SHARED)
    fits = [limit.blocks, limit.warps // warps, by_registers, by_shared]
    if tensor_columns:
        fits.append(limit.tensor_columns // tensor_columns)
    return min(fits)
