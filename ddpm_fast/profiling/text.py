"""A profile for a terminal."""

from __future__ import annotations

from ..planning import aligned
from .nvml import Series
from .profiles import Profile, Row, limits, step_cost

HEADER = (
    "n",
    "operation",
    "in (C x H x W)",
    "out",
    "with",
    "ms",
    "share",
    "TFLOP/s",
    "GB/s",
    "roof",
    "of it",
    "gap ms",
)


def cells(row: Row) -> tuple[str, ...]:
    """Of a row, under HEADER: times are of all its calls in a step."""
    line = row.line
    return (
        str(row.calls),
        line.operation,
        line.input,
        line.output,
        line.detail,
        f"{row.seconds * 1e3:.3f}",
        f"{row.share:.1%}",
        short(row.flops_per_s / 1e12) if row.flops else "-",
        short(row.bytes_per_s / 1e9),
        row.bound,
        f"{row.roof_share:.0%}",
        f"{row.gap_s * 1e3:.3f}",
    )


def short(x: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def profile_text(p: Profile) -> str:
    """The whole profile; the largest gap comes first."""
    flops, moved = step_cost(p)
    dtype = str(p.dtype).removeprefix("torch.")
    env = p.environment
    other = (
        "",
        "in no operation",
        "",
        "",
        "",
        f"{p.other_s * 1e3:.3f}",
        f"{p.other_s / p.step_s:.1%}",
        "",
        "",
        "",
        "",
        f"{p.other_s * 1e3:.3f}",
    )
    text = [
        f"{p.title}, batch {p.batch}, {dtype}, {p.ops} operations, {len(p.steps)} of {p.chain} steps timed",
        f"on {env.get('device')}, torch {env.get('versions', {}).get('torch')}, "
        f"commit {(env.get('commit') or 'unknown')[:12]}",
        "",
        f"step          {p.plain_s * 1e3:.3f} ms plain, {p.timed_s * 1e3:.3f} ms with instruments "
        f"({p.instrumented_ratio:.3f} times), {p.roof_s * 1e3:.3f} ms at the roofs ({p.roof_s / p.work_s:.0%})",
        *([] if p.busy is None else [f"              {p.busy}"]),
        f"work          {flops / 1e9:.2f} GFLOP and {moved / 1e9:.3f} GB a step, at least",
        f"images/s      {p.images_per_s:.4g}, extrapolated to {p.chain} steps"
        + ("" if p.run is None else f"; {p.work_s * 1e3:.3f} ms a step with graph={p.run.graph}"),
    ]
    for name, r in p.roofs.items():
        text.append(
            f"roofs         {name}: {r.conv_flops_per_s / 1e12:.3f} TFLOP/s convolution, "
            f"{r.gemm_flops_per_s / 1e12:.3f} product, {r.copy_bytes_per_s / 1e9:.1f} GB/s copy, all measured here"
        )
    text += [line for gpu in p.gpus for line in gpu_lines(p, gpu)]
    text += [f"gpu           {gpu_note(p)}"] if not p.gpus else []
    text += [f"limits        {sentence}" for sentence in limits(p)[:3]]
    text += [f"note          {note}" for note in p.notes]
    return "\n".join([*text, "", aligned([HEADER, *(cells(row) for row in p.rows), other])])


def gpu_note(p: Profile) -> str:
    """Why there are no series of a GPU."""
    if p.run is None:
        return "none took part, so there is no utilisation and no power to show"
    return p.run.note or "NVML gave nothing"


def gpu_lines(p: Profile, gpu: Series) -> list[str]:
    """What NVML said of one GPU."""

    def mean(name: str, unit: str) -> str:
        value = gpu.mean(name)
        return "unknown" if value is None else f"{value:.0f}{unit}"

    joules = p.joules_per_image(gpu)
    energy = "unknown" if joules is None else f"{joules:.4g} J an image (extrapolated; {gpu.energy_source})"
    gaps = gpu.idle_gaps()
    text = [
        f"gpu           {gpu.device} {gpu.name}: SM {mean('sm_percent', '%')}, memory {mean('memory_percent', '%')}, "
        f"{mean('sm_mhz', ' MHz')}, {mean('power_w', ' W')}, {mean('temperature_c', ' C')}; energy {energy}; "
        f"idle {sum(b - a for a, b in gaps):.2f} s of {gpu.seconds:.2f} in {len(gaps)} gap{'s' * (len(gaps) != 1)}"
    ]
    throttled = {name: share for name, share in gpu.throttled().items() if name != "idle"}
    if throttled:
        text.append(
            "              held back by " + ", ".join(f"{n} ({s:.0%} of samples)" for n, s in throttled.items())
        )
    text += [f"              no {field}: {why}" for field, why in gpu.missing.items()]
    text += [f"              {note}" for note in (*gpu.notes, *([gpu.lost] if gpu.lost else []))]
    return text
