"""LoRA on the linear layers of a frozen model (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from fastft.errors import ModelError
from fastft.models.quantized import QuantizedLinear
from fastft.ops import frozen_linear, lora_linear, lora_linears, products
from fastft.peft.switch import adapter_is_off

# Siblings that models call one after the other with the same input.
SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)


class LoraLinear(nn.Module):
    """A linear layer plus scaling * lora_B @ lora_A, scaling = lora_alpha / r.

    Takes over the weight and bias parameters of `base`, so one ZeRO-3 gather brings all that a call needs.
    lora_A [r, in] starts uniform as in the reference implementation, lora_B [out, r] at zero.
    """

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float):
        super().__init__()
        if isinstance(base, QuantizedLinear):
            self.packed = base.packed
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, dtype=base.weight.dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, dtype=base.weight.dtype))
        self.scaling = lora_alpha / r
        self.shared_input: SharedInput | None = None
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if adapter_is_off():
            return frozen_linear(x, self.weight, self.bias)
        if self.shared_input is not None:
            return self.shared_input.output(self, x)
        return lora_linear(x, self.weight, self.lora_A, self.lora_B, self.scaling, self.bias)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, r={self.lora_A.shape[0]}, scaling={self.scaling:g}"


class BottleneckLinear(LoraLinear):
    """A linear layer plus lora_scale * scaling * (lora_B f(lora_A x + lora_A_bias) + lora_B_bias), f ReLU or nothing.

    With ReLU it is an adapter beside the layer ("parallel", He et al. 2022, arXiv 2110.04366), and what uds-lsv/llmft
    calls LoRA. Unlike LoRA it cannot be merged into the weight. Both biases start at zero, lora_scale
    [1] at one.
    """

    def __init__(
        self, base: nn.Linear, r: int, lora_alpha: float, *, activation: str, biases: bool, trained_scale: bool
    ):
        super().__init__(base, r, lora_alpha)
        self.activation = F.relu if activation == "relu" else nn.Identity()
        self.lora_A_bias = nn.Parameter(torch.zeros(r, dtype=base.weight.dtype)) if biases else None
        self.lora_scale = nn.Parameter(torch.ones(1, dtype=base.weight.dtype)) if trained_scale else None
        self.lora_B_bias = nn.Parameter(torch.zeros(base.out_features, dtype=base.weight.dtype)) if biases else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = frozen_linear(x, self.weight, self.bias)
        if adapter_is_off():
            return out
        bottleneck = self.activation(products.linear(x, self.lora_A, self.lora_A_bias))
        scaling = self.scaling if self.lora_scale is None else self.scaling * self.lora_scale
        return out + scaling * products.linear(bottleneck, self.lora_B, self.lora_B_bias)


class SharedInput:
    """LoRA layers of one input: the first that is called computes all, the others find their output here.

    Their x is then read once for all lora_A, and backward sums their gradients in place. The layers stay where they
    are in the model, so names, hooks and files know nothing of it.
    """

    def __init__(self, layers: list[LoraLinear]):
        self.layers = layers
        # What the outputs that wait were computed from, and these: one attribute, as another thread may replace it.
        self.found: tuple[tuple, dict[LoraLinear, torch.Tensor]] | None = None

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "found": None}  # outputs wait for this model's layers, not for a copy's

    def output(self, layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
        key = (x, x._version, torch.is_grad_enabled(), *(p._version for m in self.layers for p in (m.lora_A, m.lora_B)))
        known, waiting = self.found or ((None,), {})
        if not (known[0] is x and known[1:] == key[1:] and layer in waiting):
            layers = self.layers
            # Where ZeRO-3 has gathered this layer alone, the others' weights are not here.
            if not all(m.weight.numel() and m.lora_A.numel() for m in layers):
                layers = [layer]
            outputs = lora_linears(
                x,
                [m.weight for m in layers],
                [m.lora_A for m in layers],
                [m.lora_B for m in layers],
                layer.scaling,
                [m.bias for m in layers],
            )
            waiting = dict(zip(layers, outputs, strict=True))
        result = waiting.pop(layer)
        self.found = (key, waiting) if waiting else None
        return result


def share_inputs(model: nn.Module) -> None:
    """Let the LoRA layers of each parent that read the same input compute together."""
    for parent in model.modules():
        for names in SHARED_INPUT:
            layers = [m for m in (getattr(parent, name, None) for name in names) if type(m) is LoraLinear]
            if len(layers) > 1 and len({(m.in_features, m.scaling) for m in layers}) == 1:
                shared = SharedInput(layers)
                for layer in layers:
                    layer.shared_input = shared


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
    model: PreTrainedModel,
    *,
    r: int,
    lora_alpha: float,
    target_modules: str | list[str],
    alpha_pattern: dict[str, float] | None = None,
    activation: str = "none",
    biases: bool = False,
    trained_scale: bool = False,
) -> dict[str, nn.Parameter]:
    """Replace the targeted linear layers by `LoraLinear`; returns the new parameters by name.

    alpha_pattern: name -> lora_alpha of the layers that it fits. The other three: see `BottleneckLinear`.
    Raises ModelError for a name that fits no layer.
    """
    trained = {}
    linears, alphas = target_linears(model, target_modules), alpha_pattern or {}
    for target in alphas:
        if not any(_fits(name, target) for name in linears):
            raise ModelError(f"peft.alpha_pattern: no layer of peft.target_modules is named {target!r}")
    for name, linear in linears.items():
        alpha = next((own for target, own in alphas.items() if _fits(name, target)), lora_alpha)
        if activation == "none" and not biases and not trained_scale:
            adapted = LoraLinear(linear, r, alpha)
        else:
            adapted = BottleneckLinear(
                linear, r, alpha, activation=activation, biases=biases, trained_scale=trained_scale
            )
        model.set_submodule(name, adapted)
        own = adapted.named_parameters(prefix=name)
        trained |= {path: parameter for path, parameter in own if ".lora_" in path}
    share_inputs(model)
    return trained
