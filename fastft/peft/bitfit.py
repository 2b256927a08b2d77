"""BitFit: train the biases alone (Ben Zaken et al. 2022, arXiv 2106.10199)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from fastft.errors import ModelError

# The key projection's bias adds the same number to all scores of a query, which softmax ignores: its gradient is zero
# up to rounding, and Adam would turn that rounding into full-size steps.
ZERO_GRADIENT = ("k_proj.bias",)


def inject(model: PreTrainedModel, *, add_biases: bool) -> dict[str, nn.Parameter]:
    """Make every bias trainable but the key projections'; returns them by name.

    add_biases: first give each linear layer without a bias (the head and the key projections apart) a zero one, which
    leaves the model's function as it is.
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
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained
