"""How many tokens a run computes: counted in its prepared sequences, or before a run in its data, or estimated."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from fastft.config import Config
from fastft.data.sequences import Sequence, Window, answer_tokens, batches, make_windows, passages, question_prompt
from fastft.errors import DataError, ModelError
from fastft.methods import distill, icl
from fastft.methods.evaluation import QuestionSet
from fastft.models import loading
from fastft.models.text import Text
from fastft.tasks import (
    Document,
    Example,
    Question,
    load_documents,
    select,
    select_pattern,
    select_tasks,
)

CHARACTERS_PER_TOKEN = 4  # of English text, where the tokenizer is not at hand
EXAMPLE_TOKENS = 128  # a classification query, where the data are not
QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS = 30, 12, 8  # of a document, likewise: NarrativeQA's means
SUMMARY_TEXT_TOKENS = 512


@dataclass(frozen=True)
class Ask:
    """A batch that is evaluated: sequences of these lengths behind a context, each written on by up to `new` tokens."""

    context: int
    lengths: tuple[int, ...]
    new: int = 0

    @property
    def cache_tokens(self) -> int:
        """Positions of the decode cache."""
        return len(self.lengths) * (max(self.lengths) + self.new) if self.new else 0


@dataclass(frozen=True)
class Workload:
    """Token counts of a run.

    contexts: of each context. sequences, targets: of each training sequence, leading tokens included, and its rows
    that go through the head. asked: one batch of each kind of evaluation, the largest. evaluated_tokens: of one
    evaluation of everything, contexts apart. how: where the numbers are from, in words.
    """

    contexts: tuple[int, ...]
    sequences: tuple[int, ...]
    targets: tuple[int, ...]
    asked: tuple[Ask, ...]
    evaluated_tokens: int
    how: str

    def micro_batch(self, config: Config, world_size: int) -> tuple[tuple[int, ...], int]:
        """Lengths of the micro-batch with the most tokens that a rank runs, and its target rows."""
        t = config.train
        return self._micro_batch(min(t.steps, 1000), t.batch_size, t.micro_batches, world_size, config.seed)

    @functools.lru_cache(maxsize=64)  # noqa: B019 (a planner asks for few, many times)
    def _micro_batch(
        self, steps: int, batch_size: int, micro_batches: int, world_size: int, seed: int
    ) -> tuple[tuple[int, ...], int]:
        options = {"steps": steps, "batch_size": batch_size, "micro_batches": micro_batches, "seed": seed}
        found = (
            batch.examples
            for rank in range(world_size)
            for step in batches(list(self.targets), rank=rank, world_size=world_size, **options)
            for batch in step
        )
        largest = max(found, key=lambda examples: sum(self.sequences[i] for i in examples))
        return tuple(self.sequences[i] for i in largest), sum(self.targets[i] for i in largest)

    def mean_step(self, config: Config) -> tuple[float, float, float]:
        """Tokens, target rows and sum of squared lengths of an average optimizer step over all ranks."""
        n, size = len(self.sequences), config.train.batch_size
        return (
            size * sum(self.sequences) / n,
            size * sum(self.targets) / n,
            size * sum(length**2 for length in self.sequences) / n,
        )


class EstimatedText:
    """Stands in for a tokenizer that is not at hand: every four characters are a token."""

    leading: tuple[str, ...] = ("",)

    def encode(self, text: str) -> list[str]:
        return [text[i : i + CHARACTERS_PER_TOKEN] for i in range(0, len(text), CHARACTERS_PER_TOKEN)]

    begin = encode

    def encode_all(self, texts: list[str], *, begin: bool = False) -> list[list[str]]:
        return [self.encode(text) for text in texts]

    def cut(self, ids: list[str], max_tokens: int) -> list[str]:
        return ids[: max_tokens - len(self.leading)]

    def decode(self, ids: list[str]) -> str:
        return "".join(ids)

    decode_token = staticmethod(str)


def estimate(config: Config, positions: int | None) -> Workload:
    """What a run would prepare, from its data and tokenizer as far as they are on this machine."""
    text, tokenizer = _tokenizer(config)
    if config.kind == "documents":
        return _documents(config, text, tokenizer, positions)
    return _examples(config, text, tokenizer, positions)


def _tokenizer(config: Config) -> tuple[Any, str]:
    m = config.model
    try:
        path = loading.resolve(m.name_or_path, config.cache_path)
        options = {"revision": m.revision, "trust_remote_code": m.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, **options)
        return Text(tokenizer), "the model's tokenizer"
    except (ModelError, OSError, ValueError):
        return EstimatedText(), f"{CHARACTERS_PER_TOKEN} characters a token (the tokenizer is not here)"


def _asks_the_hub(config: Config) -> bool:
    d = config.data
    return d.hub is not None or (
        d.task not in ("documents", "jsonl", "summarization") and not (d.root or os.environ.get("FASTFT_DATA"))
    )


def _documents(config: Config, text: Any, tokenizer: str, positions: int | None) -> Workload:
    data = config.data
    try:
        if _asks_the_hub(config):
            raise DataError("the hub is not asked")
        documents = select(load_documents(data), data.documents)
        how = f"{len(documents)} document{'s' if len(documents) > 1 else ''}, {tokenizer}"
    except DataError:
        question = Question(
            "q" * CHARACTERS_PER_TOKEN * QUESTION_TOKENS, ("a" * CHARACTERS_PER_TOKEN * ANSWER_TOKENS,) * 2
        )
        room = data.window.tokens or positions or 2048
        filler = "word" * (CHARACTERS_PER_TOKEN // 4) * room
        documents = [Document("?", "", filler, (question,) * QUESTIONS)]
        how = f"one full window of a document (the data are not here), {tokenizer}"
    windows, sequences, asked = [], [], []
    for document in documents:
        reserve = distill.query_reserve(document, config, text)
        own = make_windows(
            document, data, text.begin, text.decode, leading=list(text.leading), positions=positions, reserve=reserve
        )
        if document.id == "?":
            own = own[:1]
        for window in own:
            sequences += passages(window, len(windows), config, text.encode, text.decode)
            windows.append(window)
        prompts = [question_prompt(q.text, data, text.encode) for q in document.questions]
        answers = [[answer_tokens(a, data, text.encode) for a in q.answers] for q in document.questions]
        asked.append(QuestionSet(document.id, own, prompts, answers, [], []))
    study = config.queries.self_study
    longest = len(question_prompt("", data, text.encode)) + study.max_question_tokens
    sequences += [
        Sequence(i, "self_study", (0,) * longest, (0,) * study.max_answer_tokens)
        for i in range(len(windows))
        for _ in range(study.count)
    ]
    return counted(config, windows, sequences, [a for a in asked if a.prompts], text, how)


def counted(
    config: Config,
    windows: list[Window],
    sequences: list[Sequence],
    evaluated: list[QuestionSet] | list[icl.ChoiceSet],
    text: Any,
    how: str,
) -> Workload:
    """The workload of what a run has prepared."""
    leading, d, e = len(text.leading), config.distill, config.evaluate
    context = max((len(w.token_ids) for w in windows), default=0)
    if config.method == "distill":
        targets = [len(s.target_positions(d.loss_on)) for s in sequences]
    else:
        targets = [len(s.completion) for s in sequences]
    asked: list[Ask] = []
    tokens = 0
    for s in evaluated:
        if isinstance(s, QuestionSet):
            sizes = [len(p) + sum(len(a) - 1 for a in own) for p, own in zip(s.prompts, s.answers, strict=True)]
            new = e.max_new_tokens if e.answers else 0
        else:
            sizes, new = s.sizes, e.max_summary_tokens if config.kind == "summarization" else 0
        sizes = [leading + n for n in sizes]
        tokens += sum(sizes)
        asked.append(Ask(context, largest_batch(sizes, e.batch_size)))
        if new:
            asked.append(Ask(context, largest_batch([leading + len(p) for p in s.prompts], e.batch_size), new))
    if config.method == "distill" and config.kind == "documents" and config.queries.self_study.count:
        asked.append(_study(config, windows, text))
    return Workload(
        contexts=tuple(len(w.token_ids) for w in windows),
        sequences=tuple(leading + len(s.token_ids) for s in sequences),
        targets=tuple(targets),
        asked=tuple(asked),
        evaluated_tokens=tokens,
        how=how,
    )


def _study(config: Config, windows: list[Window], text: Any) -> Ask:
    """The longer of the two prompts of self-study, behind the context and the examples."""
    study, e = config.queries.self_study, config.evaluate
    context = max(len(w.token_ids) for w in windows) + len(text.encode(study.examples))
    sentences = [s for w in windows for s in distill.split_sentences(w.text)] or [""]
    asks = text.encode_all([study.answer_prompt.replace("{sentence}", s) for s in sentences[: study.count]])
    lengths = [len(ask) + study.max_question_tokens for ask in asks]
    return Ask(context, largest_batch(lengths, min(e.batch_size, study.count)), study.max_answer_tokens)


def largest_batch(sizes: list[int], batch_size: int) -> tuple[int, ...]:
    """Of the batches that lie one after the other, the one with the most tokens."""
    starts = range(0, len(sizes), batch_size)
    return tuple(max((sizes[i : i + batch_size] for i in starts), key=sum))


def _examples(config: Config, text: Any, tokenizer: str, positions: int | None) -> Workload:
    """A classification or summarization task, from its data or with every query of one length."""
    shots, score = config.icl.num_shots, config.icl.score
    distills = config.method == "distill"
    behind = shots > 0 and config.method in ("icl", "distill")
    count = config.distill.examples if distills else shots
    longest = config.evaluate.max_examples or config.evaluate.batch_size
    try:
        if _asks_the_hub(config):
            raise DataError("the hub is not asked")
        tasks, (_, pattern) = select_tasks(config.data), select_pattern(config.data)
        train = tasks[0].load("train", config.data.root)
        evaluated = [t.load(config.data.split, config.data.root) for t in tasks]
        shown = train[:shots]
        context = icl.encode_demonstrations(pattern, shown, text) if behind else ()
        learned = train[shots:][:count] if distills else shown

        def encode(examples: list[Example]) -> icl.Queries:
            return icl.encode_queries(
                pattern, examples, text, behind_demonstrations=behind, score=score, max_tokens=config.data.max_tokens
            )

        inputs, sets = encode(learned), [encode(examples) for examples in evaluated]
        how = f"{len(evaluated[0]):,} examples of {config.data.task}, {tokenizer}"
    except DataError:
        size = SUMMARY_TEXT_TOKENS if config.kind == "summarization" else EXAMPLE_TOKENS
        size = min(size, config.data.max_tokens or size)
        query = icl.Queries([[0] * size], [[[0, 0], [0, 0]]])
        context = (0,) * (shots * (size + 2)) if behind else ()
        inputs = icl.Queries(query.prompts * (count or 256), query.choices * (count or 256))
        sets = [icl.Queries(query.prompts * longest, query.choices * longest)]
        how = f"queries of {size} tokens each (the data are not here)"
    written = config.evaluate.max_summary_tokens if config.kind == "summarization" else 0
    sequences = [
        Sequence(0, "input", tuple(prompt), (0,) * written if distills else tuple(choices[0]))
        for prompt, choices in zip(inputs.prompts, inputs.choices, strict=True)
    ]
    windows = [Window(config.data.task, "", tuple(context))] if context else []
    named = [icl.ChoiceSet(q.prompts, q.choices, "", []) for q in sets]
    return counted(config, windows, sequences, named, text, how)
