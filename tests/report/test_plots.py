"""The plots of a run: what they show is what was measured."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastft.report import page, plots
from tests.engine.test_run import ok, summary_of

SVG = "{http://www.w3.org/2000/svg}"


def points_of(root: ElementTree.Element, name: str) -> list[tuple[float, float]]:
    """The points of the line with this id, in the picture's coordinates: larger y is lower."""
    path = next(g for g in root.iter(f"{SVG}g") if g.get("id") == name).find(f"{SVG}path")
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ?([\d.]+) ([\d.]+)", path.get("d"))]


def words(root: ElementTree.Element) -> list[str]:
    return [t.text for t in root.iter(f"{SVG}text")]


def test_names_at_the_right_do_not_overlap():
    placed = plots.apart([(5.0, "a"), (4.0, "b"), (4.5, "c")], gap=1.6)
    assert [name for _, name in placed] == ["b", "c", "a"]
    assert all(b[0] - a[0] == pytest.approx(1.6) for a, b in pairwise(placed))
    assert plots.apart([(5.0, "a"), (1.0, "b")], gap=1.6) == [(1.0, "b"), (5.0, "a")]


def test_a_plot_is_a_file_of_its_own_with_every_point_at_its_place():
    points = [(0, 6.0), (10, 7.5), (20, 4.2)]
    levels = [plots.Level(4, "x & y", "#000000"), plots.Level(4.05, "z", "#000000")]
    files = [plots.as_file(plots.nll(points, levels, is_measured_between=True)) for _ in range(2)]
    assert files[0] == files[1]  # nothing random, no date
    root = ElementTree.fromstring(files[0])
    (x0, y0), (x1, y1), (x2, y2) = points_of(root, "trained")
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert (y0 - y1) / (y2 - y1) == pytest.approx(1.5 / 3.3, abs=1e-3)
    assert {"trained 4.20", "x & y 4.00", "z 4.05", "optimizer steps"} <= set(words(root))


def test_memory_has_a_gap_where_nothing_was_sampled():
    samples = [(0.1 * i, 2**30) for i in range(50)] + [(20 + 0.1 * i, 2**31) for i in range(50)]
    found = plots._with_gaps(samples)
    (gap,) = [i for i, (_, nbytes) in enumerate(found) if math.isnan(nbytes)]
    assert found[gap - 1] == samples[49] and found[gap + 1] == samples[50]
    assert [p for p in found if not math.isnan(p[1])] == samples


def test_every_phase_of_a_run_and_every_operator_has_a_mark_of_its_own():
    spans = [("load", 0.0, 0.01), ("evaluate <base>", 0.01, 0.02), ("load", 0.02, 5.0)]
    drawn = plots.memory_over_time([(0.0, 2**30), (5.0, 2**31)], spans, "resident")
    assert drawn.count("<li>") == 2 and "evaluate &lt;base&gt;" in drawn and page.COLORS[1] in drawn
    looks = plots.operator_looks([f"fastft::op{i}" for i in range(9)] * 2)
    assert len(set(looks.values())) == len(looks) == 9
    calls = [(name, 0.5 * (i + 1), 1e9) for i, name in enumerate(looks)]
    drawn = plots.roofline(calls, {"flops": 1e12, "bandwidth": 1e10}, looks)
    assert all(color.lower() in drawn for color, _ in looks.values())


def test_the_report_plots_the_unseen_questions_at_every_evaluation(base_config, launch):
    raw = base_config(train={"steps": 6, "eval_every": 2})
    ok(launch(raw))
    folder = Path(raw["output_dir"])
    summary = summary_of(raw)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    between = [r["evaluated_nll"] for r in rows if "evaluated_nll" in r]
    assert len(between) == 2
    root = ElementTree.parse(folder / "nll.svg").getroot()
    heights = [y for _, y in points_of(root, "trained")]
    values = [summary["nll_no_context"], *between, summary["nll_student"]]
    assert len(heights) == 4
    low, high = (values.index(extreme(values)) for extreme in (min, max))
    slope = (heights[high] - heights[low]) / (values[high] - values[low])
    for height, value in zip(heights, values, strict=True):
        assert height == pytest.approx(heights[low] + slope * (value - values[low]), abs=0.2)
    written = " ".join(words(root))
    for name, key in (("no context", "no_context"), ("in context", "teacher"), ("trained", "student")):
        assert f"{name} {summary[f'nll_{key}']:.2f}" in written
    report = (folder / "report.html").read_text()
    assert report.count("<svg") == 7 and "before and after training only" not in report
    assert not re.search(r'(src|href)="(?!#)', report)  # nothing from outside


def test_a_run_without_evaluations_between_says_so(base_config, launch):
    raw = base_config()
    ok(launch(raw))
    report = (Path(raw["output_dir"]) / "report.html").read_text()
    assert "Measured before and after training only" in report
    assert len(points_of(ElementTree.parse(Path(raw["output_dir"]) / "nll.svg").getroot(), "trained")) == 2
