"""Documents as contexts: windows, passages, the teacher's questions about them, and the questions that are scored."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
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
    question_sequence,
)
from fastft.data.store import TeacherStore, store_key
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared, prefix_key
from fastft.engine.objective import Objective, distillation
from fastft.engine.output import draw_report, write_json
from fastft.engine.progress import Reporter
from fastft.errors import DataError
from fastft.files import write_text
from fastft.methods import distill
from fastft.methods.evaluation import QuestionSet, Scores, evaluate, recovery, total, truncated_nll
from fastft.models import loading
from fastft.models.text import Text
from fastft.report import before_after, write_report
from fastft.tasks import Document, Question, load_documents, select

SetScores = dict[str, list[Scores]]  # "evaluated" and "control", as far as there are such questions


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

    def describe(self, prepared: Prepared) -> str:
        windows = len(prepared.windows)
        longest = max(len(w.token_ids) for w in prepared.windows)
        documents = f"{len(self.learned)} document{'s' if len(self.learned) > 1 else ''}"
        return f"{documents}, {windows} context{'s' if windows > 1 else ''} of up to {longest:,} tokens"

    def prepare(self, base: Base, ranks: Ranks, out: Reporter) -> Prepared:
        """Contexts, student sequences and scored questions as token ids."""
        config, text = self.config, base.text
        data, queries = config.data, config.queries
        positions = loading.max_positions(base.lm.model.config)

        def windows_of(document: Document) -> list[Window]:
            reserve = distill.query_reserve(document, config, text)
            return make_windows(
                document, data, text.begin, text.decode, leading=text.leading, positions=positions, reserve=reserve
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
                sequences += passages(window, index, config, text.encode, text.decode)
                sequences += [
                    question_sequence("question", q.text, answer, index, data, text.encode)
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
                        question_sequence("self_study", q, answer, index, data, text.encode) for q, answer in pairs
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

    def objective(self, base: Base, prepared: Prepared, store: TeacherStore | None) -> Objective:
        return distillation(self.config, base, prepared, store)

    def evaluate_base(self, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> dict[str, SetScores]:
        """Scores of the base without and with the context."""
        contexts = {"no_context": "no context", "teacher": "in context"}
        return {
            name: self._scores(base, prepared, ranks, out, phase=phase, in_context=name == "teacher")
            for name, phase in contexts.items()
        }

    def evaluate(self, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> SetScores:
        """Scores of the student, without the context."""
        return self._scores(base, prepared, ranks, out, phase="student", in_context=False)

    def progress(self, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> dict[str, float]:
        """While training: likelihood of the evaluated questions' answers under the student."""
        return total(self._ask(base, prepared.evaluated, ranks, out, phase="student", in_context=False, answers=False))

    def _scores(
        self, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter, *, phase: str, in_context: bool
    ) -> SetScores:
        """Of the evaluated and the control questions, as far as there are any."""
        scores = {}
        for name, sets in (("evaluated", prepared.evaluated), ("control", prepared.control)):
            if sets:
                # The control is a likelihood; answers are generated for the evaluated questions alone.
                answers = name == "evaluated"
                scores[name] = self._ask(base, sets, ranks, out, phase=phase, in_context=in_context, answers=answers)
        return scores

    def _ask(
        self,
        base: Base,
        sets: list[QuestionSet],
        ranks: Ranks,
        out: Reporter,
        *,
        phase: str,
        in_context: bool,
        answers: bool,
    ) -> list[Scores]:
        e = self.config.evaluate
        count = sum(len(s.prompts) * (len(s.windows) if in_context else 1) for s in sets)
        with out.phase(phase, count, "questions") as progress:
            return evaluate(
                base.lm,
                sets,
                base.text,
                ranks,
                in_context=in_context,
                batch_size=e.batch_size,
                max_new_tokens=e.max_new_tokens if answers and e.answers else None,
                advance=progress.advance,
            )

    def summarize(
        self, base: Base, prepared: Prepared, before: dict[str, SetScores], after: SetScores
    ) -> dict[str, Any]:
        """The final figures, for all documents together and one by one."""
        config = self.config
        summary: dict[str, Any] = {
            "method": config.method,
            "setting": config.queries.setting,
            "peft": config.peft.kind,
            "model": config.model.name_or_path,
            "nll_no_context": None,
            "nll_teacher": None,
            "nll_student": None,
            "recovery": None,
            "control_recovery": None,
        }
        scores = {**before, "student": after}
        if prepared.evaluated:
            rows = {name: found["evaluated"] for name, found in scores.items()}
            for name, own in rows.items():
                summary |= {f"{metric}_{name}": value for metric, value in total(own).items()}
            summary["recovery"] = recovery(summary["nll_no_context"], summary["nll_student"], summary["nll_teacher"])
            if any(len(s.windows) > 1 for s in prepared.evaluated):
                summary["nll_truncated"] = nll = truncated_nll(rows["teacher"])
                summary["recovery_truncated"] = recovery(summary["nll_no_context"], nll, summary["nll_teacher"])
            summary["documents"] = [
                {
                    "id": s.document,
                    "questions": len(s.prompts),
                    **{f"nll_{name}": own[i].nll_per_token for name, own in rows.items()},
                    "recovery": recovery(*(rows[n][i].nll_per_token for n in ("no_context", "student", "teacher"))),
                }
                for i, s in enumerate(prepared.evaluated)
            ]
        if prepared.control:
            control = {name: total(found["control"])["nll"] for name, found in scores.items()}
            summary |= {f"control_nll_{name}": value for name, value in control.items()}
            summary["control_recovery"] = recovery(control["no_context"], control["student"], control["teacher"])
            summary["control_documents"] = [s.document for s in prepared.control]
        return summary

    def report(self, folder: Path, summary: dict[str, Any], found: dict[str, SetScores], out: Reporter) -> None:
        """Print the table; write report.html, and predictions.jsonl where answers were generated."""
        out.show(before_after(summary))
        rows = list(prediction_rows({name: scores.get("evaluated", []) for name, scores in found.items()}, summary))
        if rows:
            write_text(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        draw_report(write_report, folder, self.config, summary, out)


def prediction_rows(found: dict[str, list[Scores]], summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines of predictions.jsonl: questions in the order in which they were asked, with each model's answer."""
    for number, document in enumerate(summary.get("documents", [])):
        answers = {name: scores[number].answers or [] for name, scores in found.items()}
        for i, asked in enumerate(answers["student"]):
            own = {name: rows[i]["answer"] for name, rows in answers.items()}
            yield {"document": document["id"], "index": i, "question": asked["question"], "gold": asked["gold"], **own}


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
        [q.text for q in questions],
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
