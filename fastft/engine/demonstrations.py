"""The shots as demonstrations in front of every query: in-context learning, and what its distillation starts from."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastft.data.sequences import Sequence, Window
from fastft.data.store import TeacherStore, store_key
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared, prefix_key
from fastft.engine.few_shot import Answered, Answers, FewShot, draw
from fastft.engine.objective import Objective, distillation
from fastft.engine.progress import Reporter
from fastft.errors import DataError
from fastft.files import replaced
from fastft.methods import distill, icl
from fastft.methods.evaluation import recovery
from fastft.methods.metrics import Predictions
from fastft.models import loading
from fastft.models.attention import Prefix
from fastft.models.text import Text
from fastft.report import before_after
from fastft.tasks import Example


@dataclass(frozen=True)
class Demonstrations(FewShot):
    """The shots are one context, the same for all queries."""

    answers_type: ClassVar[type] = Predictions

    def encode_context(self, text: Text) -> tuple[int, ...]:
        return icl.encode_demonstrations(self.pattern, self.shots, text)

    def encode(self, examples: list[Example], text: Text, positions: int | None) -> icl.Queries:
        """The examples' queries; raises DataError where the longest does not fit behind the demonstrations."""
        shown = len(self.shots)
        queries = icl.encode_queries(
            self.pattern, examples, text, behind_demonstrations=shown > 0, score=self.config.icl.score
        )
        step = self.num_labels if self.config.icl.balanced else 1
        fewer = (
            (k, len(icl.encode_demonstrations(self.pattern, self.sample(k), text)))
            for k in range(shown - step, -1, -step)
        )
        icl.check_room(self.encode_context(text), self.room(queries, text), positions, fewer)
        return queries

    def calibrate(self, base: Base, answers: Answers, ranks: Ranks, *, prefix: Prefix | None) -> Answers:
        """The answers, contextually calibrated behind the demonstrations in `prefix`.

        Raises DataError where the choices are each example's own, which content-free inputs do not have.
        """
        if not self.pattern.verbalizer:
            raise DataError(
                f"icl.calibrate: the choices of data.pattern={self.pattern_name} are each example's own, which a "
                "content-free input does not have; set icl.calibrate=false or choose a pattern with label words"
            )
        examples = icl.content_free_examples(self.asked[self.task][0])
        queries = self.encode(examples, base.text, loading.max_positions(base.lm.model.config))
        content_free = self.ask(base, queries, ranks, prefix=prefix)
        return {
            name: replace(answered, predictions=icl.calibrate(answered.predictions, content_free))
            for name, answered in answers.items()
        }

    def describe(self, prepared: Prepared) -> str:
        tokens = len(prepared.windows[0].token_ids)
        return f"{len(self.shots)} demonstrations of {self.task} in one context of {tokens:,} tokens"

    def prepare(self, base: Base, ranks: Ranks, out: Reporter) -> Prepared:
        """For distillation: one context, which are the demonstrations, and unlabelled inputs to match it on.

        A sequence is a query as it stands behind the demonstrations, with what the teacher completes it by. A label is
        not completed: the only completion position is the query's last, which predicts it (distill.loss_on=completion);
        distill.loss_on=all matches every position of the query.
        """
        config, text = self.config, base.text
        positions = loading.max_positions(base.lm.model.config)
        window = Window(self.task, "", self.encode_context(text))
        unseen = [e for e in self.train if e not in self.shots]
        if not unseen:
            raise DataError(
                f"icl.num_shots={len(self.shots)}: all examples of the train split are demonstrations, which leaves no "
                "inputs to distil them on; use fewer"
            )
        inputs = self.encode(draw(unseen, config.distill.examples, config.data_seed), text, positions)
        longest, sampled = max(map(len, inputs.prompts)), distill.sampled_tokens(config.distill)
        if positions is not None and len(window.token_ids) + longest + sampled > positions:
            raise DataError(
                f"{len(window.token_ids)} tokens of demonstrations, {longest} of an input and distill.on_policy_tokens="
                f"{sampled} are more than the model's {positions} positions; lower icl.num_shots or "
                "distill.on_policy_tokens"
            )
        return Prepared(
            windows=[window],
            sequences=[
                Sequence(0, "input", tuple(prompt), tuple(completion))
                for prompt, completion in zip(
                    inputs.prompts, self.complete(base, window, inputs.prompts, ranks, out), strict=True
                )
            ],
            evaluated=self.encode_sets(text, positions),
            control=[],
        )

    def complete(
        self, base: Base, window: Window, prompts: list[list[int]], ranks: Ranks, out: Reporter
    ) -> list[list[int]]:
        """What the teacher writes behind each prompt for the student to learn from."""
        return [[] for _ in prompts]

    def objective(self, base: Base, prepared: Prepared, store: TeacherStore | None) -> Objective:
        return distillation(self.config, base, prepared, store)

    def evaluate_base(self, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> dict[str, Answers]:
        """What the base says without and with the demonstrations."""
        sets = prepared.evaluated
        return {
            "no_context": self._base_answers(base, sets, tuple(base.text.leading), ranks, out, phase="no context"),
            "teacher": self._base_answers(base, sets, prepared.windows[0].token_ids, ranks, out, phase="in context"),
        }

    def _base_answers(
        self,
        base: Base,
        sets: list[icl.ChoiceSet],
        context: tuple[int, ...],
        ranks: Ranks,
        out: Reporter,
        *,
        phase: str,
    ) -> Answers:
        """The base's answers behind a context, from the cache folder or computed now.

        Runs that differ in what they train ask the base the same. The seconds are those of the run that computed them.
        """
        c = self.config
        key = store_key(
            {
                "what": "answers",
                "base": base.fingerprint,
                "tokenizer": base.tokenizer_fingerprint,
                "dtype": c.model.dtype,
                "device": base.lm.device.type,
                "attention": c.model.attention,
                "context": context,
                "sets": [(s.name, s.prompts, s.choices) for s in sets],
                "task": c.kind,
                "score": c.icl.score,
                "evaluate": c.evaluate.model_dump(),
                **prefix_key(c),
            }
        )
        path = c.cache_path / "answers" / f"{key}.pt"
        answers = self._read_answers(path, sets)
        if ranks.all(answers is not None):
            out.line(f"{phase:<10} answers of the base found in {path}")
            return answers
        prefix = base.lm.encode_prefix(context) if context else None
        answers = self.answer(base, sets, ranks, out, prefix=prefix, phase=phase)
        if ranks.is_first:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path) as partial:
                torch.save([(vars(a.predictions), a.seconds) for a in answers.values()], partial)
        return answers

    def _read_answers(self, path: Path, sets: list[icl.ChoiceSet]) -> Answers | None:
        """What an earlier run kept there; None where it is not there or damaged."""
        try:
            kept = torch.load(path, weights_only=True)
            return {
                s.name: Answered(s, self.answers_type(**fields), seconds)
                for s, (fields, seconds) in zip(sets, kept, strict=True)
            }
        except (OSError, EOFError, ValueError, TypeError, RuntimeError, pickle.UnpicklingError):
            return None

    def summarize(self, base: Base, prepared: Prepared, before: dict[str, Answers], after: Answers) -> dict[str, Any]:
        """sets: the student's figures; sets_no_context, sets_teacher: the base's; recovery on the task's own set."""
        leading = len(base.text.leading)
        contexts = {"no_context": leading, "teacher": len(prepared.windows[0].token_ids)}
        sets = {name: self.figures(before[name], tokens) for name, tokens in contexts.items()}
        sets["student"] = self.figures(after, leading)
        own = {name: figures[self.task] for name, figures in sets.items()}
        nll = {name: figures["nll"] for name, figures in own.items()}
        return {
            **self.summary(sets["student"]),
            "setting": "demonstrations",
            **{f"nll_{name}": value for name, value in nll.items()},
            **{f"{self.quality}_{name}": figures[self.quality] for name, figures in own.items()},
            "recovery": recovery(nll["no_context"], nll["student"], nll["teacher"]),
            "control_recovery": None,
            "sets_no_context": sets["no_context"],
            "sets_teacher": sets["teacher"],
        }

    def report(self, folder: Path, summary: dict[str, Any], found: dict[str, Answers], out: Reporter) -> None:
        if "recovery" in summary:
            out.show(before_after(summary))
        super().report(folder, summary, found, out)
