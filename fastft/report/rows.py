"""What runs found, as a tidy table: a row for each run and evaluated set."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastft.config import PLACES, Config, flatten, load_config
from fastft.errors import DataError

Row = dict[str, Any]

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


def rows_of(name: str, config: Config, summary: dict[str, Any], keys: Iterable[str]) -> list[Row]:
    """The rows of one run: what it is, `keys` of its config, a set's figures with their 95 % intervals, its cost.

    name: for people; folder: the last part of its output_dir. A run on documents evaluates no sets: its figures are one
    row.
    """
    plain = config.plain()
    about = {
        "run": name,
        "folder": Path(config.output_dir).name,
        "method": config.method,
        "peft": summary["peft"],
        "task": config.data.task,
        "set": None,
        "model": config.model.name_or_path,
        "split": config.data.split,
        **{name: summary.get(name) for name in ("pattern", "num_shots", "balanced", "calibrated")},
        "seed": config.seed,
        "data_seed": config.data_seed,
        **{key: _value(plain, key) for key in keys if key not in NAMED},
    }
    seconds = {"seconds": summary["seconds"]["total"]}  # of the run; a set has its own
    rows = []
    for own_set, own in (summary.get("sets") or {config.data.task: summary}).items():
        found = {**summary, **own, **seconds}
        rows.append({**about, "set": own_set, **_figures(own, about), **{key: found.get(key) for key in COSTS}})
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


def read(folders: Iterable[Path]) -> list[Row]:
    """The rows of sweeps' and runs' folders, with the path of each run's as its `folder`.

    The rows of runs that are named one by one also have every key in which the configs of those differ. Raises
    DataError for a folder in which nothing is finished.
    """
    rows, runs = [], {}
    for folder in folders:
        if (folder / "results.csv").is_file():
            rows += _read_sweep(folder)
        elif (folder / "summary.json").is_file():
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            runs[folder] = load_config(folder / "config.yaml"), summary
        else:
            raise DataError(
                f"{folder}: nothing in it is finished: expected the results.csv of a sweep or the summary.json of a run"
            )
    plains = [dict(flatten(config.plain())) for config, _ in runs.values()]
    keys = [key for key in dict.fromkeys(key for plain in plains for key in plain) if key not in PLACES]
    keys = [key for key in keys if len({json.dumps(plain.get(key)) for plain in plains}) > 1]
    for folder, (config, summary) in runs.items():
        rows += [{**row, "folder": folder} for row in rows_of(str(folder), config, summary, keys)]
    return rows


def _read_sweep(folder: Path) -> list[Row]:
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        rows = [{key: _parsed(text) for key, text in row.items()} for row in csv.DictReader(file)]
    missing = [key for key in ("run", "folder", "method", "task", "set", "model") if rows and key not in rows[0]]
    if missing:
        raise DataError(
            f"{folder / 'results.csv'}: has no column {', '.join(missing)}; the sweep's command writes it anew"
        )
    return [{**row, "folder": folder / "runs" / str(row["folder"])} for row in rows]


def _parsed(text: str | None) -> Any:
    """A cell: a number, a truth value, a word, or None where it is empty."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return {"True": True, "False": False}.get(text, text or None)
