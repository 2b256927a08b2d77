"""Demonstrations of a classification task as a context: what in-context learning and its distillation start from."""

from __future__ import annotations

import random
from dataclasses import dataclass

from fastft.config import Config
from fastft.data.sequences import Sequence, Window
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared
from fastft.engine.progress import Reporter
from fastft.errors import DataError
from fastft.methods import distill, icl
from fastft.models import loading
from fastft.models.text import Text
from fastft.tasks import ClassificationTask, Example, Pattern, sample_demonstrations, select_pattern, select_tasks


@dataclass(frozen=True)
class FewShot:
    """A task as text: its demonstrations, the examples that are asked, and the inputs that are left."""

    config: Config
    tasks: list[ClassificationTask]  # the task, then its sets of another distribution
    pattern_name: str
    pattern: Pattern
    train: list[Example]
    demonstrations: list[Example]
    asked: dict[str, list[Example]]  # by set

    @classmethod
    def load(cls, config: Config) -> FewShot:
        """Read the configured task; raises DataError for what is missing or does not fit together."""
        tasks, (name, pattern) = select_tasks(config.data), select_pattern(config.data)
        root, split = config.data.root, config.data.split
        train = tasks[0].load("train", root) if config.icl.num_shots else []
        asked = {t.name: draw(t.load(split, root), config.evaluate.max_examples, config.seed) for t in tasks}
        few_shot = cls(config, tasks, name, pattern, train, [], asked)
        return cls(config, tasks, name, pattern, train, few_shot.sample(config.icl.num_shots), asked)

    @property
    def num_labels(self) -> int:
        return len(self.pattern.choices(self.asked[self.tasks[0].name][0]))

    def sample(self, num_shots: int) -> list[Example]:
        c = self.config
        return sample_demonstrations(self.train, num_shots, self.num_labels, balanced=c.icl.balanced, seed=c.seed)

    def encode_context(self, text: Text) -> tuple[int, ...]:
        return icl.encode_demonstrations(self.pattern, self.demonstrations, text)

    def encode(self, examples: list[Example], text: Text, positions: int | None) -> icl.Queries:
        """The examples' queries; raises DataError where the longest does not fit behind the demonstrations."""
        shown = len(self.demonstrations)
        queries = icl.encode_queries(self.pattern, examples, text, behind_demonstrations=shown > 0)
        step = self.num_labels if self.config.icl.balanced else 1
        fewer = (
            (k, len(icl.encode_demonstrations(self.pattern, self.sample(k), text)))
            for k in range(shown - step, -1, -step)
        )
        icl.check_room(self.encode_context(text), queries, positions, fewer)
        return queries

    def describe(self, windows: int) -> str:
        return f"{len(self.demonstrations)} demonstrations of {self.config.data.task} in one context"

    def prepare(self, base: Base, ranks: Ranks, out: Reporter) -> Prepared:
        """For distillation: one context, which are the demonstrations, and unlabelled inputs to match it on.

        A sequence is a query as it stands behind the demonstrations. Its only completion position is the last, which
        predicts the label (distill.loss_on=completion); distill.loss_on=all matches every position of the query.
        """
        config, text = self.config, base.text
        positions = loading.max_positions(base.lm.model)
        task = self.tasks[0].name
        window = Window(task, "", self.encode_context(text))
        unseen = [e for e in self.train if e not in self.demonstrations]
        inputs = self.encode(draw(unseen, config.distill.examples, config.seed), text, positions)
        longest, sampled = max(map(len, inputs.prompts)), distill.sampled_tokens(config.distill)
        if positions is not None and len(window.token_ids) + longest + sampled > positions:
            raise DataError(
                f"{len(window.token_ids)} tokens of demonstrations, {longest} of an input and distill.on_policy_tokens="
                f"{sampled} are more than the model's {positions} positions; lower icl.num_shots or "
                "distill.on_policy_tokens"
            )
        queries = self.encode(self.asked[task], text, positions)
        labels = [e.label for e in self.asked[task]]
        return Prepared(
            windows=[window],
            sequences=[Sequence(0, "input", tuple(prompt), ()) for prompt in inputs.prompts],
            evaluated=[icl.ChoiceSet(queries.prompts, queries.choices, task, [window], labels)],
            control=[],
        )


def draw(examples: list[Example], most: int | None, seed: int) -> list[Example]:
    """All examples, or `most` of them drawn with the seed, in their order."""
    if most is None or most >= len(examples):
        return examples
    return [examples[i] for i in sorted(random.Random(f"examples-{seed}").sample(range(len(examples)), most))]
