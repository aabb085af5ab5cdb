"""The tables between markers: from JSON alone, the same bytes each time, and refused where something is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

tables = pytest.importorskip("benchmarks.tables", reason="benchmarks/ is not part of the installed package")

FOUND = {
    "environment": {
        "device": "Example CPU, 2 cores",
        "threads": 2,
        "versions": {"torch": "2.13", "openvino": None},
        "commit": "0123456789abcdef",
        "command": "ddpm-fast bench tiny",
        "time": "2026-01-02T03:04:05+00:00",
    },
    "source": "tiny",
    "parameters": 1_200_000,
    "gflop_per_image_and_step": 0.134,
    "chain": 1000,
    "timed_steps": 20,
    "clock": "wall",
    "roofs": [],
    "rows": [
        {
            "provider": "cpu",
            "dtype": "float32",
            "batch": 4,
            "ours": True,
            "check": {"ok": True, "largest": 1.2e-6, "largest_allowed": 3.4e-6},
            "ms_a_step": {"median": 8.125, "quartiles": [8.0, 8.5], "min": 7.9, "rounds": 5},
            "images_per_s": 0.4923,
            "tflops": 0.066,
            "share_of_convolution_roof": 0.715,
            "times_as_fast": {"as": "diffusers float32", "value": 1.512, "low": 1.4, "high": 1.6049},
            "startup": {"first_step_s": 0.25, "first_image_s": 8.37, "peak_mib": 262.4, "cached_first_step_s": 0.1},
        },
        {"provider": "openvino", "dtype": "float32", "batch": 4, "ours": False, "reason": "openvino is not installed"},
        {
            "provider": "slip",
            "dtype": "float32",
            "batch": 4,
            "ours": False,
            "check": {
                "ok": False, "largest": None, "largest_allowed": 1e-6, "rms": 0.5, "rms_allowed": 1e-6,
                "chain": 0.25, "chain_allowed": 1e-3,
            },
        },
    ],
}  # fmt: skip
PAGE = "before\n<!-- bench: example -->\nold\n<!-- /bench -->\nafter <!-- bench -->\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results" / "example.json").write_text(json.dumps(FOUND))
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "performance.md").write_text("no tables\n")
    return tmp_path


def test_what_is_written(root: Path) -> None:
    assert tables.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("before\n<!-- bench: example -->\n\n| batch | provider | dtype | ms a step |")
    assert text.endswith("\n\n<!-- /bench -->\nafter <!-- bench -->\n") and "old" not in text
    assert "| 4 | cpu | float32 | 8.12 (8 .. 8.5) | 0.492* | 1.51 (1.40 .. 1.60) | 72% |" in text
    assert text.count("\n| ") == 2  # the head, and the one row that has a speed
    assert "openvino float32: openvino is not installed" in text
    assert "slip float32: WRONG, so no speed: largest error infinite (1.0e-06 allowed), RMS 5.0e-01" in text
    assert "* extrapolated from 20 of 1000 steps" in text and "than diffusers float32" in text
    for fact in ("Example CPU, 2 cores, 2 threads", "torch 2.13", "commit 0123456789ab;", "`ddpm-fast bench tiny`"):
        assert fact in text
    assert (root / "docs" / "performance.md").read_text() == "no tables\n"
    assert "busy" not in text
    busy = {**FOUND, "environment": {**FOUND["environment"], "load_average": 7.25}}
    assert "The machine was busy when this began (load 7.2)" in tables.markdown(busy)


def test_the_same_json_gives_the_same_page(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--root", str(root), "--check"]) == 1
    assert "to change: README.md" in capsys.readouterr().out and (root / "README.md").read_text() == PAGE
    tables.main(["--root", str(root)])
    once = (root / "README.md").read_bytes()
    assert tables.main(["--root", str(root), "--check"]) == 0
    tables.main(["--root", str(root)])
    assert (root / "README.md").read_bytes() == once


def test_chosen_columns_and_several_blocks(root: Path) -> None:
    chosen = "<!-- bench: example provider, first step s, first image s, peak MiB, error (allowed) -->"
    page = PAGE + f"{chosen}\n<!-- /bench -->\n"
    text = tables.filled(page, root / "benchmarks" / "results")
    assert text.count("<!-- /bench -->") == 2 and chosen in text
    assert "| 4 | cpu | 0.2 (0.1 again) | 8.4* | 262 | 1.2e-06 (3.4e-06) |" in text


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- bench: missing -->\n<!-- /bench -->", "missing.json, which is not there"),
        ("<!-- bench: example -->\nno end", "must be followed by its own <!-- /bench -->"),
        ("<!-- bench: example -->\n" + PAGE, "must be followed by its own <!-- /bench -->"),
        ("<!-- bench: example speed -->\n<!-- /bench -->", "no column is called 'speed'"),
    ],
)
def test_a_page_that_cannot_be_filled(root: Path, capsys, page: str, message: str) -> None:
    (root / "README.md").write_text(page)
    assert tables.main(["--root", str(root)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert (root / "README.md").read_text() == page


def test_this_repository_s_pages_say_what_their_json_says() -> None:
    for name in tables.PAGES:
        text = (tables.ROOT / name).read_text(encoding="utf-8")
        assert tables.filled(text, tables.ROOT / tables.RESULTS, name) == text, name


def test_the_short_table_has_a_column_for_each_batch_size(root: Path) -> None:
    slow = {**FOUND["rows"][0], "batch": 16, "times_as_fast": {**FOUND["rows"][0]["times_as_fast"], "value": 0.9}}
    (root / "benchmarks" / "results" / "example.json").write_text(json.dumps({**FOUND, "rows": [*FOUND["rows"], slow]}))
    (root / "README.md").write_text("<!-- bench: example by batch -->\n<!-- /bench -->\n")
    assert tables.main(["--root", str(root)]) == 0
    lines = (root / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "| times as fast as diffusers float32 | batch 4 | batch 16 |",
        "|---|---|---|",
        "| cpu float32 | 1.51 | 0.90 |",
        "| slip float32 | wrong | - |",
    ]
    assert "Example CPU, 2 cores" in lines[-3] and "`ddpm-fast bench tiny`" in lines[-3]
