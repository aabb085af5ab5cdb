"""JSON, trace and page of a profile whose numbers are known; the page as headless Chromium shows it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from nvml_stand_in import NOT_SUPPORTED, Board, watched
from profiling_stand_in import made_up_profile, with_gpus

from ddpm_fast import report
from ddpm_fast.profiling import Profile
from ddpm_fast.profiling.nvml import Series
from ddpm_fast.profiling.text import cells, short
from ddpm_fast.report.charts import LogAxis, quantity
from ddpm_fast.report.page import COLUMNS, page

EVIL = '</script><script>alert("x")</script>&amp;<b>'


@pytest.fixture(scope="module")
def cpu() -> Profile:
    return made_up_profile(title=EVIL)


def series() -> tuple[Series, Series]:
    """A GPU that idles for a while, and one that is lost and has no power to show."""
    times = [0.1 * i for i in range(6)]
    a = Board("GPU-1", name=EVIL, utilisation=[(80, 30), (0, 0), (0, 0), (100, 60)], energy_mj=[0, 123_000])
    b = Board("GPU-2", power_mw=NOT_SUPPORTED, reasons=4)
    return watched(a, times, 0.5), replace(watched(b, times, 0.5), device="cuda:1", lost="cuda:1 was lost: gone")


@pytest.fixture(scope="module")
def gpu(cpu: Profile) -> Profile:
    return with_gpus(cpu, *series())


# --- JSON ---


def test_json_is_the_profile(cpu: Profile, tmp_path: Path):
    report.write_json(tmp_path / "p.json", cpu)
    facts = json.loads((tmp_path / "p.json").read_text())
    assert facts == json.loads(json.dumps(report.facts(cpu), allow_nan=False))
    assert facts["title"] == EVIL and facts["timed_steps"] == 5 and facts["chain_steps"] == 12
    assert sum(r["share"] for r in facts["rows"]) + facts["step"]["other_s"] / facts["step"]["sum_s"] == (
        pytest.approx(1)
    )
    for name in ("seconds", "flops", "bytes", "roof_s"):
        assert sum(r[name] for r in facts["rows"]) == pytest.approx(sum(c[name] for c in facts["calls"]))
    assert sum(r["calls"] for r in facts["rows"]) == len(facts["calls"]) == len(cpu.calls)
    assert sum(k["seconds"] for k in facts["kinds"]) == pytest.approx(sum(c.seconds for c in cpu.calls))
    assert facts["step"]["flops"] == sum(c["flops"] for c in facts["calls"])
    assert facts["gpus"] == [] and "none took part" in facts["gpu_note"]
    assert facts["environment"]["command"] == "ddpm-fast profile a&b <i>"
    assert facts["roofs"]["float32"]["conv_flops_per_s"] == 8e6


def test_json_of_gpus(gpu: Profile):
    facts = json.loads(json.dumps(report.facts(gpu), allow_nan=False))
    first, second = facts["gpus"]
    assert facts["gpu_note"] is None and facts["run"] == {"graph": "loop", "steps": 10, "seconds": 0.5}
    assert first["energy_j"] == 123 and first["joules_per_image"] == pytest.approx(123 / 10 * 12 / 2)
    assert first["idle_gaps_s"] == [pytest.approx([0.1, 0.3])] and len(first["samples"]) == 6
    assert first["mean"]["sm_percent"] == pytest.approx((40 + 0 + 50 + 100 + 100) / 5)
    assert second["joules_per_image"] is None and second["lost"] == "cuda:1 was lost: gone"
    assert second["missing"] == {"power_w": str(NOT_SUPPORTED)} and second["mean"]["power_w"] is None
    assert second["throttled"] == {"power cap": 1.0}


# --- the trace ---


def check_trace(trace: dict[str, Any]) -> None:
    """The rules of the trace-event format for the kinds of events that are used here."""
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"} and trace["displayTimeUnit"] in ("ms", "ns")
    assert all(isinstance(v, str) for v in trace["otherData"].values())
    spans: dict[tuple[int, int], list[tuple[float, float]]] = {}
    named = set()
    for e in trace["traceEvents"]:
        assert isinstance(e["name"], str) and e["name"] and e["ph"] in ("M", "X", "C")
        assert type(e["pid"]) is int and type(e["tid"]) is int and e["ts"] >= 0 and isinstance(e["args"], dict)
        if e["ph"] == "M":
            assert e["name"] in ("process_name", "thread_name") and set(e["args"]) == {"name"}
            named.add((e["pid"], e["tid"]) if e["name"] == "thread_name" else e["pid"])
        elif e["ph"] == "X":
            assert e["dur"] >= 0 and isinstance(e["cat"], str)
            spans.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
        else:
            assert e["args"] and all(type(v) in (int, float) for v in e["args"].values())
    assert set(spans) <= named and {e["pid"] for e in trace["traceEvents"]} <= named
    for thread in spans.values():  # complete events of one thread lie within each other, or apart
        open_until: list[float] = []
        for begin, end in sorted(thread, key=lambda s: (s[0], -s[1])):
            while open_until and open_until[-1] <= begin + 1e-6:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + 1e-6
            open_until.append(end)


def test_the_trace_is_one_by_its_rules(gpu: Profile, cpu: Profile, tmp_path: Path):
    for p in (cpu, gpu):
        report.write_trace(tmp_path / "p.trace", p)
        trace = json.loads((tmp_path / "p.trace").read_text())
        check_trace(trace)
        operations = [e for e in trace["traceEvents"] if e.get("cat") == "operation"]
        assert len(operations) == len(p.steps) * len(p.calls)
        steps = [e for e in trace["traceEvents"] if e.get("cat") == "step"]
        assert [e["dur"] for e in steps] == pytest.approx([s.seconds * 1e6 for s in p.steps]) and steps[0]["ts"] == 0
        inside = [e for e in operations if steps[0]["ts"] <= e["ts"] < steps[0]["ts"] + steps[0]["dur"]]
        assert [e["name"] for e in inside] == [c.record.operation for c in p.calls]
        assert [e["args"]["layer"] for e in inside] == [c.layer for c in p.calls]
        assert [e["dur"] for e in inside] == pytest.approx([c.seconds * 1e6 for c in p.calls])


def test_counters_are_at_the_run_s_time(gpu: Profile):
    assert gpu.run is not None
    events = report.trace(gpu)["traceEvents"]
    (run,) = (e for e in events if e.get("cat") == "run")
    assert run["ts"] == pytest.approx((gpu.run.began - gpu.steps[0].began) * 1e6) and run["dur"] == 0.5e6
    power = [e for e in events if e["ph"] == "C" and e["name"] == "power"]
    assert {e["pid"] for e in power} == {2}  # the second GPU has none
    assert [(e["ts"] - run["ts"]) / 1e6 for e in power] == pytest.approx([0.1 * i for i in range(6)])
    assert power[0]["args"] == {"W": 250.0}
    assert len([e for e in events if e["ph"] == "C" and e["pid"] == 3 and e["name"] == "SM clock"]) == 6


# --- the page as text ---


class Parts(HTMLParser):
    """Elements with their attributes; whether every tag is closed in its order; the text outside of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


def test_the_page_needs_nothing_and_escapes_everything(gpu: Profile):
    parts = Parts(page(gpu))
    names = [tag for tag, _ in parts.elements]
    assert names.count("script") == 2 and "b" not in names and "i" in names
    for tag, attributes in parts.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and "alert" not in name
            if name in ("href", "src"):
                assert (tag, value) == ("link", "data:,")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page(gpu).replace(json.dumps(dict(gpu.environment)), ""))
    text = "".join(parts.words)
    assert text.count(EVIL) >= 3  # title, heading, the GPU's name
    assert "ddpm-fast profile a&b <i>" in text
    ids = [a["id"] for _, a in parts.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in parts.elements:
        if attributes.get("aria-labelledby"):
            assert attributes["aria-labelledby"] in ids


def test_the_page_says_what_a_gpu_lacks(gpu: Profile, cpu: Profile):
    text = "".join(Parts(page(gpu)).words)
    assert str(NOT_SUPPORTED) in text and "cuda:1 was lost: gone" in text and "held back by power cap (100%)" in text
    assert (
        "idle 0.20 s in 1 gap (shaded)" in text and "never seen idle" in text and "123 J by the energy counter" in text
    )
    assert short(123 / 10 * 12 / 2) in text
    assert "No GPU: none took part" in "".join(Parts(page(cpu)).words)
    assert "No GPU: NVML is not available: no driver." in page(with_gpus(cpu, note="NVML is not available: no driver"))


def test_a_profile_without_products_or_bytes_still_draws(cpu: Profile):
    for rows in ([r for r in cpu.rows if r.flops], [r for r in cpu.rows if not r.flops]):
        Parts(page(replace(cpu, rows=tuple(rows))))


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def test_contrast_in_both_schemes():
    """WCAG 2 AA: 4.5 for text, 3 for what is drawn."""
    css = (Path(report.__file__).parents[1] / "assets" / "report" / "page.css").read_text()
    schemes = [
        dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(schemes) == 2 and set(schemes[0]) == set(schemes[1])
    for colours in schemes:
        paper = luminance(colours["paper"])
        for name, colour in colours.items():
            light, dark = max(paper, luminance(colour)), min(paper, luminance(colour))
            ratio = (light + 0.05) / (dark + 0.05)
            if name in ("ink", "soft", "conv", "norm"):  # the last two name the curves of a GPU
                assert ratio >= 4.5, (name, ratio)
            elif name not in ("paper", "rule", "faint"):
                assert ratio >= 3, (name, ratio)


def test_axes():
    axis = LogAxis.around([1e3, 1e6], margin=0)
    assert [axis(v) for v in (1e3, 1e4, 1e6)] == pytest.approx([0, 100 / 3, 100])
    assert axis.ticks == pytest.approx([1e3, 1e4, 1e5, 1e6])
    assert LogAxis.around([1.5, 30], margin=0).ticks == pytest.approx([2, 5, 10, 20])
    assert [quantity(v, "B/s") for v in (950, 1.5e3, 27.4e9, 2e12)] == [
        "950 B/s",
        "1.50 kB/s",
        "27.4 GB/s",
        "2.00 TB/s",
    ]


# --- the page in a browser ---

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is not shown: playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("the page is not shown: no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def files(cpu: Profile, gpu: Profile, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    report.write_html(folder / "cpu.html", cpu)
    report.write_html(folder / "gpu.html", gpu)
    return {"cpu": folder / "cpu.html", "gpu": folder / "gpu.html"}


class Shown:
    """A page, and what it did that it should not."""

    def __init__(self, browser: Any, path: Path, width: int, dark: bool = False):
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light"
        )
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.wrong.append(request.url))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.goto(path.as_uri())
        assert self.wrong == [path.as_uri()]  # the page itself, and nothing else
        self.wrong.clear()

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: Any) -> None:
        wrong = self.wrong
        self.context.close()
        assert wrong == []


def column(page: Any, number: int) -> list[str]:
    return page.eval_on_selector_all(
        "#operations tbody tr", "(rows, i) => rows.map(row => row.cells[i].dataset.value)", number
    )


def test_it_shows_the_numbers_of_the_json(browser: Any, files: dict[str, Path], cpu: Profile):
    with Shown(browser, files["cpu"], 1200) as page:
        facts = json.loads(page.eval_on_selector("#profile", "e => e.textContent"))
        assert facts == json.loads(json.dumps(report.facts(cpu)))
        shown = page.eval_on_selector_all(
            "#operations tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        )
        assert len(shown) == len(facts["rows"])
        for texts, row, made in zip(shown, facts["rows"], cpu.rows):
            assert texts[0].startswith(row["operation"])
            assert texts[0].endswith(re.sub(r"(?<=\d)x(?=\d)", "\u00d7", row["detail"]))
            said = dict(zip((title for title, _, _ in COLUMNS), texts))
            assert said["Calls"] == str(row["calls"]) and said["ms"] == f"{row['seconds'] * 1e3:.3f}"
            assert said["Share"] == f"{row['share']:.1%}" and said["MB"] == f"{row['bytes'] / 1e6:.2f}"
            assert said["GFLOP"] == (f"{row['flops'] / 1e9:.3f}" if row["flops"] else "-")
            others = ("TFLOP/s", "GB/s", "Bound", "Of roof", "Gap, ms")
            assert [said[name] for name in others] == list(cells(made)[7:])
        for number, (_, key, is_number) in enumerate(COLUMNS[1:], 1):
            values = column(page, number)
            assert [float(v) if is_number else v for v in values] == [row[key] for row in facts["rows"]]
        sums = page.locator("#operations tfoot tr").all_inner_texts()
        step, calls, other = facts["step"], len(facts["calls"]), f"{facts['step']['other_s'] * 1e3:.3f}"
        assert sums[0].split()[-3:] == [other, other, f"{step['other_s'] / step['sum_s']:.1%}"]
        gap = f"{(step['sum_s'] - step['roof_s']) * 1e3:.3f}"
        assert sums[1].split()[4:] == [
            gap, f"{step['sum_s'] * 1e3:.3f}", "100.0%", f"{step['roof_s'] / step['sum_s']:.0%}", str(calls)
        ]  # fmt: skip
        figures = page.locator(".figures dd").all_inner_texts()
        assert figures == [
            short(facts["images_per_s"]), f"{step['at_work_s'] * 1e3:.2f}", f"{step['roof_share']:.0%}"
        ]  # fmt: skip
        lines = page.locator(".plot.flops .line").all_inner_texts()
        roof = cpu.roofs["float32"]
        assert lines == [
            f"convolution {quantity(roof.conv_flops_per_s, 'FLOP/s')}",
            f"product {quantity(roof.gemm_flops_per_s, 'FLOP/s')}",
            f"copy {quantity(roof.copy_bytes_per_s, 'B/s')}",
        ]
        assert page.locator(".bars li").count() == len(facts["kinds"]) + 1
        assert page.locator("h1").inner_text() == EVIL and page.title().startswith(EVIL)


def test_it_sorts_by_clicks_and_keys(browser: Any, files: dict[str, Path]):
    with Shown(browser, files["cpu"], 1200) as page:
        heads = page.locator("#operations thead th")
        sorts = lambda: [heads.nth(i).get_attribute("aria-sort") for i in range(heads.count())]  # noqa: E731
        gaps = [float(v) for v in column(page, 1)]
        rest = [None] * (len(COLUMNS) - 2)
        assert gaps == sorted(gaps, reverse=True) and sorts() == [None, "descending", *rest]
        heads.nth(2).get_by_role("button").click()
        times = [float(v) for v in column(page, 2)]
        assert times == sorted(times, reverse=True) and sorts()[2] == "descending" and sorts()[1] is None
        heads.nth(2).get_by_role("button").click()
        assert [float(v) for v in column(page, 2)] == sorted(times) and sorts()[2] == "ascending"
        heads.nth(0).get_by_role("button").focus()
        page.keyboard.press("Enter")
        names = column(page, 0)
        assert names == sorted(names) and sorts()[0] == "ascending"
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        again = [float(v) for v in column(page, 1)]
        assert again == gaps and sorts()[1] == "descending"


def test_points_are_where_they_belong_and_tell_what_they_are(browser: Any, files: dict[str, Path], cpu: Profile):
    with Shown(browser, files["cpu"], 1200) as page:
        dots = page.locator(".plot .dot")
        assert dots.count() == len(cpu.rows)
        box = page.locator(".plot.flops .area").bounding_box()
        roof = cpu.roofs["float32"]
        places = {}
        for dot in page.locator(".plot.flops .dot").all():
            b = dot.bounding_box()
            center = b["x"] + b["width"] / 2 - box["x"], box["y"] + box["height"] - b["y"] - b["height"] / 2
            places["\n".join(dot.get_attribute("data-tip").split("\n")[:2])] = center
        rows = [r for r in cpu.rows if r.flops]
        assert len(places) == len(rows)
        xs = LogAxis.around([r.flops / r.bytes for r in rows] + [roof.conv_flops_per_s / 4e6 * f for f in (1 / 3, 4)])
        ys = LogAxis.around([r.flops_per_s for r in rows] + [roof.gemm_flops_per_s / 4, roof.conv_flops_per_s])
        for r in rows:
            x, y = places[f"{r.line.operation} {r.line.input} to {r.line.output}\n{r.line.detail}"]
            assert x / box["width"] * 100 == pytest.approx(xs(r.flops / r.bytes), abs=0.2)
            assert y / box["height"] * 100 == pytest.approx(ys(r.flops_per_s), abs=0.2)
        first = page.locator(".plot.flops .dot").first
        tip = page.locator("#tip")
        assert tip.is_hidden()
        first.focus()
        assert tip.is_visible() and tip.inner_text() == first.get_attribute("data-tip")
        page.keyboard.press("ArrowRight")
        second = page.locator(".plot.flops .dot").nth(1)
        assert (
            tip.inner_text() == second.get_attribute("data-tip") and second.get_attribute("aria-describedby") == "tip"
        )
        page.keyboard.press("Escape")
        assert tip.is_hidden()
        first.hover(force=True)
        assert tip.is_visible()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_it_fits_a_phone(name: str, dark: bool, browser: Any, files: dict[str, Path]):
    with Shown(browser, files[name], 375, dark) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        scroll = page.locator(".scroll")
        assert scroll.evaluate("e => e.scrollWidth > e.clientWidth") and scroll.get_attribute("tabindex") == "0"
        small = page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter(e => e.childNodes.length && e.offsetParent
               && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
               && parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.outerHTML)"""
        )
        assert small == []
        paper = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 120) == dark
        dot = page.locator(".plot .dot").nth(2)
        dot.click(force=True)
        edges = page.locator("#tip").bounding_box()
        assert page.locator("#tip").is_visible() and edges["x"] >= 0 and edges["x"] + edges["width"] <= 375
        assert page.evaluate("document.documentElement.scrollWidth") == 375


OVERLAPS = """() => {
  // Boxes of the texts in and around the drawings, and of the dots: [text, text or dot, ...] that share pixels.
  const box = (e) => e.getBoundingClientRect();
  const shared = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.5;
  const found = [];
  for (const plot of document.querySelectorAll(".plot")) {
    const texts = [...plot.querySelectorAll("*")].filter(e => [...e.childNodes].some(n => n.nodeType === 3));
    const dots = [...plot.querySelectorAll(".dot")];
    texts.forEach((text, i) => [...texts.slice(i + 1), ...dots].forEach((other) => {
      if (shared(box(text), box(other))) found.push(text.innerText + " | " + (other.innerText || other.dataset.tip));
    }));
  }
  return found;
}"""


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_no_text_lies_on_a_dot_or_on_another_text(name: str, width: int, browser: Any, files: dict[str, Path]):
    with Shown(browser, files[name], width) as page:
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        beyond = page.evaluate(
            """() => [...document.querySelectorAll("header *, section > *, .plot *, .bars *, .figures *, .chart *")]
               .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
               .map(e => e.outerHTML.slice(0, 80))"""
        )
        assert beyond == []
        figures, note = page.locator(".figures").bounding_box(), page.locator(".figures + *").first
        if note.count():
            assert note.bounding_box()["y"] >= figures["y"] + figures["height"]


def test_a_phone_shows_the_column_that_the_table_is_sorted_by(browser: Any, files: dict[str, Path]):
    """At first, and after sorting by any other: whole, beside the names."""
    with Shown(browser, files["cpu"], 390) as page:
        heads = page.locator("#operations thead th")
        frame = page.locator(".scroll").bounding_box()

        def in_sight(number: int) -> bool:
            names = heads.nth(0).bounding_box()
            edges = page.locator(f"#operations tbody tr:first-child > :nth-child({number + 1})").bounding_box()
            left = names["x"] + names["width"] if number else frame["x"]
            return left - 0.5 <= edges["x"] and edges["x"] + edges["width"] <= frame["x"] + frame["width"] + 0.5

        assert in_sight(1) and heads.nth(1).get_attribute("aria-sort") == "descending"
        assert heads.nth(0).bounding_box()["width"] < frame["width"] / 2
        for number in (*range(1, len(COLUMNS)), 1, 0):
            heads.nth(number).get_by_role("button").evaluate("button => button.click()")  # scrolls nothing by itself
            assert in_sight(number), COLUMNS[number]


@pytest.mark.parametrize(("ratio", "shown"), [(0.9, False), (1.0, False), (1.19, False), (1.35, True)])
def test_the_instruments_are_named_only_when_they_cost_much(ratio: float, shown: bool, cpu: Profile):
    slowed = replace(cpu, plain_s=cpu.timed_s / ratio)
    assert slowed.instrumented_ratio == pytest.approx(ratio)
    text = "".join(Parts(page(slowed)).words)
    assert ("as long a step while it was timed call by call1.35\u00d7" in text) == shown
    assert ("as long a step" in text) == shown
    assert f"{slowed.timed_s * 1e3:.3f} ms with them" in text  # said under "How this was measured" in any case


def test_it_draws_the_gpu_over_time(browser: Any, files: dict[str, Path], gpu: Profile):
    with Shown(browser, files["gpu"], 1200) as page:
        first = page.locator(".charts").first
        assert first.locator(".chart").count() == 5 and first.locator("polyline").count() == 7
        assert page.locator(".charts").nth(1).locator(".chart").nth(1).locator(".none").inner_text() == str(
            NOT_SUPPORTED
        )
        idle = first.locator("rect.idle")
        assert idle.count() == 1
        assert float(idle.get_attribute("x")) == pytest.approx(20) and float(
            idle.get_attribute("width")
        ) == pytest.approx(40)
        points = first.locator("polyline.a").first.get_attribute("points").split()
        samples = gpu.gpus[0].samples
        assert len(points) == len(samples)
        for point, sample in zip(points, map(asdict, samples)):
            x, y = map(float, point.split(","))
            assert x == pytest.approx(sample["seconds"] / 0.5 * 100) and y == pytest.approx(100 - sample["sm_percent"])


def test_without_a_script_the_page_still_says_everything(browser: Any, files: dict[str, Path], cpu: Profile):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(files["cpu"].as_uri())
    assert page.locator("#operations tbody tr").count() == len(cpu.rows)
    assert page.locator(".plot .dot").count() == len(cpu.rows)
    context.close()
