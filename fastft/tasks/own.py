"""Examples of one's own, labelled or with a summary: files or a dataset on the hub, with a pattern in the config.

data:
  task: jsonl
  files: {train: reviews.jsonl, validation: reviews-dev.csv, films: films.jsonl}
  pattern: "Review: {text}\\nSentiment:"
  target: sentiment                          # the label's column
  verbalizer: {pos: good, neg: bad}
  ood: [films]

With `task: summarization` the target is a text that is written behind the pattern, and there is no verbalizer. It is
one line: line breaks in it become spaces, as a line break ends a generated one.
"""

from __future__ import annotations

import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.config import DataConfig, label_name
from fastft.errors import DataError
from fastft.tasks.base import READERS, Row, hub_rows, text_field
from fastft.tasks.classification import NO_LABEL, Example, Pattern


@dataclass(frozen=True)
class OwnTask:
    """What a ClassificationTask is among the shipped ones. split: the one that it always loads; None: any."""

    name: str
    config: DataConfig
    split: str | None = None

    @property
    def patterns(self) -> dict[str, Pattern]:
        return dict([select_pattern(self.config)])

    def load(self, split: str, root: str | None) -> list[Example]:
        """The examples of a split, in its order; raises DataError where there are none or a row is malformed."""
        split = self.split or split
        examples = [self._read(row, place) for place, row in self._rows(split)]
        if not examples:
            raise DataError(f"data.{'hub' if self.config.hub else 'files'}: split {split!r} holds no examples")
        return examples

    def _rows(self, split: str) -> Iterable[Row]:
        c = self.config
        if c.hub:
            return hub_rows("data.hub", c.hub, split, instead="data.files to a local copy in its place")
        if split not in c.files:
            why = ", from which demonstrations and training examples come" if split == "train" else ""
            raise DataError(f"data.files: no {split!r}{why}, among {', '.join(c.files)}; add its file")
        path = Path(c.files[split]).expanduser()
        return READERS[_suffix(path)](path)

    def _read(self, row: dict[str, Any], place: str) -> Example:
        target, columns = self._target, columns_of(self.config.pattern)
        there = f"found {', '.join(map(repr, row)) or 'nothing'}"
        missing = [column for column in columns if column not in row]
        if missing:
            raise DataError(
                f"{place}: missing {', '.join(map(repr, missing))}; {there}; write data.pattern with the columns that "
                "there are"
            )
        if target not in row:
            of = "summary" if self._summarizes else f"label ({NO_LABEL})"
            raise DataError(f"{place}: missing {target!r}; {there}; set data.target to the column of the {of}")
        fields = {column: _text(row[column], column, place) for column in columns}
        if self._summarizes:
            return Example(fields, 0, (" ".join(text_field(row, target, place).split()),))
        return Example(fields, self._label(row, place))

    @property
    def _summarizes(self) -> bool:
        return self.config.task == "summarization"

    @property
    def _target(self) -> str:
        return self.config.target or ("summary" if self._summarizes else "label")

    def _label(self, row: dict[str, Any], place: str) -> int:
        target, labels = self._target, list(self.config.verbalizer)
        label = label_name(row[target])
        if label not in labels:
            cure = NO_LABEL if label in (None, "", "-1") else "add its words, or take these rows out"
            raise DataError(
                f"{place}: {target!r} is {row[target]!r}, which data.verbalizer ({', '.join(labels)}) does not cover; "
                f"{cure}"
            )
        return labels.index(label)


def select_tasks(config: DataConfig) -> list[OwnTask]:
    """The split that is evaluated, then those of another distribution; raises DataError for missing files."""
    if config.files is not None:
        for split, name in config.files.items():
            path = Path(name).expanduser()
            if not path.is_file():
                raise DataError(f"data.files.{split}={name}: no such file")
            if _suffix(path) not in READERS:
                raise DataError(f"data.files.{split}={name}: expected {', '.join(READERS)}, or one of these with .gz")
        for key, names in (("split", [config.split]), ("ood", config.ood)):
            for name in names:
                if name not in config.files:
                    raise DataError(f"data.{key}: no {name!r} in data.files; expected {' or '.join(config.files)}")
    taken = {"train", config.split, config.task}.intersection(config.ood)
    if taken:
        raise DataError(f"data.ood={config.ood}: {taken.pop()!r} is not a set of another distribution; use other names")
    return [OwnTask(config.task, config), *(OwnTask(name, config, name) for name in dict.fromkeys(config.ood))]


def select_pattern(config: DataConfig) -> tuple[str, Pattern]:
    """The configured pattern, which is called by its text; raises DataError for places in it that name no column."""
    columns_of(config.pattern)
    return config.pattern, Pattern(config.pattern, tuple((config.verbalizer or {}).values()))


def columns_of(pattern: str) -> list[str]:
    """The columns that a pattern names, each once; raises DataError for places that are anything else."""
    try:
        places = [place for place in string.Formatter().parse(pattern) if place[1] is not None]
    except ValueError as error:
        raise DataError(f"data.pattern={pattern!r}: {error}; write {{{{ and }}}} for braces") from None
    for _, name, spec, conversion in places:
        if not name or name.isdigit() or any(c in name for c in ".[") or spec or conversion:
            raise DataError(
                f"data.pattern={pattern!r}: expected names of columns in braces, like {{text}}, got {name or '{}'!r}; "
                "write {{ and }} for braces"
            )
    if not places:
        raise DataError(f"data.pattern={pattern!r} names no column; write one in braces, like {{text}}")
    return list(dict.fromkeys(name for _, name, _, _ in places))


def _text(value: Any, column: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{place}: {column!r} is {type(value).__name__}, expected a string or a number")
    return str(value).strip()


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix
