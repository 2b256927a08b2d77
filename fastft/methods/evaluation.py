"""How well a model answers questions about a document: likelihood of the gold answers, and its own greedy answers."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastft.data.sequences import Window
from fastft.distributed import Ranks
from fastft.models.attention import PackedSequences, Prefix
from fastft.models.causal import HeadFn, Job, PackedCausalLM
from fastft.models.generation import generate
from fastft.models.text import Text
from fastft.ops import linear_cross_entropy

Advance = Callable[[int], None]  # progress: how many items are done


@dataclass(frozen=True)
class QuestionSet:
    """The evaluated questions of one document, as tokens."""

    document: str
    windows: list[Window]
    prompts: list[list[int]]
    answers: list[list[list[int]]]  # per question its accepted answers
    texts: list[tuple[str, ...]]  # the same as text
    questions: list[str]


@dataclass(frozen=True)
class Scores:
    """Sums over the questions of one document; divide to get means."""

    nll: float  # nats, summed over the tokens of all accepted answers
    answer_tokens: int
    f1: float | None = None  # summed over questions; None if no answers were generated
    exact_match: float | None = None
    questions: int = 0
    nll_first_window: float | None = None  # in context: with the document cut to its first window; the sum, as nll
    answers: list[dict[str, Any]] | None = None  # of each question: question, gold (accepted answers), answer (greedy)

    @property
    def nll_per_token(self) -> float:
        return self.nll / self.answer_tokens


def answer_job(
    lm: PackedCausalLM,
    questions: list[tuple[list[int], list[list[int]]]],
    *,
    prefix: Prefix | None,
    leading: list[int],
    also: HeadFn[Any] = lambda hidden, weight: None,
    item: Any = None,
) -> Job:
    """A job with -log p(answer | prefix, prompt) of each answer of each (prompt, answers), nats, float64 on the CPU.

    Its result has also(hidden states of the prompts' last tokens, the head's weight) besides. A prompt is computed once
    for all its answers, which branch off from it.
    leading: tokens in front of the prompt where there is no prefix (which has them already).
    """
    leading = leading if prefix is None else []
    ids, trunks, branches, ends = [], [], [], []
    rows, labels, sizes = [], [], []  # of every answer token: the position that predicts it, and its id
    for prompt, answers in questions:
        trunk, last = [*leading, *prompt], len(ids) + len(leading) + len(prompt) - 1
        ids += trunk
        ends.append(last)
        for answer in answers:
            rows += [last, *range(len(ids), len(ids) + len(answer) - 1)]
            ids += answer[:-1]
        labels += [token for answer in answers for token in answer]
        sizes += [len(answer) for answer in answers]
        trunks.append(len(trunk))
        branches.append([len(answer) - 1 for answer in answers if len(answer) > 1])
    groups = None if prefix is None else [(prefix, len(questions))]
    packed = PackedSequences(trunks, branches=branches, prefixes=groups, device=lm.device)
    at = torch.tensor(rows, device=lm.device)
    label = torch.tensor(labels, device=lm.device)

    def score(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
        nll = linear_cross_entropy(hidden[at], weight, label, reduction="none")
        owner = torch.repeat_interleave(torch.tensor(sizes)).to(nll.device)
        summed = torch.zeros(len(sizes), dtype=torch.float64, device=nll.device).index_add_(0, owner, nll.double())
        return summed.cpu(), also(hidden[torch.tensor(ends, device=lm.device)], weight)

    return Job(torch.tensor(ids, device=lm.device)[None], packed, score, item)


def evaluate(
    lm: PackedCausalLM,
    sets: list[QuestionSet],
    text: Text,
    ranks: Ranks,
    *,
    in_context: bool,
    batch_size: int,
    max_new_tokens: int | None = None,
    advance: Advance = lambda n: None,
) -> list[Scores]:
    """Scores of each question set. max_new_tokens: also generate greedy answers of that length.

    In context, a document of several windows is scored for each question in the window that suits it best (the
    highest likelihood of the gold answers): an upper bound on what retrieval of one window could give. Its first window
    alone, what a prompt cut to the model's window holds, is scored beside it. advance counts a question in each window.
    """
    count = [len(s.windows) if in_context else 1 for s in sets]
    jobs = [
        (index, w, begin)
        for index, s in enumerate(sets)
        for w in range(count[index])
        for begin in range(0, len(s.prompts), batch_size)
    ]
    # Of each question in each window: nll, tokens, f1, exact match.
    results = [torch.zeros(n, len(s.prompts), 4, dtype=torch.float64) for n, s in zip(count, sets, strict=True)]
    written: dict[tuple[int, int, int], str] = {}  # set, window, question -> answer
    leading = [] if in_context else text.leading

    def passes() -> Iterator[Job]:
        known: tuple[int, int] | None = None
        prefix = None
        together = lm.at_a_time(lambda job: job[:2]) if in_context else None
        for (index, w, begin), counts in ranks.lockstep(jobs, together):
            questions = sets[index]
            if in_context and not ranks.all(known == (index, w)):
                known = (index, w)
                context, prefix = lm.context(questions.windows[w].token_ids)
                yield context
            span = range(begin, min(begin + batch_size, len(questions.prompts)))
            asked = [(questions.prompts[q], questions.answers[q]) for q in span]
            yield answer_job(lm, asked, prefix=prefix, leading=leading, item=(index, w, span, prefix, counts))

    for job, scored in lm.each(passes(), keep_prefixes=bool(max_new_tokens)):
        if job.item is None:
            continue
        index, w, span, prefix, counts = job.item
        questions = sets[index]
        owner = torch.tensor([q - span.start for q in span for _ in questions.answers[q]])
        lengths = torch.tensor([len(a) for q in span for a in questions.answers[q]], dtype=torch.float64)
        row = torch.zeros(len(span), 4, dtype=torch.float64)
        row[:, 0].index_add_(0, owner, scored[0])
        row[:, 1].index_add_(0, owner, lengths)
        if max_new_tokens:
            answers = generate(
                lm,
                [[*leading, *questions.prompts[q]] for q in span],
                stop=text.ends_line,
                max_new_tokens=max_new_tokens,
                prefix=prefix,
                ranks=ranks,
            )
            for i, (q, ids) in enumerate(zip(span, answers, strict=True)):
                written[index, w, q] = answer = text.decode(ids)
                row[i, 2] = max(token_f1(answer, gold) for gold in questions.texts[q])
                row[i, 3] = max(float(normalize(answer) == normalize(gold)) for gold in questions.texts[q])
        if counts:
            results[index][w, span.start : span.stop] = row
            advance(len(span))
    written = {key: answer for part in ranks.gather(written) for key, answer in part.items()}
    summed = ranks.sum(torch.cat([r.flatten() for r in results])).cpu().split([r.numel() for r in results])
    scores = []
    for index, (flat, result) in enumerate(zip(summed, results, strict=True)):
        in_window = flat.view(result.shape)
        window = in_window[..., 0].argmin(0)
        best = in_window[window, torch.arange(result.shape[1])]
        nll, tokens, f1, exact_match = best.sum(0).tolist()
        found = Scores(nll, int(tokens), questions=len(best))
        if max_new_tokens:
            asked = enumerate(zip(sets[index].questions, sets[index].texts, window.tolist(), strict=True))
            answers = [{"question": q, "gold": gold, "answer": written[index, w, i]} for i, (q, gold, w) in asked]
            found = replace(found, f1=f1, exact_match=exact_match, answers=answers)
        if in_context:
            found = replace(found, nll_first_window=in_window[0, :, 0].sum().item())
        scores.append(found)
    return scores


def normalize(answer: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (SQuAD, Rajpurkar et al. 2016)."""
    answer = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", answer).split())


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of token precision and recall between two normalised answers."""
    a, g = normalize(answer).split(), normalize(gold).split()
    common = sum((Counter(a) & Counter(g)).values())
    if not a or not g:
        return float(a == g)
    return 2 * common / (len(a) + len(g))


def total(scores: list[Scores]) -> dict[str, float]:
    """Means over several documents: nll per gold-answer token, F1 and exact match per question."""
    tokens, questions = sum(s.answer_tokens for s in scores), sum(s.questions for s in scores)
    means = {"nll": sum(s.nll for s in scores) / tokens}
    if scores[0].f1 is not None:
        means["f1"] = sum(s.f1 for s in scores) / questions
        means["exact_match"] = sum(s.exact_match for s in scores) / questions
    return means


def truncated_nll(scores: list[Scores]) -> float:
    """Mean nll per gold-answer token where each document is cut to its first window."""
    return sum(s.nll_first_window for s in scores) / sum(s.answer_tokens for s in scores)


def recovery(nll_no_context: float, nll_student: float, nll_teacher: float) -> float | None:
    """(no_context - student) / (no_context - teacher): 0 learned nothing, 1 equals the prompt.

    None where the context does not lower the NLL: there is nothing to recover.
    """
    gain = nll_no_context - nll_teacher
    return (nll_no_context - nll_student) / gain if gain > 0 else None
