"""The plots of a run: what they show is what was measured."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastft.report.plot import Level, apart, as_file, line_plot, ticks
from tests.engine.test_run import ok, summary_of

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("low", "high"), [(0, 30), (3.1, 6.44), (2.8, 2.8), (0.0, 0.0), (-4.0, -1.5), (0, 1e5), (1e-7, 3e-7), (0, 1)]
)
def test_ticks_are_few_and_round_and_within_the_range(low, high):
    found = ticks(low, high)
    assert found == sorted(set(found)) and len(found) <= 7
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert low == high or len(found) >= 2
    for step in (round(b - a, 12) for a, b in pairwise(found)):
        assert f"{step:e}"[0] in "125"


def test_names_at_the_right_do_not_overlap():
    placed = apart([(50.0, "a"), (40.0, "b"), (45.0, "c")])
    assert [name for _, name in placed] == ["b", "c", "a"]
    assert all(b[0] - a[0] >= 16 for a, b in pairwise(placed))


def test_a_plot_is_xml_with_every_point_within_its_frame():
    points = [(0, 6.0), (10, 7.5), (20, 4.2)]
    text = line_plot(
        points, x_label="a < b", y_label="NLL", name="trained", levels=(Level(4, "x & y", "#000"),), markers=True
    )
    root = ElementTree.fromstring(as_file(text))
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    assert len(dots) == 3
    assert all(0 < x < 800 and 0 < y < 320 for x, y in dots)
    assert dots[1][1] < dots[0][1] < dots[2][1]  # larger values stand higher
    written = [t.text for t in root.iter(f"{SVG}text")]
    assert {"a < b", "trained 4.20", "x & y 4.00"} <= set(written)


def test_the_report_plots_the_unseen_questions_at_every_evaluation(base_config, launch):
    raw = base_config(train={"steps": 6, "eval_every": 2})
    ok(launch(raw))
    folder = Path(raw["output_dir"])
    summary = summary_of(raw)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    between = [r["evaluated_nll"] for r in rows if "evaluated_nll" in r]
    assert len(between) == 2
    root = ElementTree.parse(folder / "nll.svg").getroot()
    heights = [float(c.get("cy")) for c in root.iter(f"{SVG}circle")]
    values = [summary["nll_no_context"], *between, summary["nll_student"]]
    assert len(heights) == 4
    low, high = (values.index(extreme(values)) for extreme in (min, max))
    slope = (heights[high] - heights[low]) / (values[high] - values[low])
    for height, value in zip(heights, values, strict=True):
        assert height == pytest.approx(heights[low] + slope * (value - values[low]), abs=0.2)
    written = " ".join(t.text for t in root.iter(f"{SVG}text"))
    for name, key in (("no context", "no_context"), ("in context", "teacher"), ("trained", "student")):
        assert f"{name} {summary[f'nll_{key}']:.2f}" in written
    report = (folder / "report.html").read_text()
    assert report.count("<svg") == 7 and "before and after training only" not in report
    assert not re.search(r'(src|href)="(?!#)', report)  # nothing from outside


def test_a_run_without_evaluations_between_says_so(base_config, launch):
    raw = base_config()
    ok(launch(raw))
    report = (Path(raw["output_dir"]) / "report.html").read_text()
    assert "Measured before and after training only" in report and report.count("<circle") == 2
