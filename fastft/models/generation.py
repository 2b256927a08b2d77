"""Batched sampling from a decoder-only model under shared prefixes.

One forward per new token for all sequences at once; the prefix stays in one copy (`models.attention`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastft.distributed import Ranks
from fastft.models.attention import DecodeCache, PackedSequences, Prefix
from fastft.models.causal import PackedCausalLM
from fastft.ops import products


@torch.no_grad()
def generate(
    lm: PackedCausalLM,
    prompts: list[list[int]],
    *,
    stop: Callable[[list[int]], bool],
    max_new_tokens: int,
    prefix: Prefix | None = None,
    temperature: float = 0.0,
    seeds: list[int] | None = None,
    keep_stop: bool = False,
    ranks: Ranks | None = None,
) -> list[list[int]]:
    """New tokens for each prompt; the one that stops it is left out unless keep_stop.

    prompts: token ids, at least one each; prefix: what stands in front of all of them.
    stop(new_tokens): true when the last token ends the sequence.
    temperature 0 takes the most likely token; otherwise softmax(logits / temperature) is sampled by inverse
    transform with one uniform number per token from a generator per sequence, so a sequence's noise depends on its
    own seed alone and not on what it is batched with.
    ranks: where all ranks must run the same number of forwards (ZeRO-3); one that is done goes on with dummy steps.
    """
    if temperature < 0:
        raise ValueError(f"generate: temperature is {temperature}, expected 0 (greedy) or a positive number")
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError(f"generate: sampling {len(prompts)} sequences needs as many seeds")
    ranks, device = ranks or Ranks(), lm.device
    noise = None
    if temperature > 0:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.rand(max_new_tokens, generator=g) for g in generators]).to(device)
    cache = DecodeCache(max(map(len, prompts)) + max_new_tokens)
    outputs: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    tokens = prompts
    for step in range(max_new_tokens):
        groups = None if prefix is None else [(prefix, len(tokens))]
        packed = PackedSequences([len(t) for t in tokens], prefixes=groups, cache=cache, device=device)
        input_ids = torch.tensor([t for sequence in tokens for t in sequence], device=device)[None]
        last = torch.tensor(packed.lengths, device=device).cumsum(0) - 1
        logits = lm(input_ids, packed, lambda hidden, weight, last=last: products.mm(hidden[last], weight.t()).float())
        packed.advance()
        if temperature == 0:
            chosen = logits.argmax(-1)
        else:
            cdf = torch.softmax(logits / temperature, -1).cumsum(-1)
            at = noise[torch.tensor(alive, device=device), step, None] * cdf[:, -1:]
            chosen = torch.searchsorted(cdf, at).squeeze(-1).clamp_(max=logits.shape[-1] - 1)
        going = []
        for row, (index, token) in enumerate(zip(alive, chosen.tolist(), strict=True)):
            outputs[index].append(token)
            if not stop(outputs[index]):
                going.append(row)
            elif not keep_stop:
                outputs[index].pop()
        if ranks.all(not going):
            break
        if not going:
            cache.keep(torch.tensor([0], device=device))
            _accompany(lm, max_new_tokens - step - 1, prefix, cache, ranks)
            break
        if len(going) < len(alive):
            cache.keep(torch.tensor(going, device=device))
        alive = [alive[row] for row in going]
        tokens = [[outputs[index][-1]] for index in alive]
    return outputs


def _accompany(lm: PackedCausalLM, steps: int, prefix: Prefix | None, cache: DecodeCache, ranks: Ranks) -> None:
    """Forwards for nothing, with one sequence of this rank, until every rank is done."""
    token = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
    for _ in range(steps):
        groups = None if prefix is None else [(prefix, 1)]
        packed = PackedSequences([1], prefixes=groups, cache=cache, device=lm.device)
        lm(token, packed, lambda hidden, weight: products.mm(hidden, weight.t()))
        packed.advance()
        if ranks.all(True):
            break
