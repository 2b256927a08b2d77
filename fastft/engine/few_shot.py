"""A classification task as every method sees it: labelled examples of the train split, and the sets that are asked."""

from __future__ import annotations

import json
import random
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastft.config import Config
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared
from fastft.engine.progress import Reporter
from fastft.files import write_text
from fastft.methods import icl
from fastft.methods.metrics import FIGURES, Predictions, measure, measure_groups
from fastft.models.attention import Prefix
from fastft.models.causal import PackedCausalLM
from fastft.models.text import Text
from fastft.report import sets_table, write_sets_report
from fastft.tasks import ClassificationTask, Example, Pattern, sample_demonstrations, select_pattern, select_tasks


@dataclass(frozen=True)
class Answered:
    """A set with what a model said of it, and what that took."""

    queries: icl.ChoiceSet
    predictions: Predictions
    seconds: float


Answers = dict[str, Answered]  # by set


@dataclass(frozen=True)
class FewShot(ABC):
    """The examples of a run. For one task, data seed, num_shots and balanced they are the same for every method:
    in-context learning shows the shots, distillation shows them to its teacher, fine-tuning trains on them.
    """

    config: Config
    tasks: list[ClassificationTask]  # the task, then its sets of another distribution
    pattern_name: str
    pattern: Pattern
    train: list[Example]
    shots: list[Example]
    asked: dict[str, list[Example]]  # by set

    @classmethod
    def load(cls, config: Config):
        """Read the configured task; raises DataError for what is missing or does not fit together."""
        tasks, (name, pattern) = select_tasks(config.data), select_pattern(config.data)
        root, split = config.data.root, config.data.split
        train = tasks[0].load("train", root) if config.icl.num_shots else []
        asked = {t.name: draw(t.load(split, root), config.evaluate.max_examples, config.data_seed) for t in tasks}
        few_shot = cls(config, tasks, name, pattern, train, [], asked)
        return replace(few_shot, shots=few_shot.sample(config.icl.num_shots))

    @property
    def task(self) -> str:
        return self.tasks[0].name

    @property
    def num_labels(self) -> int:
        return len(self.pattern.choices(self.asked[self.task][0]))

    def sample(self, num_shots: int) -> list[Example]:
        c = self.config
        return sample_demonstrations(self.train, num_shots, self.num_labels, balanced=c.icl.balanced, seed=c.data_seed)

    @abstractmethod
    def encode(self, examples: list[Example], text: Text, positions: int | None) -> icl.Queries:
        """The examples as what is asked and the choices; raises DataError where they do not fit the model."""

    def encode_sets(self, text: Text, positions: int | None) -> list[icl.ChoiceSet]:
        sets = []
        for name, examples in self.asked.items():
            queries = self.encode(examples, text, positions)
            sets.append(icl.ChoiceSet(queries.prompts, queries.choices, name, [e.label for e in examples]))
        return sets

    def answer(
        self,
        lm: PackedCausalLM,
        sets: list[icl.ChoiceSet],
        ranks: Ranks,
        out: Reporter,
        *,
        prefix: Prefix | None,
        phase: str | None = None,
    ) -> Answers:
        """What the model says of each set behind the prefix. phase: its name for the progress; None is the set's."""
        answers = {}
        for s in sets:
            begin = time.monotonic()
            with out.phase(phase or s.name, len(s.prompts), "examples") as progress:
                predictions = icl.classify(
                    lm,
                    s,
                    ranks,
                    prefix=prefix,
                    batch_size=self.config.evaluate.batch_size,
                    score=self.config.icl.score,
                    advance=progress.advance,
                )
            answers[s.name] = Answered(s, predictions, time.monotonic() - begin)
        return answers

    def evaluate(self, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> Answers:
        """What the trained model says of every set, without demonstrations."""
        return self._answer_trained(base, prepared.evaluated, ranks, out)

    def progress(self, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> dict[str, float]:
        """While training: figures of the task's own set."""
        [answered] = self._answer_trained(base, prepared.evaluated[:1], ranks, out).values()
        found = measure(answered.predictions, answered.queries.gold, resamples=0)
        return {"nll": found["nll"], "accuracy": found["accuracy"]}

    def _answer_trained(self, base: Base, sets: list[icl.ChoiceSet], ranks: Ranks, out: Reporter) -> Answers:
        leading = tuple(base.text.leading)
        prefix = base.lm.encode_prefix(leading) if leading else None
        return self.answer(base.lm, sets, ranks, out, prefix=prefix, phase="student")

    def figures(self, answers: Answers, context_tokens: int) -> dict[str, dict[str, Any]]:
        """The figures of each set; context_tokens: what stands in front of every query."""
        return {name: self._set_figures(answered, context_tokens) for name, answered in answers.items()}

    def _set_figures(self, answered: Answered, context_tokens: int) -> dict[str, Any]:
        queries, predictions = answered.queries, answered.predictions
        examples, tokens = self.asked[queries.name], sum(queries.sizes)
        groups = measure_groups(predictions, examples, self.num_labels)
        return {
            **measure(predictions, queries.gold, seed=self.config.data_seed),
            **({"groups": groups} if groups else {}),
            "tokens": tokens,  # that were computed
            "inference_tokens_per_query": context_tokens + tokens / len(examples),
            "seconds": round(answered.seconds, 3),
            "tokens_per_s": tokens / answered.seconds,
        }

    def summary(self, sets: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What the summary of every method says; at its top the figures of the task's own set."""
        c = self.config
        return {
            "method": c.method,
            "peft": None if c.method == "icl" else c.peft.kind,
            "model": c.model.name_or_path,
            "task": self.task,
            "split": c.data.split,
            "pattern": self.pattern_name,
            "labels": list(self.pattern.verbalizer),
            "num_shots": len(self.shots),
            "balanced": c.icl.balanced,
            "seed": c.seed,
            "data_seed": c.data_seed,
            **{key: value for key, value in sets[self.task].items() if key in FIGURES},
            "inference_tokens_per_query": sets[self.task]["inference_tokens_per_query"],
            "sets": sets,
        }

    def report(self, folder: Path, summary: dict[str, Any], answers: Answers, out: Reporter) -> None:
        """Print the table; write predictions.jsonl and report.html."""
        out.show(sets_table(summary))
        rows = (row for answered in answers.values() for row in prediction_rows(answered))
        write_text(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_sets_report(folder, self.config, summary)


def prediction_rows(answered: Answered) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl: examples in the order in which they were asked."""
    s, predictions = answered.queries, answered.predictions
    return [
        {
            "set": s.name,
            "index": i,
            "label": gold,
            "predicted": int(values.argmax()),
            "is_label": bool(is_label),
            "log_probs": values[values > -float("inf")].tolist(),
        }
        for i, (gold, values, is_label) in enumerate(
            zip(s.gold, predictions.log_probs, predictions.is_label, strict=True)
        )
    ]


def draw(examples: list[Example], most: int | None, seed: int) -> list[Example]:
    """All examples, or `most` of them drawn with the seed, in their order."""
    if most is None or most >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(f"examples-{seed}").sample(range(len(examples)), most))]
