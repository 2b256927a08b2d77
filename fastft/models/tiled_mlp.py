"""Tiled MLP: a decoder layer's MLP over a part of the tokens at a time.

Bekman et al. 2025, Arctic Long Sequence Training, https://arxiv.org/abs/2506.13996.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastft.errors import ModelError
from fastft.models.causal import PackedCausalLM


def mlp_modules(lm: PackedCausalLM) -> list[nn.Module]:
    """Each decoder layer's MLP; none where a model has no module for it, like OPT."""
    return [layer.mlp for layer in lm.layers if isinstance(getattr(layer, "mlp", None), nn.Module)]


def tile_mlps(lm: PackedCausalLM, tokens: int) -> None:
    """Let every MLP read its input [1, T, H] in tiles [1, tokens, H]: its wide intermediates exist for one at a time.

    It works on each token alone, so the result is the same, up to the rounding of products of other shapes. With
    gradient each tile is computed again in backward, which costs a second forward of the MLP where T > tokens.
    Raises ModelError where the layers have no module that is their MLP.
    """
    mlps = mlp_modules(lm)
    if not mlps:
        raise ModelError(
            f"model.mlp_tile={tokens}: the decoder layers of {type(lm.model).__name__} have no module `mlp` that could "
            "be given a part of the tokens; use model.mlp_tile=null"
        )
    for mlp in mlps:
        _tile(mlp, tokens)


def _tile(mlp: nn.Module, tokens: int) -> None:
    whole = mlp.forward

    def forward(hidden: Tensor) -> Tensor:
        if hidden.shape[1] <= tokens:
            return whole(hidden)
        tiles = hidden.split(tokens, 1)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(whole, tile, use_reentrant=False) for tile in tiles], 1)
        return torch.cat([whole(tile) for tile in tiles], 1)

    mlp.forward = forward
