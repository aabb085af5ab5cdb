"""Compile every kernel for every architecture, without a GPU, and say what came out. `make kernels` runs it.

    python -m benchmarks.compile_kernels                      # every launch of both models, a row each
    python -m benchmarks.compile_kernels --quick --arch 90    # one launch of each kind and tile
    python -m benchmarks.compile_kernels --quick --markdown   # grouped, as docs/performance.md has it

What is compiled is what the U-Nets launch: google/ddpm-cifar10-32 and google/ddpm-*-256 in bfloat16 at a large
batch and at batch 1, walked on the ``meta`` device. Exit code 1 where any kernel spills. Compiled kernels stay in
Triton's cache, so a second run only reads them; the first takes tens of minutes on one core.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported; the interpreter compiles nothing

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import aot, sass
from ddpm_fast import ops
from ddpm_fast.config import UNetConfig
from ddpm_fast.kernels import reference
from ddpm_fast.kernels.cost import CHANNEL_PAD
from ddpm_fast.presets import PRESETS
from ddpm_fast.unet import TimeRows, UNet

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
WORK = (("cifar10", 256), ("cifar10", 1), ("lsun256", 16), ("lsun256", 1))  # preset, batch


@dataclass(frozen=True)
class Row:
    """One compiled kernel: what it is, what it takes, what it is made of."""

    kernel: str
    specialization: str
    work: str  # the preset and batch that first launched it
    arch: int
    programs: int
    warps: int
    stages: int
    shared_bytes: int
    tensor_columns: int
    binary: sass.Binary
    blocks: int  # a multiprocessor, by arithmetic

    @property
    def occupancy(self) -> float:
        """Resident warps over the warps that a multiprocessor can hold."""
        return self.blocks * self.warps / sass.LIMITS[self.arch].warps


def step(preset: str, batch: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Launch everything that one sampling step of a preset's network launches, on ``meta``.

    Also what other settings launch instead: the fused last step, a learned variance; and the initial noise.
    """
    from ddpm_fast.kernels import conv_step, sampler_step

    p = PRESETS[preset]
    with torch.device("meta"), torch.no_grad():
        model = UNet(UNetConfig(**p.model)).eval().to(dtype)
        x = torch.empty(batch, model.config.in_channels, p.image_size, p.image_size)
        low = torch.empty(batch, CHANNEL_PAD, *x.shape[2:], dtype=dtype, memory_format=torch.channels_last)
        width = sum(block.time_emb_proj.out_features for block in model.residual_blocks())
        table, row = torch.empty(1000, width), torch.empty(1, dtype=torch.int32)
        out = model.run(low, TimeRows(table=table, row=row), ops.triton())
        seed, ids = torch.empty(1, dtype=torch.int64), torch.empty(batch, dtype=torch.int64)
        rows, counter = torch.empty(1000, reference.TABLE_WIDTH), torch.empty(2, dtype=torch.int32)
        sampler_step.initial_noise(x, seed, ids, low=low)
        sampler_step.sampler_step(x, out, rows, counter, seed, ids, x_prev=x, low=low)
        learned = torch.cat((out, out), dim=1).contiguous(memory_format=torch.channels_last)
        sampler_step.sampler_step(x, learned, rows, counter, seed, ids, variance="learned_range", x_prev=x, low=low)
        last, k = model.conv_out, model.conv_out.in_channels
        h = torch.empty(batch, k, *x.shape[2:], dtype=dtype, memory_format=torch.channels_last)
        conv_step.conv_step(h, last.weight, last.bias, x, rows, counter, seed, ids, x_prev=x, low=low)


def compile_all(
    archs: Sequence[int],
    work: Sequence[tuple[str, int]] = WORK,
    quick: bool = False,
    kernels: Sequence[str] = (),
    most: int | None = None,
    progress: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Rows for every kernel that ``work`` launches; ``quick``: the first launch of each `kind` only.

    kernels: parts of kernel names; given, others are not compiled. most: kinds of each kernel, the first ones.
    """
    rows: list[Row] = []
    for arch in archs:
        kinds: set[tuple[Any, ...]] = set()
        for preset, batch in work:

            def select(kernel: str, constexprs: dict[str, Any], kinds: set[tuple[Any, ...]] = kinds) -> bool:
                if kernels and not any(part in kernel for part in kernels):
                    return False
                new = kind(kernel, constexprs) not in kinds
                if new and most is not None and sum(k[0] == kernel for k in kinds) >= most:
                    return False
                kinds.add(kind(kernel, constexprs))
                return new or not quick

            def add(c: aot.Compiled, label: str = f"{preset} batch {batch}") -> None:
                rows.append(_row(c, label))
                progress(rows[-1])

            with aot.compiling(arch, select, add):
                step(preset, batch)
    return _distinct(rows)


def kind(kernel: str, constexprs: dict[str, Any]) -> tuple[Any, ...]:
    """What sets kernels of one source apart in their code, and their tile; not the shapes that they run on."""
    c = constexprs
    tile = tuple(c.get(n) for n in ("BM", "BN", "BC", "BD", "BLOCK_P", "BLOCK_C", "NG"))
    if "conv" in kernel:
        names = ("SIZE", "STRIDE", "PHASES", "MODE", "SHORT_MODE", "VARIANCE")
        return (kernel, *tile, *(c.get(n) for n in names), bool(c.get("C2")), bool(c.get("S1")), c.get("K", 0) <= 16)
    return (kernel, *tile, bool(c.get("C2")), c.get("VARIANCE"), c.get("SILU"))


def _row(c: aot.Compiled, work: str) -> Row:
    binary = sass.read(c.binary.asm["cubin"], c.binary.asm["ptx"], c.arch)
    programs = 1
    for side in c.grid:
        programs *= side
    blocks = sass.blocks_per_multiprocessor(
        c.arch, binary.registers, c.shared_bytes, c.num_warps, c.tensor_columns
    )  # fmt: skip
    return Row(
        kernel=c.kernel.strip("_"),
        specialization=describe(c.constexprs),
        work=work,
        arch=c.arch,
        programs=programs,
        warps=c.num_warps,
        stages=c.num_stages,
        shared_bytes=c.shared_bytes,
        tensor_columns=c.tensor_columns,
        binary=binary,
        blocks=blocks,
    )


def describe(c: dict[str, Any]) -> str:
    """A specialisation in a few words: shapes, then tile. Names are the kernels' constexprs."""
    if "STRIDE" in c:
        taps = "nearest x2, 3x3" if c["PHASES"] == 4 else f"{c['SIZE']}x{c['SIZE']}"
        channels = f"{c['C1']}" + (f"+{c['C2']}" if c["C2"] else "")
        around = f" shortcut {c['S1']}" + (f"+{c['S2']}" if c["S2"] else "") if c["S1"] else ""
        fetch = ("box", "flat", "halves", "gather")[c["MODE"]]
        return (
            f"{taps}{' stride 2' if c['STRIDE'] == 2 else ''} {channels}>{c['K']}{around} at {c['H']}x{c['W']}, "
            f"tile {c['BN']}x{c['BM']}x{c['BC']} {fetch}"
        )
    if "HEADS" in c:
        return f"{c['HEADS']} heads of {c['D']}, {c['T']} pixels, tile {c['BM']}x{c['BN']}x{c['BD']}"
    if "CG" in c:
        channels = f"{c['C1']}" + (f"+{c['C2']}" if c["C2"] else "")
        tile = f", tile {c['BLOCK_P']}x{c['BLOCK_C'] if 'BLOCK_C' in c else c['NG'] * c['CGP']}"
        return f"{channels} in groups of {c['CG']}, {c['HW']} pixels{tile}{'' if c['SILU'] else ', no activation'}"
    if "LOW_C" in c:
        pixels = f"{c['H']}x{c['W']}" if "H" in c else f"{c['HW']} pixels"
        width = f"{c['C1']}>{c['C']}" if "C1" in c else str(c["C"])
        tile = f"{c['BN']}x{c['BM']}x{c['BC']}" if "BM" in c else f"{c['BLOCK_P']} pixels"
        variance = {0: "", 1: ", learned variance", 2: ", learned range"}[c.get("VARIANCE", 0)]
        return f"{width} and {c['LOW_C']} channels, {pixels}{variance}, tile {tile}"
    return " ".join(f"{k}={int(v)}" for k, v in c.items() if isinstance(v, (int, bool)))


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The first of each specialisation: a kernel that two batches share is listed once."""
    found: dict[tuple[Any, ...], Row] = {}
    for r in rows:
        found.setdefault((r.kernel, r.specialization, r.arch, r.warps, r.stages, str(r.binary)), r)
    return list(found.values())


COLUMNS = (
    "arch", "kernel", "specialization", "warps", "regs", "spills", "stack", "shared KB", "matrix", "bulk", "async",
    "loads", "stores", "blocks", "occupancy",
)  # fmt: skip


def cells(r: Row) -> tuple[str, ...]:
    b = r.binary
    return (
        f"sm_{r.arch}", r.kernel, r.specialization, str(r.warps), str(b.registers), str(b.spills), str(b.stack),
        f"{r.shared_bytes / 1024:.0f}", _counts(b.matrix), str(b.bulk_loads), _counts(b.async_copies),
        _counts(b.loads), _counts(b.stores), str(r.blocks), f"{100 * r.occupancy:.0f}%",
    )  # fmt: skip


def _counts(counts: dict[Any, int]) -> str:
    """{16: 4, 2: 1} -> "4x16B 1x2B"; names of instructions as they are."""
    return " ".join(f"{n}x{k}B" if isinstance(k, int) else f"{n} {k}" for k, n in counts.items()) or "-"


def markdown(rows: Sequence[Row]) -> str:
    """One line for each architecture, kernel, kind of fetch and tile, over all shapes that use it."""
    lines = [
        "| arch | kernel | binaries | registers, most | spills | shared KB, most | matrix | bulk copies | widest load "
        "| widest store | blocks, least | occupancy |",
        "|---" * 12 + "|",
    ]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        tile = r.specialization.rpartition(", tile ")[2] if ", tile " in r.specialization else ""
        groups.setdefault((r.arch, r.kernel, tile, r.warps), []).append(r)
    for (arch, kernel, tile, warps), members in sorted(groups.items()):
        binaries = [r.binary for r in members]
        matrix = sorted({k for b in binaries for k in b.matrix})
        values = (
            f"sm_{arch}",
            f"{kernel} {tile}, {warps} warps".replace(" ,", ","),
            str(len(members)),
            str(max(b.registers for b in binaries)),
            str(max(b.spills for b in binaries)),
            f"{max(r.shared_bytes for r in members) / 1024:.0f}",
            " ".join(matrix) or "-",
            "yes" if all(b.bulk_loads for b in binaries) else "some" if any(b.bulk_loads for b in binaries) else "no",
            _widest([{**b.loads, **b.async_copies} for b in binaries]),
            _widest([b.stores for b in binaries]),
            str(min(r.blocks for r in members)),
            f"{100 * min(r.occupancy for r in members):.0f}%",
        )
        lines.append("| " + " | ".join(values) + " |")
    return "\n".join(lines)


def _widest(counts: Sequence[dict[int, int]]) -> str:
    """The width that every member has at its widest, or the range over the members."""
    widest = sorted({max(c) for c in counts if c})
    return "-" if not widest else f"{widest[0]} B" if len(widest) == 1 else f"{widest[0]} to {widest[-1]} B"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--model", choices=sorted({p for p, _ in WORK}), action="append", help="default: both")
    parser.add_argument("--batch", type=int, help="instead of the large and the single one")
    parser.add_argument("--kernel", action="append", default=[], help="only kernels whose name has this in it")
    parser.add_argument("--quick", action="store_true", help="one launch of each kind and tile")
    parser.add_argument("--kinds", type=int, help="with --quick: only so many kinds of each kernel, the first launched")
    parser.add_argument("--json", action="store_true", help="all that is known of each, on stdout")
    parser.add_argument("--markdown", action="store_true", help="a grouped table, on stdout")
    args = parser.parse_args(argv)
    try:
        sass.binaries()
        work = [(p, args.batch or b) for p, b in WORK if not args.model or p in args.model]
        loud = not (args.json or args.markdown)
        rows = compile_all(
            args.arch or ARCHITECTURES, list(dict.fromkeys(work)), args.quick, args.kernel, args.kinds, _printer(loud)
        )
    except (ImportError, FileNotFoundError, RuntimeError) as e:
        print(f"compile_kernels: {e}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([asdict(r) | {"occupancy": r.occupancy} for r in rows], indent=1))
    elif args.markdown:
        print(markdown(rows))
    spilling = [r for r in rows if r.binary.spills]
    print(f"{len(rows)} kernels, {len(spilling)} with spills", file=sys.stderr)
    return 1 if spilling else 0


def _printer(loud: bool) -> Callable[[Row], None]:
    if not loud:
        return lambda row: None
    print(" | ".join(COLUMNS))
    return lambda row: print(" | ".join(cells(row)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
