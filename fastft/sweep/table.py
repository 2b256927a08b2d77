"""What a sweep found, as one tidy table: a row for each run and evaluated set, in the order of the grid."""

from __future__ import annotations

import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.table import Table

from fastft.files import replaced
from fastft.report.table import number, percent
from fastft.sweep.grid import Run, Sweep

# Keys whose values are in a row already, under a shorter name.
NAMED = {
    "method": "method",
    "peft.kind": "peft",
    "data.task": "task",
    "data.pattern": "pattern",
    "data.split": "split",
    "model.name_or_path": "model",
    "icl.num_shots": "num_shots",
    "icl.balanced": "balanced",
    "icl.calibrate": "calibrated",
    "seed": "seed",
    "data.seed": "data_seed",
}
# What a row costs, in the last columns. Seconds, memory and speed are all that differs when a run is done again.
COSTS = ("seconds", "peak_memory_bytes", "trained_parameters", "inference_tokens_per_query", "tokens_per_s")


def rows_of(run: Run, summary: dict[str, Any], keys: list[str]) -> list[dict[str, Any]]:
    """The rows of one run: what it is, `keys` of its config, a set's figures with their 95 % intervals, its cost.

    A run on documents evaluates no sets: its figures are one row.
    """
    plain = run.config.plain()
    about = {
        "run": run.name,
        "method": run.config.method,
        "peft": summary["peft"],
        "task": run.config.data.task,
        "set": None,
        "model": run.config.model.name_or_path,
        "split": run.config.data.split,
        **{name: summary.get(name) for name in ("pattern", "num_shots", "balanced", "calibrated")},
        "seed": run.config.seed,
        "data_seed": run.config.data_seed,
        **{key: _value(plain, key) for key in keys if key not in NAMED},
    }
    seconds = {"seconds": summary["seconds"]["total"]}  # of the run; a set has its own
    rows = []
    for name, own in (summary.get("sets") or {run.config.data.task: summary}).items():
        found = {**summary, **own, **seconds}
        rows.append({**about, "set": name, **_figures(own, about), **{key: found.get(key) for key in COSTS}})
    return rows


def _figures(found: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a set, each followed by the ends of its interval; what a row says elsewhere is left out."""
    figures = {}
    for key, value in found.items():
        if key in about or key in COSTS or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        figures[key] = value
        if key in found.get("intervals", {}):
            figures[f"{key}_low"], figures[f"{key}_high"] = found["intervals"][key]
    return figures


def _value(plain: dict[str, Any], key: str) -> Any:
    """A config's value; None where the method does not use the key. Lists as JSON: a cell holds one value."""
    value: Any = plain
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return json.dumps(value) if isinstance(value, list | dict) else value


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


SHOWN = {"accuracy": percent, "mcc": number, "nll": number, "recovery": number}


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
