"""Activation checkpointing: decoder layers that keep their input alone and are computed again in backward.

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft.errors import ModelError
from fastft.models.causal import PackedCausalLM


def checkpoint_layers(lm: PackedCausalLM, count: int | None = None) -> None:
    """Make the first `count` decoder layers (None: all) keep only their input [1, T, H] between forward and backward.

    The first ones: by the time that they are computed again, backward has freed what the others kept. Passes without
    gradient are as they were.
    """
    layers = lm.layers
    if not layers:
        raise ModelError(
            f"{type(lm.model).__name__} does not name its decoder layers; use train.activation_checkpointing=none"
        )
    for layer in layers[:count]:
        _checkpoint(layer)


def _checkpoint(layer: nn.Module) -> None:
    # Inside of the module's hooks: ZeRO-3 has gathered the layer for its backward when it is computed again.
    whole = layer.forward

    def forward(*args, **kwargs):
        if not torch.is_grad_enabled():
            return whole(*args, **kwargs)
        return checkpoint(whole, *args, use_reentrant=False, **kwargs)

    layer.forward = forward
