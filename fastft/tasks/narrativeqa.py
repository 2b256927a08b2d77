"""NarrativeQA summaries with their questions (Kocisky et al. 2018, arXiv 1712.07040).

From the hub (`deepmind/narrativeqa`), or from a local copy with the hub's field names:
<data.root>/narrativeqa/<split>.jsonl[.gz], a line a question: document {id, summary {text}}, question {text},
answers [{text}, ...].
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastft.config import DataConfig
from fastft.errors import DataError
from fastft.tasks.base import Document, Question, read_jsonl, text_field

HUB_NAME = "deepmind/narrativeqa"


def load(config: DataConfig) -> list[Document]:
    root = config.root or os.environ.get("FASTFT_DATA")
    rows = _local_rows(Path(root).expanduser(), config.split) if root else _hub_rows(config.split)
    texts: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    for place, row in rows:
        document, question, answers = row.get("document"), row.get("question"), row.get("answers")
        if not isinstance(document, dict) or not isinstance(question, dict) or not isinstance(answers, list):
            raise DataError(f"{place}: expected document {{...}}, question {{...}}, answers [...]; found {list(row)}")
        key = text_field(document, "id", place)
        texts.setdefault(key, text_field(document.get("summary") or {}, "text", f"{place}: document.summary"))
        questions.setdefault(key, []).append(
            Question(
                text=text_field(question, "text", f"{place}: question"),
                answers=tuple(text_field(a, "text", f"{place}: answers[{i}]") for i, a in enumerate(answers)),
            )
        )
    if not texts:
        raise DataError(f"narrativeqa: split {config.split!r} holds no questions")
    return [Document(id=key, title=key, text=text, questions=tuple(questions[key])) for key, text in texts.items()]


def _local_rows(root: Path, split: str) -> Iterable[tuple[str, dict[str, Any]]]:
    folder = root / "narrativeqa"
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).is_file():
            return read_jsonl(folder / name)
    there = ", ".join(sorted(p.name for p in folder.glob("*.jsonl*"))) if folder.is_dir() else "no such folder"
    raise DataError(f"data.root={root}: {folder / split}.jsonl[.gz] not found ({there})")


def _hub_rows(split: str) -> Iterable[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset  # slow to import; only the hub needs it

    try:
        dataset = load_dataset(HUB_NAME, split=split)
    except Exception as error:  # the library raises many kinds: network, missing split, missing dataset
        raise DataError(
            f"data.task=narrativeqa: {HUB_NAME} (split {split}) cannot be loaded: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}; set data.root or FASTFT_DATA to a local copy"
        ) from error
    return ((f"{HUB_NAME}/{split}:{i}", row) for i, row in enumerate(dataset))
