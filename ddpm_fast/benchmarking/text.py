"""What `run` found, for a person: one table a batch size, as plain columns or Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

BUSY = 1.0  # processes that wanted a core before we did
SPEED = ("provider", "dtype", "ms a step", "images/s", "times as fast", "share of roof")
FULL = (*SPEED, "error (allowed)", "trajectory error", "first step s", "first image s", "peak MiB")


def report_text(found: dict[str, Any]) -> str:
    """All of it: the machine, the tables, what is not right or not there."""
    return "\n\n".join([heading(found), *(batch_text(found, batch) for batch in batches(found)), *notes(found)])


def batch_text(found: dict[str, Any], batch: int) -> str:
    """The table of one batch size, and why rows are missing from it."""
    rows = [r for r in found["rows"] if r["batch"] == batch]
    timed = [r for r in rows if "ms_a_step" in r]
    parts = [f"batch {batch}"]
    if timed:
        parts[0] += "\n" + columns(FULL, [cells(found, r, FULL) for r in timed])
    remarks = [remark(r) for r in rows if "ms_a_step" not in r]
    remarks += [f"{r['provider']} {r['dtype']}: no first step: {r['startup']['failed']}" for r in timed if _failed(r)]
    return "\n\n".join([*parts, *(["\n".join(remarks)] if remarks else [])])


def _failed(row: Row) -> bool:
    return "failed" in (row.get("startup") or {})


def heading(found: dict[str, Any]) -> str:
    env = found["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items() if v is not None)
    threads = "" if "capability" in env else f", {env['threads']} thread{'s' * (env['threads'] != 1)}"
    return (
        f"{found['source']}: {found['parameters'] / 1e6:.1f} M parameters, "
        f"{found['gflop_per_image_and_step']:.3f} GFLOP an image and step\n"
        f"{env['device']}{threads}; {versions}; commit {(env['commit'] or 'unknown')[:12]}; {env['time']}"
    )


def markdown(found: dict[str, Any], names: Sequence[str] = SPEED) -> str:
    """One table of all batch sizes, and where its numbers are from."""
    head = ("batch", *names)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in found["rows"]:
        if "ms_a_step" in row:
            lines.append("| " + " | ".join([str(row["batch"]), *cells(found, row, names)]) + " |")
    missing = list(dict.fromkeys(remark(r) for r in found["rows"] if "ms_a_step" not in r))
    parts = ["\n".join(lines), *(["Without a speed: " + "; ".join(missing) + "."] if missing else [])]
    command = found["environment"]["command"]
    return "\n\n".join([*parts, *notes(found), heading(found).replace("\n", ". ") + f". Command: `{command}`."])


def by_batch(found: dict[str, Any]) -> str:
    """Markdown for a front page: how many times as fast, a row for each provider and a column for each batch size."""
    sizes = batches(found)
    rows: dict[tuple[str, str], dict[int, str]] = {}
    baseline = ""
    for row in found["rows"]:
        cell = "-"
        if "ms_a_step" in row:
            baseline = row["times_as_fast"]["as"]
            cell = f"{row['times_as_fast']['value']:.2f}"
        elif "check" in row:
            cell = "wrong"
        rows.setdefault((row["provider"], row["dtype"]), {})[row["batch"]] = cell
    lines = [
        "| times as fast as " + baseline + " | " + " | ".join(f"batch {n}" for n in sizes) + " |",
        "|---|" + "---|" * len(sizes),
    ]
    for (provider, dtype), found_cells in rows.items():
        if any(cell != "-" for cell in found_cells.values()):
            lines.append(f"| {provider} {dtype} | " + " | ".join(found_cells.get(n, "-") for n in sizes) + " |")
    env = found["environment"]
    return "\n".join(lines) + (
        f"\n\n{found['source']} on {env['device']}. wrong: further from float64 than twice torch's own error in that "
        f"precision, so it has no speed. Command: `{env['command']}`."
    )


def notes(found: dict[str, Any]) -> list[str]:
    """What the numbers are: only what the tables need."""
    timed = [r for r in found["rows"] if "ms_a_step" in r]
    if not timed:
        return []
    lines = [
        "ms a step: median and quartiles; times as fast: than "
        + timed[0]["times_as_fast"]["as"]
        + ", median over rounds that both ran in, with its 95% interval."
    ]
    if found["clock"] == "cpu":
        lines.append("Times are of the processor, its cores added up, not of the wall: only ratios say anything.")
    load = found["environment"].get("load_average") or 0.0
    if load > BUSY:
        lines.append(f"The machine was busy when this began (load {load:.1f}): times are longer than on an idle one.")
    if found["timed_steps"] < found["chain"]:
        lines.append(f"* extrapolated from {found['timed_steps']} of {found['chain']} steps.")
    if any(r.get("share_of_convolution_roof") for r in timed):
        lines.append("Share of roof: of the measured peak of a 3x3 convolution in the same precision.")
    return [" ".join(lines)]


def cells(found: dict[str, Any], row: Row, names: Sequence[str]) -> list[str]:
    return [_CELLS[name](row, found["timed_steps"] < found["chain"]) for name in names]


def remark(row: Row) -> str:
    """Why a row has no speed."""
    name = f"{row['provider']} {row['dtype']}"
    if "reason" in row:
        return f"{name}: {row['reason']}"
    c = row["check"]
    return (
        f"{name}: WRONG, so no speed: largest error {_number(c['largest'])} ({_number(c['largest_allowed'])} allowed), "
        f"RMS {_number(c['rms'])} ({_number(c['rms_allowed'])}), trajectory {_number(c['chain'])} "
        f"({_number(c['chain_allowed'])})"
    )


def batches(found: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(r["batch"] for r in found["rows"]))


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text, each column as wide as its widest cell; the first two to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = []
    for row in (head, *rows):
        padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _ms(row: Row, extrapolated: bool) -> str:
    ms = row["ms_a_step"]
    low, high = ms["quartiles"]
    return f"{_short(ms['median'])} ({_short(low)} .. {_short(high)})"


def _rate(row: Row, extrapolated: bool) -> str:
    return "-" if row["images_per_s"] is None else _short(row["images_per_s"]) + "*" * extrapolated


def _ratio(row: Row, extrapolated: bool) -> str:
    r = row["times_as_fast"]
    if r["as"] == f"{row['provider']} {row['dtype']}":
        return "1"
    return f"{r['value']:.2f} ({r['low']:.2f} .. {r['high']:.2f})"


def _share(row: Row, extrapolated: bool) -> str:
    share = row.get("share_of_convolution_roof")
    return "-" if share is None else f"{share:.0%}"


def _error(row: Row, extrapolated: bool) -> str:
    return f"{_number(row['check']['largest'])} ({_number(row['check']['largest_allowed'])})"


def _startup(key: str, form: str, again: str | None = None) -> Callable[[Row, bool], str]:
    def cell(row: Row, extrapolated: bool) -> str:
        found = row.get("startup") or {}
        if found.get(key) is None:
            return "failed" if "failed" in found else "-"
        text = format(found[key], form)
        if again is not None and found.get(again) is not None:
            text += f" ({format(found[again], form)} again)"
        return text + ("*" if key == "first_image_s" and extrapolated else "")

    return cell


_CELLS: dict[str, Callable[[Row, bool], str]] = {
    "provider": lambda row, _: row["provider"],
    "dtype": lambda row, _: row["dtype"],
    "ms a step": _ms,
    "images/s": _rate,
    "times as fast": _ratio,
    "share of roof": _share,
    "error (allowed)": _error,
    "trajectory error": lambda row, _: _number(row["check"]["chain_largest"]),
    "first step s": _startup("first_step_s", ".1f", "cached_first_step_s"),
    "first image s": _startup("first_image_s", ".1f"),
    "peak MiB": _startup("peak_mib", ".0f"),
}


def _short(value: float) -> str:
    """Three digits, without an exponent for what is met here."""
    return f"{value:.3g}" if 1e-4 <= abs(value) < 1000 else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.2g}"


def _number(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.1e}"
