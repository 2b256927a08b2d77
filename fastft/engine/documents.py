"""Documents as contexts: windows, passages, the teacher's questions about them, and the questions that are scored."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from fastft.config import Config
from fastft.data.sequences import Sequence, Window, answer_tokens, make_windows, passages, question_prompt
from fastft.data.store import store_key
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared, prefix_key
from fastft.engine.output import write_json
from fastft.engine.progress import Reporter
from fastft.errors import DataError
from fastft.methods import distill
from fastft.methods.evaluation import QuestionSet
from fastft.models import loading
from fastft.models.text import Text
from fastft.tasks import Document, Question, load_documents, select


@dataclass(frozen=True)
class Documents:
    """The documents of a run: those that are learned, and others whose questions measure the control."""

    config: Config
    documents: list[Document]
    learned: list[Document]

    @classmethod
    def load(cls, config: Config) -> Documents:
        """Read the configured documents; raises DataError for what is missing."""
        documents = load_documents(config.data)
        return cls(config, documents, select(documents, config.data.documents))

    def describe(self, windows: int) -> str:
        documents = f"{len(self.learned)} document{'s' if len(self.learned) > 1 else ''}"
        return f"{documents}, {windows} context{'s' if windows > 1 else ''}"

    def prepare(self, base: Base, ranks: Ranks, out: Reporter) -> Prepared:
        """Contexts, student sequences and scored questions as token ids."""
        config, text = self.config, base.text
        data, queries = config.data, config.queries
        positions = loading.max_positions(base.lm.model)

        def windows_of(document: Document) -> list[Window]:
            reserve = distill.query_reserve(document, config, text)
            return make_windows(
                document, data, text.encode, text.decode, leading=text.leading, positions=positions, reserve=reserve
            )

        windows: list[Window] = []
        sequences: list[Sequence] = []
        evaluated = []
        for document in self.learned:
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
        others = [d for d in self.documents if d not in self.learned and d.questions]
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
