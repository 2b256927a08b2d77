"""A sweep's file, and the runs that it comes to.

output_dir: runs/mine
base: {model: {...}, icl: {num_shots: 16}}      # or the path of a run's config
runs:                                           # named sets of values, one of which each run has
  icl: {method: icl}
  pbft-lora: {method: pbft, peft.kind: lora, train.steps: 20}
grid:                                           # every combination of
  data: {rte: {data.task: rte, data.ood: [hans]}, qqp: {data.task: qqp}}    # named sets of values
  seed: [0, 1, 2]                                                           # values of a key
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from fastft.config import (
    PLACES,
    Config,
    Folder,
    PositiveInt,
    Section,
    check,
    describe,
    flatten,
    list_problems,
    load_values,
    set_value,
)
from fastft.errors import ConfigError, DataError
from fastft.tasks import select_pattern, select_tasks

NAME_LENGTH = 120  # of the 255 bytes that a file name may have
HASH_LENGTH = 10
OWN = ("output_dir", "overwrite", "resume")  # what the sweep says to each run
SECTIONS = {key for key, kind, *_ in describe() if kind == "section"}


class SweepConfig(Section):
    """A sweep's file."""

    output_dir: Folder = Field(..., description="folder of the sweep: its table, its runs, their logs")
    parallel: PositiveInt = Field(
        1, description="runs at once on this machine, with the cores, and the GPUs in turn, divided among them"
    )
    base: str | dict[str, Any] = Field({}, description="what all runs share: values, or the path of a run's config")
    runs: dict[str, Any] = Field(
        {},
        description="name -> values of keys (dotted or nested; null takes a section out): a run has those of one name",
    )
    grid: dict[str, Any] = Field(
        {},
        description="key -> list of values, or any word -> named sets of values as in runs; every combination is run",
    )

    @model_validator(mode="after")
    def _axes(self):
        problems = [
            f"runs.{name}: got {values!r}, expected values of keys, like {{method: icl}}"
            for name, values in self.runs.items()
            if not isinstance(values, dict)
        ]
        for key, values in self.grid.items():
            named = isinstance(values, dict) and all(isinstance(v, dict) for v in values.values())
            if not values or not (named or isinstance(values, list)):
                problems.append(f"grid.{key}: got {values!r}, expected a list of values, or names with values of keys")
        if not self.runs and not self.grid:
            problems.append("runs, grid: both are empty; expected at least one of them")
        if problems:
            raise ValueError("\n  ".join(problems))
        return self


@dataclass(frozen=True)
class Run:
    """name: for people. config: complete, with its own output_dir."""

    name: str
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)


@dataclass(frozen=True)
class Sweep:
    """keys: what differs between the runs, dotted."""

    output_dir: Path
    parallel: int
    runs: list[Run]
    keys: list[str]


Choice = tuple[str, dict[str, Any]]  # a name, and values of dotted keys


def load_sweep(path: str | os.PathLike, overrides: list[str] | tuple[str, ...] = ()) -> Sweep:
    """Read a sweep's file and validate every run of it; raises ConfigError that lists every problem of all runs."""
    file, problems = check(load_values(path, overrides), SweepConfig)
    if file is None:
        raise ConfigError(list_problems(str(path), problems))
    base = _base(file, str(path))
    axes = list(_axes(file))
    of_axes = [dict.fromkeys(key for _, values in axis for key in values) for axis in axes]
    counts = Counter(itertools.chain(*of_axes))
    problems = [f"{key}: is set in two places of runs and grid; keep one" for key, count in counts.items() if count > 1]
    problems += [f"{key}: the sweep says this to each run itself; remove it" for key in OWN if key in counts]

    runs, who = [], defaultdict(list)  # problem -> the runs that have it
    for combination in itertools.product(*axes):
        name = "-".join(name for name, _ in combination)
        config, found = _resolve(base, [values for _, values in combination], Path(file.output_dir), name)
        for problem in found:
            who[problem].append(name)
        if config:
            runs.append(Run(name, config))
    problems += [f"{_listing(names)}: {problem}" for problem, names in who.items()]
    same = defaultdict(list)
    for run in runs:
        same[identity(run.config)].append(run.name)
    problems += [f"{_listing(names)}: are the same run" for names in same.values() if len(names) > 1]
    if problems:
        raise ConfigError(list_problems(str(path), problems))
    return Sweep(Path(file.output_dir), file.parallel, runs, list(counts))


def select_part(runs: list[Run], part: str | None) -> list[Run]:
    """The runs of part "i/n": every n-th, from the i-th. Raises ConfigError unless 1 <= i <= n."""
    if part is None:
        return runs
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise ConfigError(f"--part {part}: expected i/n with 1 <= i <= n, like 2/4 for the second of four")
    return runs[i - 1 :: n]


def identity(config: Config) -> str:
    """What makes a run the same run: its resolved values without those that say where it works."""
    return _without_places(config.plain())


def _without_places(plain: dict[str, Any]) -> str:
    for key in PLACES:
        section, _, name = key.rpartition(".")
        (plain.get(section, {}) if section else plain).pop(name, None)
    return json.dumps({key: value for key, value in plain.items() if value != {}}, sort_keys=True)


def _base(file: SweepConfig, source: str) -> dict[str, Any]:
    if isinstance(file.base, str):
        return {key: value for key, value in load_values(file.base).items() if key not in OWN}
    own = [f"base.{key}: the sweep says this to each run itself; remove it" for key in OWN if key in file.base]
    if own:
        raise ConfigError(list_problems(source, own))
    return file.base


def _axes(file: SweepConfig) -> Iterator[list[Choice]]:
    """What is chosen from, in the order of the file, the runs first."""
    runs = {"runs": file.runs} if file.runs else {}
    for key, values in [*runs.items(), *file.grid.items()]:
        if isinstance(values, dict):
            yield [(_clean(str(name)), dict(flatten(own))) for name, own in values.items()]
        else:
            yield [(_label(key, value), dict(flatten({key: value}))) for value in values]


def _label(key: str, value: Any) -> str:
    """A value in a run's name: a word as it is, anything else behind the last part of its key."""
    return _clean(value if isinstance(value, str) else f"{key.rpartition('.')[2]}{json.dumps(value)}")


def _clean(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", name).strip("_.") or "_"


def _resolve(
    base: dict[str, Any], choices: list[dict[str, Any]], output_dir: Path, name: str
) -> tuple[Config | None, list[str]]:
    """The config of one combination, or None and what is wrong with it."""
    raw = copy.deepcopy(base)
    try:
        for key, value in itertools.chain.from_iterable(values.items() for values in choices):
            if value is None and key in SECTIONS:
                _remove(raw, key)
            else:
                set_value(raw, key, value)
    except ConfigError as error:
        return None, [str(error)]
    config, problems = check({**raw, "output_dir": str(output_dir)})
    if config is None:
        return None, problems
    if config.kind != "documents":
        try:
            select_tasks(config.data)
            select_pattern(config.data)
        except DataError as error:
            return None, [str(error)]
    # Of what is not a default: a key that fastft gains later leaves the folders of earlier runs where they are, and
    # `identity` tells whether they still hold this run.
    chosen = _without_places(config.model_dump(mode="json", exclude_defaults=True))
    digest = hashlib.sha256(chosen.encode()).hexdigest()[:HASH_LENGTH]
    folder = output_dir / "runs" / f"{name[:NAME_LENGTH]}-{digest}"
    return config.model_copy(update={"output_dir": str(folder)}), []


def _remove(raw: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        raw = raw.get(parent, {})
    raw.pop(last, None)


def _listing(names: list[str]) -> str:
    shown, more = ", ".join(names[:3]), len(names) - 3
    return shown + (f" and {more} more" if more > 0 else "")
