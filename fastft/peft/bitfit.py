"""BitFit: train the biases alone (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastft.errors import ModelError
from fastft.peft.switch import adapter_is_off

# The key projection's bias adds the same number to all scores of a query, which softmax ignores: its gradient is zero
# up to rounding, and Adam would turn that rounding into full-size steps.
ZERO_GRADIENT = ("k_proj.bias",)


def inject(model: PreTrainedModel, *, add_biases: bool) -> dict[str, nn.Parameter]:
    """Make every bias trainable but the key projections'; returns them by name.

    add_biases: first give each linear layer without a bias (the head and the key projections apart) a zero one, which
    leaves the model's function as it is.
    A copy of the biases as they are now is kept for `peft.adapter_off`.
    """
    if add_biases:
        head = model.get_output_embeddings()
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head and module.bias is None:
                if f"{name}.bias".endswith(ZERO_GRADIENT):
                    continue
                weight = module.weight
                module.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] == "bias" and not name.endswith(ZERO_GRADIENT)
    }
    if not trained:
        raise ModelError(
            f"peft.kind=bitfit, but {type(model).__name__} has no bias parameters; set peft.add_biases=true to add "
            "zero biases, or use peft.kind=lora"
        )
    for name, parameter in trained.items():
        _keep_base_bias(model.get_submodule(name.rpartition(".")[0]))
        parameter.requires_grad_(True)
    return trained


def _keep_base_bias(module: nn.Module) -> None:
    """Let `module` compute with a copy of its bias of now where the adapter is off.

    The copy is a buffer, which ZeRO-3 leaves whole on every rank; the trained bias is put aside, not overwritten, so
    what ZeRO-3 does with it goes on as ever.
    """
    module.register_buffer("base_bias", module.bias.detach().clone(), persistent=False)
    # Not a closure: a copy of the module, or its pickle, would go on computing with the parameters of this one.
    module.forward = partial(_forward, module, module.forward)


def _forward(module: nn.Module, trained_forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not adapter_is_off():
        return trained_forward(*args, **kwargs)
    parameters = module._parameters  # ZeRO-3 puts a dictionary of its own there
    trained, parameters["bias"] = parameters["bias"], module.base_bias
    try:
        return trained_forward(*args, **kwargs)
    finally:
        parameters["bias"] = trained
