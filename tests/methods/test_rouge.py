"""ROUGE against rouge_score 0.1.2: its figures, kept here, and itself where it is installed."""

from __future__ import annotations

import random

import pytest

from fastft.methods.rouge import longest_common_subsequence, rouge

# (summary, reference, ROUGE-1, ROUGE-2, ROUGE-L): RougeScorer(["rouge1", "rouge2", "rougeL"]), F-measures.
KNOWN = [
    (
        "Police killed the gunman; the 2 dogs weren't hurt.",
        "The police have killed a gunman, and two dogs were hurt",
        0.571429,
        0.000000,
        0.476190,
    ),
    ("the the the cat", "the cat sat on the mat", 0.600000, 0.250000, 0.400000),
    ("a b c d", "a b c d", 1.000000, 1.000000, 1.000000),
    ("a b c d", "d c b a", 1.000000, 0.000000, 0.250000),
    ("", "a word", 0.000000, 0.000000, 0.000000),
    ("Café 3.5% up", "cafe 3 5 up", 0.750000, 0.666667, 0.750000),
    ("one", "one", 1.000000, 0.000000, 1.000000),
    ("x y", "z", 0.000000, 0.000000, 0.000000),
]


@pytest.mark.parametrize(("summary", "reference", "rouge1", "rouge2", "rougeL"), KNOWN)
def test_known_figures(summary, reference, rouge1, rouge2, rougeL):
    assert rouge(summary, reference) == pytest.approx({"rouge1": rouge1, "rouge2": rouge2, "rougeL": rougeL}, abs=1e-6)


def test_rouge_score_says_the_same():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    generator = random.Random(0)
    vocabulary = ["the", "a", "cat", "sat", "mat,", "dog's", "Über", "3.5%", "x-ray", "The\n"]
    for _ in range(500):
        a, b = (" ".join(generator.choices(vocabulary, k=generator.randint(0, 14))) for _ in range(2))
        expected = {name: score.fmeasure for name, score in scorer.score(b, a).items()}
        assert rouge(a, b) == pytest.approx(expected)


def test_longest_common_subsequence():
    assert longest_common_subsequence(list("abcbdab"), list("bdcaba")) == 4
    assert longest_common_subsequence([], ["a"]) == longest_common_subsequence(["a"], []) == 0
