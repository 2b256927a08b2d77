"""From documents to token ids: teacher contexts, student sequences, scored answers, batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastft.config import Config, DataConfig
from fastft.errors import DataError
from fastft.tasks import Document

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Window:
    """One teacher context: the whole document or a part of it, in the context pattern."""

    document: str
    text: str  # the document's text in this window
    token_ids: tuple[int, ...]  # the filled pattern, with the tokenizer's leading tokens in front


@dataclass(frozen=True)
class Sequence:
    """Tokens that the student sees without the context: prompt, then completion."""

    window: int
    kind: str  # "passage", "self_study", "question"; of a classification task "input", "labelled"
    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt + self.completion

    def target_positions(self, loss_on: str) -> range:
        """Positions whose next-token distribution is matched."""
        start = 0 if loss_on == "all" else len(self.prompt) - 1
        return range(start, len(self.prompt) + len(self.completion))


def make_windows(
    document: Document,
    config: DataConfig,
    encode: Encode,
    decode: Decode,
    *,
    leading: list[int],
    positions: int | None,
    reserve: int,
) -> list[Window]:
    """Split a document into windows that leave `reserve` of the model's `positions` for what follows them.

    Raises DataError for a document that is longer where config.window.enabled is false.
    """

    def fill(text: str) -> list[int]:
        return leading + encode(config.context_pattern.format(document=text, title=document.title))

    room = None if positions is None else positions - reserve
    limit = min((n for n in (config.window.tokens, room) if n is not None), default=None)
    whole = fill(document.text)
    if limit is None or len(whole) <= limit:
        return [Window(document.id, document.text, tuple(whole))]
    if not config.window.enabled:
        raise DataError(
            f"document {document.id!r} takes {len(whole)} tokens, the window holds {limit}; "
            "set data.window.enabled=true to split it, or use a model with a longer window"
        )
    body = limit - len(fill("")) - 8  # a few spare: cutting and filling may tokenise differently
    if body <= config.window.overlap:
        if limit == room:
            cure = (
                f"of the model's {positions} positions {reserve} are kept for the longest query with its answer: "
                "shorten queries.self_study.examples, evaluate.max_new_tokens, distill.on_policy_tokens or the "
                "questions themselves, lower the overlap, or use a model with more positions"
            )
        else:
            cure = f"raise data.window.tokens={limit}, or lower the overlap"
        raise DataError(
            f"data.window: {max(body, 0)} tokens are left for the text of document {document.id!r}, which must be more "
            f"than data.window.overlap={config.window.overlap}; {cure}"
        )
    ids = encode(document.text)
    windows = []
    for start in range(0, len(ids), body - config.window.overlap):
        text = decode(ids[start : start + body]).strip()
        windows.append(Window(document.id, text, tuple(fill(text)[:limit])))
        if start + body >= len(ids):
            break
    return windows


def passages(window: Window, index: int, config: Config, encode: Encode, decode: Decode) -> list[Sequence]:
    """Overlapping pieces of the window's text, each to be continued from its first tokens.

    The pieces start before the text does, so that its first tokens are predicted from as little as the others. In the
    query pattern a piece's first tokens stand where a question does, and the others where its answer does.
    """
    p = config.queries.passages
    if p.stride == 0:
        return []
    ids = encode(window.text)
    found = []
    for number, start in enumerate(range(-(p.prompt_tokens // 2), max(1, len(ids) - p.prompt_tokens), p.stride)):
        piece = ids[max(start, 0) : start + p.tokens]
        prompt_tokens = min(p.prompt_tokens, len(piece) - 1)
        if prompt_tokens < 1:
            continue
        prompt, rest = piece[:prompt_tokens], piece[prompt_tokens:]
        if p.pattern == "query" or (p.pattern == "both" and number % 2):
            question, answer = decode(prompt).strip(), decode(rest).strip()
            found.append(question_sequence("passage", question, answer, index, config.data, encode))
        else:
            found.append(Sequence(index, "passage", tuple(prompt), tuple(rest)))
    return found


def question_sequence(
    kind: str, question: str, answer: str, window: int, config: DataConfig, encode: Encode
) -> Sequence:
    """The question in the query pattern, continued by the answer and what ends it."""
    completion = encode(config.answer_pattern.format(answer=answer) + config.answer_end)
    return Sequence(window, kind, tuple(question_prompt(question, config, encode)), tuple(completion))


def question_prompt(question: str, config: DataConfig, encode: Encode) -> list[int]:
    return encode(config.query_pattern.format(question=question))


def answer_tokens(answer: str, config: DataConfig, encode: Encode) -> list[int]:
    return encode(config.answer_pattern.format(answer=answer))


@dataclass(frozen=True)
class Batch:
    """The part of an optimizer step's batch that one process runs in one forward."""

    examples: list[int]  # indices into the sequences
    total_targets: int  # target positions of the whole step, over all processes and micro-batches


def batches(
    target_counts: list[int], *, steps: int, batch_size: int, micro_batches: int, rank: int, world_size: int, seed: int
) -> Iterator[list[Batch]]:
    """For each optimizer step the micro-batches of one rank.

    Every example once per epoch in an order drawn from the seed; the order, and what a step holds, do not depend on
    the number of processes, so the loss of a step does not either.
    """
    order: list[int] = []
    epoch = 0
    for _ in range(steps):
        while len(order) < batch_size:
            more = list(range(len(target_counts)))
            random.Random(f"{seed}-{epoch}").shuffle(more)
            order += more
            epoch += 1
        chosen, order = order[:batch_size], order[batch_size:]
        total = sum(target_counts[i] for i in chosen)
        mine = chosen[rank::world_size]
        yield [Batch(mine[m::micro_batches], total) for m in range(micro_batches)]


def pack(
    sequences: list[tuple[int, ...]], leading: list[int], device: torch.device | str
) -> tuple[torch.Tensor, list[int]]:
    """input_ids [1, T] of the sequences end to end, each behind the leading tokens; and the lengths."""
    lengths = [len(leading) + len(s) for s in sequences]
    ids = [token for s in sequences for token in (*leading, *s)]
    return torch.tensor(ids, dtype=torch.long, device=device)[None], lengths
