"""In-context learning: demonstrations in the prompt, nothing trained (Brown et al. 2020, arXiv 2005.14165).

The demonstrations are the same for every query. Their keys and values are computed once; all queries stand behind that
one copy, packed without padding (`models.attention`). Labels that are single tokens are read off the last position of
each query, from their own rows of the head; choices of several tokens branch off from their query and are compared by
log-likelihood.

A fine-tuned model answers in the same way, without demonstrations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastft.data.sequences import pack
from fastft.distributed import Ranks
from fastft.errors import DataError
from fastft.methods.evaluation import Advance, answer_job
from fastft.methods.metrics import Predictions
from fastft.models.attention import PackedSequences, Prefix
from fastft.models.causal import Job, PackedCausalLM
from fastft.models.text import Text
from fastft.tasks import Example, Pattern


@dataclass(frozen=True)
class Queries:
    """Examples as token ids: what is asked, and for each the choices that may follow. cut: how many were shortened."""

    prompts: list[list[int]]
    choices: list[list[list[int]]]
    cut: int = field(default=0, kw_only=True)

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
    """The examples of a set with the numbers of their right choices."""

    name: str
    gold: list[int]


def encode_demonstrations(pattern: Pattern, demonstrations: list[Example], text: Text) -> tuple[int, ...]:
    """The tokenizer's leading tokens and the demonstrations: what all queries share. May be empty without any."""
    return (*text.leading, *text.begin(pattern.separator.join(map(pattern.demonstrate, demonstrations))))


def encode_queries(
    pattern: Pattern,
    examples: list[Example],
    text: Text,
    *,
    behind_demonstrations: bool,
    score: str = "mean",
    max_tokens: int | None = None,
) -> Queries:
    """The separator belongs to the query: at the end of the demonstrations a tokenizer would cut it otherwise.

    score: see icl.score; of "first", a choice is its first token alone. max_tokens: see data.max_tokens; the choices
    are not cut. Raises DataError for label words that are the same, where max_tokens leaves nothing, and for an example
    of which the pattern makes no text.
    """
    if max_tokens is not None and max_tokens <= len(text.leading):
        raise DataError(
            f"data.max_tokens={max_tokens} leaves nothing of an example behind the tokenizer's {len(text.leading)} "
            "leading tokens; use more"
        )
    front = pattern.separator if behind_demonstrations else ""
    choices = [pattern.choices(example) for example in examples]
    length = 1 if score == "first" else None
    ids = {words: text.encode(words)[:length] for words in dict.fromkeys(words for own in choices for words in own)}
    if pattern.verbalizer or score == "first":
        for own in dict.fromkeys(map(tuple, choices)):
            _check_distinct(own, [ids[words] for words in own], text, score)
    asked = [front + pattern.ask(example) for example in examples]
    prompts, cut = text.encode_all(asked, begin=not behind_demonstrations), 0
    if [] in prompts:
        fields = examples[prompts.index([])].fields
        raise DataError(
            f"data.pattern={pattern.query!r} makes no text of the example {fields}; take it out, or use a pattern with "
            "words of its own"
        )
    if max_tokens is not None:
        whole, prompts = prompts, [text.cut(prompt, max_tokens) for prompt in prompts]
        cut = sum(len(prompt) < len(own) for prompt, own in zip(prompts, whole, strict=True))
    return Queries(prompts, [[ids[words] for words in own] for own in choices], cut=cut)


def _check_distinct(words: tuple[str, ...], ids: list[list[int]], text: Text, score: str) -> None:
    for i, own in enumerate(ids):
        other = ids.index(own)
        if other < i:
            same = (
                f"icl.score=first sees {text.decode_token(own[0])!r} of both"
                if score == "first"
                else "both are the same"
            )
            cure = "score them whole with icl.score=mean, or choose" if score == "first" else "choose"
            raise DataError(
                f"label words {words[other]!r} and {words[i]!r} cannot be told apart: {same}; {cure} other words with "
                "data.verbalizer or data.pattern"
            )


CONTENT_FREE = ("N/A", "[MASK]", "")


def content_free_examples(example: Example) -> list[Example]:
    """Inputs that say nothing, with the fields of `example`."""
    return [Example(dict.fromkeys(example.fields, text), label=0) for text in CONTENT_FREE]


def calibrate(predictions: Predictions, content_free: Predictions) -> Predictions:
    """Contextual calibration (Zhao et al. 2021, arXiv 2102.09690): p(label) / p_cf(label), normalised.

    p_cf is the mean over content-free inputs behind the same demonstrations: what these make the model say by
    themselves.
    """
    bias = content_free.log_probs.exp().mean(0).log()
    return replace(predictions, log_probs=(predictions.log_probs - bias).log_softmax(-1))


def check_room(shared: tuple[int, ...], needed: int, positions: int | None, fewer: Iterable[tuple[int, int]]) -> None:
    """Raise DataError where demonstrations and the longest query are more than the model's positions.

    needed: what the query takes with its answer.
    fewer: (number of demonstrations, tokens that they take) of smaller samples, largest first.
    """
    if positions is None or len(shared) + needed <= positions:
        return
    most = next((num_shots for num_shots, tokens in fewer if tokens + needed <= positions), None)
    raise DataError(
        f"the demonstrations take {len(shared)} tokens and the longest query {needed} with its answer, but the model "
        f"has {positions} positions; "
        + (
            "no demonstration fits; use shorter texts or a model with more"
            if not most
            else f"{most} demonstrations fit: set icl.num_shots={most}"
        )
    )


def label_job(
    lm: PackedCausalLM, prompts: list[list[int]], labels: list[int], prefix: Prefix | None, item: Any = None
) -> Job:
    """A job whose result is, behind each prompt, the label tokens' logits, float64 [B, labels], and the most likely
    token, [B]; on the CPU.

    Of the hidden states only the last of each prompt is multiplied by the head's weight.
    """
    input_ids, lengths = pack(prompts, [], lm.device)
    last = torch.tensor(lengths, device=lm.device).cumsum(0) - 1
    rows = torch.tensor(labels, device=lm.device)
    packed = PackedSequences(lengths, prefixes=None if prefix is None else [(prefix, len(prompts))], device=lm.device)

    def head(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden[last]
        return (hidden.double() @ weight[rows].double().t()).cpu(), most_likely_token(hidden, weight)

    return Job(input_ids, packed, head, item)


def most_likely_token(hidden: torch.Tensor, weight: torch.Tensor, chunk_tokens: int = 8192) -> torch.Tensor:
    """argmax over the vocabulary, [B] on the CPU, of hidden [B, H] @ weight [V, H].T in float32 (float64 for float64).

    In 16 bits the largest logits are often equal. At most chunk_tokens rows of the weight are converted at a time.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.to(dtype)
    tops = [(hidden @ rows.to(dtype).t()).max(-1) for rows in weight.split(chunk_tokens)]
    values = torch.stack([top.values for top in tops])
    ids = torch.stack([top.indices + i * chunk_tokens for i, top in enumerate(tops)])
    return ids.gather(0, values.argmax(0, keepdim=True))[0].cpu()


def choice_job(
    lm: PackedCausalLM,
    questions: list[tuple[list[int], list[list[int]]]],
    prefix: Prefix | None,
    item: Any = None,
) -> Job:
    """A job whose result is -log p of each choice (`answer_job`), and the most likely token behind each prompt, [B]."""
    return answer_job(lm, questions, prefix=prefix, leading=[], also=most_likely_token, item=item)


def classify(
    lm: PackedCausalLM,
    queries: Queries,
    ranks: Ranks,
    *,
    prefix: Prefix | None,
    batch_size: int,
    score: str = "mean",
    advance: Advance = lambda n: None,
) -> Predictions:
    """log p of each choice among the choices of its example.

    The score of a choice, to which a softmax over the choices is applied, is its log-likelihood behind the prompt:
    summed over its tokens, or their mean (score). The batches are the same for any number of ranks.
    """
    count = len(queries.prompts)
    order = sorted(range(count), key=queries.sizes.__getitem__)  # sequences of one length need no padding in attention
    jobs = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    width = torch.tensor([len(own) for own in queries.choices])
    scores = torch.zeros(count, int(width.max()), dtype=torch.float64)
    is_label = torch.zeros(count, dtype=torch.float64)
    labels = queries.labels

    def passes() -> Iterator[Job]:
        for members, counts in ranks.lockstep(jobs):
            prompts, choices = ([own[i] for i in members] for own in (queries.prompts, queries.choices))
            if labels is not None:
                yield label_job(lm, prompts, labels, prefix, (members, counts))
            else:
                yield choice_job(lm, list(zip(prompts, choices, strict=True)), prefix, (members, counts))

    for job, (found, tops) in lm.each(passes()):
        members, counts = job.item
        if labels is None:
            choices = [queries.choices[i] for i in members]
            if score == "mean":
                found = found / torch.tensor([len(c) for own in choices for c in own])
            found = (-found).split([len(own) for own in choices])
        if counts:
            for i, values, top in zip(members, found, tops.tolist(), strict=True):
                scores[i, : len(values)] = values
                is_label[i] = top in {choice[0] for choice in queries.choices[i]}
            advance(len(members))
    scores, is_label = ranks.sum(scores).cpu(), ranks.sum(is_label).cpu()
    missing = torch.arange(scores.shape[1]) >= width[:, None]
    return Predictions(scores.masked_fill(missing, -torch.inf).log_softmax(-1), is_label > 0)
