"""What an optimizer step minimises, for every method in one shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fastft.config import Config
from fastft.data.sequences import Sequence
from fastft.data.store import TeacherStore
from fastft.engine.base import Base, Prepared
from fastft.methods import distill
from fastft.methods.online import OnlineTeacher


@dataclass(frozen=True)
class Objective:
    """A sum over the target positions of sequences; a step minimises its mean over those of the whole batch.

    loss_fn: (the engine around the model, the examples' numbers, their sequences) -> float32 scalar, nats.
    count_targets: how many of these positions a sequence has.
    """

    loss_fn: Callable[[nn.Module, list[int], list[Sequence]], torch.Tensor]
    count_targets: Callable[[Sequence], int]


def distillation(config: Config, base: Base, prepared: Prepared, store: TeacherStore | None) -> Objective:
    """Match the teacher: its stored targets, or without a store what it says in the step itself."""
    leading, d = base.text.leading, config.distill

    def count_targets(sequence: Sequence) -> int:
        return len(sequence.target_positions(d.loss_on))

    if store is None:
        online = OnlineTeacher(base.lm, prepared.windows, d)
        return Objective(lambda engine, _, sequences: online.loss_fn(engine, sequences, leading), count_targets)

    def stored(engine: nn.Module, examples: list[int], _: list[Sequence]) -> torch.Tensor:
        return distill.loss_fn(engine, prepared.sequences, examples, store, d, leading)

    return Objective(stored, count_targets)
