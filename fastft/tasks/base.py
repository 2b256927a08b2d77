"""What tasks share: documents with questions, and rows of a dataset from a local copy or from the hub."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.errors import DataError

Row = tuple[str, dict[str, Any]]  # place (for messages) and fields

SURROGATE = b"\\ud"  # how JSON escapes begin that stand for half of a character, \ud800 to \udfff


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


def read_rows(
    root: str | None, task: str, split: str, *, hub: str | None, hub_split: str | None = None
) -> Iterable[Row]:
    """Rows of a dataset: <root>/<task>/<split> with an ending of READERS, or from the hub without root and FASTFT_DATA.

    hub: "owner/name" or "owner/name:subset"; None where the hub has no such dataset. hub_split: its name for the split.
    """
    root = root or os.environ.get("FASTFT_DATA")
    if root:
        return _local_rows(Path(root).expanduser() / task, split)
    if hub is None:
        raise DataError(
            f"data.task={task} is not on the hub: set data.root or FASTFT_DATA to a folder with "
            f"{task}/{split}.jsonl[.gz]"
        )
    return hub_rows(f"data.task={task}", hub, hub_split or split, instead="data.root or FASTFT_DATA to a local copy")


def _local_rows(folder: Path, split: str) -> Iterable[Row]:
    for suffix, read in READERS.items():
        for path in (folder / f"{split}{suffix}", folder / f"{split}{suffix}.gz"):
            if path.is_file():
                return read(path)
    there = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise DataError(f"data.root={folder.parent}: {folder / split}.jsonl[.gz] not found ({there})")


def hub_rows(key: str, hub: str, split: str, *, instead: str) -> Iterable[Row]:
    """Rows of a dataset on the hub, "owner/name" or "owner/name:subset". key, instead: for the message of an error."""
    from datasets import load_dataset  # slow to import; only the hub needs it

    name, _, subset = hub.partition(":")
    try:
        dataset = load_dataset(name, subset or None, split=split)
    except Exception as error:  # the library raises many kinds: network, missing split, missing dataset
        raise DataError(
            f"{key}: {hub} (split {split}) cannot be loaded: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}; set {instead}"
        ) from error
    return ((f"{hub}/{split}:{i}", row) for i, row in enumerate(dataset))


def read_jsonl(path: Path) -> Iterator[Row]:
    """(place, object) of each line of a .jsonl or .jsonl.gz file; place is "file:line" for messages."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # which Windows' editors write
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode("utf-8"))
                    if SURROGATE in line.lower():
                        json.dumps(value, ensure_ascii=False).encode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{place}: not UTF-8 (byte {error.start} of the line)") from None
                except UnicodeEncodeError as error:
                    half = ascii(error.object[error.start])
                    raise DataError(f"{place}: {half} is half of a character, whose other half is missing") from None
                except (json.JSONDecodeError, RecursionError) as error:
                    raise DataError(f"{place}: not JSON: {error}") from None
                if not isinstance(value, dict):
                    raise DataError(f"{place}: expected a JSON object, found {type(value).__name__}")
                yield place, value
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    """(place, columns) of each row of a .csv or .csv.gz file whose first row names the columns.

    place is "file:line", the last line of a row that has several.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=delimiter, strict=True)
            names = rows.fieldnames or []
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{path}: the first row names the column {twice!r} twice; rename one of them")
            for row in rows:
                place = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{place}: the row has more or fewer cells than the {len(rows.fieldnames)} columns")
                yield place, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason}") from None
    except csv.Error as error:
        raise DataError(f"{path}: not CSV after line {rows.line_num}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


READERS = {".jsonl": read_jsonl, ".csv": read_csv, ".tsv": lambda path: read_csv(path, delimiter="\t")}


def text_field(value: dict[str, Any], key: str, place: str, *, may_be_empty: bool = False) -> str:
    """A string at `key`, stripped; raises DataError where there is none, or an empty one that may not be."""
    if key not in value:
        raise DataError(f"{place}: missing {key!r}; found {', '.join(map(repr, value)) or 'nothing'}")
    text = value[key]
    if not isinstance(text, str):
        raise DataError(f"{place}: {key!r} is {type(text).__name__}, expected a string")
    if not text.strip() and not may_be_empty:
        raise DataError(f"{place}: {key!r} is empty")
    return text.strip()
