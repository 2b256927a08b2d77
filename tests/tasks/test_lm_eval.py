"""The `lm_eval` patterns write what lm-evaluation-harness writes, character by character."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from fastft.tasks import CLASSIFICATION_TASKS, Example

ROOT = Path(__file__).parents[2]
TEXTS = {"text1": "It rains.", "text2": "It is wet."}
QUESTION = {"question": "Where?", "A": "sea", "B": "a bank", "C": "hall", "D": "den", "E": "sky"}


@pytest.mark.parametrize(
    ("task", "pattern", "example", "asked", "choices"),
    [
        (
            "rte",
            "lm_eval",
            Example(TEXTS, 0),
            "It rains.\nQuestion: It is wet. True or False?\nAnswer:",
            [" True", " False"],
        ),
        (
            "cola",
            "lm_eval",
            Example({"text1": "It rains."}, 0),
            "It rains.\nQuestion: Does this sentence make sense?\nAnswer:",
            [" no", " yes"],
        ),
        (
            "mnli",
            "lm_eval",
            Example(TEXTS, 0),
            "It rains.\nQuestion: It is wet. True, False or Neither?\nAnswer:",
            [" True", " Neither", " False"],
        ),
        (
            "qqp",
            "lm_eval",
            Example({"text1": "Is it wet?", "text2": "Does it rain?"}, 0),
            "Question 1: Is it wet?\nQuestion 2: Does it rain?\n"
            "Question: Do both questions ask the same thing?\nAnswer:",
            [" no", " yes"],
        ),
        (
            "commonsense_qa",
            "letters",
            Example(QUESTION, 0, ("sea", "a bank", "hall", "den", "sky")),
            "Question: Where?\nA. sea\nB. a bank\nC. hall\nD. den\nE. sky\nAnswer:",
            [" A", " B", " C", " D", " E"],
        ),
    ],
)
def test_prompts_and_choices(task, pattern, example, asked, choices):
    pattern = CLASSIFICATION_TASKS[task].patterns[pattern]
    assert pattern.ask(example) == asked
    assert pattern.choices(example) == choices
    assert pattern.separator == "\n\n"


@pytest.mark.parametrize(
    ("hypothesis", "asked"),
    [("It is wet", "It is wet."), ("It is wet.", "It is wet."), ("Is it?", "Is it?."), ("Well...", "Well...")],
)
def test_mnli_ends_each_hypothesis_with_a_full_stop(hypothesis, asked):
    """The hypothesis alone, and only where there is none."""
    example = Example({"text1": "It rains", "text2": hypothesis}, 0)
    expected = f"It rains\nQuestion: {asked} True, False or Neither?\nAnswer:"
    assert CLASSIFICATION_TASKS["mnli"].patterns["lm_eval"].ask(example) == expected


def test_the_installed_harness_asks_the_same():
    """Every definition that benchmarks/compare_lm_eval.py compares, on made-up rows."""
    registry = pytest.importorskip("lm_eval.api.registry", reason="lm_eval is not installed")
    spec = importlib.util.spec_from_file_location("compare_lm_eval", ROOT / "benchmarks/compare_lm_eval.py")
    compare = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = compare  # where dataclasses look for their annotations
    spec.loader.exec_module(compare)
    texts = ["Is it wet?", "It rains", "It is wet."]
    words = {"label": list("ABCDE"), "text": ["sea", "a bank", "hall", "den", "sky"]}
    rows = [
        dict.fromkeys(("sentence", "sentence1", "premise", "question1", "question"), text)
        | dict.fromkeys(("sentence2", "hypothesis", "question2"), other)
        | {"label": 0, "choices": words, "answerKey": "B"}
        for text, other in zip(texts, reversed(texts), strict=True)
    ]
    for definition in compare.DEFINITIONS:
        task = CLASSIFICATION_TASKS[definition.task]
        sample = compare.Sample(rows, [task.read(row, "row") for row in rows])
        theirs = compare.harness(registry.get_model("dummy")(), definition, sample, sample)
        assert theirs.prompts == compare.write(task.patterns[definition.pattern], sample.examples, sample.examples)
