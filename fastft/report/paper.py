"""The folder in which `fastft report` leaves a comparison: its tables in every format, its pictures, and one page."""

from __future__ import annotations

import os
from pathlib import Path

from fastft.errors import DataError
from fastft.files import write_bytes, write_text
from fastft.report.compare import Comparison, compare
from fastft.report.comparison_tables import accuracy_table, cost_table, difference_table, differences
from fastft.report.curves import Run, curves, runs_table
from fastft.report.figures import draw, inline, rendered
from fastft.report.formats import FORMATS, html
from fastft.report.page import page, text
from fastft.report.rows import read

CAPTIONS = {
    "scatter": "Accuracy out of domain against in domain. Small: a seed; large: the mean over seeds with its 95 % "
    "confidence ellipse (over seeds and examples), or a cross of two 95 % intervals where seeds are too few for one.",
    "shots": "Accuracy against the number of labelled examples: mean, and its 95 % interval over seeds and examples.",
    "cost": "Accuracy against what a run costs. Seconds are of the whole run; tokens, of a query as it is answered.",
}


def write_comparison(folders: list[Path], out: Path | None = None) -> tuple[Path, list[str]]:
    """Compare sweeps and runs; returns the page that was written, and a line for each thing that is missing in it.

    Of runs that classify nothing, and of those that failed or were stopped, the page has the training curves alone.

    out: where to write; None is the folder `comparison` in the only one of `folders`. Each table as .md, .tex and .csv,
    each picture as .svg, .pdf and .png, and all in report.html. Raises DataError where there is nothing to compare, and
    before anything is written.
    """
    if out is None and len(folders) > 1:
        raise DataError(f"fastft report: {len(folders)} folders are compared: say where to write with --out DIR")
    trained = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
    names = dict(zip(trained, _short_names(trained), strict=True))
    runs = {names[folder]: Run.read(folder) for folder in trained}
    training = [*runs_table(runs), *curves(runs)]
    finished = [folder for folder in folders if not (folder / "metrics.jsonl").is_file() or runs[names[folder]].summary]
    rows = read(finished)
    if runs and all(row.get("accuracy") is None for row in rows):
        out = out or folders[0] / "comparison"
        out.mkdir(parents=True, exist_ok=True)
        title = f"<h1>{len(runs)} run{'s' if len(runs) > 1 else ''}</h1>"
        write_text(out / "report.html", page("comparison", [title, *training]))
        return out / "report.html", []
    comparison = compare(rows)
    tables = {
        "accuracy": accuracy_table(comparison),
        "differences": difference_table(comparison, differences(comparison)),
        "cost": cost_table(comparison),
    }
    missing = _missing(comparison)
    figures = draw(comparison)
    out = out or folders[0] / "comparison"
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        for suffix, function in FORMATS.items():
            write_text(out / f"{name}.{suffix}", function(table))
    pictures = []
    for name, figure in figures.items():
        for kind in ("svg", "pdf", "png"):
            write_bytes(out / f"{name}.{kind}", rendered(figure, kind))
        pictures.append(inline(figure, CAPTIONS[name]))
    parts = [
        f"<h1>{text(', '.join(dict.fromkeys(group.task for group in comparison.scores)))}: "
        f"{len(comparison.settings)} methods</h1>",
        html(tables["accuracy"]),
        *(f"<p>{text(line)}</p>" for line in missing),
        *pictures,
        html(tables["cost"]),
        f"<details><summary>Which is better?</summary>{html(tables['differences'])}</details>",
        *training,
    ]
    write_text(out / "report.html", page("comparison", parts))
    return out / "report.html", missing


def _short_names(folders: list[Path]) -> list[str]:
    """Folders without what all of their paths begin with."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < 2:
        return list(map(str, folders))
    common = os.path.commonpath(paths)
    return [str(path.relative_to(common)) for path in paths]


def _missing(comparison: Comparison) -> list[str]:
    """Which cells are blank: a line for each setting that has no run on a set of a group."""
    return [
        f"{setting} has no finished run on {name}, trained on {group.task}: {group.model}, {group.num_shots} shots"
        for group, sets in comparison.scores.items()
        for name, settings in sets.items()
        for setting in comparison.settings
        if setting not in settings
    ]
