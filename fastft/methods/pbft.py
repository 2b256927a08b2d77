"""Pattern-based fine-tuning: the language-model head learns each pattern's label words (Schick and Schuetze 2021,
arXiv 2001.07676; for decoders, Mosbach et al. 2023, aclanthology 2023.findings-acl.779).

A labelled example is its pattern, continued by the words of its label. The loss is the cross entropy at the label's
tokens over the whole vocabulary, or that of the label's score among the scores of all labels, which is what the model
is evaluated by (`methods.icl`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastft.data.sequences import pack
from fastft.methods.icl import ChoiceSet
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.ops import linear_cross_entropy
from fastft.profiling import phase


def vocabulary_loss(lm: PackedCausalLM, shots: ChoiceSet, examples: list[int], *, leading: list[int]) -> torch.Tensor:
    """-log p of the right choices' tokens over the rows of the head, summed over the given examples, in nats.

    lm: the model, or the engine around it. leading: the tokenizer's tokens in front of any text.
    """
    right = [shots.choices[i][shots.gold[i]] for i in examples]
    return _token_nll(lm, [shots.prompts[i] for i in examples], right, leading, reduction="sum")


def label_loss(
    lm: PackedCausalLM, shots: ChoiceSet, examples: list[int], *, leading: list[int], score: str
) -> torch.Tensor:
    """-log softmax(scores)[right choice], summed over the given examples, in nats.

    The score of a choice is the log-likelihood of its tokens, summed or their mean, as in `icl.classify`.
    """
    gold = torch.tensor([shots.gold[i] for i in examples], device=lm.device)
    prompts, choices = [shots.prompts[i] for i in examples], [shots.choices[i] for i in examples]
    if shots.labels is not None:  # one token each, for all examples the same: of the head their rows alone
        input_ids, lengths = pack(prompts, leading, lm.device)
        last = torch.tensor(lengths, device=lm.device).cumsum(0) - 1
        rows = torch.tensor(shots.labels, device=lm.device)
        return lm(
            input_ids,
            PackedSequences(lengths, device=lm.device),
            lambda hidden, weight: linear_cross_entropy(hidden[last], weight[rows], gold, reduction="sum"),
        )
    trunks = [prompt for prompt, own in zip(prompts, choices, strict=True) for _ in own]
    flat = [choice for own in choices for choice in own]
    sizes = torch.tensor([len(choice) for choice in flat], device=lm.device)
    nll = _token_nll(lm, trunks, flat, leading, reduction="none")
    owner = torch.repeat_interleave(torch.arange(len(flat), device=lm.device), sizes)
    scores = -torch.zeros(len(flat), dtype=nll.dtype, device=lm.device).index_add(0, owner, nll)
    if score == "mean":
        scores = scores / sizes
    return F.cross_entropy(scores.view(len(examples), -1), gold, reduction="sum")


def _token_nll(
    lm: PackedCausalLM, prompts: list[list[int]], answers: list[list[int]], leading: list[int], *, reduction: str
) -> torch.Tensor:
    """-log p of the answers' tokens, one after the other, each answer behind its prompt."""
    with phase("data"):
        texts = [(*prompt, *answer[:-1]) for prompt, answer in zip(prompts, answers, strict=True)]
        input_ids, lengths = pack(texts, leading, lm.device)
        at, end = [], 0
        for length, answer in zip(lengths, answers, strict=True):
            end += length
            at += range(end - len(answer), end)
        rows = torch.tensor(at, device=lm.device)
        labels = torch.tensor([token for answer in answers for token in answer], device=lm.device)
        packed = PackedSequences(lengths, device=lm.device)
    return lm(
        input_ids,
        packed,
        lambda hidden, weight: linear_cross_entropy(hidden[rows], weight, labels, reduction=reduction),
    )
