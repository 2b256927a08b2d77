"""Summaries: likelihood of the reference, and the model's own greedy summary scored by ROUGE.

As in `methods.icl` all queries stand behind one copy of what they share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastft.distributed import Ranks
from fastft.methods.evaluation import Advance, answer_job
from fastft.methods.icl import Queries
from fastft.methods.metrics import RESAMPLES, interval, resample
from fastft.methods.rouge import rouge
from fastft.models.attention import Prefix
from fastft.models.causal import Job, PackedCausalLM
from fastft.models.generation import generate
from fastft.models.text import Text

FIGURES = ("rougeL", "rouge1", "rouge2", "nll", "summary_tokens")


@dataclass(frozen=True)
class Summaries:
    """What a model says of N texts.

    texts: its greedy summaries. lengths: their tokens, [N]. rouge: of each with its reference.
    nll: -log p(reference), nats summed over its tokens, float64 [N]. reference_lengths: these tokens, [N].
    """

    texts: list[str]
    lengths: torch.Tensor
    rouge: list[dict[str, float]]
    nll: torch.Tensor
    reference_lengths: torch.Tensor


def summarize(
    lm: PackedCausalLM,
    queries: Queries,
    references: list[str],
    text: Text,
    ranks: Ranks,
    *,
    prefix: Prefix | None,
    batch_size: int,
    max_new_tokens: int,
    advance: Advance = lambda n: None,
) -> Summaries:
    """Write and score a summary of each query, whose only choice is its reference."""
    nll = reference_nll(lm, queries, ranks, prefix=prefix, batch_size=batch_size)
    written = write(
        lm,
        queries.prompts,
        text,
        ranks,
        prefix=prefix,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        advance=advance,
    )
    texts = [text.decode(ids).strip() for ids in written]
    return Summaries(
        texts,
        torch.tensor([len(ids) for ids in written]),
        [rouge(own, reference) for own, reference in zip(texts, references, strict=True)],
        nll,
        torch.tensor([len(reference) for [reference] in queries.choices]),
    )


def write(
    lm: PackedCausalLM,
    prompts: list[list[int]],
    text: Text,
    ranks: Ranks,
    *,
    prefix: Prefix | None,
    batch_size: int,
    max_new_tokens: int,
    keep_stop: bool = False,
    advance: Advance = lambda n: None,
) -> list[list[int]]:
    """A greedy summary behind each prompt, up to a line break (which keep_stop leaves in), as token ids."""
    found = torch.zeros(len(prompts), max_new_tokens, dtype=torch.float64)  # id + 1; 0 past the end
    for members, counts in ranks.lockstep(_batches(prompts, batch_size)):
        written = generate(
            lm,
            [prompts[i] for i in members],
            stop=text.ends_line,
            max_new_tokens=max_new_tokens,
            prefix=prefix,
            keep_stop=keep_stop,
            ranks=ranks,
        )
        if counts:
            for i, ids in zip(members, written, strict=True):
                found[i, : len(ids)] = torch.tensor(ids, dtype=torch.float64) + 1
            advance(len(members))
    return [[int(n) - 1 for n in row if n] for row in ranks.sum(found).tolist()]


def reference_nll(
    lm: PackedCausalLM, queries: Queries, ranks: Ranks, *, prefix: Prefix | None, batch_size: int
) -> torch.Tensor:
    """-log p of each query's only choice, nats summed over its tokens, float64 [N]."""
    found = torch.zeros(len(queries.prompts), dtype=torch.float64)

    def passes() -> Iterator[Job]:
        for members, counts in ranks.lockstep(_batches(queries.prompts, batch_size)):
            asked = [(queries.prompts[i], queries.choices[i]) for i in members]
            yield answer_job(lm, asked, prefix=prefix, leading=[], item=(members, counts))

    for job, (nll, _) in lm.each(passes()):
        members, counts = job.item
        if counts:
            found[members] = nll
    return ranks.sum(found).cpu()


def _batches(prompts: list[list[int]], size: int) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[i : i + size] for i in range(0, len(order), size)]


def measure(found: Summaries, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Figures of one set of texts:

    rougeL, rouge1, rouge2    means over the texts
    nll                       -log p of the references, nats per token
    summary_tokens            mean length of the model's summaries
    intervals                 {figure: [low, high]}, 95 % bootstrap over the texts; without resamples none
    """
    rouges = torch.tensor([[own[name] for name in FIGURES[:3]] for own in found.rouge], dtype=torch.float64)
    lengths = torch.stack([found.lengths, found.reference_lengths, torch.ones_like(found.lengths)], 1)
    features = torch.cat([rouges, found.nll[:, None], lengths.double()], 1)

    def figures(sums: torch.Tensor) -> dict[str, torch.Tensor]:
        *rouges, nll, length, reference_length, count = sums.unbind(1)
        means = [*(total / count for total in rouges), nll / reference_length, length / count]
        return dict(zip(FIGURES, means, strict=True))

    intervals = {}
    if resamples:
        intervals = {name: interval(values) for name, values in figures(resample(features, resamples, seed)).items()}
    return {
        "examples": len(found.texts),
        **{name: value.item() for name, value in figures(features.sum(0, keepdim=True)).items()},
        **({"intervals": intervals} if resamples else {}),
    }
