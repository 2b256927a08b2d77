"""The tables of a comparison, in Markdown, LaTeX and CSV, and the folder in which `fastft report` leaves everything."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft.errors import DataError
from fastft.files import replaced, write_text
from fastft.report.compare import COSTS, Comparison, Group, Scores, compare
from fastft.report.curves import Run, curves, runs_table
from fastft.report.figures import draw, inline, rendered
from fastft.report.page import page, text
from fastft.report.rows import read
from fastft.report.stats import ALPHA, Estimate, holm

BEST, TIED = "best", "tied"


@dataclass(frozen=True)
class Table:
    """columns: head -> how a cell is aligned, "l" or "r". marks: (row, column) -> BEST or TIED.

    records: the same and more as plain numbers, a row for each figure.
    """

    caption: str
    columns: dict[str, str]
    rows: list[list[str]]
    records: list[dict[str, Any]]
    marks: dict[tuple[int, int], str] = field(default_factory=dict)

    def cells(self, escape: Callable[[str], str], best: str, tied: str) -> list[list[str]]:
        """The rows in a language of its own: `best` and `tied` have a place for the text that they mark."""
        marked = {BEST: best, TIED: tied, None: "{}"}
        return [
            [marked[self.marks.get((i, j))].format(escape(cell)) for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]


@dataclass(frozen=True)
class Difference:
    """`better` is more accurate than `worse` on a set by `by`; adjusted: its p among all pairs of the group and set."""

    group: Group
    set: str
    better: str
    worse: str
    by: Estimate
    adjusted: float | None


def differences(comparison: Comparison) -> list[Difference]:
    """Every pair of settings of a group on a set that have a seed in common."""
    found = []
    for group, sets in comparison.scores.items():
        for name, settings in sets.items():
            pairs = []
            for a, b in itertools.combinations(settings, 2):
                if settings[a].estimate.mean < settings[b].estimate.mean:
                    a, b = b, a
                by = settings[a].minus(settings[b])
                if by:
                    pairs.append((a, b, by))
            adjusted = holm([by.p for *_, by in pairs])
            found += [Difference(group, name, *pair, p) for pair, p in zip(pairs, adjusted, strict=True)]
    return found


def accuracy_table(comparison: Comparison) -> Table:
    """A row for each setting of a model and number of shots, a column for each task and set."""
    places = list(dict.fromkeys((group.task, name) for group, sets in comparison.scores.items() for name in sets))
    heads = [task if task == name else f"{task} → {name}" for task, name in places]
    leading, rows, records, marks = _leading(comparison), [], [], {}
    for (model, num_shots), setting in itertools.product(_blocks(comparison), comparison.settings):
        cells, counts = [], set()
        for column, (task, name) in enumerate(places, len(leading) + 2):
            group = Group(model, task, num_shots)
            settings = comparison.scores.get(group, {}).get(name, {})
            own = settings.get(setting)
            cells.append(_percent(own.estimate) if own else "")
            if own:
                counts.add(len(own.rows))
                mark = _marks(settings).get(setting)
                marks |= {(len(rows), column): mark} if mark else {}
                records.append(
                    {
                        **_about(group, name),
                        "method": setting,
                        "out_of_domain": name != task,
                        "seeds": len(own.rows),
                        "accuracy": own.estimate.mean,
                        "low": own.estimate.low,
                        "high": own.estimate.high,
                        "majority": own.mean("majority"),
                        "mark": mark,
                    }
                )
        if counts:
            seeds = "-".join(map(str, sorted({min(counts), max(counts)})))
            rows.append([*_values(leading, model, num_shots), setting, seeds, *cells])
    columns = {**dict.fromkeys(leading, "l"), "method": "l", "seeds": "r", **dict.fromkeys(heads, "r")}
    caption = (
        "Accuracy in percent: mean over seeds and 95 % interval of a bootstrap over seeds and examples, none of one "
        f"seed. A → B: trained on A, evaluated on B. Bold: the best{_each(leading)}; †: not shown to be worse "
        f"(p ≥ {ALPHA}, paired bootstrap, Holm's correction within the column)."
    )
    return Table(caption, columns, rows, records, marks)


def _marks(settings: dict[str, Scores]) -> dict[str, str]:
    """Which settings are the best on a set, and which are not shown to be worse than the first of those."""
    means = {setting: scores.estimate.mean for setting, scores in settings.items()}
    best = max(means, key=means.__getitem__)
    worse = [setting for setting in means if means[setting] < means[best]]
    by = [settings[best].minus(settings[setting]) for setting in worse]
    adjusted = holm([own.p if own else None for own in by])
    tied = {setting: TIED for setting, p in zip(worse, adjusted, strict=True) if p is not None and p >= ALPHA}
    return {setting: BEST for setting in means if setting not in worse} | tied


def cost_table(comparison: Comparison) -> Table:
    """A row for each task and setting; means over the seeds."""
    leading, rows, records = _leading(comparison), [], []
    for group, sets in comparison.scores.items():
        for setting, own in sets.get(group.task, {}).items():
            means = {key: own.mean(key) for key in COSTS}
            shown = ["" if v is None else _figure(v / COSTS[key].unit) for key, v in means.items()]
            rows.append([*_values(leading, group.model, group.num_shots), group.task, setting, *shown])
            records.append({**_about(group), "method": setting, "seeds": len(own.rows), **means})
    columns = dict.fromkeys([*leading, "task", "method"], "l") | {cost.name: "r" for cost in COSTS.values()}
    caption = "What a run costs, mean over seeds: seconds of the whole run, and tokens that a query is answered with."
    return Table(caption, columns, rows, records)


def difference_table(comparison: Comparison, found: list[Difference]) -> Table:
    """A row for each pair of settings on each set."""
    leading, rows, records = _leading(comparison), [], []
    for d in found:
        ps = ["" if p is None else f"{p:.3f}" for p in (d.by.p, d.adjusted)]
        where = [*_values(leading, d.group.model, d.group.num_shots), d.group.task, d.set]
        rows.append([*where, d.better, d.worse, _percent(d.by), *ps])
        numbers = {"difference": d.by.mean, "low": d.by.low, "high": d.by.high, "p": d.by.p, "p_holm": d.adjusted}
        records.append({**_about(d.group, d.set), "better": d.better, "worse": d.worse, **numbers})
    columns = dict.fromkeys([*leading, "task", "set", "better", "worse"], "l")
    columns |= dict.fromkeys(["points", "p", "p (Holm)"], "r")
    caption = (
        "By how many points of accuracy one method is better than another on the same seeds and examples: mean, 95 % "
        "interval and two-sided p of a paired bootstrap; Holm's p allows for all pairs on a set. Blank: only one seed "
        "in common."
    )
    return Table(caption, columns, rows, records)


def _blocks(comparison: Comparison) -> list[tuple[str, int]]:
    return list(dict.fromkeys((group.model, group.num_shots) for group in comparison.scores))


def _leading(comparison: Comparison) -> list[str]:
    """The columns in front of the method's: what else differs."""
    models, counts = zip(*_blocks(comparison), strict=True)
    return ["model"] * (len(set(models)) > 1) + ["shots"] * (len(set(counts)) > 1)


def _values(leading: list[str], model: str, num_shots: int) -> list[str]:
    return [{"model": model, "shots": str(num_shots)}[head] for head in leading]


def _each(leading: list[str]) -> str:
    return f" for each {' and number of '.join(leading)}" if leading else ""


def _about(group: Group, name: str | None = None) -> dict[str, Any]:
    about = {"model": group.model, "num_shots": group.num_shots, "task": group.task}
    return about | ({"set": name} if name else {})


def _percent(estimate: Estimate) -> str:
    """The ends of an interval in whole points: few seeds do not say more. All digits are in the CSV."""
    mean = f"{100 * estimate.mean:.1f}"
    return mean if estimate.low is None else f"{mean} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def _figure(value: float) -> str:
    """Three digits, and all in front of the point."""
    return f"{value:,.0f}" if value == 0 or value >= 100 else f"{value:.3g}"


def markdown(table: Table) -> str:
    """A pipe table whose columns are aligned in the file too, below its caption."""
    rows = table.cells(lambda cell: cell.replace("|", "\\|"), "**{}**", "{} †")
    widths = [max(3, *map(len, column)) for column in zip(table.columns, *rows, strict=True)]
    sides = table.columns.values()
    rule = ["-" * width if side == "l" else "-" * (width - 1) + ":" for width, side in zip(widths, sides, strict=True)]
    lines = []
    for row in (list(table.columns), rule, *rows):
        aligned = (c.ljust(w) if s == "l" else c.rjust(w) for c, w, s in zip(row, widths, sides, strict=True))
        lines.append(f"| {' | '.join(aligned)} |")
    return "\n".join([table.caption, "", *lines, ""])


ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "→": r"$\rightarrow$",
    "≥": r"$\geq$",
    "−": r"$-$",
    "†": r"\textdagger{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex_escape(value: str) -> str:
    """Text as LaTeX sets it."""
    return "".join(ESCAPES.get(character, character) for character in value)


def latex(table: Table) -> str:
    """A table in the style of booktabs."""
    rows = table.cells(latex_escape, r"\textbf{{{}}}", r"{}\textsuperscript{{\textdagger}}")
    head, *body = (" & ".join(cells) + r" \\" for cells in (map(latex_escape, table.columns), *rows))
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table*}",
            r"\centering\small",
            rf"\caption{{{latex_escape(table.caption)}}}",
            rf"\begin{{tabular}}{{{''.join(table.columns.values())}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table*}",
            "",
        ]
    )


def comma_separated(table: Table) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(table.records[0]) if table.records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.records)
    return file.getvalue()


def html(table: Table) -> str:
    sides = ["left" if side == "l" else "right" for side in table.columns.values()]
    lines = []
    for tag, cells in (
        ("th", map(text, table.columns)),
        *(("td", row) for row in table.cells(text, "<b>{}</b>", "{} †")),
    ):
        own = (f'<{tag} style="text-align:{side}">{c}</{tag}>' for c, side in zip(cells, sides, strict=True))
        lines.append(f"<tr>{''.join(own)}</tr>")
    return f"<p>{text(table.caption)}</p><table>{''.join(lines)}</table>"


FORMATS = {"md": markdown, "tex": latex, "csv": comma_separated}
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
            with replaced(out / f"{name}.{kind}") as path:
                path.write_bytes(rendered(figure, kind))
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
