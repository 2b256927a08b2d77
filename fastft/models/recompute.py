"""Activation checkpointing: modules that keep their input alone and are computed again in backward.

Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, https://arxiv.org/abs/1604.06174.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft.errors import ModelError
from fastft.models.causal import PackedCausalLM
from fastft.models.offload import ActivationOffloading


def checkpoint_activations(lm: PackedCausalLM, what: str | int, *, offloads: bool = False) -> None:
    """As train.activation_checkpointing says: "none", "attention", so many of the first layers, or "full", all.

    offloads: the layers' inputs wait in host memory (train.activation_offloading).
    """
    if what == "attention":
        checkpoint_attention(lm)
    elif what != "none":
        offloading = ActivationOffloading(lm.device) if offloads else None
        checkpoint_layers(lm, None if what == "full" else what, offloading)


def attention_modules(lm: PackedCausalLM) -> list[nn.Module]:
    """Each decoder layer's attention with its projections: the part that knows the layer's place in a cache."""
    return [m for layer in lm.layers for m in layer.children() if hasattr(m, "layer_idx")]


def checkpoint_attention(lm: PackedCausalLM) -> None:
    """Make each layer's attention keep its input [1, T, H] alone, instead of queries, keys, values and output.

    A third of OPT's layer is computed again (Llama's: a fifth), for half of what BitFit keeps or LoRA on queries and
    values: there the MLP is frozen, and a bit of each ReLU is all that it keeps (docs/scaling.md has the counts).
    """
    modules = attention_modules(lm)
    if not modules:
        raise ModelError(
            f"{type(lm.model).__name__} has no attention modules that fastft knows; use train.activation_checkpointing="
            "full, a number of layers, or none"
        )
    for module in modules:
        _checkpoint(module)


def checkpoint_layers(
    lm: PackedCausalLM, count: int | None = None, offloading: ActivationOffloading | None = None
) -> None:
    """Make the first `count` decoder layers (None: all) keep only their input [1, T, H] between forward and backward.

    The first ones: by the time that they are computed again, backward has freed what the others kept. Passes without
    gradient are as they were.
    """
    layers = lm.layers
    if not layers:
        raise ModelError(
            f"{type(lm.model).__name__} does not name its decoder layers; use train.activation_checkpointing=none"
        )
    for i, layer in enumerate(layers[:count]):
        _checkpoint(layer, offloading, is_first=i == 0)


def _checkpoint(module: nn.Module, offloading: ActivationOffloading | None = None, *, is_first: bool = False) -> None:
    # Inside of the module's hooks: ZeRO-3 has gathered the layer for its backward when it is computed again.
    whole = module.forward

    def forward(*args, **kwargs):
        if not torch.is_grad_enabled():
            return whole(*args, **kwargs)
        with offloading.keeping(args[0], is_first=is_first) if offloading else nullcontext():
            return checkpoint(whole, *args, use_reentrant=False, **kwargs)

    module.forward = forward
