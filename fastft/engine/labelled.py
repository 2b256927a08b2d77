"""The shots as training examples: pattern-based fine-tuning, and fine-tuning with a classification head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastft.data.sequences import Sequence
from fastft.data.store import TeacherStore
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared
from fastft.engine.few_shot import Answers, FewShot
from fastft.engine.objective import Objective
from fastft.engine.progress import Reporter
from fastft.errors import DataError
from fastft.methods import icl, pbft
from fastft.models import loading
from fastft.models.text import Text
from fastft.tasks import Example


@dataclass(frozen=True)
class Labelled(FewShot):
    """Every example is asked alone. With a classification head (method=ft) the choices are the labels' numbers."""

    @classmethod
    def load(cls, config):
        few_shot = super().load(config)
        if config.method == "ft" and not few_shot.pattern.verbalizer:
            fixed = [name for name, p in few_shot.tasks[0].patterns.items() if p.verbalizer]
            raise DataError(
                f"data.pattern={few_shot.pattern_name}: the choices are each example's own words, which a head "
                f"cannot tell apart; use method=pbft, or data.pattern={' or '.join(fixed)}"
            )
        return few_shot

    def encode(self, examples: list[Example], text: Text, positions: int | None) -> icl.Queries:
        score, max_tokens = self.config.icl.score, self.config.data.max_tokens
        queries = icl.encode_queries(
            self.pattern, examples, text, behind_demonstrations=False, score=score, max_tokens=max_tokens
        )
        if self.config.method == "ft":
            labels = [[label] for label in range(self.num_labels)]
            queries = replace(queries, choices=[labels] * len(examples))
        longest = len(text.leading) + self.room(queries, text)
        if positions is not None and longest > positions:
            raise DataError(
                f"the longest example of {self.task} takes {longest} tokens with its answer, but the model has "
                f"{positions} positions; cut them with data.max_tokens, or use a shorter data.pattern or a model with "
                "more"
            )
        return queries

    def describe(self, prepared: Prepared) -> str:
        return f"{len(self.shots)} labelled examples of {self.task}"

    def prepare(self, base: Base, ranks: Ranks, out: Reporter) -> Prepared:
        """A sequence is an example's query, completed by its label."""
        positions = loading.max_positions(base.lm.model.config)
        shots = self.encode_shots(base)
        evaluated = self.encode_sets(base.text, positions)
        counts = [("labelled examples", shots), *((f"examples of {s.name}", s) for s in evaluated)]
        if cut := [f"{s.cut} of {len(s.prompts):,} {what}" for what, s in counts if s.cut]:
            out.line(f"cut        {', '.join(cut)} to data.max_tokens={self.config.data.max_tokens}")
        return Prepared(
            windows=[],
            sequences=[
                Sequence(0, "labelled", tuple(prompt), tuple(choices[label]))
                for prompt, choices, label in zip(shots.prompts, shots.choices, shots.gold, strict=True)
            ],
            evaluated=evaluated,
            control=[],
        )

    def encode_shots(self, base: Base) -> icl.ChoiceSet:
        """What is trained on."""
        queries = self.encode(self.shots, base.text, loading.max_positions(base.lm.model.config))
        gold = [e.label for e in self.shots]
        return icl.ChoiceSet(queries.prompts, queries.choices, self.task, gold, cut=queries.cut)

    def objective(self, base: Base, prepared: Prepared, store: TeacherStore | None) -> Objective:
        """The labels' tokens over the vocabulary, or the label among the labels; with a head both are the same."""
        shots, leading = self.encode_shots(base), base.text.leading
        if self.config.method == "ft" or self.config.pbft.loss_over == "vocabulary":

            def vocabulary_loss(engine: nn.Module, examples: list[int], _: list[Sequence]) -> torch.Tensor:
                return pbft.vocabulary_loss(engine, shots, examples, leading=leading)

            return Objective(vocabulary_loss, lambda sequence: len(sequence.completion))

        def label_loss(engine: nn.Module, examples: list[int], _: list[Sequence]) -> torch.Tensor:
            return pbft.label_loss(engine, shots, examples, leading=leading, score=self.config.icl.score)

        return Objective(label_loss, lambda sequence: 1)

    def evaluate_base(self, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter) -> dict[str, Answers]:
        """Nothing: the base without demonstrations is method=icl with icl.num_shots=0."""
        return {}

    def summarize(self, base: Base, prepared: Prepared, before: dict[str, Answers], after: Answers) -> dict[str, Any]:
        return self.summary(self.figures(after, len(base.text.leading)))
