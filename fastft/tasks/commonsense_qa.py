"""CommonsenseQA (Talmor et al. 2019, arXiv 1811.00937): a question with five choices of its own.

`minimal` and `question` score the words of each choice behind the question; `letters` shows the choices and scores
their letters, as lm-evaluation-harness does.
"""

from __future__ import annotations

from typing import Any

from fastft.errors import DataError
from fastft.tasks.base import text_field
from fastft.tasks.classification import NO_LABEL, ClassificationTask, Example, Pattern

LETTERS = ("A", "B", "C", "D", "E")
PATTERNS = {
    "minimal": Pattern("{question}"),
    "question": Pattern("Question: {question}\nAnswer:"),
    "letters": Pattern(
        "Question: {question}\n" + "".join(f"{x}. {{{x}}}\n" for x in LETTERS) + "Answer:", verbalizer=LETTERS
    ),
}


def read(row: dict[str, Any], place: str) -> Example:
    choices = row.get("choices")
    if not isinstance(choices, dict) or tuple(choices.get("label", ())) != LETTERS or len(choices["text"]) != 5:
        raise DataError(f"{place}: 'choices' is {choices!r}, expected {{label: {list(LETTERS)}, text: [five strings]}}")
    if row.get("answerKey") not in LETTERS:
        raise DataError(f"{place}: 'answerKey' is {row.get('answerKey')!r}, expected a letter; {NO_LABEL}")
    texts = dict(zip(LETTERS, choices["text"], strict=True))
    texts = {x: text_field(texts, x, f"{place}: choices") for x in LETTERS}
    fields = {"question": text_field(row, "question", place), **texts}
    return Example(fields, LETTERS.index(row["answerKey"]), tuple(texts.values()))


TASK = ClassificationTask("commonsense_qa", read, PATTERNS, "commonsense_qa", "tau/commonsense_qa")
