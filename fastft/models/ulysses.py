"""Sequence parallelism: the ranks encode a context together, and what follows it shares their work.

DeepSpeed Ulysses, Jacobs et al. 2023, arXiv 2309.14509. A rank has its own tokens in everything but attention: about
C / N of a context's C, then sequences behind it. In attention one all-to-all turns [own tokens, all heads] into
[the tokens of all ranks, own heads] for queries, keys and values together, attention is that of one rank (packed,
behind prefixes and caches, nothing merged between ranks), and a second all-to-all takes the outputs back. The keys and
values that a rank keeps of a context, in its `SharedPrefix`, are those of all C tokens in its own heads.

Key/value heads are dealt out, each with the query heads that share it; where they do not divide by N, the first ranks
have one more. Ranks are behind the same context at the same time, each with one sequence or more. No gradient.

Shapes: t tokens of this rank, T of all ranks, N ranks, H query heads, G key/value heads, D head size, C context length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from fastft.distributed import Ranks
from fastft.errors import ModelError
from fastft.models.packing import DecodeCache, PackedSequences, Prefix

T = TypeVar("T")
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def deal(count: int, ranks: int) -> list[int]:
    """`count` things dealt out: how many each rank has. The first have one more where it does not come out even."""
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


def check_heads(kv_heads: int, ranks: int) -> None:
    """Raise ModelError where a rank would be left without a key/value head."""
    if kv_heads < ranks:
        raise ModelError(
            f"model.sequence_parallel=ulysses deals key/value heads out to the processes, and the model has {kv_heads} "
            f"for {ranks} processes; use up to {kv_heads} processes, or model.sequence_parallel=none"
        )


def check_model(model: PreTrainedModel, ranks: int) -> None:
    """Raise ModelError where the ranks cannot encode a context together."""
    config = model.config.get_text_config()
    check_heads(getattr(config, "num_key_value_heads", None) or config.num_attention_heads, ranks)
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind == "longrope" or "dynamic" in (kind or ""):
                raise ModelError(
                    f"model.sequence_parallel=ulysses: the rotary frequencies of {type(model).__name__} (rope_type="
                    f"{kind}) follow from the largest position in a pass, which is another in each process's share of "
                    "a context; use model.sequence_parallel=none"
                )


class SharedPrefix(Prefix):
    """Keys and values of a context of `length` tokens, of which each rank holds those of its own heads.

    begin, end: the positions that this rank computes outside of attention. length is at least the number of ranks.
    """

    is_shared_out = True
    _made = itertools.count()

    def __init__(self, length: int, ranks: Ranks, placement: str = "device"):
        super().__init__(placement)
        if length < ranks.world_size:
            raise ValueError(
                f"SharedPrefix: length is {length}, expected a token or more for each of {ranks.world_size} ranks"
            )
        self.length, self.ranks = length, ranks
        tokens = deal(length, ranks.world_size)
        self.begin = sum(tokens[: ranks.rank])
        self.end = self.begin + tokens[ranks.rank]
        self._number = next(self._made)  # the same on all ranks, which make them together

    def exchange(self, packed: PackedSequences) -> Exchange:
        """The way into attention for a pack that captures this prefix, or is behind it. A collective."""
        if packed.capture is not None:
            whole = PackedSequences([self.length], capture=self, device=packed.device)
            return Exchange(self.ranks, deal(self.length, self.ranks.world_size), whole)
        if len(packed.prefixes) != 1:
            raise ValueError(
                f"SharedPrefix: a pack has {len(packed.prefixes)} prefixes, expected all of it behind this one"
            )
        cache = packed.cache
        state = None if cache is None else (cache.capacity, cache.rows, cache.lengths.tolist())
        own = (self._number, packed.trunks, packed.branches, state)
        numbers, trunks, branches, states = zip(*self.ranks.gather(own), strict=True)
        if len(set(numbers)) > 1:
            raise RuntimeError(f"SharedPrefix: the ranks are behind different contexts (numbers {numbers})")
        trunks, tokens = _joined(trunks), [_tokens(t, b) for t, b in zip(trunks, branches, strict=True)]
        whole = PackedSequences(
            trunks,
            branches=None if packed.branches is None else _joined(branches),
            prefixes=[(self, len(trunks))],
            cache=None if cache is None else _cache_of_all(cache, states),
            device=packed.device,
        )
        return Exchange(self.ranks, tokens, whole)


def _joined(of_ranks: Iterable[list[T]]) -> list[T]:
    return [x for own in of_ranks for x in own]


def _tokens(trunks: list[int], branches: list[list[int]] | None) -> int:
    return sum(trunks) + sum(map(sum, branches or []))


def _cache_of_all(own: DecodeCache, states: Sequence[tuple[int, list[int], list[int]]]) -> DecodeCache:
    """The decode cache of all ranks' sequences in this rank's heads, brought to the ranks' states."""
    capacities, rows, lengths = zip(*states, strict=True)
    left = [(rank, row) for rank, of_rank in enumerate(rows) for row in of_rank]
    if own.of_all is None:
        own.of_all = DecodeCache(max(capacities))
        own.of_all.rows = left
    elif left != own.of_all.rows:
        where = {row: i for i, row in enumerate(own.of_all.rows)}
        own.of_all.keep(torch.tensor([where[row] for row in left], device=own.lengths.device))
    own.of_all.lengths = torch.tensor(_joined(lengths), device=own.lengths.device)
    return own.of_all


class Exchange:
    """Attention of this rank's tokens, computed by all ranks: each has the tokens of all of them in its own heads.

    tokens: how many each rank has. whole: the packs of all ranks end to end, as attention sees them.
    """

    def __init__(self, ranks: Ranks, tokens: list[int], whole: PackedSequences):
        self.ranks, self.tokens, self.whole = ranks, tokens, whole
        whole.exchange = None  # in it tokens and heads are together

    def attend(self, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [1, H, t, D]; k, v [1, G, t, D] -> [1, t, H, D], all ranks doing a part of it.

        attention: of all T tokens in a rank's heads, [1, h, T, D], [1, g, T, D] twice -> [1, T, h, D].
        """
        check_heads(k.shape[1], self.ranks.world_size)
        kv_heads, group = deal(k.shape[1], self.ranks.world_size), q.shape[1] // k.shape[1]
        out = attention(*self._to_heads(q, k, v, kv_heads, group))
        return self._to_tokens(out, [group * n for n in kv_heads])

    def _to_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_heads: list[int], group: int
    ) -> list[torch.Tensor]:
        """Of all tokens the queries, keys and values in this rank's heads; a token's lie side by side on the way."""
        t, D, rank = q.shape[2], q.shape[3], self.ranks.rank
        heads = [(n * group, n, n) for n in kv_heads]  # of queries, keys and values, for each rank
        sizes = [t * sum(own) * D for own in heads]
        sent = q.new_empty(sum(sizes))
        first = [0, 0, 0]
        for part, own in zip(sent.split(sizes), heads, strict=True):
            rows = part.view(t, -1, D).split(own, 1)
            for row, x, begin in zip(rows, (q, k, v), first, strict=True):
                row.copy_(x[0, begin : begin + row.shape[1]].transpose(0, 1))
            first = [begin + n for begin, n in zip(first, own, strict=True)]
        width = sum(heads[rank]) * D
        found = self.ranks.all_to_all(sent, sizes, [n * width for n in self.tokens])
        return [x.transpose(0, 1)[None] for x in found.view(-1, sum(heads[rank]), D).split(heads[rank], 1)]

    def _to_tokens(self, out: torch.Tensor, heads: list[int]) -> torch.Tensor:
        """[1, T, h, D] -> [1, t, H, D]; heads: of queries, for each rank."""
        t, (h, D) = self.tokens[self.ranks.rank], out.shape[2:]
        sizes = [t * n * D for n in heads]
        found = self.ranks.all_to_all(out.reshape(-1), [n * h * D for n in self.tokens], sizes)
        return torch.cat([x.view(1, t, -1, D) for x in found.split(sizes)], 2)
