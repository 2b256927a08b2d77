"""Trained parameters on disk, in formats that load without fastft.

lora    adapter_config.json + adapter_model.safetensors, as PEFT writes them: `PeftModel.from_pretrained(base, folder)`
bitfit  biases.safetensors: every trained bias under its name in the base model, and bitfit_config.json
full    the whole model, as `save_pretrained` writes it
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from fastft.config import PeftConfig
from fastft.errors import FastftError, ModelError


def save_adapter(
    folder: Path, trained: dict[str, torch.Tensor], config: PeftConfig, *, base_model: str, model: PreTrainedModel
) -> None:
    """Write the trained parameters (whole tensors by name in the model) below `folder`, each file atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in trained.items()}
    if config.kind == "full":
        model.save_pretrained(folder, state_dict=tensors)
        return
    if config.kind == "bitfit":
        _write_tensors(folder / "biases.safetensors", tensors)
        described = {"kind": "bitfit", "base_model_name_or_path": base_model, "add_biases": config.add_biases}
        _write_json(folder / "bitfit_config.json", described)
        return
    targets = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors})
    _write_tensors(
        folder / "adapter_model.safetensors", {f"base_model.model.{name}.weight": t for name, t in tensors.items()}
    )
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets if config.target_modules == "all-linear" else config.target_modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    _write_json(folder / "adapter_config.json", described)


def load_biases(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Put the biases of a BitFit run into its base model, in place; adds those that the base does not have."""
    path = Path(folder) / "biases.safetensors"
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected the adapter/ folder of a run with peft.kind=bitfit")
    modules = dict(model.named_modules())
    for name, value in load_file(path).items():
        module = modules.get(name.rpartition(".")[0])
        if module is None or (getattr(module, "bias", None) is not None and module.bias.shape != value.shape):
            raise ModelError(f"{path}: {name} {list(value.shape)} does not fit {type(model).__name__}")
        weight = module.weight
        module.bias = nn.Parameter(value.to(weight), requires_grad=False)
    return model


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    _atomically(path, lambda partial: save_file(tensors, partial, metadata={"format": "pt"}))


def _write_json(path: Path, value: dict) -> None:
    _atomically(path, lambda partial: Path(partial).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8"))


def _atomically(path: Path, write) -> None:
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(partial)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException as error:
        os.unlink(partial)
        if isinstance(error, SafetensorError):  # its own kind for what is an OSError elsewhere
            raise FastftError(f"{path} cannot be written: {error}") from error
        raise
