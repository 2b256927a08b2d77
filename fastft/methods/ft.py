"""Vanilla fine-tuning: a new head [labels, H] on the final hidden state of the last token (Radford et al. 2018).

With that head the labels are the vocabulary: label i is "token" i. What pattern-based fine-tuning does over the
vocabulary (`pbft.vocabulary_loss`), and how label words are scored (`icl.classify`), then trains and evaluates the
classifier, and nothing else is needed.
"""

from __future__ import annotations

from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from fastft.errors import ModelError
from fastft.models.causal import Head, PackedCausalLM


def replace_head(lm: PackedCausalLM, num_labels: int) -> nn.Parameter:
    """Put a new head, drawn as transformers draws it, in the place of the language-model head; returns its weight.

    Raises ModelError for a model of which transformers has no sequence classifier, which could not be loaded again.
    """
    model = lm.model
    if type(model.config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(f"method=ft: transformers has no sequence classifier for {type(model).__name__}; use pbft")
    old = lm.head.weight
    head = nn.Linear(old.shape[1], num_labels, bias=False, device=old.device, dtype=old.dtype)
    nn.init.normal_(head.weight, std=getattr(model.config, "initializer_range", 0.02))
    model.set_output_embeddings(head)
    lm.head = Head(head.weight)
    return head.weight
