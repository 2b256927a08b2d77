"""`fastft report`: what finished runs found, side by side, as tables, pictures and one page.

A *setting* is what is compared: a method with its kind of parameters, and whatever else of the config differs among its
runs. Its runs differ in their seeds, and are paired by them with those of other settings.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastft.errors import DataError
from fastft.report.rows import Row
from fastft.report.stats import RESAMPLES, Estimate, bootstrap, resample_examples


class Cost(NamedTuple):
    """name: with the unit that it is shown in; unit: how much that is in the table."""

    name: str
    unit: float = 1


COSTS = {
    "seconds": Cost("seconds"),
    "peak_memory_bytes": Cost("peak memory, GiB", 2**30),
    "trained_parameters": Cost("trained parameters"),
    "inference_tokens_per_query": Cost("tokens per query"),
}
NAMES = {
    "icl": "ICL",
    "pbft": "PBFT",
    "ft": "FT",
    "distill": "distillation",
    "lora": "LoRA",
    "bitfit": "BitFit",
    "full": "full",
    "head": "head",
}
DETAILS = ("pattern", "balanced", "calibrated", "split")  # in a setting's name where they differ, as dotted keys are

Seed = tuple[Any, Any]


@dataclass(frozen=True)
class Group:
    """What is compared within: a model with a number of labelled examples of a task."""

    model: str
    task: str
    num_shots: int


@dataclass
class Scores:
    """The runs of a setting on one set, by seed: accuracies [S], and the same under draws of the examples [S, R]."""

    rows: dict[Seed, Row]
    resampled: dict[Seed, np.ndarray] = field(default_factory=dict)

    @property
    def accuracy(self) -> np.ndarray:
        return np.array([row["accuracy"] for row in self.rows.values()])

    @cached_property
    def estimate(self) -> Estimate:
        found = bootstrap(self.accuracy, np.stack([self.resampled[seed] for seed in self.rows]))
        return found if found.low is None else replace(found, low=max(0.0, found.low), high=min(1.0, found.high))

    def mean(self, key: str) -> float | None:
        """Of a column over the runs; None where a run does not say it."""
        values = [row.get(key) for row in self.rows.values()]
        return None if None in values else float(np.mean(values))

    def beside(self, other: Scores) -> tuple[np.ndarray, np.ndarray]:
        """Both at the n seeds that both have: [n, 2], and under draws of the examples [n, 2, R]."""
        seeds, both = [seed for seed in self.rows if seed in other.rows], (self, other)
        points = np.array([[scores.rows[seed]["accuracy"] for scores in both] for seed in seeds])
        resampled = np.array([[scores.resampled[seed] for scores in both] for seed in seeds])
        return points, resampled

    def minus(self, other: Scores) -> Estimate | None:
        """The paired difference over the seeds that both have; None without one."""
        points, resampled = self.beside(other)
        return bootstrap(points[:, 0] - points[:, 1], resampled[:, 0] - resampled[:, 1]) if len(points) else None


@dataclass(frozen=True)
class Comparison:
    """scores: group -> set -> setting -> Scores; settings, and the sets of a task, its own first, in their order."""

    scores: dict[Group, dict[str, dict[str, Scores]]]
    settings: list[str]

    @property
    def panels(self) -> list[tuple[Group, str | None]]:
        """Each group with each of its sets of another distribution, or with None where it has none."""
        return [
            (group, name)
            for group, sets in self.scores.items()
            for name in ([name for name in sets if name != group.task] or [None])
        ]

    def title(self, group: Group) -> str:
        """What of the model and the shots differs between groups."""
        parts = [group.model] if len({g.model for g in self.scores}) > 1 else []
        parts += [f"{group.num_shots} shots"] if len({g.num_shots for g in self.scores}) > 1 else []
        return ", ".join(parts)


def compare(rows: list[Row]) -> Comparison:
    """Group the rows, and read the runs' predictions.

    Raises DataError where no row is of a classification, for two runs that differ in nothing, and for runs that were
    asked different examples.
    """
    rows = [row for row in rows if row.get("accuracy") is not None]
    if not rows:
        raise DataError("fastft report: no run here evaluates a classification task; there is nothing to compare yet")
    labels = name_settings(rows)
    scores: dict[Group, dict[str, dict[str, Scores]]] = defaultdict(lambda: defaultdict(dict))
    for row, label in zip(rows, labels, strict=True):
        group = Group(str(row["model"]), str(row["task"]), row.get("num_shots") or 0)
        own = scores[group][str(row["set"])].setdefault(label, Scores({}))
        seed = (row.get("seed"), row.get("data_seed"))
        if seed in own.rows:
            raise DataError(
                f"{own.rows[seed]['run']} and {row['run']}: are both {label} on {row['set']} with seed {seed[0]}; a "
                "comparison needs each run once"
            )
        own.rows[seed] = row
    asked_alike = defaultdict(list)
    for group, sets in scores.items():
        for name, settings in sets.items():
            asked_alike[group.task, name] += settings.values()
    for (_, name), found in asked_alike.items():
        _resample(name, found)
    ordered = {group: dict(sorted(sets.items(), key=lambda s: s[0] != group.task)) for group, sets in scores.items()}
    return Comparison(ordered, list(dict.fromkeys(labels)))


def name_settings(rows: list[Row]) -> list[str]:
    """For each row the method, its kind of parameters, and what else differs among that method's runs of a group."""
    details = [key for key in dict.fromkeys(key for row in rows for key in row) if key in DETAILS or "." in key]
    kinds = [(row["method"], row.get("peft")) for row in rows]
    found = defaultdict(lambda: defaultdict(set))
    for row, kind in zip(rows, kinds, strict=True):
        for key in details:
            found[kind, key][row["model"], row["task"], row.get("num_shots")].add(row.get(key))
    differing = {own: any(len(values) > 1 for values in groups.values()) for own, groups in found.items()}

    def name(row: Row, kind: tuple) -> str:
        parts = [NAMES.get(word, str(word)) for word in kind if word]
        for key in details:
            value = row.get(key)
            if not differing[kind, key] or value is None or value is False:
                continue
            short = key.rpartition(".")[2]
            parts.append(short if value is True else f"{short}={value}")
        return " ".join(parts)

    return list(map(name, rows, kinds))


def _resample(name: str, found: list[Scores]) -> None:
    """Fill in `resampled` of all runs on a set, with the same draws for those that were asked the same examples."""
    runs = [(own, seed, row) for own in found for seed, row in own.rows.items()]
    asked: dict[tuple[Seed, type], tuple[str, Any]] = {}
    kept = defaultdict(list)  # by the examples' labels: those of another seed may be others
    for own, seed, row in runs:
        labels, correct = _predictions(row["folder"], name) or (None, None)
        for examples in (row.get("examples"), labels):
            first, expected = asked.setdefault((seed, type(examples)), (row["run"], examples))
            if examples != expected:
                raise DataError(
                    f"{name}: {first} and {row['run']} were asked different examples; compare runs with the same "
                    "data.split and evaluate.max_examples"
                )
        own.resampled[seed] = np.full(RESAMPLES, row["accuracy"])
        if labels is None:
            continue
        if not math.isclose(np.mean(correct), row["accuracy"]):
            raise DataError(
                f"{row['folder']}/predictions.jsonl: {np.mean(correct):.4f} of {name} is right, and the table says "
                f"{row['accuracy']:.4f}; the sweep's command writes the table anew"
            )
        kept[labels].append((own, seed, correct))
    for i, alike in enumerate(kept.values()):
        drawn = resample_examples(np.array([correct for *_, correct in alike]), seed=i)
        for (own, seed, _), accuracies in zip(alike, drawn, strict=True):
            own.resampled[seed] = accuracies


def _predictions(folder: Path, name: str) -> tuple[tuple[int, ...], list[bool]] | None:
    """The labels of a set's examples, and whether the run got them right; None where it kept no predictions."""
    path = folder / "predictions.jsonl"
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        own = [found for found in map(json.loads, file) if found["set"] == name]
    own.sort(key=lambda found: found["index"])
    return tuple(found["label"] for found in own), [found["label"] == found["predicted"] for found in own]
