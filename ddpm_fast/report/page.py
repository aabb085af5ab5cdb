"""A profile as one HTML page: no network, no library, light and dark, from a phone's width up."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from ..profiling import Profile, Row, limits
from ..profiling.nvml import Series
from ..profiling.text import cells, gpu_note, short
from .charts import kind_bars, kind_class, quantity, roofline, series_chart, step_strip
from .files import facts

# The table's columns: heading, the fact that its cells show and sort by, and whether that is a number. The one that it
# is sorted by at first stands beside the names, where a phone shows it.
COLUMNS: tuple[tuple[str, str, bool], ...] = (
    ("Operation", "operation", False),
    ("Gap, ms", "gap_s", True),
    ("ms", "seconds", True),
    ("Share", "share", True),
    ("Of roof", "roof_share", True),
    ("Bound", "bound", False),
    ("Calls", "calls", True),
    ("GFLOP", "flops", True),
    ("MB", "bytes", True),
    ("TFLOP/s", "flops_per_s", True),
    ("GB/s", "bytes_per_s", True),
)
NOTICEABLE = 1.2  # a step that takes longer than this, times its ordinary time, is slowed by being timed


def page(p: Profile) -> str:
    """The whole page as text."""
    assets = files("ddpm_fast") / "assets" / "report"
    css, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    sections = [
        _section("What limits", _limits(p)),
        _section("One step, in order", _strip(p)),
        _section("Under the roofs", _roofs(p)),
        _section("The GPU over time", _gpus(p)),
        _section("Every operation", _table(p)),
        _section("How this was measured", _colophon(p)),
    ]
    data = json.dumps(facts(p)).replace("<", "\\u003c")
    title = escape(p.title or "a model")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}: where a step's time goes</title>
<style>
{css}</style>
</head>
<body>
<header>
<p class="over">ddpm-fast profile</p>
<h1>{title}</h1>
<p class="lead">{escape(_lead(p))}</p>
{_figures(p)}
</header>
<main>
{"".join(sections)}</main>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="profile">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def _section(title: str, body: str) -> str:
    name = title.lower().replace(" ", "-").replace(",", "")
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>\n{body}\n</section>\n'


def _lead(p: Profile) -> str:
    dtype, images = str(p.dtype).removeprefix("torch."), "One image" if p.batch == 1 else f"{p.batch} images together"
    return (
        f"{images} in {dtype}, by the {p.ops} operations, on {p.environment.get('device', 'an unknown device')}. "
        f"{len(p.steps)} of the chain's {p.chain:,} steps were timed."
    )


def _figures(p: Profile) -> str:
    shown = [
        (short(p.images_per_s), f"images a second over {p.chain:,} steps, extrapolated"),
        (f"{p.work_s * 1e3:.2f}", "ms a step"),
        (f"{p.roof_s / p.work_s:.0%}", "of what the roofs allow"),
    ]
    if p.instrumented_ratio > NOTICEABLE:
        shown.append((f"{p.instrumented_ratio:.2f}\u00d7", "as long a step while it was timed call by call"))
    for gpu in p.gpus:
        joules = p.joules_per_image(gpu)
        if joules is not None:
            shown.append((short(joules), f"joules an image on {gpu.device}, extrapolated"))
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for value, name in shown)
    beside = "" if p.busy is None else f'\n<p class="note">Of these times: {escape(p.busy)}.</p>'
    return f'<dl class="figures">{items}</dl>{beside}'


def _limits(p: Profile) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in limits(p))
    return f'<ol class="limits">{items}</ol>'


def _strip(p: Profile) -> str:
    return f"""{step_strip(p)}
{kind_bars(p)}
<p class="note">Solid: the least time at the roofs. Pale: what is above it.</p>"""


def _roofs(p: Profile) -> str:
    return f"""<p>Each circle is one operation and shape, its area the time it takes of a step. The lines are what this
device reached when it did nothing else; an operation that touches its line is done as well as it can be.</p>
{roofline(p)}
<p class="legend" aria-hidden="true">{_legend(p)}</p>"""


def _legend(p: Profile) -> str:
    return " ".join(
        f'<span class="{kind_class(kind.operation)}"><i></i>{escape(kind.operation)}</span>' for kind in p.kinds()
    )


def _gpus(p: Profile) -> str:
    if not p.gpus:
        return f'<p class="none">No GPU: {escape(gpu_note(p))}.</p>'
    return "".join(_gpu(p, gpu) for gpu in p.gpus)


def _gpu(p: Profile, gpu: Series) -> str:
    power, clock = gpu.maximum("power_w") or 1.0, gpu.maximum("sm_mhz") or 1.0
    heat, used = gpu.maximum("temperature_c") or 1.0, gpu.maximum("memory_bytes") or 1.0
    charts = [
        _chart(gpu, "Utilisation", [("sm_percent", "a", "SM"), ("memory_percent", "b", "memory")], 100.0, " %", True),
        _chart(gpu, "Power", [("power_w", "a", "")], 1.1 * power, " W"),
        _chart(gpu, "Clocks", [("sm_mhz", "a", "SM"), ("memory_mhz", "b", "memory")], 1.1 * clock, " MHz"),
        _chart(gpu, "Temperature", [("temperature_c", "a", "")], 1.1 * heat, " \u00b0C"),
        _chart(gpu, "Memory in use", [("memory_bytes", "a", "")], 1.1 * used, " GB", scale=1e-9),
    ]
    gaps, throttled = gpu.idle_gaps(), {n: s for n, s in gpu.throttled().items() if n != "idle"}
    said = [f"{gpu.seconds:.2f} s watched, {len(gpu.samples)} samples"]
    idle = sum(b - a for a, b in gaps)
    if gpu.values("sm_percent"):
        said.append(
            f"idle {idle:.2f} s in {len(gaps)} gap{'s' * (len(gaps) != 1)} (shaded)" if gaps else "never seen idle"
        )
    if throttled:
        said.append("held back by " + ", ".join(f"{name} ({share:.0%})" for name, share in throttled.items()))
    if gpu.energy_j is not None:
        said.append(f"{short(gpu.energy_j)} J by the {gpu.energy_source}")
    said += [*gpu.notes, *([gpu.lost] if gpu.lost else [])]
    return (
        f"<h3>{escape(gpu.device)}: {escape(gpu.name)}</h3>"
        f'<p class="note">{escape("; ".join(said))}. Each drawing begins at zero.</p>'
        f'<div class="charts">{"".join(charts)}</div>'
    )


def _chart(
    gpu: Series,
    title: str,
    curves: Sequence[tuple[str, str, str]],  # field, class of the line, name beside the number
    top: float,
    unit: str,
    gaps: bool = False,
    scale: float = 1.0,
) -> str:
    given = [c for c in curves if gpu.values(c[0])]
    if not given:
        why = gpu.missing.get(curves[0][0], "no sample gave it")
        return f'<figure class="chart"><figcaption>{title}</figcaption><p class="none">{escape(why)}</p></figure>'
    top = max([top, *(gpu.maximum(field) or 0.0 for field, _, _ in given)])
    words = []
    for field, css, name in given:
        mean, most = gpu.mean(field), gpu.maximum(field)
        assert mean is not None and most is not None
        number = f"{short(mean * scale)}{unit} mean, {short(most * scale)} at most"
        words.append(f'<span class="{css}">{escape(f"{name} {number}".strip())}</span>')
    drawn = series_chart(gpu, [(field, css) for field, css, _ in given], top, gaps)
    ends = f'<div class="ends" aria-hidden="true"><span>0</span><span>{gpu.seconds:.2f} s</span></div>'
    return f'<figure class="chart"><figcaption>{title} {" ".join(words)}</figcaption>{drawn}{ends}</figure>'


def _table(p: Profile) -> str:
    heads: list[str] = []
    for title, key, number in COLUMNS:
        sort = ' aria-sort="descending"' if key == "gap_s" else ""
        css = ' class="num"' if number else ' class="word"' if heads else ""
        heads.append(f'<th scope="col"{css}{sort}><button type="button" data-key="{key}">{title}</button></th>')
    body = "".join(_row(row) for row in p.rows)
    other = f"{p.other_s * 1e3:.3f}"
    return f"""<p class="note">Sums of one step. The gap is the time above the roof; the largest comes first. A heading
sorts by its column, and an operation opens into its layers.</p>
<div class="scroll" role="region" aria-labelledby="every-operation" tabindex="0">
<table id="operations" aria-labelledby="every-operation">
<thead><tr>{"".join(heads)}</tr></thead>
<tbody>{body}</tbody>
<tfoot><tr><th scope="row">in no operation</th><td class="num">{other}</td><td class="num">{other}</td>
<td class="num">{p.other_s / p.step_s:.1%}</td><td colspan="7"></td></tr>
<tr><th scope="row">sum of a step</th><td class="num">{(p.step_s - p.roof_s) * 1e3:.3f}</td>
<td class="num">{p.step_s * 1e3:.3f}</td><td class="num">100.0%</td><td class="num">{p.roof_s / p.step_s:.0%}</td>
<td></td><td class="num">{len(p.calls)}</td><td colspan="4"></td></tr></tfoot>
</table></div>"""


def _row(row: Row) -> str:
    line, text = row.line, cells(row)
    name = f'<span class="op {kind_class(line.operation)}"><i></i>{escape(line.operation)}</span>'
    if len(row.layers) == 1:
        name += f' <span class="layer">{_breakable(row.layers[0])}</span>'
    elif row.layers:
        layers = "<br>".join(_breakable(layer) for layer in row.layers)
        name = f"<details><summary>{name} <span>{len(row.layers)} layers</span></summary><div>{layers}</div></details>"
    what = _times(f"{escape(line.input)} \u2192 {escape(line.output)}")
    detail = _times(escape(line.detail))
    numbers: list[tuple[Any, str, bool]] = [
        (row.gap_s, text[11], True),
        (row.seconds, text[5], True),
        (row.share, text[6], True),
        (row.roof_share, text[10], True),
        (row.bound, text[9], False),
        (row.calls, text[0], True),
        (row.flops, f"{row.flops / 1e9:.3f}" if row.flops else "-", True),
        (row.bytes, f"{row.bytes / 1e6:.2f}", True),
        (row.flops_per_s, text[7], True),
        (row.bytes_per_s, text[8], True),
    ]
    drawn = "".join(
        f'<td class="{"num" if number else "word"}" data-value="{escape(str(value))}">{escape(shown)}</td>'
        for value, shown, number in numbers
    )
    key = escape(f"{line.operation} {line.input} {line.output} {line.detail}")
    return (
        f'<tr><th scope="row" data-value="{key}">{name}<small>{what}</small>'
        f"{f'<small>{detail}</small>' if detail else ''}</th>{drawn}</tr>"
    )


def _breakable(layer: str) -> str:
    """A layer's dotted name, which may go on in the next line after each part."""
    return escape(layer).replace(".", ".<wbr>")


def _times(text: str) -> str:
    return re.sub(r"(?<=\d)x(?=\d)", "\u00d7", text)


def _colophon(p: Profile) -> str:
    env = p.environment
    versions = ", ".join(f"{name} {v}" for name, v in (env.get("versions") or {}).items() if v)
    roofs = "; ".join(
        f"{dtype}: convolution {quantity(r.conv_flops_per_s, 'FLOP/s')}, product "
        f"{quantity(r.gemm_flops_per_s, 'FLOP/s')}, copy {quantity(r.copy_bytes_per_s, 'B/s')}"
        for dtype, r in p.roofs.items()
    )
    work = "" if p.run is None else f", {p.work_s * 1e3:.3f} ms at work with graph={p.run.graph}"
    listed = [
        ("Command", f"<code>{escape(str(env.get('command', '')))}</code>"),
        (
            "Machine",
            escape(f"{env.get('device')}, torch on {env.get('threads')} of its threads, {env.get('platform')}"),
        ),
        ("Versions", escape(f"{versions}, Python {env.get('python')}, commit {env.get('commit') or 'unknown'}")),
        ("Time", escape(str(env.get("time", "")))),
        ("Roofs", escape(f"measured on this device; {roofs}")),
        (
            "Step",
            f"{p.plain_s * 1e3:.3f} ms without instruments, {p.timed_s * 1e3:.3f} ms with them{escape(work)}. An "
            "operation's time is its median over the timed steps.",
        ),
        (
            "Counting",
            "FLOPs are matrix products, two a multiply-add; bytes are inputs, weights and outputs once: what no "
            "implementation can avoid. The roof of an operation is the larger of both times.",
        ),
        *(("Note", escape(note)) for note in p.notes),
    ]
    return f'<dl class="colophon">{"".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in listed)}</dl>'
