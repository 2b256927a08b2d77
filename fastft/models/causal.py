"""A causal language model that runs on packed sequences and hands its head to whoever needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from fastft.errors import ModelError
from fastft.models.attention import PackedSequences, Prefix

R = TypeVar("R")
HeadFn = Callable[[torch.Tensor, torch.Tensor], R]  # (hidden [T, H], head weight [V, H]) -> anything


def decoder_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder layers by name, in order; none where the model does not say what its layers are."""
    kinds = model._no_split_modules or ()
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}


class Head(nn.Module):
    """The head's weight as a module of its own.

    ZeRO-3 gathers a module's parameters around its forward; a loss that multiplies by the head weight chunk by chunk
    therefore runs inside this one.
    """

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor, head_fn: HeadFn[R]) -> R:
        return head_fn(hidden, self.weight)


class PackedCausalLM(nn.Module):
    """Final hidden states of packed sequences, and a function of them and the head, without a [T, V] tensor."""

    def __init__(self, model: PreTrainedModel, *, placement: str = "device"):
        """placement: where the keys and values of encoded contexts live, see `Prefix`."""
        super().__init__()
        head = model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise ModelError(f"{type(model).__name__}: expected a language-model head without a bias")
        self.model = model
        self.placement = placement
        self.head = Head(head.weight)

    def forward(
        self, input_ids: torch.Tensor, packed: PackedSequences, head_fn: HeadFn[R] | None = None
    ) -> torch.Tensor | R:
        """input_ids [1, T] -> hidden [T, H], or head_fn(hidden, weight [V, H])."""
        hidden = self.model.get_decoder()(
            input_ids=input_ids, position_ids=packed.position_ids, packed=packed, use_cache=False
        ).last_hidden_state.squeeze(0)
        return hidden if head_fn is None else self.head(hidden, head_fn)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return list(decoder_layers(self.model).values())

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def encode_prefix(self, token_ids: tuple[int, ...]) -> Prefix:
        """Keys and values of a context, to be shared by all that follows it."""
        prefix = Prefix(self.placement)
        packed = PackedSequences([len(token_ids)], capture=prefix, device=self.device)
        self(torch.tensor(token_ids, device=self.device)[None], packed)
        return prefix
