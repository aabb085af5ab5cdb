"""Write the tables of README.md and docs/performance.md from the JSON that `ddpm-fast bench --out` wrote.

    python -m benchmarks.tables            # between <!-- bench: NAME --> and <!-- /bench -->, from results/NAME.json
    python -m benchmarks.tables --check    # exit code 1 where a page is not what its JSON says

`<!-- bench: NAME COLUMN, COLUMN -->` chooses the columns; `<!-- bench: NAME by batch -->` is a short table of ratios, a
column for each batch size. JSON of `benchmarks.gains` gives its own table. The same JSON gives the same text, byte for
byte.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gains
from ddpm_fast.benchmarking.text import FULL, SPEED, by_batch, markdown
from ddpm_fast.whole_files import whole_file

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/performance.md")
RESULTS = "benchmarks/results"
BY_BATCH = "by batch"
BLOCK = re.compile(r"<!-- bench: *(?P<name>[\w.-]+) *(?P<columns>[^>]*?) *-->\n.*?<!-- /bench -->", re.DOTALL)
OPENING = re.compile(r"<!-- bench: ")


def filled(text: str, results: Path, page: str = "the page") -> str:
    """``text`` with every block's table made anew. ValueError for a block without an end, a JSON or such a column."""
    blocks = list(BLOCK.finditer(text))
    inside = [m for m in blocks if len(OPENING.findall(m.group(0))) != 1]
    if inside or len(OPENING.findall(text)) != len(blocks):
        raise ValueError(f"{page}: each <!-- bench: NAME --> must be followed by its own <!-- /bench -->")
    return BLOCK.sub(lambda m: _block(m, results, page), text)


def _block(found: re.Match[str], results: Path, page: str) -> str:
    path = results / f"{found['name']}.json"
    if not path.exists():
        raise ValueError(f"{page} wants a table from {path}, which is not there: write it by ddpm-fast bench --out")
    opening = found.group(0).splitlines()[0]
    measured = json.loads(path.read_text())
    if any("gain" in row for row in measured["rows"]):
        return f"{opening}\n\n{gains.markdown(measured)}\n\n<!-- /bench -->"
    if found["columns"] == BY_BATCH:
        return f"{opening}\n\n{by_batch(measured)}\n\n<!-- /bench -->"
    names = [c.strip() for c in found["columns"].split(",")] if found["columns"] else list(SPEED)
    unknown = [n for n in names if n not in FULL]
    if unknown:
        raise ValueError(f"{page}: no column is called {unknown[0]!r}; there are: {', '.join(FULL)}")
    return f"{opening}\n\n{markdown(measured, names)}\n\n<!-- /bench -->"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page would change")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    args = parser.parse_args(argv)
    changed = []
    for name in PAGES:
        path = args.root / name
        try:
            before = path.read_text(encoding="utf-8")
            after = filled(before, args.root / RESULTS, name)
        except (OSError, ValueError) as error:
            print(f"benchmarks.tables: {error}", file=sys.stderr)
            return 2
        if after != before:
            changed.append(name)
            if not args.check:
                with whole_file(path) as file:
                    file.write(after.encode())
    print(f"{'to change' if args.check else 'written'}: {', '.join(changed)}" if changed else "all tables are current")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    raise SystemExit(main())
