"""What `benchmarks.engine` found, for a person."""

from __future__ import annotations

from typing import Any

MOST_LINES = 8  # of a batch size's kernels; the JSON has all


def heading(found: dict[str, Any]) -> str:
    check, env = found["check"], found["environment"]
    return "\n".join(
        [
            f"{found['model']}, {found['dtype']}, ops={found['ops']}, {env['device']}, torch "
            f"{env['versions']['torch']}, commit {(env['commit'] or 'unknown')[:12]}",
            f"house rule {'holds' if check['ok'] else 'BROKEN'}: largest {check['largest']:.3g} (torch "
            f"{check['torch_largest']:.3g}), rms {check['rms']:.3g} (torch {check['torch_rms']:.3g}); "
            + (", ".join(f"{k}: {'yes' if v else 'NO'}" for k, v in check["exact"].items()) or "nothing bitwise"),
            *(f"{name} was NOT timed: {why}" for name, why in found["missing"].items()),
            *([] if check["ok"] else ["no speed is reported for a configuration that is not right"]),
        ]
    )


def row_text(row: dict[str, Any]) -> str:
    """A batch size for a person."""
    lines = []
    if row.get("images_per_s") is not None:
        kind = "extrapolated" if row["extrapolated"] else "a whole chain"
        lines.append(
            f"batch {row['batch']}: {row['images_per_s']:.4g} images/s ({kind}, {row['best_graph']}); ms a step: "
            + ", ".join(f"{name} {ms:.3f}" for name, ms in row["ms_a_step"].items())
        )
    else:
        lines.append(f"batch {row['batch']}: nothing of ours could be timed")
    if "times_torch_compile" in row:
        lines.append(f"  torch.compile takes {row['times_torch_compile']:.2f} times as long")
    if "times_with_pdl" in row:
        lines.append(f"  with programmatic dependent launches {row['times_with_pdl']:.3f} times as fast")
    if row["peak_mib"]:
        lines.append("  peak MiB: " + ", ".join(f"{n} {mib:.0f}" for n, mib in row["peak_mib"].items()))
    if row["exact"]:
        lines.append("  the same bits: " + ", ".join(f"{n} {'yes' if ok else 'NO'}" for n, ok in row["exact"].items()))
    lines += [f"  {name} ran as {kind}" for name, kind in row["ran_as"].items()]
    lines += [f"  {name} FAILED: {why}" for name, why in row["failed"].items()]
    return "\n".join(lines)


def kernels_text(row: dict[str, Any]) -> str:
    """A batch size's kernels, those with the largest gap to their roof."""
    lines = [
        f"batch {row['batch']}: {row['launches_a_step']} kernels ({row['planned_launches']} planned), "
        f"{row['kernel_us']:.1f} us in all"
        + (f", {row['roof_us']:.1f} us at the roofs" if "roof_us" in row else "; they do not fit the plan's order")
    ]
    for r in (row["launches"] or [])[:MOST_LINES]:
        lines.append(
            f"    {r['us']:8.1f} us, {r['roof_share']:4.0%} of its {r['bound']} roof: {r['count']} x "
            f"{r['operation']} {r['in']} > {r['out']} {r['detail']}"
        )
    return "\n".join(lines)
