"""Which tile runs each convolution of a step fastest: a tournament, on the GPU, whose result is a table to choose by.

    python -m benchmarks.tiles --batch 256 --out benchmarks/results    # on a GPU: time every tile
    python -m benchmarks.tiles --arch 90 --top 4                       # without one: what each tile compiles to

The launcher's own choice (kernels/launch_conv.py) is among the candidates. No choice may change a bit of the result:
each candidate's output and statistics are compared with the choice's, and one that differs is named and not timed.
Candidates are compiled by every core first. `gain` is what a step would save by the fastest of each shape.
"""

from __future__ import annotations

import os
import sys

if __name__ in ("__main__", "__mp_main__"):
    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported; the interpreter compiles nothing

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import aot, sass
from ddpm_fast.benchmarking.environment import environment
from ddpm_fast.benchmarking.timing import Clock, CudaClock, compare
from ddpm_fast.kernels import conv, launch_conv
from ddpm_fast.kernels.conv_plan import DTYPES as KEYS
from ddpm_fast.kernels.conv_plan import ConvShape, specialization
from ddpm_fast.kernels.launch import Launch
from ddpm_fast.kernels.reference import Shortcut
from ddpm_fast.presets import PRESETS
from ddpm_fast.sampler import DTYPES
from ddpm_fast.whole_files import whole_file

# Output channels and pixels of tiles that the launcher does not use, tried beside those that it does.
MORE = ((128, 256), (256, 128), (64, 256), (128, 64), (256, 64))
STAGES = (2, 3, 4, 5)
TORCH = {key: dtype for dtype, key in KEYS.items()}


def shapes(preset: str, dtype: torch.dtype, batch: int, arch: int) -> Counter[ConvShape]:
    """The convolutions of one step but the last, which is one with the sampler's, and how often each is launched."""
    from benchmarks.compile_kernels import step

    found: Counter[ConvShape] = Counter()

    def note(shape: ConvShape, *args: Any) -> Any:
        found[shape] += 1
        return specialization(shape, *args)

    with aot.compiling(arch, lambda kernel, constexprs: False), mock.patch.object(conv, "specialization", note):
        step(preset, batch, dtype)
    return found


def flops(shape: ConvShape) -> int:
    """Of one launch, over the channels that are there, padding included."""
    pixels = shape.images * shape.phases * shape.grid[0] * shape.grid[1]
    taps = 4 if shape.upsample else shape.size**2
    return 2 * pixels * shape.out_channels * (taps * sum(shape.channels) + sum(shape.shortcut))


def candidates(shape: ConvShape, arch: int) -> list[Launch]:
    """Launches of ``shape`` to compare: the launcher's own, then other tiles and depths that fit shared memory."""
    chosen = specialization(shape, arch).launch
    tiles = {(t.channels, t.pixels, t.warps) for t in _tiles(shape, arch)}
    if shape.dtype != torch.float32 and chosen.meta["BN"] > 16:
        tiles |= {(k, m, max(4, k // 16 if arch == 90 else 8)) for k, m in MORE}
    most = sass.LIMITS[arch].shared_bytes - sass.RESERVED_SHARED
    found = [chosen]
    for channels, pixels, warps in sorted(tiles):
        if pixels % shape.part or (channels > shape.out_channels and channels > chosen.meta["BN"]):
            continue
        run = min(shape.part, launch_conv.in_order(arch, shape.dtype, channels))
        for stages in STAGES:
            fits = stages * (channels + pixels) * shape.depth * shape.dtype.itemsize <= most
            launch = Launch(warps, stages, {"BN": channels, "BM": pixels, "RUN": run}, "a candidate")
            if fits and name(launch) not in map(name, found):
                found.append(launch)
    return found


def _tiles(shape: ConvShape, arch: int) -> Sequence[launch_conv.Tile]:
    narrow = shape.out_channels <= 16
    if shape.dtype == torch.float32:
        return launch_conv.NARROW_FULL_PRECISION_TILES if narrow else launch_conv.FULL_PRECISION_TILES
    if narrow:
        return launch_conv.NARROW_TILES
    return launch_conv.TILES if arch == 90 else launch_conv.EIGHT_WARP_TILES


def name(launch: Launch) -> str:
    """Output channels x pixels, warps, stages."""
    return f"{launch.meta['BN']}x{launch.meta['BM']} {launch.num_warps} warps {launch.num_stages} stages"


def describe(shape: ConvShape) -> str:
    taps = "nearest x2, 3x3" if shape.upsample else f"{shape.size}x{shape.size}"
    more = [f"stride {shape.stride}"] * (shape.stride > 1) + ["residual"] * shape.residual
    more += [f"shortcut {'+'.join(map(str, shape.shortcut))}"] * bool(shape.shortcut)
    return ", ".join(
        [f"{taps} {'+'.join(map(str, shape.channels))}>{shape.out_channels} at {shape.height}x{shape.width}", *more]
    )


def operands(shape: ConvShape, device: torch.device | str) -> Callable[[Launch], tuple[Tensor, ...]]:
    """Random operands of ``shape``, and the call that runs it on them under a launch: output, statistics."""
    g = None if str(device) == "meta" else torch.Generator(device).manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = shape.dtype, std: float = 1.0) -> Tensor:
        x = torch.randn(size, generator=g, device=device).mul_(std).to(dtype)
        return x.contiguous(memory_format=torch.channels_last) if len(size) == 4 else x

    def given(key: str, *size: int) -> Tensor | None:
        return draw(*size, dtype=TORCH[key]) if key else None

    def maps(channels: Sequence[int], height: int, width: int) -> list[Tensor]:
        return [draw(shape.images, c, height, width) for c in channels]

    n, k, side = shape.images, shape.out_channels, 3 if shape.upsample else shape.size
    x, *skip = maps(shape.channels, shape.height, shape.width)
    fan = sum(shape.channels) * side**2
    weight = draw(k, sum(shape.channels), side, side, std=fan**-0.5)
    rows = {"one": 1, "row": 5, "image": n}.get(shape.time_rows, 0)
    kwargs: dict[str, Any] = {
        "bias": given(shape.bias, k),
        "time": given(shape.time, rows, k) if rows else None,
        "residual": draw(n, k, *shape.output) if shape.residual else None,
        "scale": 0.7 if shape.scaled else 1.0,
        "with_stats": shape.with_stats,
    }
    if shape.time_rows == "row":
        kwargs["row"] = torch.ones(1, dtype=torch.int64 if shape.row == "i64" else torch.int32, device=device)
    if shape.shortcut:
        sx, *more = maps(shape.shortcut, *shape.output)
        short: Any = draw(k, sum(shape.shortcut), 1, 1, std=sum(shape.shortcut) ** -0.5)
        short = conv.pack_conv(short, dtype=shape.dtype, channels=shape.shortcut)
        kwargs["shortcut"] = Shortcut(sx, more[0] if more else None, short, given(shape.shortcut_bias, k))
    if shape.upsample:
        packed, run = conv.pack_upsample_conv(weight, dtype=shape.dtype), conv.upsample_conv
    else:
        packed, run = conv.pack_conv(weight, dtype=shape.dtype, channels=shape.channels), conv.conv
        kwargs |= {"skip": skip[0] if skip else None, "stride": shape.stride, "padding": shape.padding}
    kwargs["out"] = conv.empty_map((n, k, *shape.output), shape.dtype, x.device)
    if shape.with_stats:
        kwargs["stats_out"] = torch.empty((n, shape.parts, 3, k), device=device)

    def call(launch: Launch) -> tuple[Tensor, ...]:
        result = run(x, packed, **kwargs, launch=launch)
        return result if isinstance(result, tuple) else (result,)

    return call


def compile_share(arch: int, work: Sequence[tuple[ConvShape, Launch]], jobs: int, rank: int) -> list[dict[str, Any]]:
    """Compile every ``jobs``-th of ``work`` into Triton's cache, from number ``rank`` on, and read the binaries."""
    torch.set_num_threads(1)
    rows = []
    for shape, launch in work[rank::jobs]:
        row: dict[str, Any] = {"shape": describe(shape), "tile": name(launch)}
        try:
            with aot.compiling(arch) as found:
                operands(shape, "meta")(launch)
            c = found[0]
            b = sass.read(c.binary.asm["cubin"], c.binary.asm["ptx"], arch)
            blocks = sass.blocks_per_multiprocessor(arch, b.registers, c.shared_bytes, c.num_warps, c.tensor_columns)
            row |= {"registers": b.registers, "spills": b.spills, "shared_bytes": c.shared_bytes, "blocks": blocks}
        except Exception as error:  # whatever a compiler says of a tile that nobody has used
            row["failed"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        rows.append(row)
    return rows


def compiled(arch: int, work: Sequence[tuple[ConvShape, Launch]], jobs: int) -> list[dict[str, Any]]:
    """A row for each of ``work``, in its order."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        shares = pool.map(partial(compile_share, arch, work, jobs), range(jobs), chunksize=1)
    return [shares[i % jobs][i // jobs] for i in range(len(work))]


def tournament(
    shape: ConvShape,
    launches: Sequence[Launch],  # the first is what others are compared with
    device: torch.device,
    clock: Clock,
    rounds: tuple[int, int] = (7, 30),
) -> dict[str, Any]:
    """Each tile's microseconds, JSON-ready; those that fail or whose bits differ have none."""
    call = operands(shape, device)
    truth = [t.clone() for t in call(launches[0])]
    runs, wrong = {}, {}
    for launch in launches:
        try:
            equal = all(torch.equal(a, b) for a, b in zip(truth, call(launch)))
        except Exception as error:  # too much shared memory or too many registers: this tile is out
            wrong[name(launch)] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            continue
        if equal:
            runs[name(launch)] = partial(call, launch)
        else:
            wrong[name(launch)] = "other bits than the launcher's choice"
    timed = compare(runs, clock=clock, rounds=rounds, budget_s=2.0)
    us = {n: 1e3 * timed[n].median_ms for n in runs}
    best = min(us, key=lambda n: us[n])
    return {
        "shape": describe(shape),
        "chosen": name(launches[0]),
        "best": best,
        "us": dict(sorted(us.items(), key=lambda item: item[1])),
        "ratio": timed.ratio(best).value,
        "chosen_tflop_per_s": flops(shape) / us[name(launches[0])] / 1e6,
        "best_tflop_per_s": flops(shape) / us[best] / 1e6,
        "without": wrong,
    }


def summary(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        chosen, best = r["us"][r["chosen"]], r["us"][r["best"]]
        lines.append(
            f"{r['count']} x {r['shape']}: {chosen:.1f} us at {r['chosen_tflop_per_s']:.0f} TFLOP/s by {r['chosen']}; "
            f"best {best:.1f} us by {r['best']}" + "".join(f"; {n}: {why}" for n, why in r["without"].items())
        )
    now, then = (sum(r["count"] * r["us"][r[which]] for r in rows) for which in ("chosen", "best"))
    return "\n".join([*lines, f"these convolutions take {now:.0f} us of a step, {then:.0f} by the best tiles"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset-model", choices=tuple(PRESETS), default="cifar10")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--top", type=int, default=16, help="shapes, those with most FLOPs in a step first")
    parser.add_argument("--arch", type=int, choices=tuple(sass.LIMITS), help="only compile, for a GPU that is not here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="a folder for the JSON")
    args = parser.parse_args(argv)
    if min(args.batch, args.top, args.jobs) < 1:
        parser.error("--batch, --top and --jobs must be at least 1")
    if args.arch is None and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here: name an architecture to compile for, as in --arch 90")
    arch = args.arch or conv.architecture(torch.empty(0, device="cuda"))
    found = shapes(args.preset_model, DTYPES[args.dtype], args.batch, arch)
    heaviest = sorted(found, key=lambda s: -flops(s) * found[s])[: args.top]
    work = [(shape, launch) for shape in heaviest for launch in candidates(shape, arch)]
    rows = compiled(arch, work, min(args.jobs, len(work)))
    if args.arch is not None:
        for row in rows:
            print(json.dumps(row))
        return 0
    usable = [w for w, row in zip(work, rows) if not row.get("failed") and not row["spills"]]
    device, results = torch.device("cuda"), []
    for shape in heaviest:
        launches = [launch for s, launch in usable if s == shape]
        row = tournament(shape, launches, device, CudaClock(ahead=True)) | {"count": found[shape]}
        results.append(row)
        if args.out is not None:
            _write(args, device, results)
    print(summary(results))
    return 0


def _write(args: argparse.Namespace, device: torch.device, rows: Sequence[dict[str, Any]]) -> None:
    facts = {"environment": environment(device), "model": args.preset_model, "dtype": args.dtype, "batch": args.batch}
    card = facts["environment"]["device"].replace(" ", "-").replace("/", "-").lower()
    with whole_file(args.out / f"tiles-{card}-{args.batch}.json") as file:
        file.write((json.dumps(facts | {"convolutions": list(rows)}, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
