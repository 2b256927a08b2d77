"""Which parameters are trained: LoRA, BitFit, all weights or a head alone; injection, and files in PEFT's format."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from fastft.config import PeftConfig
from fastft.peft import bitfit, lora
from fastft.peft.files import head_name, save_adapter
from fastft.peft.switch import adapter_off

__all__ = ["adapter_off", "bitfit", "head_name", "inject", "lora", "save_adapter"]


def inject(model: PreTrainedModel, config: PeftConfig) -> dict[str, nn.Parameter]:
    """Make the configured parameters of a frozen model trainable and return them by their name in `model`.

    Raises ModelError where the model has nothing of the kind asked for.
    """
    if config.kind == "lora":
        return lora.inject(model, r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules)
    if config.kind == "bitfit":
        return bitfit.inject(model, add_biases=config.add_biases)
    if config.kind == "head":  # which method=ft puts there, with every kind
        return {}
    model.requires_grad_(True)
    return dict(model.named_parameters())
