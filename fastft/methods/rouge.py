"""ROUGE (Lin 2004, aclanthology W04-1013): how much of a summary's words is in another.

The F-measures of rouge_score 0.1.2, without stemming: ROUGE-1 and ROUGE-2 count common words and pairs of neighbours,
ROUGE-L the longest common subsequence of words.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise


def rouge(summary: str, reference: str) -> dict[str, float]:
    """rouge1, rouge2 and rougeL of two texts, each 0 to 1."""
    a, b = words(summary), words(reference)
    return {
        "rouge1": _f_measure(_common(a, b), len(a), len(b)),
        "rouge2": _f_measure(_common(_pairs(a), _pairs(b)), len(a) - 1, len(b) - 1),
        "rougeL": _f_measure(longest_common_subsequence(a, b), len(a), len(b)),
    }


def words(text: str) -> list[str]:
    """Runs of letters a-z and digits, in lower case."""
    return re.findall("[a-z0-9]+", text.lower())


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest sequence of words that is in both, in order but not always next to each other."""
    row = [0] * (len(b) + 1)  # of the words of a so far, with the first j words of b
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _pairs(tokens: list[str]) -> list[tuple[str, str]]:
    return list(pairwise(tokens))


def _common(a: list, b: list) -> int:
    return sum((Counter(a) & Counter(b)).values())


def _f_measure(common: int, of_summary: int, of_reference: int) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is in common."""
    return 2 * common / (of_summary + of_reference) if common else 0.0
