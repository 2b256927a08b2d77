"""NarrativeQA's summaries, or its whole stories, with their questions (Kocisky et al. 2018, arXiv 1712.07040).

From the hub (`deepmind/narrativeqa`), or from a local copy with the hub's field names:
<data.root>/narrativeqa/<split>.jsonl[.gz], a line a question: document {id, summary {text}, text}, question {text},
answers [{text}, ...]; of summary and text only what data.document_text asks for must be there.
"""

from __future__ import annotations

from fastft.config import DataConfig
from fastft.errors import DataError
from fastft.tasks.base import Document, Question, read_rows, text_field

HUB_NAME = "deepmind/narrativeqa"


def load(config: DataConfig) -> list[Document]:
    rows = read_rows(config.root, "narrativeqa", config.split, hub=HUB_NAME)
    texts: dict[str, str] = {}
    questions: dict[str, list[Question]] = {}
    for place, row in rows:
        document, question, answers = row.get("document"), row.get("question"), row.get("answers")
        if not isinstance(document, dict) or not isinstance(question, dict) or not isinstance(answers, list):
            raise DataError(f"{place}: expected document {{...}}, question {{...}}, answers [...]; found {list(row)}")
        key = text_field(document, "id", place)
        if key not in texts:
            summary = config.document_text == "summary"
            where = (document.get("summary") or {}, "text", f"{place}: document.summary")
            texts[key] = text_field(*where) if summary else text_field(document, "text", f"{place}: document")
        questions.setdefault(key, []).append(
            Question(
                text=text_field(question, "text", f"{place}: question"),
                answers=tuple(text_field(a, "text", f"{place}: answers[{i}]") for i, a in enumerate(answers)),
            )
        )
    if not texts:
        raise DataError(f"narrativeqa: split {config.split!r} holds no questions")
    return [Document(id=key, title=key, text=text, questions=tuple(questions[key])) for key, text in texts.items()]
