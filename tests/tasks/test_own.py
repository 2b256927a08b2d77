"""Examples of one's own: what is read from files and the hub, and what is refused with the place named."""

from __future__ import annotations

import gzip
import json

import pytest

from fastft.config import DataConfig, validate
from fastft.errors import ConfigError, DataError
from fastft.tasks import select_pattern, select_tasks

CSV = 'text,stars,sentiment\n"Dull, and\nlong.",1,neg\nA joy.,5,pos\n'
ROWS = [
    {"text": "Dull, and\nlong.", "stars": 1, "sentiment": "neg"},
    {"text": " A joy. ", "stars": 5, "sentiment": "pos"},
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
COVER = "which data.verbalizer (pos, neg) does not cover"


def own(files: dict[str, str] | None, **values) -> DataConfig:
    values = {
        "pattern": "{text} ({stars} stars)\nSentiment:",
        "verbalizer": {"pos": "good", "neg": "bad"},
        "target": "sentiment",
        **values,
    }
    return DataConfig(task="jsonl", files=files, **values)


@pytest.mark.parametrize(
    ("name", "content"),
    [  # mtime: the bytes are part of the test's name, which every worker is to find alike
        ("a.jsonl", JSONL.encode()),
        ("a.jsonl.gz", gzip.compress(JSONL.encode(), mtime=0)),
        ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        (
            "a.tsv",
            CSV.replace('"Dull, and\nlong."', '"Dull; and\nlong."').replace(",", "\t").replace(";", ",").encode(),
        ),
    ],
)
def test_every_format_gives_the_same(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    config = own({"validation": str(path)})
    [task], (pattern_name, pattern) = select_tasks(config), select_pattern(config)
    examples = task.load("validation", None)
    assert [pattern.demonstrate(e) for e in examples] == [
        "Dull, and\nlong. (1 stars)\nSentiment: bad",
        "A joy. (5 stars)\nSentiment: good",
    ]
    assert (pattern_name, pattern.verbalizer) == (config.pattern, ("good", "bad"))


def test_labels_are_the_same_from_yaml_json_and_csv(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": false}\n')
    (tmp_path / "b.csv").write_text("text,label\na,1\nb,false\n")
    for name in ("a.jsonl", "b.csv"):
        config = own(
            {"validation": str(tmp_path / name)}, pattern="{text}", target="label", verbalizer={False: "no", 1: "yes"}
        )
        assert [e.label for e in select_tasks(config)[0].load("validation", None)] == [1, 0]


def test_a_dataset_in_the_hubs_form(tmp_path):
    """A folder is read as the hub's datasets are."""
    (tmp_path / "train.jsonl").write_text(JSONL)
    (tmp_path / "films.jsonl").write_text(JSONL)
    config = own(None, hub=str(tmp_path), split="train")
    assert [e.label for e in select_tasks(config)[0].load("train", None)] == [1, 0]
    with pytest.raises(DataError, match=r"data.hub: .* \(split dev\) cannot be loaded: .*; set data.files to"):
        select_tasks(config)[0].load("dev", None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'["a"]', "expected a JSON object"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"body": "a", "sentiment": "pos"}', "missing 'text', 'stars'; found 'body', 'sentiment'; write data."),
        (b'{"text": "a", "stars": 1}', "missing 'sentiment'; found 'text', 'stars'; set data.target to the column"),
        (b'{"text": "a", "stars": [1], "sentiment": "pos"}', "'stars' is list, expected a string or a number"),
        (b'{"text": "a", "stars": 1, "sentiment": "mixed"}', f"'sentiment' is 'mixed', {COVER}; add its words"),
        (b'{"text": "a", "stars": 1, "sentiment": null}', f"'sentiment' is None, {COVER}; a split without labels"),
        (b'{"text": "a", "stars": 1, "sentiment": -1}', f"'sentiment' is -1, {COVER}; a split without labels"),
    ],
)
def test_bad_rows_are_refused(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL.encode() + line + b"\n")
    with pytest.raises(DataError) as error:
        select_tasks(own({"validation": str(path)}))[0].load("validation", None)
    assert f"a.jsonl:3: {message}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "split 'validation' holds no examples"),
        (CSV.encode() + b"only one\n", "a.csv:5: the row has more or fewer cells than the 3 columns"),
        (b"text,stars,sentiment\na,1,\n", f"a.csv:2: 'sentiment' is '', {COVER}; a split without labels"),
        (b'text,stars,sentiment\n"a,1,pos\n', "a.csv: not CSV after line 1: unexpected end of data"),
        (b"text,stars,sentiment\n\xff,1,pos\n", "a.csv: not UTF-8"),
        (b"text,stars,text,sentiment\na,1,b,pos\n", "a.csv: the first row names the column 'text' twice"),
    ],
)
def test_bad_csv_is_refused(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        select_tasks(own({"validation": str(path)}))[0].load("validation", None)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"files": {"validation": "none.jsonl"}}, "data.files.validation=none.jsonl: no such file"),
        ({"split": "test"}, "data.split: no 'test' in data.files; expected validation or train"),
        ({"ood": ["films"]}, "data.ood: no 'films' in data.files; expected validation or train"),
        ({"ood": ["train"]}, "'train' is not a set of another distribution"),
        ({"pattern": "a film"}, "names no column; write one in braces"),
        ({"pattern": "{}"}, "expected names of columns in braces"),
        ({"pattern": "{text.upper}"}, "got 'text.upper'"),
        ({"pattern": "{text!r}"}, "expected names of columns"),
        ({"pattern": "{text"}, "write {{ and }} for braces"),
    ],
)
def test_bad_configs_are_refused(tmp_path, monkeypatch, values, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(JSONL)
    with pytest.raises(DataError) as error:
        config = own(**{"files": {"validation": "a.jsonl", "train": "a.jsonl"}, **values})
        select_pattern(config)
        select_tasks(config)
    assert message in str(error.value)


def test_only_known_kinds_of_files(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"expected .jsonl, .csv, .tsv, or one of these with .gz"):
        select_tasks(own({"validation": str(tmp_path / "a.parquet")}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"task": "jsonl"}, "files or hub (one of them) must say where the examples are; pattern must be the text"),
        ({"task": "jsonl", "verbalizer": ["good", "bad"]}, "verbalizer must map two or more labels to words"),
        ({"task": "jsonl", "verbalizer": {"pos": "good"}}, "verbalizer must map two or more labels to words"),
        (
            {"task": "jsonl", "verbalizer": {"n": False, "m": "Maybe"}},
            "data.verbalizer: got False, expected a valid string; quote",
        ),
        ({"task": "rte", "verbalizer": {0: "True", 1: "False"}}, "verbalizer must be a list of words for task=rte"),
        ({"task": "rte", "target": "gold"}, "data.task=rte does not use data.target"),
        (
            {"task": "jsonl", "files": {}, "pattern": "{a}", "verbalizer": {0: "a", 1: "b"}, "root": "x"},
            "data.task=jsonl does not use data.root",
        ),
    ],
)
def test_what_the_schema_refuses(data, message):
    with pytest.raises(ConfigError) as error:
        validate({"method": "icl", "output_dir": "x", "data": data})
    assert message in str(error.value)
