"""What a document task gives: documents with questions."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.errors import DataError


@dataclass(frozen=True)
class Question:
    """A question with its accepted answers, the canonical one first; split is "train", "heldout" or None."""

    text: str
    answers: tuple[str, ...]
    split: str | None = None


@dataclass(frozen=True)
class Document:
    id: str
    title: str
    text: str
    questions: tuple[Question, ...] = ()


def select(documents: list[Document], wanted: list[int | str] | None) -> list[Document]:
    """The documents at the given positions or with the given ids, in that order; None is all."""
    if wanted is None:
        return list(documents)
    by_id = {d.id: d for d in documents}
    chosen = []
    for key in wanted:
        if isinstance(key, int) and 0 <= key < len(documents):
            chosen.append(documents[key])
        elif isinstance(key, str) and key in by_id:
            chosen.append(by_id[key])
        else:
            known = ", ".join(list(by_id)[:8]) + (", ..." if len(by_id) > 8 else "")
            raise DataError(f"data.documents: no document {key!r}; there are {len(documents)}: {known}")
    if len({d.id for d in chosen}) != len(chosen):
        raise DataError(f"data.documents: {wanted} names a document twice")
    return chosen


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a .jsonl or .jsonl.gz file; place is "file:line" for messages."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise DataError(f"{place}: not UTF-8 (byte {error.start} of the line)") from None
                except json.JSONDecodeError as error:
                    raise DataError(f"{place}: not JSON: {error}") from None
                if not isinstance(value, dict):
                    raise DataError(f"{place}: expected a JSON object, found {type(value).__name__}")
                yield place, value
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def text_field(value: dict[str, Any], key: str, place: str) -> str:
    """A non-empty string at `key`, stripped; raises DataError otherwise."""
    if key not in value:
        raise DataError(f"{place}: missing {key!r}; found {', '.join(map(repr, value)) or 'nothing'}")
    text = value[key]
    if not isinstance(text, str):
        raise DataError(f"{place}: {key!r} is {type(text).__name__}, expected a string")
    if not text.strip():
        raise DataError(f"{place}: {key!r} is empty")
    return text.strip()
