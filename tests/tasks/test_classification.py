"""Classification tasks: every shipped one on real data, patterns, sampling, and what is refused."""

from __future__ import annotations

import json
import os
import typing
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from fastft.config import ClassificationTask, DataConfig
from fastft.errors import DataError
from fastft.tasks import CLASSIFICATION_TASKS, Example, sample_demonstrations, select_pattern, select_tasks

ROWS = {  # labels of the validation split in the local copy
    "rte": {0: 146, 1: 131},
    "mnli": {0: 1667, 1: 1667, 2: 1666},
    "mnli_binary": {0: 1667, 1: 1666},
    "mnli_merged": {0: 1667, 1: 3333},
    "hans": {0: 2490, 1: 2490},
    "qqp": {0: 623, 1: 377},
    "paws_qqp": {0: 342, 1: 135},
    "cola": {0: 160, 1: 367},
    "cola_ood": {0: 98, 1: 218},
    "commonsense_qa": {0: 239, 1: 255, 2: 241, 3: 251, 4: 235},
}


NOT_IN_THE_COPY = {"mnli_mismatched", "mnli_binary_mismatched", "mnli_merged_mismatched"}


def test_the_schema_names_the_tasks_that_there_are():
    assert set(typing.get_args(ClassificationTask)) == set(CLASSIFICATION_TASKS) == set(ROWS) | NOT_IN_THE_COPY


@pytest.mark.parametrize("name", ROWS)
def test_tasks_from_a_local_copy(name):
    if not os.environ.get("FASTFT_DATA"):
        pytest.skip("FASTFT_DATA is not set: no local copy of the datasets")
    task = CLASSIFICATION_TASKS[name]
    examples = task.load("validation", None)
    assert Counter(e.label for e in examples) == ROWS[name]
    assert task.has_train == bool(task.has_train and task.load("train", None))
    assert len(task.patterns) >= 2
    for pattern_name, pattern in task.patterns.items():
        asked = pattern.ask(examples[0])
        assert all(text in asked for key, text in examples[0].fields.items() if f"{{{key}}}" in pattern.query)
        assert len(pattern.choices(examples[0])) == len(ROWS[name])
        assert asked.endswith(" ") == (pattern_name == "llmft_minimal")


def test_a_demonstration_is_the_query_with_its_label_word():
    example = Example({"text1": "It {rains}.", "text2": "It is wet."}, 1)
    pattern = CLASSIFICATION_TASKS["rte"].patterns["minimal"]
    assert pattern.demonstrate(example) == "It {rains}. It is wet. ? No"
    example = Example({"question": "Where?"}, 1, ("a sea", "a bank"))
    assert CLASSIFICATION_TASKS["commonsense_qa"].patterns["minimal"].demonstrate(example) == "Where? a bank"


def pool(counts: dict[int, int]) -> list[Example]:
    return [Example({"text1": f"{label}-{i}"}, label) for label, n in counts.items() for i in range(n)]


def test_balanced_demonstrations():
    examples = pool({0: 90, 1: 10})
    chosen = sample_demonstrations(examples, 12, 2, balanced=True, seed=0)
    assert Counter(e.label for e in chosen) == {0: 6, 1: 6}
    assert len({e.fields["text1"] for e in chosen}) == 12
    assert chosen == sample_demonstrations(examples, 12, 2, balanced=True, seed=0)
    assert chosen != sample_demonstrations(examples, 12, 2, balanced=True, seed=1)
    last = Counter(sample_demonstrations(examples, 4, 2, balanced=True, seed=s)[-1].label for s in range(200))
    assert min(last.values()) > 70  # neither label stands last more often


def test_unbalanced_demonstrations_follow_the_data():
    chosen = sample_demonstrations(pool({0: 900, 1: 100}), 200, 2, balanced=False, seed=0)
    assert 5 <= sum(e.label for e in chosen) <= 40
    assert sample_demonstrations(pool({0: 3, 1: 3}), 0, 2, balanced=True, seed=0) == []


@pytest.mark.parametrize("balanced", [True, False])
def test_the_draw_of_llmft(balanced):
    """Its steps, written with the libraries it uses: numpy's global generator, datasets' filter and shuffle."""
    examples = [Example({"text1": str(i)}, label) for i, label in enumerate([0, 1, 1, 0, 1] * 20)]
    dataset = Dataset.from_dict({"idx": range(100), "label": [e.label for e in examples]})
    np.random.seed(3)
    drawn = []
    if balanced:
        for label in (0, 1):
            pool = dataset.filter(lambda row, label=label: row["label"] == label)["idx"]
            drawn += np.random.choice(pool, size=5, replace=False).tolist()
    else:
        drawn = np.random.choice(range(100), size=10, replace=False).tolist()
    expected = dataset.filter(lambda row: row["idx"] in drawn).shuffle(3)["idx"]
    chosen = sample_demonstrations(examples, 10, 2, balanced=balanced, seed=3, sampling="llmft")
    assert [int(e.fields["text1"]) for e in chosen] == list(expected)
    assert sample_demonstrations([], 0, 2, balanced=balanced, seed=3, sampling="llmft") == []
    with pytest.raises(DataError, match=r"has 2 examples.*use fewer"):
        sample_demonstrations(examples[:2], 4, 2, balanced=balanced, seed=0, sampling="llmft")


def test_the_prompts_of_llmft():
    """A query that ends in a space, demonstrations that do not, and backslashes that its shell does not take away."""
    example = Example({"text1": "It rains.", "text2": "It is wet."}, 1)
    rte = CLASSIFICATION_TASKS["rte"].patterns
    assert rte["llmft_minimal"].ask(example) == "It rains. It is wet. ? "
    assert rte["llmft_minimal"].demonstrate(example) == "It rains. It is wet. ? No"
    assert rte["llmft_minimal"].separator == "\\n\\n"
    harness = "It rains. \\nQuestion: It is wet. True or False?"
    assert rte["llmft_eval_harness"].ask(example) == f"{harness} \\nAnswer:"
    assert rte["llmft_eval_harness"].demonstrate(example) == f"{harness}\\nAnswer: False"
    assert rte["llmft_gpt3"].ask(example) == "It rains. question: It is wet. Yes or No? answer:"
    cola = CLASSIFICATION_TASKS["cola"].patterns["llmft_minimal"]
    assert (cola.ask(example), cola.separator) == ("It rains. ? ", " ")


def test_samples_that_cannot_be_drawn():
    with pytest.raises(DataError, match="use 4 or 6"):
        sample_demonstrations(pool({0: 9, 1: 9}), 5, 2, balanced=True, seed=0)
    with pytest.raises(DataError, match=r"12 examples, \{0: 9, 1: 3\} by label"):
        sample_demonstrations(pool({0: 9, 1: 3}), 8, 2, balanced=True, seed=0)
    with pytest.raises(DataError, match="use fewer"):
        sample_demonstrations(pool({0: 9, 1: 3}), 13, 2, balanced=False, seed=0)


def test_sets_of_another_distribution():
    assert [t.name for t in select_tasks(DataConfig(task="rte", ood=["hans"]))] == ["rte", "hans"]
    with pytest.raises(DataError, match=r"set data.task=rte and data.ood=\[hans\]"):
        select_tasks(DataConfig(task="hans"))
    with pytest.raises(DataError, match="paws_qqp does not have the labels"):
        select_tasks(DataConfig(task="rte", ood=["paws_qqp"]))
    with pytest.raises(DataError, match="expected none"):
        select_tasks(DataConfig(task="commonsense_qa", ood=["hans"]))


@pytest.mark.parametrize(("name", "labels"), [("mnli", [0, 1, 2]), ("mnli_binary", [0, 1]), ("mnli_merged", [0, 1, 1])])
def test_mnli_and_its_mismatched_set(tmp_path, name, labels):
    """Entailment, neutral, contradiction: three labels, without the neutral pairs, or these as no entailment."""
    (tmp_path / "mnli_mismatched").mkdir()
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, 1, 2)]
    (tmp_path / "mnli_mismatched" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, mismatched = select_tasks(DataConfig(task=name, ood=[f"{name}_mismatched"]))
    assert [e.label for e in mismatched.load("validation", str(tmp_path))] == labels
    assert mismatched.hub_splits == {"validation": "validation_mismatched"}


def test_paws_qqp_as_it_is_released(tmp_path):
    """A table of bytes literals, with labels as text."""
    (tmp_path / "paws_qqp").mkdir()
    (tmp_path / "paws_qqp" / "validation.tsv").write_text(
        "id\tsentence1\tsentence2\tlabel\n1\tb'Why caf\\xc3\\xa9 ?'\tb\"Isn't it so ?\"\t0\n2\tb is a letter\tb'\t1\n"
    )
    first, second = CLASSIFICATION_TASKS["paws_qqp"].load("validation", str(tmp_path))
    assert first.fields == {"text1": "Why café ?", "text2": "Isn't it so ?"} and first.label == 0
    assert second.fields == {"text1": "b is a letter", "text2": "b'"} and second.label == 1


def test_patterns():
    assert select_pattern(DataConfig(task="rte"))[0] == "minimal"
    with pytest.raises(DataError, match="rte has minimal, gpt3, eval_harness"):
        select_pattern(DataConfig(task="rte", pattern="best"))


def test_patterns_of_ones_own():
    """With the words of the task's first pattern, or with others; places that the task has not are refused."""
    written = "{text1}\nIs it so that {text2}?"
    name, pattern = select_pattern(DataConfig(task="rte", pattern=written))
    assert name == written and pattern.verbalizer == ("Yes", "No")
    example = Example({"text1": "A mill.", "text2": "A goat."}, 1)
    assert pattern.demonstrate(example) == "A mill.\nIs it so that A goat.? No"
    _, pattern = select_pattern(DataConfig(task="rte", pattern=written, verbalizer=["so", "not so"]))
    assert pattern.choices(example) == [" so", " not so"]
    _, pattern = select_pattern(DataConfig(task="commonsense_qa", pattern="Q: {question}\nA:"))
    assert pattern.choices(Example({"question": "?"}, 0, ("a", "b"))) == [" a", " b"]
    with pytest.raises(DataError, match=r"cola has no \{text2\}; expected \{text1\}$"):
        select_pattern(DataConfig(task="cola", pattern=written))
    with pytest.raises(DataError, match=r"=other: rte has minimal, .*; or write one .* \{text1\}, \{text2\}$"):
        select_pattern(DataConfig(task="rte", pattern="other"))


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("rte", {"sentence1": "a", "sentence2": "b", "label": -1}, "rte/validation.jsonl:1: 'label' is -1"),
        ("rte", {"sentence1": "a", "label": 0}, "missing 'sentence2'"),
        ("rte", {"sentence1": "a", "sentence2": 3, "label": 0}, "'sentence2' is int"),
        ("rte", {"sentence1": "a", "gold": 0}, "missing 'label'; found 'sentence1', 'gold'"),
        ("rte", {"sentence1": "a", "sentence2": "b", "label": 2}, "'label' is 2, expected 0, 1"),
        ("hans", {"premise": "a", "hypothesis": "b", "label": 0}, "missing 'heuristic'; found 'premise'"),
        ("commonsense_qa", {"question": "a", "choices": ["b"], "answerKey": "A"}, "'choices' is"),
        ("mnli_binary", {"premise": "a", "hypothesis": "b", "label": 1}, "holds no examples"),
    ],
)
def test_bad_rows_are_refused(tmp_path, task, row, message):
    folder = tmp_path / CLASSIFICATION_TASKS[task].folder
    folder.mkdir()
    (folder / "validation.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        CLASSIFICATION_TASKS[task].load("validation", str(tmp_path))
    assert message in str(error.value)


def test_a_missing_copy_says_where_it_was_looked_for(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"rte/test.jsonl\[.gz\] not found"):
        CLASSIFICATION_TASKS["rte"].load("test", str(tmp_path))
    monkeypatch.delenv("FASTFT_DATA", raising=False)
    with pytest.raises(DataError, match="paws_qqp is not on the hub"):
        CLASSIFICATION_TASKS["paws_qqp"].load("validation", None)
