"""A folder of documents with questions and answers, in JSON Lines (format: collections/README.md)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastft.config import DataConfig
from fastft.errors import DataError
from fastft.tasks.base import Document, Question, read_jsonl, text_field

FIELDS = ("id", "title", "text", "questions")


def load(config: DataConfig) -> list[Document]:
    path = Path(config.path).expanduser() if config.path else Path(str(files("fastft.tasks") / "collections"))
    if path.is_dir():
        sources = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
        if not sources:
            raise DataError(f"data.path={path}: the folder has no .jsonl file")
    elif path.is_file():
        sources = [path]
    else:
        raise DataError(f"data.path={path}: no such file or folder; expected .jsonl or a folder of .jsonl files")
    documents: dict[str, Document] = {}
    for source in sources:
        for place, value in read_jsonl(source):
            document = _document(value, place)
            if document.id in documents:
                raise DataError(f"{place}: a document with id {document.id!r} is there already")
            documents[document.id] = document
    if not documents:
        raise DataError(f"data.path={path}: no documents in {', '.join(s.name for s in sources)}")
    return list(documents.values())


def _document(value: dict[str, Any], place: str) -> Document:
    unknown = [key for key in value if key not in FIELDS]
    if unknown:
        raise DataError(f"{place}: unknown field {unknown[0]!r}; expected {', '.join(FIELDS)}")
    questions = value.get("questions", [])
    if not isinstance(questions, list):
        raise DataError(f"{place}: 'questions' is {type(questions).__name__}, expected a list of objects")
    return Document(
        id=text_field(value, "id", place),
        title=text_field(value, "title", place),
        text=text_field(value, "text", place),
        questions=tuple(_question(q, f"{place}: questions[{i}]") for i, q in enumerate(questions)),
    )


def _question(value: Any, place: str) -> Question:
    if not isinstance(value, dict):
        raise DataError(f"{place} is {type(value).__name__}, expected an object with 'question' and 'answers'")
    answers = value.get("answers")
    if not isinstance(answers, list) or not answers:
        raise DataError(f"{place}: 'answers' is {answers!r}, expected a list of one or more strings")
    split = value.get("split")
    if split not in (None, "train", "heldout"):
        raise DataError(f"{place}: 'split' is {split!r}, expected 'train' or 'heldout'")
    fields = {f"answers[{i}]": a for i, a in enumerate(answers)}
    return Question(
        text=text_field(value, "question", place),
        answers=tuple(text_field(fields, key, place) for key in fields),
        split=split,
    )
