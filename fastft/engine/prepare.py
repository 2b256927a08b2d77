"""What comes before training: the base model, token ids, the teacher's questions and targets."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.config import Config
from fastft.data.sequences import (
    Sequence,
    Window,
    answer_tokens,
    make_windows,
    passages,
    question_prompt,
)
from fastft.data.store import (
    BuildLock,
    Layout,
    StoreWriter,
    TeacherStore,
    check_free,
    size_text,
    store_key,
    written_positions,
)
from fastft.distributed import Ranks
from fastft.engine.output import write_json
from fastft.engine.progress import Reporter
from fastft.errors import DataError, FastftError, Interrupted
from fastft.methods import distill
from fastft.methods.evaluation import QuestionSet
from fastft.models import loading
from fastft.models.causal import PackedCausalLM
from fastft.models.text import Text
from fastft.tasks import Document, Question

LOCK_POLL_SECONDS = 1.0


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
        PackedCausalLM(model.to(ranks.device), placement=m.prefix),
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
            **prefix_key(config),
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


def prefix_key(config: Config) -> dict[str, str]:
    """What the placement of the context's keys and values adds to a key: only int8 changes what the teacher says."""
    return {"prefix": "int8"} if config.model.prefix == "int8" else {}


def teach(config: Config, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> TeacherStore:
    """The teacher's targets: found in the cache folder, gone on with where an earlier run stopped, or computed now."""
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
        **prefix_key(config),
    }
    layout = Layout(
        store_key(description),
        distill.target_specs(d, base.lm),
        [len(s.target_positions(d.loss_on)) for s in prepared.sequences],
    )
    folder = config.cache_path / "teacher" / layout.key
    what = f"{layout.positions:,} {d.targets} targets, {size_text(layout.nbytes)}"
    begin = time.monotonic()
    check_shared(folder, ranks)
    store = TeacherStore.open(folder, layout, ranks)
    if not store.is_complete:
        with _sole_builder(folder, ranks, out):
            store = TeacherStore.open(folder, layout, ranks)  # another run may have been at work
            if not store.is_complete:
                about = {k: v for k, v in description.items() if k not in ("windows", "sequences")}
                about |= {"documents": sorted({w.document for w in prepared.windows}), "positions": layout.positions}
                seconds, prefix_bytes = _compute(config, base, prepared, store, about, ranks, out)
                rate = (layout.positions - store.positions) / seconds
                store = TeacherStore.open(folder, layout, ranks)
                if not store.is_complete:
                    raise FastftError(
                        f"{folder}: the teacher store that was just written does not read back; check the disk"
                    )
                out.line(
                    f"teach      {what}, {seconds:.1f} s ({rate:,.0f} targets/s), context {size_text(prefix_bytes)} "
                    f"({config.model.prefix}), written to {folder}"
                )
                return store
    out.line(f"teach      {what}, found in {folder}, checked in {time.monotonic() - begin:.1f} s")
    return store


def _compute(
    config: Config,
    base: Base,
    prepared: Prepared,
    store: TeacherStore,
    about: dict[str, Any],
    ranks: Ranks,
    out: Reporter,
) -> tuple[float, int]:
    """Compute the targets that `store` lacks and write them to its folder: (seconds, bytes of the largest prefix)."""
    layout, folder = store.layout, store.folder
    lacking = 1 - store.positions / layout.positions
    problem = None
    if ranks.is_first:
        try:
            store.prune()
            check_free(folder, int(lacking * layout.nbytes))
            write_json(folder / "about.json", about)
        except (FastftError, OSError) as error:
            problem = str(error)
    problem = ranks.gather(problem)[0]
    if problem:
        raise FastftError(problem)
    if store.damaged or store.where:
        damaged = f"; damaged or foreign blocks, computed again: {store.damaged}" if store.damaged else ""
        out.line(f"teach      goes on: {store.positions:,} of {layout.positions:,} targets are in {folder}{damaged}")

    def kept() -> str:
        there = written_positions(folder, layout)
        return f"{there:,} of {layout.positions:,} targets are kept in {folder}; the same command goes on with them"

    count = len(prepared.sequences) - len(store.where)
    try:
        with out.phase("teach", count, "sequences") as phase, closing(StoreWriter(folder, layout, ranks)) as writer:
            prefix_bytes = distill.teach(
                base.lm,
                prepared.windows,
                prepared.sequences,
                config.distill,
                writer,
                ranks,
                present=store,
                batch_size=config.evaluate.batch_size,
                advance=phase.advance,
            )
    except Interrupted as stopped:
        raise Interrupted(f"stopped while teaching; {kept()}", stopped.signum) from None
    problem = next((p for p in ranks.gather(writer.error and writer.error.strerror) if p), None)
    if problem:
        raise FastftError(f"the teacher store cannot be written: {folder}: {problem}; {kept()}")
    return phase.seconds, prefix_bytes


@contextmanager
def _sole_builder(folder: Path, ranks: Ranks, out: Reporter) -> Iterator[None]:
    """One run builds a store at a time; others wait for it and then find its targets, all or some."""
    lock = BuildLock(folder) if ranks.is_first else None
    try:
        waiting = False
        # The first rank tells the others at every turn: collectives have a time limit, another run has none.
        while not ranks.gather(lock is None or lock.acquire())[0]:
            if not waiting:
                out.line(f"teach      another run writes these targets; waiting for it ({folder})")
            waiting = True
            time.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        if lock:
            lock.release()


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Every rank reads what all ranks write: refuse a cache folder of which each node has its own."""
    if ranks.world_size == 1:
        return
    probe = None
    if ranks.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        probe = tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-")  # noqa: SIM115
    name = ranks.gather(probe and probe.name)[0]
    shared = ranks.all(os.path.exists(name))
    if probe:
        probe.close()
    if not shared:
        raise FastftError(
            f"cache_dir: {folder} is not the same folder for all {ranks.world_size} processes; set cache_dir to one "
            "that all nodes share"
        )
