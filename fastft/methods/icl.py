"""In-context learning: demonstrations in the prompt, nothing trained (Brown et al. 2020, arXiv 2005.14165).

The demonstrations are the same for every query. Their keys and values are computed once; all queries stand behind that
one copy, packed without padding (`models.attention`). Labels that are single tokens are read off the last position of
each query, from their own rows of the head; choices of several tokens branch off from their query and are compared by
log-likelihood.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastft.data.sequences import Window, pack
from fastft.distributed import Ranks
from fastft.errors import DataError
from fastft.methods.evaluation import Advance, Scores, answer_nll
from fastft.models.attention import PackedSequences, Prefix
from fastft.models.causal import PackedCausalLM
from fastft.models.text import Text
from fastft.tasks import Example, Pattern


@dataclass(frozen=True)
class Queries:
    """Examples as token ids: what is asked, and for each the choices that may follow."""

    prompts: list[list[int]]
    choices: list[list[list[int]]]

    @property
    def labels(self) -> list[int] | None:
        """The label words' tokens, where they are single tokens and the same for all examples."""
        first = self.choices[0]
        same = all(len(c) == 1 for c in first) and all(c == first for c in self.choices)
        return [c[0] for c in first] if same else None

    @property
    def sizes(self) -> list[int]:
        """Tokens that a forward computes for each example: its prompt and all but the last token of each choice."""
        pairs = zip(self.prompts, self.choices, strict=True)
        return [len(prompt) + sum(len(choice) - 1 for choice in own) for prompt, own in pairs]

    @property
    def longest(self) -> int:
        """Positions that the longest prompt takes with its longest choice."""
        pairs = zip(self.prompts, self.choices, strict=True)
        return max(len(prompt) + max(map(len, choices)) for prompt, choices in pairs)


@dataclass(frozen=True)
class ChoiceSet(Queries):
    """Evaluated examples behind one context, or without it."""

    document: str  # name of the set
    windows: list[Window]  # the demonstrations
    gold: list[int]


def encode_demonstrations(pattern: Pattern, demonstrations: list[Example], text: Text) -> tuple[int, ...]:
    """The tokenizer's leading tokens and the demonstrations: what all queries share. May be empty without any."""
    return (*text.leading, *text.encode(pattern.separator.join(map(pattern.demonstrate, demonstrations))))


def encode_queries(pattern: Pattern, examples: list[Example], text: Text, *, behind_demonstrations: bool) -> Queries:
    """The separator belongs to the query: at the end of the demonstrations a tokenizer would cut it otherwise."""
    front = pattern.separator if behind_demonstrations else ""
    choices = [pattern.choices(example) for example in examples]
    ids = {words: text.encode(words) for words in dict.fromkeys(words for own in choices for words in own)}
    return Queries(
        text.encode_all([front + pattern.ask(example) for example in examples]),
        [[ids[words] for words in own] for own in choices],
    )


def check_room(
    shared: tuple[int, ...], queries: Queries, positions: int | None, fewer: Iterable[tuple[int, int]]
) -> None:
    """Raise DataError where demonstrations and the longest query are more than the model's positions.

    fewer: (number of demonstrations, tokens that they take) of smaller samples, largest first.
    """
    needed = queries.longest
    if positions is None or len(shared) + needed <= positions:
        return
    most = next((num_shots for num_shots, tokens in fewer if tokens + needed <= positions), None)
    raise DataError(
        f"the demonstrations take {len(shared)} tokens and the longest query {needed} with its answer, but the model "
        f"has {positions} positions; "
        + ("no demonstration fits" if not most else f"{most} demonstrations fit: set icl.num_shots={most}")
    )


@torch.no_grad()
def label_logits(
    lm: PackedCausalLM, prompts: list[list[int]], labels: list[int], prefix: Prefix | None
) -> torch.Tensor:
    """Logits of the label tokens behind each prompt: float64 [B, labels] on the CPU.

    Of the head's weight [V, H] only the labels' rows are read, and of the hidden states the last of each prompt.
    """
    input_ids, lengths = pack(prompts, [], lm.device)
    last = torch.tensor(lengths, device=lm.device).cumsum(0) - 1
    rows = torch.tensor(labels, device=lm.device)
    packed = PackedSequences(lengths, prefixes=None if prefix is None else [(prefix, len(prompts))], device=lm.device)
    return lm(input_ids, packed, lambda hidden, weight: hidden[last].double() @ weight[rows].double().t()).cpu()


def classify(
    lm: PackedCausalLM,
    queries: Queries,
    ranks: Ranks,
    *,
    prefix: Prefix | None,
    batch_size: int,
    score: str = "mean",
    advance: Advance = lambda n: None,
) -> torch.Tensor:
    """log p of each choice among the choices of its example: float64 [N, C], -inf past an example's own choices.

    The score of a choice, to which a softmax over the choices is applied, is its log-likelihood behind the prompt:
    summed over its tokens, or their mean (score). The batches are the same for any number of ranks.
    """
    count = len(queries.prompts)
    order = sorted(range(count), key=queries.sizes.__getitem__)  # sequences of one length need no padding in attention
    jobs = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    width = torch.tensor([len(own) for own in queries.choices])
    scores = torch.zeros(count, int(width.max()), dtype=torch.float64)
    labels = queries.labels
    for members, counts in ranks.lockstep(jobs):
        prompts = [queries.prompts[i] for i in members]
        if labels is not None:
            found = list(label_logits(lm, prompts, labels, prefix))
        else:
            choices = [queries.choices[i] for i in members]
            nll = answer_nll(lm, list(zip(prompts, choices, strict=True)), prefix=prefix, leading=[])
            if score == "mean":
                nll = nll / torch.tensor([len(c) for own in choices for c in own])
            found = (-nll).split([len(own) for own in choices])
        if counts:
            for i, values in zip(members, found, strict=True):
                scores[i, : len(values)] = values
            advance(len(members))
    scores = ranks.sum(scores).cpu()
    missing = torch.arange(scores.shape[1]) >= width[:, None]
    return scores.masked_fill(missing, -torch.inf).log_softmax(-1)


def evaluate_choices(
    lm: PackedCausalLM,
    sets: list[ChoiceSet],
    ranks: Ranks,
    *,
    in_context: bool,
    leading: list[int],
    batch_size: int,
    score: str,
    advance: Advance,
) -> list[Scores]:
    """Of each set: -log p of the right choice among the choices (nats), and how often it is the most likely one."""
    scores = []
    for s in sets:
        front = s.windows[0].token_ids if in_context else tuple(leading)
        prefix = lm.encode_prefix(front) if front else None
        log_probs = classify(lm, s, ranks, prefix=prefix, batch_size=batch_size, score=score, advance=advance)
        gold = torch.tensor(s.gold)
        nll = -log_probs.gather(1, gold[:, None]).sum().item()
        right = (log_probs.argmax(-1) == gold).sum().item()
        scores.append(Scores(nll, len(gold), accuracy=right, questions=len(gold)))
    return scores
