"""Figures of a classification against their definitions, example by example, and values worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fastft.methods.metrics import Predictions, measure, measure_groups
from fastft.tasks import Example

GOLD = [0, 1, 1, 0, 1, 1, 0, 1]
PREDICTED = [0, 1, 0, 0, 1, 1, 1, 1]


def certain(predicted: list[int], num_labels: int, p: float = 0.9) -> Predictions:
    """The predicted label has probability p, the others share the rest."""
    probs = torch.full((len(predicted), num_labels), (1 - p) / max(1, num_labels - 1), dtype=torch.float64)
    probs[torch.arange(len(predicted)), torch.tensor(predicted)] = p
    return Predictions(probs.log(), torch.tensor([True] * len(predicted)))


def test_two_labels_by_hand():
    """tp 4, tn 2, fp 1, fn 1: MCC (4 * 2 - 1 * 1) / 15, F1 8 / 10 and 4 / 6."""
    found = measure(certain(PREDICTED, 2), GOLD)
    assert found["accuracy"] == 0.75 and found["examples"] == 8 and found["majority"] == 5 / 8
    assert found["mcc"] == pytest.approx(7 / 15)
    assert found["macro_f1"] == pytest.approx((8 / 10 + 4 / 6) / 2)
    assert found["class_accuracy"] == pytest.approx([2 / 3, 4 / 5])
    assert found["nll"] == pytest.approx(-(6 * math.log(0.9) + 2 * math.log(0.1)) / 8)
    assert found["ece"] == pytest.approx(0.9 - 0.75)  # one bin
    assert found["non_label_fraction"] == 0 and found["vocabulary_accuracy"] == 0.75


def test_several_labels_by_their_definitions():
    draw = random.Random(0)
    gold = [draw.randrange(4) for _ in range(200)]
    log_probs = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).mul(2)
    log_probs = log_probs.log_softmax(-1)
    predictions = Predictions(log_probs, torch.tensor([i % 5 > 0 for i in range(200)]))
    found = measure(predictions, gold)
    predicted = [max(range(4), key=row.__getitem__) for row in log_probs.tolist()]
    pairs = list(zip(predicted, gold, strict=True))
    f1 = []
    for label in range(4):
        hits = sum(p == g == label for p, g in pairs)
        f1.append(2 * hits / (predicted.count(label) + gold.count(label)))
    assert found["macro_f1"] == pytest.approx(sum(f1) / 4)
    assert found["non_label_fraction"] == 0.2
    assert found["vocabulary_accuracy"] == sum(p == g and i % 5 > 0 for i, (p, g) in enumerate(pairs)) / 200
    one_hot = torch.nn.functional.one_hot
    x, y = (
        one_hot(torch.tensor(v), 4).double() - one_hot(torch.tensor(v), 4).double().mean(0) for v in (predicted, gold)
    )
    assert found["mcc"] == pytest.approx(((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item())
    ece = 0.0
    for b in range(15):
        inside = [
            (p == g, math.exp(max(row)))
            for (p, g), row in zip(pairs, log_probs.tolist(), strict=True)
            if b / 15 < math.exp(max(row)) <= (b + 1) / 15
        ]
        ece += abs(sum(right for right, _ in inside) - sum(confidence for _, confidence in inside)) / 200
    assert found["ece"] == pytest.approx(ece)


def test_labels_that_do_not_occur():
    found = measure(certain([1, 1, 1, 1], 3), [1, 1, 1, 0])
    assert found["mcc"] == 0.0  # one constant label
    assert found["macro_f1"] == pytest.approx((6 / 7 + 0) / 2)  # label 2 is neither right nor predicted
    assert found["class_accuracy"] == [0.0, 1.0, None]
    own = Predictions(
        torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64).log(), torch.tensor([1, 1]) > 0
    )
    assert measure(own, [0, 2])["nll"] == pytest.approx(math.log(2))  # the first example has two choices


def test_intervals_are_those_of_a_binomial():
    """The accuracy of a resample is a binomial share: 95 % lie within 1.96 standard deviations of the accuracy."""
    predicted = [int(i % 10 < 7) for i in range(1000)]
    found = measure(certain(predicted, 2), [1] * 1000)
    low, high = found["intervals"]["accuracy"]
    half = 1.96 * math.sqrt(0.7 * 0.3 / 1000)
    assert low == pytest.approx(0.7 - half, abs=0.005) and high == pytest.approx(0.7 + half, abs=0.005)
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high or name == "ece"  # resampling can only add to it
    assert measure(certain(predicted, 2), [1] * 1000) == found
    assert measure(certain(predicted, 2), [1] * 1000, seed=1)["intervals"] != found["intervals"]
    assert "intervals" not in measure(certain(predicted, 2), [1] * 1000, resamples=0)


def test_groups():
    kinds = [("a", 0), ("a", 1), ("b", 0), ("b", 0)]
    examples = [Example({}, label, groups={"subcase": kind}) for kind, label in kinds]
    assert measure_groups(certain([0, 0, 0, 1], 2), examples, 2) == {
        "subcase": {
            "a": {"examples": 2, "accuracy": 0.5, "class_accuracy": [1.0, 0.0]},
            "b": {"examples": 2, "accuracy": 0.5, "class_accuracy": [0.5, None]},
        }
    }
    assert measure_groups(certain([0], 2), [Example({}, 0)], 2) == {}
