"""What comes before training: the base model, token ids, the teacher's questions and targets."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
from dataclasses import dataclass

from fastft.config import Config
from fastft.data.sequences import (
    Sequence,
    Window,
    answer_tokens,
    make_windows,
    passages,
    question_prompt,
)
from fastft.data.store import StoreWriter, TeacherStore, store_key
from fastft.distributed import Ranks
from fastft.engine.output import write_json
from fastft.engine.progress import Reporter
from fastft.errors import DataError, FastftError
from fastft.methods import distill
from fastft.methods.evaluation import QuestionSet
from fastft.models import loading
from fastft.models.causal import PackedCausalLM
from fastft.models.text import Text
from fastft.tasks import Document, Question


@dataclass
class Base:
    """The frozen model with what identifies it."""

    lm: PackedCausalLM
    text: Text
    path: str
    fingerprint: str
    tokenizer_fingerprint: str


@dataclass
class Prepared:
    """All that training and evaluation read."""

    windows: list[Window]
    sequences: list[Sequence]
    evaluated: list[QuestionSet]
    control: list[QuestionSet]


def load_base(config: Config, ranks: Ranks) -> Base:
    m = config.model
    if m.dtype == "float16" and ranks.device.type == "cpu":
        raise FastftError("model.dtype=float16 needs a GPU; on the CPU use bfloat16 or float32")
    if ranks.is_first:
        path = loading.resolve(m.name_or_path, config.cache_path)
    ranks.barrier()
    path = loading.resolve(m.name_or_path, config.cache_path)
    tokenizer = loading.load_tokenizer(path, revision=m.revision, trust_remote_code=m.trust_remote_code)
    model = loading.load_model(
        path,
        dtype=m.dtype,
        revision=m.revision,
        trust_remote_code=m.trust_remote_code,
        random_weights=m.random_weights,
        seed=config.seed,
    )
    loading.check_tokenizer(tokenizer, model, path)
    fingerprint = loading.fingerprint(model)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return Base(
        PackedCausalLM(model.to(ranks.device)),
        Text(tokenizer),
        path,
        fingerprint,
        hashlib.sha256(vocabulary.encode()).hexdigest(),
    )


def prepare(
    config: Config, base: Base, documents: list[Document], learned: list[Document], ranks: Ranks, out: Reporter
) -> Prepared:
    """Contexts, student sequences and scored questions as token ids."""
    text, data, queries = base.text, config.data, config.queries
    positions = loading.max_positions(base.lm.model)

    def windows_of(document: Document) -> list[Window]:
        reserve = distill.query_reserve(document, config, text)
        return make_windows(
            document, data, text.encode, text.decode, leading=text.leading, positions=positions, reserve=reserve
        )

    windows: list[Window] = []
    sequences: list[Sequence] = []
    evaluated = []
    for document in learned:
        own = windows_of(document)
        used, scored = split_questions(document, config)
        for window in own:
            index = len(windows)
            windows.append(window)
            sequences += passages(window, index, queries.passages, text.encode)
            sequences += [
                distill.question_sequence("question", q.text, answer, index, config, text)
                for q in used
                for answer in q.answers
            ]
        if scored:
            evaluated.append(question_set(document, own, scored, config, text))
    control = []
    others = [d for d in documents if d not in learned and d.questions]
    count = min(data.control_documents, len(others))
    for i in range(count):
        document = others[i * len(others) // count]
        own = windows_of(document)
        control.append(question_set(document, own, list(document.questions), config, text))
    if queries.self_study.count:
        with out.phase("prepare", queries.self_study.count * len(windows), "questions") as phase:
            for index, window in enumerate(windows):
                pairs = cached_questions(config, base, window, ranks, phase.advance)
                sequences += [
                    distill.question_sequence("self_study", q, answer, index, config, text) for q, answer in pairs
                ]
    if not sequences:
        raise DataError("there is nothing to train on: the documents gave no passages and the teacher no questions")
    sampled = distill.sampled_tokens(config.distill)
    longest = max(max(len(s.token_ids), len(s.prompt) + sampled) for s in sequences) + len(text.leading)
    if positions is not None and longest > positions:
        raise DataError(
            f"a query takes {longest} tokens, the model holds {positions}; shorten "
            "queries.passages.tokens or distill.on_policy_tokens"
        )
    return Prepared(windows, sequences, evaluated, control)


def split_questions(document: Document, config: Config) -> tuple[list[Question], list[Question]]:
    """(trained, evaluated) questions of a document; in the document_only setting none is trained."""
    questions = list(document.questions)
    if config.queries.setting == "document_only":
        return [], questions
    shuffled = [q for q in questions if q.split is None]
    random.Random(f"{config.seed}-{document.id}").shuffle(shuffled)
    cut = round(len(shuffled) * (1 - config.data.heldout_fraction))
    train = {id(q) for q in [*shuffled[:cut], *(q for q in questions if q.split == "train")]}
    return [q for q in questions if id(q) in train], [q for q in questions if id(q) not in train]


def question_set(
    document: Document, windows: list[Window], questions: list[Question], config: Config, text: Text
) -> QuestionSet:
    return QuestionSet(
        document.id,
        windows,
        [question_prompt(q.text, config.data, text.encode) for q in questions],
        [[answer_tokens(a, config.data, text.encode) for a in q.answers] for q in questions],
        [q.answers for q in questions],
    )


def cached_questions(config: Config, base: Base, window: Window, ranks: Ranks, advance) -> list[tuple[str, str]]:
    """The teacher's questions about a window, from the cache folder or written now."""
    study = config.queries.self_study
    key = store_key(
        {
            "what": "questions",
            "base": base.fingerprint,
            "tokenizer": base.tokenizer_fingerprint,
            "dtype": config.model.dtype,
            "context": window.token_ids,
            "text": window.text,
            "study": study.model_dump(mode="json"),
            "query_pattern": config.data.query_pattern,
            "batch_size": config.evaluate.batch_size,
            "seed": config.seed,
        }
    )
    path = config.cache_path / "questions" / f"{key}.json"
    try:
        pairs = [(q, a) for q, a in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        pairs = None
    if ranks.all(pairs is not None):
        advance(study.count)
        return pairs
    pairs = distill.write_questions(base.lm, window, base.text, config, ranks, seed=config.seed, advance=advance)
    if ranks.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, pairs)
    return pairs


def teach(config: Config, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> tuple[TeacherStore, bool]:
    """The teacher's targets, found in the cache folder or computed now; and which of the two."""
    d = config.distill
    description = {
        "what": "targets",
        "base": base.fingerprint,
        "tokenizer": base.tokenizer_fingerprint,
        "dtype": config.model.dtype,
        "device": base.lm.device.type,
        "windows": [w.token_ids for w in prepared.windows],
        "sequences": [(s.window, s.prompt, s.completion) for s in prepared.sequences],
        "targets": d.targets,
        "top_k": d.top_k if d.targets == "topk" else None,
        "loss_on": d.loss_on,
    }
    key = store_key(description)
    folder = config.cache_path / "teacher" / key
    store = TeacherStore.open(folder)
    if ranks.all(store is not None):
        return store, True
    lengths = [len(s.target_positions(d.loss_on)) for s in prepared.sequences]
    run = ranks.gather(f"{socket.gethostname()}-{os.getpid()}")[0]
    writer = StoreWriter(folder, distill.target_specs(d, base.lm), lengths, run=run)
    problem = None
    if ranks.is_first:
        try:
            writer.create()
        except FastftError as error:
            problem = str(error)
    problem = ranks.gather(problem)[0]
    if problem:
        raise FastftError(problem)
    with out.phase("teach", len(prepared.sequences), "sequences") as phase:
        distill.teach(
            base.lm,
            prepared.windows,
            prepared.sequences,
            d,
            writer,
            ranks,
            batch_size=config.evaluate.batch_size,
            advance=phase.advance,
        )
    ranks.barrier()
    if ranks.is_first:
        described = {k: v for k, v in description.items() if k not in ("windows", "sequences")}
        writer.finish({**described, "documents": sorted({w.document for w in prepared.windows})})
    ranks.barrier()
    store = TeacherStore.open(folder)
    if store is None:
        raise FastftError(f"{folder}: the teacher store that was just written does not read back; check the disk")
    return store, False
