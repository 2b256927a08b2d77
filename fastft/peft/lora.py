"""LoRA on the linear layers of a frozen model (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from fastft.errors import ModelError
from fastft.ops import lora_linear


class LoraLinear(nn.Module):
    """A linear layer plus scaling * lora_B @ lora_A, scaling = lora_alpha / r.

    Takes over the weight and bias parameters of `base`, so one ZeRO-3 gather brings all that a call needs.
    lora_A [r, in] starts uniform as in the reference implementation, lora_B [out, r] at zero.
    """

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, dtype=base.weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=base.weight.dtype))
        self.scaling = lora_alpha / r
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, self.scaling, self.bias)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, r={self.lora_A.shape[0]}, scaling={self.scaling:g}"


def target_linears(model: PreTrainedModel, target_modules: str | list[str]) -> dict[str, nn.Linear]:
    """The linear layers that `target_modules` names, by path; "all-linear" is all but the head.

    A name fits a module whose path is it or ends in "." + it, as in PEFT.
    """
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    if target_modules == "all-linear":
        if not linears:
            raise ModelError(f"peft.target_modules=all-linear: {type(model).__name__} has no torch.nn.Linear layers")
        return linears
    for target in target_modules:
        if not any(_fits(name, target) for name in linears):
            kinds = ", ".join(sorted({n.rpartition(".")[2] for n in linears}))
            raise ModelError(f"peft.target_modules: no linear layer is named {target!r}; this model has {kinds}")
    return {n: m for n, m in linears.items() if any(_fits(n, t) for t in target_modules)}


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def inject(
    model: PreTrainedModel, *, r: int, lora_alpha: float, target_modules: str | list[str]
) -> dict[str, nn.Parameter]:
    """Replace the targeted linear layers by `LoraLinear`; returns the new parameters by name."""
    trained = {}
    for name, linear in target_linears(model, target_modules).items():
        adapted = LoraLinear(linear, r, lora_alpha)
        model.set_submodule(name, adapted)
        trained |= {f"{name}.lora_A": adapted.lora_A, f"{name}.lora_B": adapted.lora_B}
    return trained
