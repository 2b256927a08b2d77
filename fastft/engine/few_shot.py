"""A task with examples as every method sees it: those of the train split, and the sets that are asked."""

from __future__ import annotations

import json
import random
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from fastft.config import Config
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared
from fastft.engine.output import draw_report
from fastft.engine.progress import Reporter
from fastft.files import write_text
from fastft.methods import icl
from fastft.methods.evaluation import Advance
from fastft.methods.metrics import FIGURES, RESAMPLES, Predictions, measure, measure_groups
from fastft.methods.summarization import Summaries
from fastft.models.attention import Prefix
from fastft.models.text import Text
from fastft.report import sets_table, write_sets_report
from fastft.tasks import (
    ClassificationTask,
    Example,
    OwnTask,
    Pattern,
    sample_demonstrations,
    select_pattern,
    select_tasks,
)


@dataclass(frozen=True)
class Answered:
    """A set with what a model said of it, and what that took."""

    queries: icl.ChoiceSet
    predictions: Predictions | Summaries
    seconds: float


Answers = dict[str, Answered]  # by set


@dataclass(frozen=True)
class FewShot(ABC):
    """The examples of a run. For one task, data seed, num_shots, balanced and sampling every method has the same:
    in-context learning shows the shots, distillation shows them to its teacher, fine-tuning trains on them.

    What is said here of labels holds for classification; `engine.summaries` says it of summaries.
    """

    quality: ClassVar[str] = "accuracy"  # of the figures the one that is shown first
    figure_names: ClassVar[tuple[str, ...]] = FIGURES

    config: Config
    tasks: list[ClassificationTask] | list[OwnTask]  # the task, then its sets of another distribution
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
        return sample_demonstrations(
            self.train,
            num_shots,
            self.num_labels,
            balanced=c.icl.balanced,
            seed=c.data_seed,
            sampling=c.icl.sampling,
        )

    @abstractmethod
    def encode(self, examples: list[Example], text: Text, positions: int | None) -> icl.Queries:
        """The examples as what is asked and the choices; raises DataError where they do not fit the model."""

    def room(self, queries: icl.Queries, text: Text) -> int:
        """Positions that the longest query takes with its answer."""
        return queries.longest

    def encode_sets(self, text: Text, positions: int | None) -> list[icl.ChoiceSet]:
        sets = []
        for name, examples in self.asked.items():
            queries = self.encode(examples, text, positions)
            gold = [e.label for e in examples]
            sets.append(icl.ChoiceSet(queries.prompts, queries.choices, name, gold, cut=queries.cut))
        return sets

    def answer(
        self,
        base: Base,
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
                predictions = self.ask(base, s, ranks, prefix=prefix, advance=progress.advance)
            answers[s.name] = Answered(s, predictions, time.monotonic() - begin)
        return answers

    def ask(
        self,
        base: Base,
        queries: icl.Queries,
        ranks: Ranks,
        *,
        prefix: Prefix | None,
        advance: Advance = lambda n: None,
    ) -> Predictions | Summaries:
        """What the model says to each query behind the prefix."""
        size, score = self.config.evaluate.batch_size, self.config.icl.score
        return icl.classify(base.lm, queries, ranks, prefix=prefix, batch_size=size, score=score, advance=advance)

    def evaluate(self, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> Answers:
        """What the trained model says of every set, without demonstrations."""
        return self._answer_trained(base, prepared.evaluated, ranks, out)

    def progress(self, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> dict[str, float]:
        """While training: figures of the task's own set."""
        [answered] = self._answer_trained(base, prepared.evaluated[:1], ranks, out).values()
        found = self.measure(answered, resamples=0)
        return {"nll": found["nll"], self.quality: found[self.quality]}

    def _answer_trained(self, base: Base, sets: list[icl.ChoiceSet], ranks: Ranks, out: Reporter) -> Answers:
        leading = tuple(base.text.leading)
        prefix = base.lm.encode_prefix(leading) if leading else None
        return self.answer(base, sets, ranks, out, prefix=prefix, phase="student")

    def measure(self, answered: Answered, *, resamples: int = RESAMPLES) -> dict[str, Any]:
        """How good a set's answers are."""
        queries, predictions = answered.queries, answered.predictions
        groups = measure_groups(predictions, self.asked[queries.name], self.num_labels)
        found = measure(predictions, queries.gold, resamples=resamples, seed=self.config.data_seed)
        return {**found, **({"groups": groups} if groups else {})}

    def figures(self, answers: Answers, context_tokens: int) -> dict[str, dict[str, Any]]:
        """The figures of each set; context_tokens: what stands in front of every query."""
        return {
            name: {**self.measure(answered), **self._cost(answered, context_tokens)}
            for name, answered in answers.items()
        }

    def count_tokens(self, answered: Answered) -> tuple[int, int]:
        """Tokens that the evaluation computed, and those of them that answering takes."""
        tokens = sum(answered.queries.sizes)
        return tokens, tokens

    def _cost(self, answered: Answered, context_tokens: int) -> dict[str, Any]:
        tokens, of_answers = self.count_tokens(answered)
        return {
            "tokens": tokens,
            "inference_tokens_per_query": context_tokens + of_answers / len(answered.queries.prompts),
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
            **{key: value for key, value in sets[self.task].items() if key in self.figure_names},
            "inference_tokens_per_query": sets[self.task]["inference_tokens_per_query"],
            "sets": sets,
        }

    def report(self, folder: Path, summary: dict[str, Any], found: dict[str, Answers], out: Reporter) -> None:
        """Print the table; write report.html, and predictions.jsonl with what the evaluated model said.

        found: what each model said, that one under "student".
        """
        out.show(sets_table(summary))
        rows = (row for answered in found["student"].values() for row in self.prediction_rows(answered))
        write_text(folder / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        draw_report(write_sets_report, folder, self.config, summary, out)

    def prediction_rows(self, answered: Answered) -> list[dict[str, Any]]:
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
