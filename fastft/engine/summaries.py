"""Summaries in place of labels: what a model writes behind each query, scored against a reference by ROUGE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from fastft.data.sequences import Window
from fastft.distributed import Ranks
from fastft.engine.base import Base
from fastft.engine.demonstrations import Demonstrations
from fastft.engine.few_shot import Answered, FewShot
from fastft.engine.labelled import Labelled
from fastft.engine.progress import Reporter
from fastft.methods import icl, summarization
from fastft.methods.evaluation import Advance
from fastft.methods.metrics import RESAMPLES
from fastft.methods.summarization import Summaries
from fastft.models.attention import Prefix
from fastft.models.text import Text


@dataclass(frozen=True)
class Summarized(FewShot):
    """An example's only choice is its reference summary."""

    quality: ClassVar[str] = "rougeL"
    figure_names: ClassVar[tuple[str, ...]] = summarization.FIGURES

    def room(self, queries: icl.Queries, text: Text) -> int:
        """With its reference and what ends it in training, or with the longest summary that may be written."""
        longest_prompt = max(map(len, queries.prompts))
        ended = queries.longest + len(text.encode(self.config.data.answer_end))
        return max(ended, longest_prompt + self.config.evaluate.max_summary_tokens)

    def ask(
        self,
        base: Base,
        queries: icl.ChoiceSet,
        ranks: Ranks,
        *,
        prefix: Prefix | None,
        advance: Advance = lambda n: None,
    ) -> Summaries:
        e, references = self.config.evaluate, [example.choices[0] for example in self.asked[queries.name]]
        return summarization.summarize(
            base.lm,
            queries,
            references,
            base.text,
            ranks,
            prefix=prefix,
            batch_size=e.batch_size,
            max_new_tokens=e.max_summary_tokens,
            advance=advance,
        )

    def measure(self, answered: Answered, *, resamples: int = RESAMPLES) -> dict[str, Any]:
        return summarization.measure(answered.predictions, resamples=resamples, seed=self.config.data_seed)

    def count_tokens(self, answered: Answered) -> tuple[int, int]:
        """Each query is computed for its reference, and for the summary that is written."""
        queries, written = answered.queries, int(answered.predictions.lengths.sum())
        of_answers = sum(map(len, queries.prompts)) + written
        return sum(queries.sizes) + of_answers, of_answers

    def summary(self, sets: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {**super().summary(sets), "balanced": False}

    def prediction_rows(self, answered: Answered) -> list[dict[str, Any]]:
        found = answered.predictions
        rows = zip(found.texts, found.nll.tolist(), found.rouge, strict=True)
        return [
            {"set": answered.queries.name, "index": i, "summary": text, "nll": nll, **rouge}
            for i, (text, nll, rouge) in enumerate(rows)
        ]


@dataclass(frozen=True)
class SummaryDemonstrations(Summarized, Demonstrations):
    """Pairs of a text and its summary as one context; what is distilled of it are the summaries that it makes."""

    answers_type: ClassVar[type] = Summaries

    def complete(
        self, base: Base, window: Window, prompts: list[list[int]], ranks: Ranks, out: Reporter
    ) -> list[list[int]]:
        """The teacher's greedy summaries, with the line break that ends them."""
        e = self.config.evaluate
        with out.phase("prepare", len(prompts), "summaries") as progress:
            return summarization.write(
                base.lm,
                prompts,
                base.text,
                ranks,
                prefix=base.lm.encode_prefix(window.token_ids),
                batch_size=e.batch_size,
                max_new_tokens=e.max_summary_tokens,
                keep_stop=True,
                advance=progress.advance,
            )


@dataclass(frozen=True)
class SummaryLabelled(Summarized, Labelled):
    """The model is trained to continue each text by its reference and what ends it (data.answer_end)."""

    def encode_shots(self, base: Base) -> icl.ChoiceSet:
        shots = super().encode_shots(base)
        end = base.text.encode(self.config.data.answer_end)
        return replace(shots, choices=[[[*reference, *end]] for [reference] in shots.choices])
