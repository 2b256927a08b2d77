"""What a classifier's predictions come to: accuracy, MCC, F1, likelihood, calibration, each with a bootstrap interval.

Every figure is a function of sums over the examples: the confusion matrix, the negative log-likelihood, and so on. A
resample of the examples is a vector of counts, so all resamples' sums are one product of counts and features.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from fastft.tasks import Example

BINS = 15
FIGURES = ("accuracy", "vocabulary_accuracy", "mcc", "macro_f1", "non_label_fraction", "nll", "ece", "majority")
RESAMPLES = 1000
INTERVAL = (0.025, 0.975)  # 95 %, between percentiles of the resamples (Efron and Tibshirani 1993)
RESAMPLED_AT_ONCE = 2**22  # counts in memory


@dataclass(frozen=True)
class Predictions:
    """What a model says of N examples with up to C choices each.

    log_probs: log p of each choice among the choices of its example, float64 [N, C]; -inf past an example's own.
    is_label: whether the most likely token of the whole vocabulary begins one of the choices, bool [N].
    """

    log_probs: torch.Tensor
    is_label: torch.Tensor

    @property
    def labels(self) -> torch.Tensor:
        return self.log_probs.argmax(-1)


def measure(predictions: Predictions, gold: list[int], *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Figures of one set of examples:

    accuracy, macro_f1    macro_f1 is the mean over the labels that occur, in the set or among the predictions
    mcc                   Matthews' correlation coefficient over any number of labels: 1 all right, 0 no better than one
                          constant label (Gorodkin 2004, doi 10.1016/j.compbiolchem.2004.09.006)
    non_label_fraction    where the most likely token of the vocabulary begins none of the choices
    vocabulary_accuracy   accuracy where those count as wrong: for labels of one token, that of the most likely token
    nll                   -log p(right label | choices), nats
    ece                   expected calibration error, sum_b n_b / n |accuracy_b - confidence_b| over 15 bins of
                          equal width of the predicted label's probability (Guo et al. 2017, arXiv 1706.04599)
    majority              accuracy of always answering the most frequent label
    class_accuracy        of the examples of each label (its recall); None for a label that does not occur
    intervals             {figure: [low, high]}, 95 % bootstrap over the examples; without resamples none
    """
    features = _features(predictions, torch.tensor(gold))
    num_labels = predictions.log_probs.shape[1]
    sums = features.sum(0, keepdim=True)
    found = {name: value.item() for name, value in _figures(sums, num_labels).items()}
    counts = sums[0, : num_labels**2].view(num_labels, num_labels)
    occurs = counts.sum(1)
    recall = counts.diagonal() / occurs
    intervals = {}
    if resamples:
        resampled = _figures(resample(features, resamples, seed), num_labels)
        for name, values in resampled.items():
            intervals[name] = interval(values)
    return {
        "examples": len(gold),
        **found,
        "majority": occurs.max().item() / len(gold),
        "class_accuracy": [r if n else None for r, n in zip(recall.tolist(), occurs.tolist(), strict=True)],
        **({"intervals": intervals} if resamples else {}),
    }


def interval(values: torch.Tensor) -> list[float]:
    """[low, high] of a figure, from its values over the resamples."""
    return values.quantile(torch.tensor(INTERVAL, dtype=values.dtype)).tolist()


def _features(predictions: Predictions, gold: torch.Tensor) -> torch.Tensor:
    """[N, C * C + 3 + BINS]: cell of the confusion matrix, no label, right and a label, nll, and in its bin
    (right - confidence)."""
    log_probs, labels = predictions.log_probs, predictions.labels
    count, num_labels = log_probs.shape
    cell = torch.zeros(count, num_labels**2, dtype=torch.float64)
    cell.scatter_(1, (gold * num_labels + labels)[:, None], 1.0)
    nll = -log_probs.gather(1, gold[:, None])
    confidence = log_probs.max(-1).values.exp()
    gaps = torch.zeros(count, BINS, dtype=torch.float64)
    place = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)  # bins (b / BINS, (b + 1) / BINS]
    gaps.scatter_(1, place[:, None], ((labels == gold).double() - confidence)[:, None])
    is_label = predictions.is_label
    counted = torch.stack([~is_label, is_label & (labels == gold)], 1).double()
    return torch.cat([cell, counted, nll, gaps], 1)


def _figures(sums: torch.Tensor, num_labels: int) -> dict[str, torch.Tensor]:
    """Sums of the features over R samples of the examples, [R, features] -> each figure [R]."""
    confusion = sums[:, : num_labels**2].view(-1, num_labels, num_labels)  # gold, predicted
    non_label, right_label, nll = sums[:, num_labels**2 : num_labels**2 + 3].unbind(1)
    gaps = sums[:, num_labels**2 + 3 :]
    right, gold, predicted = confusion.diagonal(dim1=1, dim2=2), confusion.sum(2), confusion.sum(1)
    n, hits = gold.sum(1), right.sum(1)
    spread = (n**2 - predicted.square().sum(1)) * (n**2 - gold.square().sum(1))
    covariance = n * hits - (predicted * gold).sum(1)
    f1 = 2 * right / (gold + predicted)  # nan for a label that does not occur
    return {
        "accuracy": hits / n,
        "vocabulary_accuracy": right_label / n,
        "mcc": torch.where(spread > 0, covariance / spread.sqrt(), 0.0),
        "macro_f1": f1.nanmean(1),
        "non_label_fraction": non_label / n,
        "nll": nll / n,
        "ece": gaps.abs().sum(1) / n,
    }


def resample(features: torch.Tensor, resamples: int, seed: int) -> torch.Tensor:
    """Sums of the features over `resamples` samples of N examples drawn with replacement."""
    count = features.shape[0]
    generator = torch.Generator().manual_seed(seed)
    sums = []
    for part in torch.arange(resamples).split(max(1, RESAMPLED_AT_ONCE // count)):
        drawn = torch.randint(count, (len(part), count), generator=generator)
        counts = torch.zeros(len(part), count, dtype=features.dtype)
        counts.scatter_add_(1, drawn, torch.ones_like(counts))
        sums.append(counts @ features)
    return torch.cat(sums)


def measure_groups(
    predictions: Predictions, examples: list[Example], num_labels: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Accuracy, overall and by label, of each group that the examples belong to: kind of group -> group -> figures."""
    members: dict[str, dict[str, list[tuple[int, bool]]]] = defaultdict(lambda: defaultdict(list))
    for example, label in zip(examples, predictions.labels.tolist(), strict=True):
        for kind, group in example.groups.items():
            members[kind][group].append((example.label, label == example.label))
    return {
        kind: {group: _group_figures(rows, num_labels) for group, rows in sorted(groups.items())}
        for kind, groups in members.items()
    }


def _group_figures(rows: list[tuple[int, bool]], num_labels: int) -> dict[str, Any]:
    by_label = [[right for label, right in rows if label == own] for own in range(num_labels)]
    return {
        "examples": len(rows),
        "accuracy": sum(right for _, right in rows) / len(rows),
        "class_accuracy": [sum(own) / len(own) if own else None for own in by_label],
    }
