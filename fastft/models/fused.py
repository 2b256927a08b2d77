"""What of a base model runs on fastft's own kernels, beside its attention."""

from __future__ import annotations

from torch import nn

from fastft.models.gated_mlp import fuse_gated_mlps
from fastft.models.rotary import fuse_rotary


def fuse(model: nn.Module) -> None:
    """Give the modules of `model` that fastft has a kernel for a forward of their own, and transformers' none."""
    fuse_rotary(model)
    fuse_gated_mlps(model)
