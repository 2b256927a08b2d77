"""What a classification task gives: labelled examples, patterns that write them as text, and a metric.

A *pattern* turns an example into a query, its *verbalizer* a label into the words that follow the query (Schick and
Schuetze 2021, arXiv 2001.07676). Demonstrations are queries with their label words, in front of the one that is asked.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fastft.errors import DataError
from fastft.tasks.base import read_rows, text_field


@dataclass(frozen=True)
class Example:
    """fields: what patterns fill in; label: index of the right choice; choices: its own, where labels are not words.

    groups: what the example belongs to, for tables of each group's accuracy: kind of group -> its name.
    """

    fields: dict[str, str]
    label: int
    choices: tuple[str, ...] = ()
    groups: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pattern:
    """query: text with {field} places, without the space that the answer begins with.

    verbalizer: the words of each label, in the order of the labels; empty where the choices are the example's own.
    separator: what stands between demonstrations and in front of the query.
    sentences: fields that get a full stop where they do not end with one.
    shown: the query of a demonstration, where it is not the one that is asked.
    """

    query: str
    verbalizer: tuple[str, ...] = ()
    separator: str = "\n\n"
    sentences: tuple[str, ...] = ()
    shown: str | None = None

    def ask(self, example: Example) -> str:
        return self._fill(self.query, example)

    def choices(self, example: Example) -> list[str]:
        """The texts that may follow the query, in the order of the labels."""
        return [f" {words}" for words in self.verbalizer or example.choices]

    def demonstrate(self, example: Example) -> str:
        return self._fill(self.shown or self.query, example) + self.choices(example)[example.label]

    def _fill(self, query: str, example: Example) -> str:
        sentences = {key: example.fields[key].removesuffix(".") + "." for key in self.sentences}
        return query.format(**example.fields | sentences)


Reader = Callable[[dict[str, Any], str], Example | None]  # (row, place) -> example, or None to leave the row out


@dataclass(frozen=True)
class ClassificationTask:
    """A dataset with its patterns.

    folder: its name in a local copy; hub: see `read_rows`, with `hub_splits` where the hub names splits differently.
    patterns: name -> Pattern, the default first. Tasks that share this object have the same labels and fields: the
        demonstrations of one may stand in front of the queries of another.
    has_train: whether it has a train split; those without are evaluation sets of another distribution.
    """

    name: str
    read: Reader
    patterns: dict[str, Pattern]
    folder: str
    hub: str | None = None
    hub_splits: dict[str, str] = field(default_factory=dict)
    has_train: bool = True

    def load(self, split: str, root: str | None) -> list[Example]:
        """The examples of a split, in its order; raises DataError where there are none or a row is malformed."""
        rows = read_rows(root, self.folder, split, hub=self.hub, hub_split=self.hub_splits.get(split))
        examples = [example for place, row in rows if (example := self.read(row, place)) is not None]
        if not examples:
            raise DataError(f"data.task={self.name}: split {split!r} holds no examples")
        return examples


NO_LABEL = "a split without labels cannot be used, choose another with data.split"


def columns(
    names: dict[str, str],
    labels: dict[int, int | None],
    groups: tuple[str, ...] = (),
    decode: Callable[[str], str] = str,
) -> Reader:
    """A reader of rows with texts and an integer `label`, which a CSV file has as text.

    names: field -> column. labels: label in the file -> label here, or None to leave the row out. groups: columns that
    say which groups a row belongs to. decode: what makes a text of a column's.
    """
    expected = ", ".join(map(str, labels))

    def read(row: dict[str, Any], place: str) -> Example | None:
        if "label" not in row:
            raise DataError(f"{place}: missing 'label'; found {', '.join(map(repr, row)) or 'nothing'}; {NO_LABEL}")
        label = row["label"]
        if isinstance(label, str) and label.strip().lstrip("-").isdecimal():
            label = int(label)
        if not isinstance(label, int) or label not in labels:
            unlabelled = f"; {NO_LABEL}" if label in (-1, None) else ""
            raise DataError(f"{place}: 'label' is {label!r}, expected {expected}{unlabelled}")
        if labels[label] is None:
            return None
        # Some pairs of QQP have an empty side.
        texts = {key: decode(text_field(row, column, place, may_be_empty=True)) for key, column in names.items()}
        return Example(texts, labels[label], groups={column: text_field(row, column, place) for column in groups})

    return read


def sample_demonstrations(
    examples: list[Example],
    num_shots: int,
    num_labels: int,
    *,
    balanced: bool,
    seed: int,
    sampling: Literal["fastft", "llmft"] = "fastft",
) -> list[Example]:
    """num_shots examples in random order, drawn without replacement; balanced: as many of each label.

    sampling: who draws, see icl.sampling.
    Raises DataError where there are too few, or a balanced number that the labels do not divide.
    """
    if balanced and num_shots % num_labels:
        lower = num_shots - num_shots % num_labels
        fitting = " or ".join(str(n) for n in (lower, lower + num_labels) if n)
        raise DataError(
            f"icl.num_shots={num_shots} cannot be balanced over {num_labels} labels; use {fitting}, or set "
            "icl.balanced=false"
        )
    labels = [e.label for e in examples]
    draw = _draw_as_llmft if sampling == "llmft" else _draw
    chosen = draw(labels, num_shots, num_labels, balanced, seed)
    if len(chosen) < num_shots:
        raise DataError(
            f"icl.num_shots={num_shots}: the train split has {len(examples)} examples, "
            f"{dict(sorted(Counter(labels).items()))} by label; use fewer"
        )
    return [examples[i] for i in chosen]


def _draw(labels: list[int], num_shots: int, num_labels: int, balanced: bool, seed: int) -> list[int]:
    """Up to num_shots positions in random order, by Python's generator."""
    generator = random.Random(f"demonstrations-{seed}")
    order = generator.sample(range(len(labels)), len(labels))
    if not balanced:
        return order[:num_shots]
    taken: Counter[int] = Counter()
    chosen = []
    for i in order:
        if taken[labels[i]] < num_shots // num_labels:
            taken[labels[i]] += 1
            chosen.append(i)
    generator.shuffle(chosen)  # in the order drawn, the last ones would often have one label
    return chosen


def _draw_as_llmft(labels: list[int], num_shots: int, num_labels: int, balanced: bool, seed: int) -> list[int]:
    """The draw of uds-lsv/llmft: numpy's choice, label by label; back in the dataset's order, then shuffled."""
    generator = np.random.RandomState(seed)
    every = range(len(labels))
    pools = [[i for i in every if labels[i] == label] for label in range(num_labels)] if balanced else [every]
    size = num_shots // len(pools)
    drawn = [generator.choice(pool, min(size, len(pool)), replace=False) for pool in pools]
    chosen = np.sort(np.concatenate(drawn))
    return chosen[np.random.default_rng(seed).permutation(len(chosen))].tolist()
