"""What of a base model runs on fastft's own kernels, beside its attention."""

from __future__ import annotations

import torch
from torch import nn

from fastft.models.gated_mlp import fuse_gated_mlps
from fastft.models.linears import fuse_linears
from fastft.models.norms import fuse_norms
from fastft.models.rotary import fuse_rotary


def fuse(model: nn.Module) -> None:
    """Give what fastft has a kernel for a forward of its own; parameters, and their names, stay as they are."""
    with torch.device("cpu"):  # where the modules' own code is tried, whatever the caller's default is
        fuse_norms(model)
        fuse_rotary(model)
        fuse_gated_mlps(model)
        fuse_linears(model)
