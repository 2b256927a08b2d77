"""Classification heads that stand in the place of the language-model head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from fastft.models.causal import Head, HeadFn, R
from fastft.ops import products

DROPOUT_RATES = ("dropout", "hidden_dropout", "resid_pdrop")  # what models call that of their hidden states


class Affine(nn.Module):
    """x @ weight.T + bias, weight [out, in] drawn from N(0, std), bias zero.

    No torch.nn.Linear: whatever adapts or freezes a model's linear layers is to leave its classifier alone.
    """

    def __init__(self, in_features: int, out_features: int, *, std: float, **factory):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **factory).normal_(std=std))
        self.bias = nn.Parameter(torch.zeros(out_features, **factory))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return products.linear(x, self.weight, self.bias)


class MlpClassifier(nn.Module):
    """output(dropout(relu(dense(hidden)))), hidden [..., H] -> logits [..., labels], dense [H, H].

    The default head of uds-lsv/llmft (`models/opt_wrapper.py`, `ClassificationHead`), with its names and initial
    weights.
    """

    def __init__(self, hidden_size: int, num_labels: int, *, std: float, dropout: float = 0.0, **factory):
        super().__init__()
        self.dense = Affine(hidden_size, hidden_size, std=std, **factory)
        self.output = Affine(hidden_size, num_labels, std=std, **factory)
        self.dropout = dropout

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.output(F.dropout(F.relu(self.dense(hidden)), self.dropout, self.training))


class MlpHead(Head):
    """The parameters of an `MlpClassifier` as a module of their own, see `Head`.

    What reads the head multiplies by a weight and adds nothing: the output's bias is the weight of one more feature,
    which is 1 for every token.
    """

    def __init__(self, classifier: MlpClassifier):
        dense, output = classifier.dense, classifier.output
        super().__init__(output.weight)
        self.bias, self.dense_weight, self.dense_bias = output.bias, dense.weight, dense.bias
        self.dropout = classifier.dropout

    def forward(self, hidden: torch.Tensor, head_fn: HeadFn[R]) -> R:
        features = F.relu(products.linear(hidden, self.dense_weight, self.dense_bias))
        features = F.dropout(features, self.dropout, self.training)
        features = torch.cat([features, features.new_ones(len(features), 1)], dim=-1)
        return head_fn(features, torch.cat([self.weight, self.bias[:, None]], dim=-1))


def initial_std(config: PretrainedConfig) -> float:
    """The standard deviation from which transformers draws the weights of a new layer; OPT calls it init_std."""
    return getattr(config, "init_std", getattr(config, "initializer_range", 0.02))


def hidden_dropout(config: PretrainedConfig) -> float:
    """The dropout rate of the model's hidden states; 0 where its config has none."""
    return next((getattr(config, name) for name in DROPOUT_RATES if hasattr(config, name)), 0.0)
