"""A table in Markdown, LaTeX, CSV and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastft.report.page import text

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


PAGE_ROWS = 40  # of a page in LaTeX


def latex_escape(value: str) -> str:
    """Text as LaTeX sets it."""
    return "".join(ESCAPES.get(character, character) for character in value)


def latex(table: Table) -> str:
    """A table in the style of booktabs: one float, or over several pages where it has more than PAGE_ROWS rows."""
    rows = table.cells(latex_escape, r"\textbf{{{}}}", r"{}\textsuperscript{{\textdagger}}")
    head, *body = (" & ".join(cells) + r" \\" for cells in (map(latex_escape, table.columns), *rows))
    sides, caption = "".join(table.columns.values()), rf"\caption{{{latex_escape(table.caption)}}}"
    head = [r"\toprule", head, r"\midrule"]
    if len(body) > PAGE_ROWS:
        begin = [r"% needs \usepackage{booktabs,longtable}", rf"{{\small\begin{{longtable}}{{{sides}}}"]
        begin += [caption + r" \\", *head, r"\endfirsthead", *head, r"\endhead", r"\bottomrule", r"\endlastfoot"]
        return "\n".join([*begin, *body, r"\end{longtable}}", ""])
    begin = [r"% needs \usepackage{booktabs}", r"\begin{table*}", r"\centering\small", caption]
    begin += [rf"\begin{{tabular}}{{{sides}}}", *head]
    return "\n".join([*begin, *body, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""])


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
