"""ReLU that keeps one bit an element, where nothing else keeps its result for backward."""

from __future__ import annotations

import torch
from torch import nn

from fastft.ops import relu


class MaskedReLU(nn.ReLU):
    """`torch.nn.ReLU` by `fastft.ops.relu`.

    Not in place: that would save nothing at a step's peak, since backward has dy and dx of that size together in any
    case, and another reader of the input would find it changed.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relu(x)


def mask_relus(model: nn.Module) -> None:
    """Replace each ReLU between two linear layers of which the second keeps no input.

    That of OPT's MLP: [T, 4H] in 16 bits, 4 of the 10 H elements that BitFit keeps of a token in a layer, becomes a
    sixteenth. With full fine-tuning, or LoRA on the second layer, that layer keeps ReLU's result anyway, and a
    gated MLP's product does; the mask would come on top. Other activations' gradients need more than a bit.
    """
    for parent in model.modules():
        relus = [name for name, m in parent.named_children() if type(m) is nn.ReLU]
        linears = [m for m in parent.children() if hasattr(m, "in_features")]
        widening = [m for m in linears if m.in_features < m.out_features]
        narrowing = [m for m in linears if m.in_features > m.out_features]
        if relus and len(widening) == len(narrowing) == 1 and not _keeps_input(narrowing[0]):
            for name in relus:
                setattr(parent, name, MaskedReLU())


def _keeps_input(linear: nn.Module) -> bool:
    """Whether a weight of it gets a gradient: that of a bias needs no input."""
    return any(p.requires_grad and p.dim() > 1 for p in linear.parameters())
