"""Context distillation (Askell et al. 2021, arXiv 2112.00861; Snell et al. 2022, arXiv 2209.15189).

The teacher is the frozen base with the context, the student the same base without it plus the trained parameters:

    minimise  mean over target positions of  D( p_base(. | context, tokens) || p_student(. | tokens) )

The tokens come from the document (its passages), from the teacher (questions that it writes about the document and
answers), and in the `with_questions` setting from the trained gold questions. The base never changes, so each target is
computed once, before training (`teach`); or, with teacher=online, in every step anew (`methods.online`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator
from functools import partial

import torch

from fastft.config import Config, DistillConfig
from fastft.data.sequences import Sequence, Window, answer_tokens, pack, question_prompt, question_sequence
from fastft.data.store import StoreWriter, TeacherStore
from fastft.distributed import Ranks
from fastft.models.attention import PackedSequences, Prefix
from fastft.models.causal import Job, PackedCausalLM
from fastft.models.generation import generate
from fastft.models.text import Text
from fastft.ops import linear_log_softmax_kl, linear_topk_kl, products
from fastft.profiling import phase
from fastft.tasks import Document

Advance = Callable[[int], None]  # progress: how many items are done


def write_questions(
    lm: PackedCausalLM, window: Window, text: Text, config: Config, ranks: Ranks, *, seed: int, advance: Advance
) -> list[tuple[str, str]]:
    """Self-study: the teacher, with the context, writes questions and answers them: (question, answer) pairs.

    Questions are sampled, each with noise from its own seed; batches hold the same questions for any number of ranks,
    so the result is the same too.
    """
    study = config.queries.self_study
    sentences = split_sentences(window.text) or [window.text]

    def sentence(i: int) -> str:
        return sentences[i % len(sentences)]

    def opening(i: int) -> str:
        return study.openings[i // len(sentences) % len(study.openings)]

    # The examples stand in front of every prompt: they are encoded once, with the window.
    prefix = lm.encode_prefix((*window.token_ids, *text.encode(study.examples)))
    size = config.evaluate.batch_size
    found: dict[int, tuple[str, str]] = {}
    for start, counts in ranks.lockstep(list(range(0, study.count, size))):
        span = range(start, min(start + size, study.count))
        asks = [fill(study.prompt, sentence=sentence(i), opening=opening(i)) for i in span]
        written = generate(
            lm,
            [text.encode(ask) for ask in asks],
            prefix=prefix,
            stop=lambda ids: text.ends_line(ids) or "?" in text.decode_token(ids[-1]),
            keep_stop=True,
            max_new_tokens=study.max_question_tokens,
            temperature=study.temperature,
            seeds=[seed * 1_000_003 + i for i in span],
            ranks=ranks,
        )
        questions = [
            clean_question((opening(i) if "{opening}" in study.prompt else "") + text.decode(ids))
            for i, ids in zip(span, written, strict=True)
        ]
        asks = [
            fill(study.answer_prompt, sentence=sentence(i), question=q or "?")
            for i, q in zip(span, questions, strict=True)
        ]
        answers = generate(
            lm,
            [text.encode(ask) for ask in asks],
            prefix=prefix,
            stop=text.ends_line,
            max_new_tokens=study.max_answer_tokens,
            temperature=study.answer_temperature,
            seeds=[seed * 1_000_003 + 500_000 + i for i in span],
            ranks=ranks,
        )
        if counts:
            pairs = ((q, text.decode(a).strip()) for q, a in zip(questions, answers, strict=True))
            found |= {i: (q, a) for i, (q, a) in zip(span, pairs, strict=True) if q and a}
            advance(len(span))
    merged = {i: pair for part in ranks.gather(found) for i, pair in part.items()}
    return list(dict.fromkeys(pair for _, pair in sorted(merged.items())))


def query_reserve(document: Document, config: Config, text: Text) -> int:
    """Positions that the longest sequence behind a context of this document may take: any query with its answer."""
    study, sampled = config.queries.self_study, sampled_tokens(config.distill)
    piece = config.queries.passages
    frame = len(question_sequence("passage", "", "", 0, config.data, text.encode).token_ids)
    around = 0 if piece.pattern == "text" else frame
    needs = [around + piece.tokens, around + piece.prompt_tokens + sampled]
    for q in document.questions:
        answer = max(len(answer_tokens(a, config.data, text.encode)) for a in q.answers)
        written = max(answer, config.evaluate.max_new_tokens, sampled)
        needs.append(len(question_prompt(q.text, config.data, text.encode)) + written)
    if study.count:
        sentence = max((len(text.encode(s)) for s in split_sentences(document.text)), default=0)
        asked = len(text.encode(study.examples + max(study.prompt, study.answer_prompt, key=len)))
        needs.append(asked + sentence + study.max_question_tokens + study.max_answer_tokens)
        needs.append(len(question_prompt("", config.data, text.encode)) + study.max_question_tokens + sampled)
    return max(needs) + 8  # a few spare: the parts joined may tokenise differently


def sampled_tokens(config: DistillConfig) -> int:
    """Tokens of the longest completion that the student writes in training."""
    return config.on_policy_tokens if config.on_policy else 0


def fill(pattern: str, **values: str) -> str:
    """The pattern with {name} replaced by each value, and no space at its end for the next word to stumble over."""
    for name, value in values.items():
        pattern = pattern.replace(f"{{{name}}}", value)
    return pattern.rstrip(" ")


def clean_question(written: str) -> str:
    """The question in what the teacher wrote, or "" if there is none: up to its first question mark."""
    question, mark, _ = " ".join(written.split()).partition("?")
    question = question.strip(" \"'-*")
    return f"{question}?" if mark and len(question.split()) >= 2 else ""


def split_sentences(text: str) -> list[str]:
    """Sentences of four words and more."""
    return [s for s in (p.strip() for p in re.split(r"(?<=[.!?])\s+|\n+", text)) if len(s.split()) >= 4]


def target_specs(config: DistillConfig, lm: PackedCausalLM) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What is stored per target position: name -> (shape, dtype)."""
    weight = lm.head.weight
    if config.targets == "hidden":
        return {"hidden": ((weight.shape[1],), weight.dtype)}
    k = min(config.top_k, weight.shape[0])
    return {"topk_ids": ((k,), torch.int32), "topk_log_probs": ((k,), torch.float32)}


@torch.no_grad()
def teach(
    lm: PackedCausalLM,
    windows: list[Window],
    sequences: list[Sequence],
    config: DistillConfig,
    writer: StoreWriter,
    ranks: Ranks,
    *,
    present: Container[int] = (),
    batch_size: int,
    advance: Advance,
) -> int:
    """Run the teacher on every sequence behind its window and hand the targets to `writer`.

    present: what the store has already. The batches are dealt before it is left out, so that a teach phase that goes on
    computes what one that was never stopped does. Each window's keys and values are computed once on every rank, or
    once by all (`models.ulysses`), and shared by all of its sequences; returns the bytes of the largest that a rank
    holds. Ends early where a rank cannot write (`writer.error` says why).
    """
    jobs = []
    for w in range(len(windows)):
        members = [i for i, s in enumerate(sequences) if s.window == w]
        batches = (members[i : i + batch_size] for i in range(0, len(members), batch_size))
        missing = ([i for i in batch if i not in present] for batch in batches)
        jobs += [(w, batch) for batch in missing if batch]
    k = min(config.top_k, lm.head.weight.shape[0]) if config.targets == "topk" else None
    prefix_bytes = 0

    def passes() -> Iterator[Job]:
        known: tuple[int, Prefix] | None = None
        for (w, members), counts in ranks.lockstep(jobs, lm.at_a_time(lambda job: job[0])):
            if not ranks.all(known is not None and known[0] == w):
                context, prefix = lm.context(windows[w].token_ids)
                known = (w, prefix)
                yield context
            batch = [sequences[i] for i in members]
            input_ids, lengths = pack([s.token_ids for s in batch], [], lm.device)
            packed = PackedSequences(lengths, prefixes=[(known[1], len(members))], device=lm.device)
            at = target_rows(batch, config.loss_on, [], lm.device)
            yield Job(input_ids, packed, partial(_targets, at=at, k=k), (members, counts))

    for job, targets in lm.each(passes()):
        if job.item is None:
            prefix_bytes = max(prefix_bytes, job.packed.capture.peak_nbytes)
            continue
        members, counts = job.item
        if counts:
            writer.write(members, targets)
            advance(len(members))
        if not ranks.all(writer.error is None):
            break
    return prefix_bytes


def _targets(hidden: torch.Tensor, weight: torch.Tensor, *, at: torch.Tensor, k: int | None) -> dict[str, torch.Tensor]:
    """What is stored of the rows `at` of hidden [T, H]: themselves, or the k most likely tokens and their log-probs."""
    if k is None:
        return {"hidden": hidden[at]}
    ids, log_probs = top_k_log_probs(hidden[at], weight, k)
    return {"topk_ids": ids, "topk_log_probs": log_probs}


def top_k_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, k: int, chunk_rows: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most likely tokens at each position and their log-probabilities over the full vocabulary.

    hidden [T, H], weight [V, H] -> ids [T, k] int32, log_probs [T, k] float32; at most chunk_rows rows of logits live.
    """
    ids, log_probs = [], []
    for rows in hidden.split(chunk_rows):
        logits = products.mm(rows, weight.t()).float()
        top, index = logits.topk(k, dim=-1)
        ids.append(index.int())
        log_probs.append(top - logits.logsumexp(-1, keepdim=True))
    return torch.cat(ids), torch.cat(log_probs)


def target_rows(
    sequences: list[Sequence], loss_on: str, leading: list[int], device: torch.device | str
) -> torch.Tensor:
    """Rows of the pack of these sequences, each behind the leading tokens, whose distributions are matched."""
    rows, start = [], len(leading)
    for s in sequences:
        rows += [start + p for p in s.target_positions(loss_on)]
        start += len(s.token_ids) + len(leading)
    return torch.tensor(rows, device=device)


def hidden_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    weight: torch.Tensor,
    config: DistillConfig,
    teacher_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Divergence summed over rows of final hidden states [T, H] under the head weight [V, H], the teacher's its own."""
    return linear_log_softmax_kl(
        student,
        teacher,
        weight,
        teacher_weight=teacher_weight,
        temperature=config.temperature,
        direction=config.direction,
        beta=config.beta,
        reduction="sum",
    )


def loss_fn(
    lm: PackedCausalLM,
    sequences: list[Sequence],
    examples: list[int],
    store: TeacherStore,
    config: DistillConfig,
    leading: list[int],
) -> torch.Tensor:
    """Divergence summed over the target positions of the given sequences, in nats (float32 scalar)."""
    with phase("data"):
        batch = [sequences[i] for i in examples]
        input_ids, lengths = pack([s.token_ids for s in batch], leading, lm.device)
        at = target_rows(batch, config.loss_on, leading, lm.device)
        parts = [store.rows(i) for i in examples]
        targets = {name: torch.cat([p[name] for p in parts]).to(lm.device) for name in parts[0]}
        packed = PackedSequences(lengths, device=lm.device)

    def divergence(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        hidden = hidden if len(at) == len(hidden) else hidden[at]
        if config.targets == "hidden":
            return hidden_divergence(hidden, targets["hidden"], weight, config, store.head)
        return linear_topk_kl(
            hidden,
            weight,
            targets["topk_ids"],
            targets["topk_log_probs"],
            tail=config.tail,
            temperature=config.temperature,
            direction=config.direction,
            beta=config.beta,
            reduction="sum",
        )

    return lm(input_ids, packed, divergence)
