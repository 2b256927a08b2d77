"""Which parameters are trained: LoRA, BitFit, all weights or a head alone; injection, and files in PEFT's format."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from fastft.config import PeftConfig
from fastft.errors import ModelError
from fastft.models.classifier import MlpClassifier, hidden_dropout, initial_std
from fastft.peft import bitfit, lora
from fastft.peft.files import head_name, read_trained, save_adapter
from fastft.peft.frozen_linear import freeze_linears
from fastft.peft.masked_relu import mask_relus
from fastft.peft.switch import adapter_off

__all__ = ["adapter_off", "bitfit", "head_name", "inject", "load_trained", "lora", "save_adapter"]


def inject(model: PreTrainedModel, config: PeftConfig) -> dict[str, nn.Parameter]:
    """Make the configured parameters of a frozen model trainable and return them by their name in `model`.

    Linear layers with a frozen weight and ReLUs are replaced by those that keep less for backward, see `frozen_linear`
    and `masked_relu`.
    Raises ModelError where the model has nothing of the kind asked for.
    """
    if config.kind != "full":
        freeze_linears(model)
    if config.kind == "lora":
        trained = lora.inject(
            model,
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=config.target_modules,
            alpha_pattern=config.alpha_pattern,
            activation=config.activation,
            biases=config.adapter_biases,
            trained_scale=config.trained_scale,
        )
    elif config.kind == "bitfit":
        trained = bitfit.inject(model, add_biases=config.add_biases)
    elif config.kind == "full":
        trained = dict(model.requires_grad_(True).named_parameters())
    else:  # the head, which method=ft puts there, with every kind
        trained = {}
    if config.train_embeddings:
        trained |= embeddings(model)
    mask_relus(model)
    return trained


def embeddings(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Make the weights of all embeddings (tokens, learned positions) and of the head trainable; returns them by name.

    A head that is tied to the token embeddings is one parameter with them, under their name.
    """
    head = model.get_output_embeddings()
    weights = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) or m is head for p in m.parameters()}
    found = {name: p for name, p in model.named_parameters() if id(p) in weights}
    for parameter in found.values():
        parameter.requires_grad_(True)
    return found


def load_trained(model: PreTrainedModel, folder: str | os.PathLike) -> PreTrainedModel:
    """Put what a run trained into its base model, in place, from a folder with trained.safetensors.

    model: the base; transformers' sequence classifier of it where the run had a classification head.
    Raises ModelError where folder and model do not fit.
    """
    saved, tensors = read_trained(Path(folder))
    if saved.head == "mlp":
        replace_score(model, saved.num_labels)
    inject(model, saved.peft)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in tensors.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ModelError(f"{folder}: {name} {list(value.shape)} does not fit {type(model).__name__}")
        with torch.no_grad():
            parameters[name].copy_(value)
    return model.requires_grad_(False)


def replace_score(model: PreTrainedModel, num_labels: int) -> None:
    """Put an `MlpClassifier` in the place of the linear layer of transformers' sequence classifier."""
    score = getattr(model, "score", None)
    if not isinstance(score, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no classification head `score`, in whose place ft.head=mlp belongs; load the "
            "base with AutoModelForSequenceClassification"
        )
    factory = {"device": score.weight.device, "dtype": score.weight.dtype}
    std, dropout = initial_std(model.config), hidden_dropout(model.config)
    classifier = MlpClassifier(score.in_features, num_labels, std=std, dropout=dropout, **factory)
    model.score = classifier.train(model.training)
    model.num_labels = model.config.num_labels = num_labels
