"""The tables of a comparison, in Markdown, LaTeX and CSV, and the folder in which `fastft report` leaves everything."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft.report.compare import COSTS, Comparison, Group, compare, read
from fastft.report.html import page, text
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


def accuracy_table(comparison: Comparison, found: list[Difference]) -> Table:
    """A row for each setting of a model and number of shots, a column for each task and set."""
    places = list(dict.fromkeys((group.task, name) for group, sets in comparison.scores.items() for name in sets))
    heads = {task if task == name else f"{task} → {name}": (task, name) for task, name in places}
    leading, rows, records, marks = _leading(comparison), [], [], {}
    compared = {(d.group, d.set, d.better, d.worse): d.adjusted for d in found}
    for (model, num_shots), setting in itertools.product(_blocks(comparison), comparison.settings):
        cells, counts = [], set()
        for column, (task, name) in enumerate(heads.values(), len(leading) + 2):
            group = Group(model, task, num_shots)
            settings = comparison.scores.get(group, {}).get(name, {})
            own = settings.get(setting)
            if not own:
                cells.append("")
                continue
            best = max(settings, key=lambda other: settings[other].estimate.mean)
            p = compared.get((group, name, best, setting))
            if settings[setting].estimate.mean == settings[best].estimate.mean:
                marks[len(rows), column] = BEST
            elif p is not None and p >= ALPHA:
                marks[len(rows), column] = TIED
            counts.add(len(own.rows))
            cells.append(_percent(own.estimate))
            records.append(
                {
                    **_about(group, name),
                    "method": setting,
                    "out_of_domain": name != task,
                    "seeds": len(own.rows),
                    "accuracy": own.estimate.mean,
                    "accuracy_low": own.estimate.low,
                    "accuracy_high": own.estimate.high,
                    "majority": own.majority,
                    "mark": marks.get((len(rows), column)),
                }
            )
        if counts:
            seeds = f"{min(counts)}" + (f"-{max(counts)}" if len(counts) > 1 else "")
            rows.append([*_values(leading, model, num_shots), setting, seeds, *cells])
    columns = {**dict.fromkeys(leading, "l"), "method": "l", "seeds": "r", **dict.fromkeys(heads, "r")}
    caption = (
        "Accuracy in percent, mean over seeds with the 95 % interval of a bootstrap over seeds and examples; A → B is "
        f"trained on A and evaluated on B. Bold: the best of a column{_each(leading)}; †: not shown to be worse than it "
        f"(p ≥ {ALPHA} in a paired bootstrap, after Holm). One seed has no interval."
    )
    return Table(caption, columns, rows, records, marks)


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
        "By how many points of accuracy one method is better than another on the same seeds and examples, with the 95 % "
        "interval and two-sided p of a paired bootstrap; Holm's p allows for all pairs on a set. Blank: one seed in common."
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
    mean = f"{100 * estimate.mean:.1f}"
    return mean if estimate.low is None else f"{mean} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _figure(value: float) -> str:
    """Three digits, and all in front of the point."""
    return f"{value:,.0f}" if value == 0 or value >= 100 else f"{value:.3g}"


def markdown(table: Table) -> str:
    """A pipe table whose columns are aligned in the file too, with its caption above."""
    marked = {BEST: "**{}**", TIED: "{} †", None: "{}"}
    rows = [
        [marked[table.marks.get((i, j))].format(cell.replace("|", "\\|")) for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    widths = [max(3, *map(len, column)) for column in zip(table.columns, *rows, strict=True)]
    sides = list(table.columns.values())

    def line(cells: Iterable[str]) -> str:
        aligned = (c.ljust(w) if s == "l" else c.rjust(w) for c, w, s in zip(cells, widths, sides, strict=True))
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * width if side == "l" else "-" * (width - 1) + ":" for width, side in zip(widths, sides, strict=True)]
    return "\n".join([table.caption, "", line(table.columns), line(rule), *map(line, rows)]) + "\n"


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


def escape(value: str) -> str:
    """Text as LaTeX sets it."""
    return "".join(ESCAPES.get(character, character) for character in value)


def latex(table: Table) -> str:
    """A table environment in the style of booktabs: needs \\usepackage{booktabs}."""
    marked = {BEST: r"\textbf{{{}}}", TIED: r"{}\textsuperscript{{\textdagger}}", None: "{}"}
    rows = [
        [marked[table.marks.get((i, j))].format(escape(cell)) for j, cell in enumerate(row)]
        for i, row in enumerate(table.rows)
    ]
    lines = [" & ".join(cells) + r" \\" for cells in ([escape(head) for head in table.columns], *rows)]
    return "\n".join(
        [
            "% \\usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(table.caption)}}}",
            rf"\begin{{tabular}}{{{''.join(table.columns.values())}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
