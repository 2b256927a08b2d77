"""Linear layers with a frozen weight, which keep nothing for backward."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from fastft.ops import frozen_linear


class FrozenLinear(nn.Linear):
    """`torch.nn.Linear` by `fastft.ops.frozen_linear`, with the parameters of `base`.

    Torch's own keeps a view of the weight for backward, which under ZeRO-3 keeps the gathered one alive; the function
    that DeepSpeed puts in its place there keeps the input, too, though only a weight's gradient would need it.
    """

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_linear(x, self.weight, self.bias)


def freeze_linears(model: PreTrainedModel) -> None:
    """Replace each plain linear layer but the head."""
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, linear in parent.named_children():
            if type(linear) is nn.Linear and linear is not head:
                setattr(parent, name, FrozenLinear(linear))
