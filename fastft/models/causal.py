"""A causal language model that runs on packed sequences and hands its head to whoever needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from fastft.distributed import Ranks
from fastft.errors import ModelError
from fastft.models.attention import PackedSequences, Prefix
from fastft.models.layerwise import HostLayers, Layerwise
from fastft.models.ulysses import SharedPrefix
from fastft.ops.products import rounded_rows

R = TypeVar("R")
Item = TypeVar("Item")
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


@dataclass(frozen=True)
class Job:
    """A pass of `PackedCausalLM` without gradient, for `PackedCausalLM.each`; item: the caller's own."""

    input_ids: torch.Tensor
    packed: PackedSequences
    head_fn: HeadFn[Any] | None = None
    item: Any = None


class PackedCausalLM(nn.Module):
    """Final hidden states of packed sequences, and a function of them and the head, without a [T, V] tensor."""

    def __init__(self, model: PreTrainedModel, *, placement: str = "device", shared_by: Ranks | None = None):
        """placement: where the keys and values of encoded contexts live, see `Prefix`.

        shared_by: the ranks that encode each context together (`ulysses`); None: each encodes it whole.
        """
        super().__init__()
        head = model.get_output_embeddings()
        if head is None or getattr(head, "bias", None) is not None:
            raise ModelError(f"{type(model).__name__}: expected a language-model head without a bias")
        self.model = model
        self.placement = placement
        self.shared_by = shared_by
        self.host_layers: HostLayers | None = None
        self.head = Head(head.weight)

    def forward(
        self, input_ids: torch.Tensor, packed: PackedSequences, head_fn: HeadFn[R] | None = None
    ) -> torch.Tensor | R:
        """input_ids [1, T] -> hidden [T, H], or head_fn(hidden, weight [V, H])."""
        tokens = input_ids.shape[1]
        input_ids, packed = self.rounded(input_ids, packed)
        hidden = self.model.get_decoder()(
            input_ids=input_ids, position_ids=packed.position_ids, packed=packed, use_cache=False
        ).last_hidden_state.squeeze(0)[:tokens]
        return hidden if head_fn is None else self.head(hidden, head_fn)

    def rounded(self, input_ids: torch.Tensor, packed: PackedSequences) -> tuple[torch.Tensor, PackedSequences]:
        """A pack with tokens behind its own whose hidden states nobody reads, where their number is rounded up."""
        tokens = input_ids.shape[1]
        count = rounded_rows(tokens, self.head.weight) - tokens
        if count == 0 or not packed.is_extensible:
            return input_ids, packed
        return F.pad(input_ids, (0, count)), packed.extended(count)

    def at_a_time(self, context: Callable[[Item], Any]) -> Callable[[Item], Any] | None:
        """What `Ranks.lockstep` keeps together of items behind context(item): one at a time where ranks share them."""
        return None if self.shared_by is None else context

    @torch.no_grad()
    def each(self, jobs: Iterable[Job], *, keep_prefixes: bool = False) -> Iterator[tuple[Job, Any]]:
        """Every job with its result, in order: head_fn(hidden, weight), or the hidden states [T, H] without one.

        One after the other as they come; where the layers wait in host memory, layer by layer over all of them, and
        what a `context` job captures is then gone with them unless keep_prefixes. No gradient.
        """
        if self.host_layers is None:
            for job in jobs:
                yield job, self(job.input_ids, job.packed, job.head_fn)
            return
        jobs = list(jobs)
        packs = [self.rounded(job.input_ids, job.packed) for job in jobs]
        for job, hidden in zip(jobs, self._layerwise.run(packs, keep_prefixes=keep_prefixes), strict=True):
            hidden = hidden[: job.input_ids.shape[1]]
            yield job, hidden if job.head_fn is None else self.head(hidden, job.head_fn)

    def context(self, token_ids: tuple[int, ...]) -> tuple[Job, Prefix]:
        """A job that fills the prefix with the keys and values of a context, for the jobs that come after it.

        Where ranks share contexts, they all come with the same one; one of fewer tokens than ranks is not shared.
        """
        if self.shared_by is not None and len(token_ids) >= self.shared_by.world_size:
            prefix = SharedPrefix(len(token_ids), self.shared_by, self.placement)
        else:
            prefix = Prefix(self.placement)
            prefix.length = len(token_ids)
        own = token_ids[prefix.begin : prefix.end]
        packed = PackedSequences([len(own)], capture=prefix, device=self.device)
        return Job(torch.tensor(own, device=self.device)[None], packed), prefix

    def encode_prefix(self, token_ids: tuple[int, ...]) -> Prefix:
        """Keys and values of a context, to be shared by all that follows it."""
        job, prefix = self.context(token_ids)
        for _ in self.each([job], keep_prefixes=True):
            pass
        return prefix

    def keep_layers_on_host(self, device: torch.device, *, copies: bool | None = None) -> None:
        """Move all but the decoder layers to the device; these wait in host memory and visit it one at a time.

        copies: see `HostLayers`.
        """
        if not self.layers:
            raise ModelError(
                f"{type(self.model).__name__} does not name its decoder layers, so they cannot wait in host memory; "
                "use model.layers=device and deepspeed.offload_param=none"
            )
        inside = {p for layer in self.layers for p in layer.parameters()}
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor not in inside:
                tensor.data = tensor.data.to(device)
        self.host_layers = HostLayers(self.layers, device, copies=copies)
        self._layerwise = Layerwise(self.model.get_decoder(), self.layers, self.host_layers.visit)

    def release_host_layers(self) -> None:
        """The layers stay in host memory, and nothing brings them to the device any more."""
        if self.host_layers is not None:
            self.host_layers.release()
            self.host_layers = None

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return list(decoder_layers(self.model).values())

    @property
    def device(self) -> torch.device:
        return self.model.device
