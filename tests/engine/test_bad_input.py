"""Data that cannot be used, of a shipped task and of one's own alike: each run is refused and says what to change."""

from __future__ import annotations

import json
import re

import pytest

from tests.engine.test_icl_run import FACTS, figures, ok

TASKS = ("rte", "jsonl")
PATTERN = "{sentence1} {sentence2} ?"  # what rte's first pattern is, here in the config


@pytest.fixture
def either(tmp_path, tiny):
    """A function: values of a run on the same rows, as a shipped task or as one's own; `more` comes behind them."""
    folder = tmp_path / "rte"
    folder.mkdir()
    pairs = [(f"{FACTS[i % 3]} {FACTS[i % 2]}"[: 20 + i], FACTS[i % 3]) for i in range(20)]
    rows = [{"sentence1": a, "sentence2": b, "label": i % 2} for i, (a, b) in enumerate(pairs)]

    def write(split: str, rows: list[dict]) -> None:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(task: str, method: str = "icl", *, words=("Yes", "No"), more: str = "", **sections) -> dict:
        write("train", rows)
        write("validation", rows[:11])
        with open(folder / "validation.jsonl", "a") as file:
            file.write(more)
        data = {"task": task, "verbalizer": list(words), "root": str(tmp_path)}
        if task == "jsonl":
            files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
            data = {"task": task, "files": files, "pattern": PATTERN, "verbalizer": dict(enumerate(words))}
        raw = {
            "method": method,
            "output_dir": str(tmp_path / f"run-{task}-{method}"),
            "cache_dir": str(tmp_path / "cache"),
            "model": {"name_or_path": str(tiny("llama")), "dtype": "float32"},
            "data": data,
            "icl": {"num_shots": 4},
            "peft": {"kind": "lora", "r": 4},
            "train": {"steps": 4, "batch_size": 2, "lr": 1e-2, "warmup_steps": 1},
            "deepspeed": {"zero_stage": 0, "threads_per_rank": 1},
        }
        if method == "icl":
            del raw["peft"], raw["train"]
        if method == "distill":
            raw["distill"] = {"examples": 8}
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        return raw

    return make


@pytest.mark.parametrize("method", ["icl", "pbft", "ft", "distill"])
def test_both_give_the_same_figures(either, launch, method):
    found = []
    for task in TASKS:
        raw = either(task, method)
        ok(launch(raw))
        summary, rows = figures(raw["output_dir"])
        assert set(summary["sets"]) == {task}
        found.append([row["log_probs"] for row in rows])
    assert found[0] == found[1]


def test_sets_of_another_distribution(either, launch):
    raw = either("jsonl")
    raw["data"]["files"]["films"] = raw["data"]["files"]["train"]
    raw["data"]["ood"] = ["films"]
    ok(launch(raw))
    summary, _ = figures(raw["output_dir"])
    assert {name: s["examples"] for name, s in summary["sets"].items()} == {"jsonl": 11, "films": 20}


ROW = {"sentence1": "A goat.", "sentence2": "A mill.", "label": 0}
UNCOVERED = json.dumps({**ROW, "label": 2}) + "\n"
UNLABELLED = json.dumps({**ROW, "label": -1}) + "\n"
NO_LABEL = json.dumps({k: v for k, v in ROW.items() if k != "label"}) + "\n"
NO_COLUMN = json.dumps({"premise": "A goat.", "sentence2": "A mill.", "label": 0}) + "\n"
CASES = {
    "a label without words": ({"more": UNCOVERED}, r"validation.jsonl:12: 'label' is 2, (expected |which .*\()0, 1"),
    "the same first token": (
        {"words": ("built by anchors", "built nine"), "icl": {"score": "first"}},
        "icl.score=first sees ' ?b.*' of both; score them whole with icl.score=mean, or choose other words",
    ),
    "the same words": ({"words": ("Yes", "Yes")}, "cannot be told apart: both are the same; choose other words"),
    "too many demonstrations": (
        {"icl": {"num_shots": 18}},
        r"the model has 512 positions; \d+ demonstrations fit: set icl.num_shots=\d+",
    ),
    "a missing column": (
        {"more": NO_COLUMN},
        "validation.jsonl:12: missing 'sentence1'; found 'premise', 'sentence2', 'label'",
    ),
    "no labels": ({"more": NO_LABEL}, "jsonl:12: missing 'label'; found 'sentence1', 'sentence2'; .*without labels"),
    "labels that are kept secret": (
        {"more": UNLABELLED},
        "'label' is -1, .*a split without labels cannot be used, choose another with data.split",
    ),
    "a broken line": ({"more": '{"sentence1": '}, "validation.jsonl:12: not JSON"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("task", TASKS)
def test_it_is_refused(either, launch, task, case):
    changes, message = CASES[case]
    result = launch(either(task, **changes))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize("task", TASKS)
def test_the_number_of_demonstrations_that_is_said_to_fit_does(either, launch, task):
    raw = either(task, icl={"num_shots": 18})
    fits = int(re.search(r"set icl.num_shots=(\d+)", launch(raw).stderr)[1])
    raw["icl"]["num_shots"] = fits
    ok(launch(raw))
    raw["icl"]["num_shots"] = fits + 2
    assert launch(raw, "overwrite=true").returncode == 1


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "icl",
            {"data": {"files": {"validation": "train.jsonl"}}},
            "no 'train', from which .* come, among validation; add",
        ),
        (
            "distill",
            {"icl": {"num_shots": 20, "balanced": False}},
            "which leaves no inputs to distil them on; use fewer",
        ),
    ],
)
def test_too_few_examples_of_ones_own(either, launch, tmp_path, monkeypatch, method, changes, message):
    monkeypatch.chdir(tmp_path / "rte")
    result = launch(either("jsonl", method, **changes))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.parametrize("method", ["pbft", "ft"])
def test_an_example_without_text(either, launch, method):
    raw = either("jsonl", method, more=json.dumps({**ROW, "sentence1": ""}) + "\n")
    raw["data"]["pattern"] = "{sentence1}"
    result = launch(raw)
    assert result.returncode == 1 and "makes no text of the example {'sentence1': ''}" in result.stderr


def test_words_for_a_label_that_has_none(either, launch):
    """A list has too few words for a shipped task's labels; one's own labels are named in the rows."""
    result = launch(either("rte", words=("Yes",)))
    assert result.returncode == 1
    assert "data.verbalizer=['Yes'] does not cover label 1 of rte, which is 'No'" in result.stderr
