"""Document files: what is read, and what is refused with the place named."""

from __future__ import annotations

import codecs
import gzip
import json
import os

import pytest

from fastft.config import DataConfig
from fastft.errors import DataError
from fastft.tasks import load_documents, select

GOOD = {"id": "a", "title": "A", "text": "Some text.", "questions": [{"question": "Q?", "answers": ["x", "y"]}]}


def test_the_shipped_collection():
    documents = load_documents(DataConfig())
    assert len(documents) >= 3
    assert all(len(d.questions) >= 24 for d in documents)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "facts.jsonl:1: not JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"id": "\xff"}', "not UTF-8"),
        (json.dumps({**GOOD, "text": "  "}).encode(), "'text' is empty"),
        (json.dumps({**GOOD, "text": 3}).encode(), "'text' is int"),
        (json.dumps({"id": "a"}).encode(), "missing 'title'"),
        (json.dumps({**GOOD, "txt": ""}).encode(), "unknown field 'txt'"),
        (json.dumps({**GOOD, "questions": [{"question": "", "answers": ["x"]}]}).encode(), "'question' is empty"),
        (json.dumps({**GOOD, "questions": [{"question": "Q?", "answers": []}]}).encode(), "'answers' is []"),
        (b"", "no documents"),
        (b'{"id": ' + b"[" * 100_000, "facts.jsonl:1: not JSON"),
        (json.dumps({**GOOD, "text": "a \ud83d b"}).encode(), "facts.jsonl:1: '\\ud83d' is half of a character"),
        ((json.dumps(GOOD) + "\n" + json.dumps(GOOD)).encode(), "facts.jsonl:2: a document with id 'a'"),
    ],
)
def test_bad_files_are_refused(tmp_path, line, message):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(DataError) as error:
        load_documents(DataConfig(path=str(path)))
    assert message in str(error.value)


def test_marks_and_characters_of_other_editors(tmp_path):
    """A byte order mark, lines that end as on Windows, and a character that JSON escapes in two halves."""
    path = tmp_path / "facts.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + json.dumps({**GOOD, "text": "a \U0001f98a b"}).encode() + b"\r\n")
    assert [d.text for d in load_documents(DataConfig(path=str(path)))] == ["a \U0001f98a b"]


def test_damaged_gzip_is_refused(tmp_path):
    path = tmp_path / "facts.jsonl.gz"
    whole = bytearray(gzip.compress(json.dumps(GOOD).encode()))
    for at in range(10, len(whole)):
        damaged = whole.copy()
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"facts\.jsonl\.gz"):
            load_documents(DataConfig(path=str(path)))


def test_select(tmp_path):
    documents = load_documents(DataConfig())
    assert select(documents, [1, documents[0].id]) == [documents[1], documents[0]]
    with pytest.raises(DataError, match="no document 'nope'"):
        select(documents, ["nope"])
    with pytest.raises(DataError, match="twice"):
        select(documents, [0, documents[0].id])


def test_narrativeqa_from_a_local_copy():
    root = os.environ.get("FASTFT_DATA")
    if not root:
        pytest.skip("FASTFT_DATA is not set: no local copy of the datasets")
    documents = load_documents(DataConfig(task="narrativeqa", root=root))
    assert len(documents) == 30 and sum(len(d.questions) for d in documents) == 885


def test_narrativeqa_summaries_and_stories(tmp_path):
    (tmp_path / "narrativeqa").mkdir()
    document = {"id": "a", "summary": {"text": "Short."}, "text": "A long story."}
    row = {"document": document, "question": {"text": "Q?"}, "answers": [{"text": "x"}]}
    (tmp_path / "narrativeqa" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    for which, text in (("summary", "Short."), ("story", "A long story.")):
        config = DataConfig(task="narrativeqa", root=str(tmp_path), document_text=which)
        assert [d.text for d in load_documents(config)] == [text]
    del document["text"]
    (tmp_path / "narrativeqa" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"validation\.jsonl:1: document: missing 'text'; found 'id', 'summary'"):
        load_documents(DataConfig(task="narrativeqa", root=str(tmp_path), document_text="story"))


def test_narrativeqa_names_what_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"validation\.jsonl"):
        load_documents(DataConfig(task="narrativeqa", root=str(tmp_path)))
