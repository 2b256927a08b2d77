"""What a sweep found, as one tidy table: a row for each run and evaluated set, in the order of the grid."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.table import Table

from fastft.files import replaced
from fastft.report.rows import COSTS, NAMED
from fastft.report.table import number, percent
from fastft.sweep.grid import Sweep


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write results.csv and results.parquet, each in one step."""
    import pyarrow
    import pyarrow.parquet

    for partial in folder.glob(".results.*.partial-*"):  # of a sweep that was killed; one writes at a time
        partial.unlink()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda key: key in COSTS)  # stable: the cost last
    with replaced(folder / "results.csv") as path, open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with replaced(folder / "results.parquet") as path:
        table = pyarrow.table({column: [row.get(column) for row in rows] for column in columns})
        pyarrow.parquet.write_table(table, path)


SHOWN = {"accuracy": percent, "rougeL": percent, "mcc": number, "nll": number, "recovery": number}


def seeds_table(sweep: Sweep, rows: list[dict[str, Any]]) -> Table:
    """For a terminal: mean and standard deviation over the seeds of what is otherwise the same."""
    heads = ["method", "peft", "task", "set"]
    for key in sweep.keys:  # those that tell apart what these heads do not
        name = NAMED.get(key, key)
        if name not in ("seed", "data_seed", *heads) and len(_groups(rows, heads)) < len(_groups(rows, [*heads, name])):
            heads.append(name)
    figures = [name for name in SHOWN if any(row.get(name) is not None for row in rows)]
    table = Table(title=f"{sweep.output_dir}: mean ± standard deviation over seeds", title_justify="left")
    for head in (*heads, "runs", *(name.upper() if name in ("mcc", "nll") else name for name in figures), "seconds"):
        table.add_column(head, justify="left" if head in heads else "right")
    for own, found in _groups(rows, heads).items():
        cells = [_spread([row[name] for row in found if row.get(name) is not None], SHOWN[name]) for name in figures]
        seconds = statistics.mean(row["seconds"] for row in found)
        table.add_row(*own, str(len(found)), *cells, f"{seconds:.0f}")
    return table


def _groups(rows: list[dict[str, Any]], heads: list[str]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple("" if row.get(head) is None else str(row[head]) for head in heads)].append(row)
    return groups


def _spread(values: list[float], shown) -> str:
    if not values:
        return ""
    mean = shown(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {shown(statistics.stdev(values)).removesuffix(' %')}"
