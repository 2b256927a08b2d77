"""Trained parameters on disk, in formats that load without fastft.

lora    adapter_config.json + adapter_model.safetensors, as PEFT writes them: `PeftModel.from_pretrained(base, folder)`
bitfit  biases.safetensors: every trained bias under its name in the base model, and bitfit_config.json
full    the whole model, as `save_pretrained` writes it
head    head.safetensors, the classification head alone
else    trained.safetensors: every trained parameter under its name in the model, and trained_config.json; for what
        those formats have no place for (peft.activation, adapter_biases, trained_scale, train_embeddings; ft.head=mlp);
        to be read by `fastft.peft.load_trained`

A classification head (method=ft) is saved under transformers' name for it, `score`: in PEFT's format as one of the
`modules_to_save`, so that `AutoModelForSequenceClassification` and PEFT load it; in the other files beside the
rest, for `model.load_state_dict(load_file(FILE), strict=False)`.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from fastft.config import PeftConfig, Section
from fastft.errors import FastftError, ModelError
from fastft.files import replaced, write_text

CLASSIFICATION_HEAD = "score.weight"  # what transformers calls it in its sequence classifiers


class Saved(Section):
    """What trained_config.json says; num_labels, head: of a classifier."""

    base_model_name_or_path: str
    num_labels: int | None
    head: Literal["linear", "mlp"] = "linear"
    peft: PeftConfig


def save_adapter(
    folder: Path,
    trained: dict[str, torch.Tensor],
    config: PeftConfig,
    *,
    base_model: str,
    model: PreTrainedModel,
    num_labels: int | None = None,
    head: str = "linear",
) -> None:
    """Write the trained parameters (whole tensors by name in the model) below `folder`, each file atomically.

    num_labels: of a classifier, whose head (ft.head) stands in the place of the language-model head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in trained.items()}
    if num_labels is not None:
        inside = f"{head_name(model)}."
        tensors = {f"score.{n.removeprefix(inside)}" if n.startswith(inside) else n: t for n, t in tensors.items()}
    if not config.is_plain or head != "linear":
        _write_tensors(folder / "trained.safetensors", tensors)
        described = config.model_copy(update={"target_modules": _targets(tensors, config)})
        saved = Saved(base_model_name_or_path=base_model, num_labels=num_labels, head=head, peft=described)
        _write_json(folder / "trained_config.json", saved.model_dump(mode="json"))
        return
    if config.kind == "full":
        whole = model if num_labels is None else _empty_classifier(model, num_labels)
        whole.save_pretrained(folder, state_dict=tensors)
        return
    if config.kind == "head":
        _write_tensors(folder / "head.safetensors", tensors)
        described = {"kind": "head", "base_model_name_or_path": base_model, "num_labels": num_labels}
        _write_json(folder / "head_config.json", described)
        return
    if config.kind == "bitfit":
        _write_tensors(folder / "biases.safetensors", tensors)
        described = {"kind": "bitfit", "base_model_name_or_path": base_model, "add_biases": config.add_biases}
        _write_json(folder / "bitfit_config.json", described)
        return
    save_peft(folder, tensors, config, base_model=base_model)


def save_peft(folder: Path, tensors: dict[str, torch.Tensor], config: PeftConfig, *, base_model: str) -> None:
    """Write LoRA's lora_A and lora_B, and a classification head where there is one, in PEFT's format."""
    is_classifier = CLASSIFICATION_HEAD in tensors
    _write_tensors(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{name.removesuffix('.weight')}.weight": t for name, t in tensors.items()},
    )
    described = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "alpha_pattern": config.alpha_pattern,
        "target_modules": _targets(tensors, config),
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": [CLASSIFICATION_HEAD.removesuffix(".weight")] if is_classifier else None,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    _write_json(folder / "adapter_config.json", described)


def _targets(tensors: dict[str, torch.Tensor], config: PeftConfig) -> list[str]:
    """Names of the adapted layers, "all-linear" resolved."""
    if config.target_modules != "all-linear":
        return config.target_modules
    return sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name})


def head_name(model: PreTrainedModel) -> str:
    """The path of the head, be it the language model's or one in its place."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _empty_classifier(model: PreTrainedModel, num_labels: int) -> PreTrainedModel:
    """transformers' sequence classifier of this architecture, without memory: what says how it is saved."""
    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)


def read_trained(folder: Path) -> tuple[Saved, dict[str, torch.Tensor]]:
    """What `save_adapter` wrote to trained_config.json and trained.safetensors."""
    path = folder / "trained_config.json"
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected the adapter/ folder of a run that holds trained.safetensors")
    return Saved.model_validate_json(path.read_text(encoding="utf-8")), load_file(folder / "trained.safetensors")


def load_biases(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Put the biases of a BitFit run, and its classification head where it has one, into its base model, in place.

    Adds biases that the base does not have.
    """
    path = Path(folder) / "biases.safetensors"
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected the adapter/ folder of a run with peft.kind=bitfit")
    modules = dict(model.named_modules())
    for name, value in load_file(path).items():
        place, _, kind = name.rpartition(".")
        module = modules.get(place)
        there = getattr(module, kind, None)
        if module is None or (there is not None and there.shape != value.shape):
            raise ModelError(f"{path}: {name} {list(value.shape)} does not fit {type(model).__name__}")
        setattr(module, kind, nn.Parameter(value.to(module.weight), requires_grad=False))
    return model


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with replaced(path) as partial:
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
        except SafetensorError as error:  # its own kind for what is an OSError elsewhere
            raise FastftError(f"{path} cannot be written: {error}") from error


def _write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
