"""The modules of a model whose place this project's kernels take."""

from __future__ import annotations

from torch import nn

from fastft.models.norms import fuse_norms


def fuse(model: nn.Module) -> None:
    """Replace what has a kernel here; parameters, and their names, stay as they are."""
    fuse_norms(model)
