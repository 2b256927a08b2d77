"""Vanilla fine-tuning: a new head on the final hidden state of the last token (Radford et al. 2018).

With that head the labels are the vocabulary: label i is "token" i. What pattern-based fine-tuning does over the
vocabulary (`pbft.vocabulary_loss`), and how label words are scored (`icl.classify`), then trains and evaluates the
classifier, and nothing else is needed.
"""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from fastft.errors import ModelError
from fastft.models.causal import Head, PackedCausalLM
from fastft.models.classifier import MlpClassifier, MlpHead, hidden_dropout, initial_std
from fastft.peft import head_name


def replace_head(
    lm: PackedCausalLM, num_labels: int, kind: Literal["linear", "mlp"] = "linear", *, dropout: bool = False
) -> dict[str, nn.Parameter]:
    """Put a new head in the place of the language-model head; returns its parameters by name, to be trained.

    linear: a weight [labels, H], drawn as transformers draws it. mlp: see `MlpClassifier`; dropout: with the rate of
    the model's config. Raises ModelError for a model of which transformers has no sequence classifier, which could not
    be loaded again.
    """
    model = lm.model
    if type(model.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(f"method=ft: transformers has no sequence classifier for {type(model).__name__}; use pbft")
    old, std = lm.head.weight, initial_std(model.config)
    factory = {"device": old.device, "dtype": old.dtype}
    if kind == "mlp":
        rate = hidden_dropout(model.config) if dropout else 0.0
        head = MlpClassifier(old.shape[1], num_labels, std=std, dropout=rate, **factory)
        lm.head = MlpHead(head)
    else:
        head = nn.Linear(old.shape[1], num_labels, bias=False, **factory)
        nn.init.normal_(head.weight, std=std)
        lm.head = Head(head.weight)
    model.set_output_embeddings(head)
    return dict(head.named_parameters(prefix=head_name(model)))
