"""The page's drawings: HTML for what is text or can be pointed at, SVG stretched behind it for the lines.

So that a drawing is as wide as the screen and its words stay as large as the others. Positions are percent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..profiling import Profile, Row
from ..profiling.nvml import Series
from ..profiling.text import short

KINDS = {  # operation -> the CSS class of its colour
    "conv": "conv",
    "upsample_conv": "up",
    "norm_act": "norm",
    "attention": "attention",
    "sampler_step": "step",
    "conv_step": "step",
}
LEAST_DOT, MOST_DOT = 9.0, 34.0  # pixels across; the area is the share of the step


def kind_class(operation: str) -> str:
    return "k-" + KINDS.get(operation, "rest")


@dataclass(frozen=True)
class LogAxis:
    """Logarithms from ``low`` to ``high`` as percent of a length."""

    low: float
    high: float

    @staticmethod
    def around(values: Sequence[float], margin: float = 0.15) -> LogAxis:
        """All values, with a margin (of a decade) on both sides."""
        exponents = [math.log10(v) for v in values if v > 0]
        return LogAxis(min(exponents) - margin, max(exponents) + margin)

    def __call__(self, value: float) -> float:
        return 100 * (math.log10(value) - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Decades, and their 2 and 5 where the axis is short."""
        steps = (1, 2, 5) if self.high - self.low < 1.7 else (1,)
        exponents = range(math.floor(self.low), math.ceil(self.high) + 1)
        values = [step * 10.0**e for e in exponents for step in steps]
        return [v for v in values if 0 <= self(v) <= 100]


def quantity(value: float, unit: str) -> str:
    """1.29e11, "FLOP/s" -> "129 GFLOP/s"."""
    prefixes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")]
    for size, prefix in prefixes:
        if value >= size:
            return f"{short(value / size)} {prefix}{unit}"
    return f"{short(value)} {unit}"


def decade(value: float, unit: str) -> str:
    return quantity(value, unit).replace(".00", "").replace(".0", "")


def step_strip(p: Profile) -> str:
    """One step from left to right: each call as wide as it takes, what lies between them at the end."""
    parts, x = [], 0.0
    for call in p.calls:
        width = 100 * call.seconds / p.step_s
        name = escape(f"{call.record.operation} {call.layer}".strip())
        parts.append(
            f'<rect class="{kind_class(call.record.operation)}" x="{x:.4f}" width="{width:.4f}" y="0" height="100">'
            f"<title>{name}: {call.seconds * 1e3:.3f} ms</title></rect>"
        )
        x += width
    return (
        '<svg class="strip" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="The {len(p.calls)} calls of one step in their order, each as wide as its time">'
        f"{''.join(parts)}</svg>"
    )


def kind_bars(p: Profile) -> str:
    """A bar an operation: solid to its roof, pale above it."""
    entries = [(k.operation, kind_class(k.operation), k.calls, k.seconds, k.roof_s, k.share) for k in p.kinds()]
    entries.append(("in no operation", "k-other", 0, p.other_s, 0.0, p.other_s / p.step_s))
    longest = max(e[3] for e in entries) or 1.0
    items = []
    for name, css, calls, seconds, roof_s, share in sorted(entries, key=lambda e: -e[3]):
        at_roof = 100 * min(roof_s, seconds) / longest
        above = 100 * max(0.0, seconds - roof_s) / longest
        count = f"{calls} call{'s' * (calls != 1)}" if calls else "Python, noise, waiting"
        roof = f"{roof_s / seconds:.0%} of its roof" if calls and seconds else ""
        items.append(
            f'<li class="{css}"><span class="what">{escape(name)}</span><span class="n">{count}</span>'
            f'<span class="bar" aria-hidden="true"><i class="solid" style="width:{at_roof:.2f}%"></i>'
            f'<i class="pale" style="width:{above:.2f}%"></i></span>'
            f'<span class="ms">{seconds * 1e3:.2f} ms</span><span class="pc">{share:.1%}</span>'
            f'<span class="of">{roof}</span></li>'
        )
    return f'<ul class="bars">{"".join(items)}</ul>'


def roofline(p: Profile) -> str:
    """FLOP/s over FLOP/byte under both roofs, and beside it the operations without products, by bytes alone."""
    with_products = [r for r in p.rows if r.flops and r.seconds]
    without = [r for r in p.rows if not r.flops and r.seconds]
    return f'<div class="roofline">{_bandwidth(p, without)}{_products(p, with_products)}</div>'


def _products(p: Profile, rows: Sequence[Row]) -> str:
    r = p.roofs[str(p.dtype).removeprefix("torch.")]
    bandwidth, conv, gemm = r.copy_bytes_per_s, r.conv_flops_per_s, r.gemm_flops_per_s
    ridge = conv / bandwidth
    x = LogAxis.around([row.flops / row.bytes for row in rows] + [ridge / 3, ridge * 4])
    y = LogAxis.around([row.flops_per_s for row in rows] + [gemm / 4, conv])
    left, right = 10.0**x.low, 10.0**x.high
    lines = [
        _line(x, y, "roof product", (gemm / bandwidth, gemm), (right, gemm)),
        _line(x, y, "roof", (left, left * bandwidth), (ridge, conv), (right, conv)),
    ]
    dots = [
        _dot(row, x(row.flops / row.bytes), y(row.flops_per_s), f"{short(row.flops / row.bytes)} FLOP/byte")
        for row in sorted(rows, key=lambda row: -row.seconds)
    ]
    names = [
        ("convolution", f"convolution {quantity(conv, 'FLOP/s')}"),
        ("product", f"product {quantity(gemm, 'FLOP/s')}"),
        ("copy", f"copy {quantity(bandwidth, 'B/s')}"),
    ]
    return _plot("flops", "FLOP/s", x, y, lines, dots, names, "FLOP a byte moved")


def _line(x: LogAxis, y: LogAxis, css: str, *points: tuple[float, float]) -> str:
    drawn = " ".join(f"{x(a):.3f},{100 - y(b):.3f}" for a, b in points)
    return f'<polyline class="{css}" points="{drawn}" vector-effect="non-scaling-stroke"/>'


def _bandwidth(p: Profile, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    bandwidth = p.roofs[str(p.dtype).removeprefix("torch.")].copy_bytes_per_s
    y = LogAxis.around([row.bytes_per_s for row in rows] + [bandwidth / 4, bandwidth])
    at = 100 - y(bandwidth)
    lines = [f'<polyline class="roof" points="0,{at:.3f} 100,{at:.3f}" vector-effect="non-scaling-stroke"/>']
    dots = []
    for i, row in enumerate(sorted(rows, key=lambda row: -row.seconds)):
        dots.append(_dot(row, 20 + 60 * (i * 0.618 % 1), y(row.bytes_per_s), "no matrix product"))
    return _plot("bytes", "B/s", None, y, lines, dots, [("flat", f"copy {quantity(bandwidth, 'B/s')}")], "no products")


def _plot(
    css: str,
    unit: str,
    x: LogAxis | None,
    y: LogAxis,
    lines: Sequence[str],
    dots: Sequence[str],
    roofs: Sequence[tuple[str, str]],  # the lines' CSS class and name, said above the drawing, where no dot is
    below: str,
) -> str:
    grid = [f'<line x1="0" x2="100" y1="{100 - y(v):.3f}" y2="{100 - y(v):.3f}"/>' for v in y.ticks]
    ticks = [f'<span class="ytick" style="bottom:{y(v):.2f}%">{decade(v, unit)}</span>' for v in y.ticks]
    if x is not None:
        grid += [f'<line y1="0" y2="100" x1="{x(v):.3f}" x2="{x(v):.3f}"/>' for v in x.ticks]
        ticks += [f'<span class="xtick" style="left:{x(v):.2f}%">{_plain(v)}</span>' for v in x.ticks]
    grid = [g.replace("/>", ' vector-effect="non-scaling-stroke"/>') for g in grid]
    label = f"{len(dots)} operations by {unit}, {below}; arrow keys go from one to the next"
    names = "".join(f'<span class="line {kind}"><i aria-hidden="true"></i>{name}</span>' for kind, name in roofs)
    return (
        f'<figure class="plot {css}"><p class="lines">{names}</p><div class="area" role="group" aria-label="{label}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true"><g class="grid">{"".join(grid)}</g>'
        f"{''.join(lines)}</svg>{''.join(ticks)}{''.join(dots)}</div>"
        f"<figcaption>{below}</figcaption></figure>"
    )


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _dot(row: Row, x: float, y: float, where: str) -> str:
    line = row.line
    size = LEAST_DOT + (MOST_DOT - LEAST_DOT) * min(1.0, math.sqrt(max(row.share, 0.0) / 0.2))
    rate = f"{quantity(row.flops_per_s, 'FLOP/s')}, " if row.flops else ""
    text = "\n".join(
        (
            f"{line.operation} {line.input} to {line.output}",
            line.detail,
            f"{row.seconds * 1e3:.3f} ms a step in {row.calls} call{'s' * (row.calls != 1)}, {row.share:.1%}",
            f"{rate}{quantity(row.bytes_per_s, 'B/s')}, {where}",
            f"{row.roof_share:.0%} of its {row.bound} roof",
        )
    )
    return (
        f'<button type="button" class="dot {kind_class(line.operation)}" tabindex="-1" '
        f'style="left:{x:.2f}%;bottom:{y:.2f}%;--size:{size:.1f}px" data-tip="{escape(text)}" '
        f'aria-label="{escape(text.replace(chr(10), ", "))}"></button>'
    )


def series_chart(gpu: Series, curves: Sequence[tuple[str, str]], top: float, gaps: bool = False) -> str:
    """(field, CSS class) over time as lines, from 0 to ``top``; gaps: idle stretches shaded."""
    end = gpu.seconds or 1.0
    parts = []
    if gaps:
        parts += [
            f'<rect class="idle" x="{100 * a / end:.3f}" width="{100 * (b - a) / end:.3f}" y="0" height="100"/>'
            for a, b in gpu.idle_gaps()
        ]
    for field, css in curves:
        points = " ".join(f"{100 * t / end:.3f},{100 - 100 * v / top:.3f}" for t, v in gpu.values(field))
        parts.append(f'<polyline class="curve {css}" points="{points}" vector-effect="non-scaling-stroke"/>')
    return f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'
