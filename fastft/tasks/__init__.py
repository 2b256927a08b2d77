"""Datasets as plain Python values: one file each, no model and no tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastft.config import DataConfig
from fastft.errors import DataError
from fastft.tasks import commonsense_qa, documents, glue, narrativeqa
from fastft.tasks import own as own_data
from fastft.tasks.base import Document, Question, select
from fastft.tasks.classification import ClassificationTask, Example, Pattern, sample_demonstrations
from fastft.tasks.own import OwnTask

DOCUMENT_TASKS: dict[str, Callable[[DataConfig], list[Document]]] = {
    "documents": documents.load,
    "narrativeqa": narrativeqa.load,
}
CLASSIFICATION_TASKS: dict[str, ClassificationTask] = {t.name: t for t in (*glue.TASKS, commonsense_qa.TASK)}

__all__ = [
    "CLASSIFICATION_TASKS",
    "DOCUMENT_TASKS",
    "ClassificationTask",
    "Document",
    "Example",
    "OwnTask",
    "Pattern",
    "Question",
    "load_documents",
    "sample_demonstrations",
    "select",
    "select_pattern",
    "select_tasks",
]


def load_documents(config: DataConfig) -> list[Document]:
    """Every document of the configured task; raises DataError where there is none."""
    return DOCUMENT_TASKS[config.task](config)


def select_tasks(config: DataConfig) -> list[ClassificationTask] | list[OwnTask]:
    """The configured task, then its sets of another distribution; raises DataError for those that do not fit it."""
    if config.is_own:
        return own_data.select_tasks(config)
    task = CLASSIFICATION_TASKS[config.task]
    fitting = [t for t in CLASSIFICATION_TASKS.values() if t.patterns is task.patterns and t is not task]
    if not task.has_train:
        sources = [t.name for t in fitting if t.has_train]
        raise DataError(
            f"data.task={task.name} has no train split to take demonstrations from; set data.task={sources[0]} and "
            f"data.ood=[{task.name}]" + "".join(f" (or data.task={name})" for name in sources[1:])
        )
    names = [t.name for t in fitting]
    for name in config.ood:
        if name not in names:
            raise DataError(
                f"data.ood: {name} does not have the labels and texts of data.task={task.name}; "
                f"expected {' or '.join(names) or 'none'}"
            )
    return [task, *(CLASSIFICATION_TASKS[name] for name in dict.fromkeys(config.ood))]


def select_pattern(config: DataConfig) -> tuple[str, Pattern]:
    """The configured pattern of the configured task and its name; null is the task's first.

    One with {places} is the pattern itself, and is called by its text.
    Raises DataError for a pattern that there is not, and for words that do not cover the labels.
    """
    if config.is_own:
        return own_data.select_pattern(config)
    patterns = CLASSIFICATION_TASKS[config.task].patterns
    name = config.pattern or next(iter(patterns))
    if "{" in name:
        pattern = _written_pattern(name, config.task, patterns)
    elif name in patterns:
        pattern = patterns[name]
    else:
        raise DataError(
            f"data.pattern={name}: {config.task} has {', '.join(patterns)}; or write one yourself, with "
            f"{{{'}, {'.join(_fields(patterns))}}}"
        )
    if config.verbalizer is None:
        return name, pattern
    own, words = pattern.verbalizer, config.verbalizer
    if not own:
        raise DataError(
            f"data.verbalizer={words}: the choices of data.pattern={name} are each example's own; remove it"
        )
    if len(words) < len(own):
        raise DataError(
            f"data.verbalizer={words} does not cover label {len(words)} of {config.task}, which is {own[len(words)]!r} "
            f"in data.pattern={name}; expected {len(own)} words, in the order of {', '.join(map(repr, own))}"
        )
    if len(words) > len(own):
        raise DataError(
            f"data.verbalizer={words}: {config.task} has {len(own)} labels; expected {len(own)} words, in the order of "
            f"{', '.join(map(repr, own))}"
        )
    return name, replace(pattern, verbalizer=tuple(words))


def _written_pattern(text: str, task: str, patterns: dict[str, Pattern]) -> Pattern:
    """A pattern of the user's own, with the label words of the task's first."""
    known = _fields(patterns)
    for name in own_data.columns_of(text):
        if name not in known:
            raise DataError(f"data.pattern={text!r}: {task} has no {{{name}}}; expected {{{'}, {'.join(known)}}}")
    return Pattern(text, next(iter(patterns.values())).verbalizer)


def _fields(patterns: dict[str, Pattern]) -> list[str]:
    """The fields of a task's examples, which its patterns name."""
    return list(dict.fromkeys(name for p in patterns.values() for name in own_data.columns_of(p.query)))
