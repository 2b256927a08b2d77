"""Context distillation without a store: the teacher answers in the step itself, also for what the student writes.

For data too large to store, and for on-policy queries (GKD, Agarwal et al. 2023, arXiv 2306.13649): a share of the
examples is continued by the student itself, without the context, and the teacher scores that continuation with it.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from dataclasses import replace
from itertools import groupby

import torch

from fastft.config import Config, DistillConfig
from fastft.data.sequences import Sequence, Window, pack
from fastft.distributed import Ranks
from fastft.methods.distill import hidden_divergence, target_rows
from fastft.models.attention import PackedSequences, Prefix
from fastft.models.causal import PackedCausalLM
from fastft.models.generation import generate
from fastft.models.lockstep import Lockstep
from fastft.models.text import Text


class OnlineTeacher:
    """The frozen base behind each sequence's context, computed in the student's own pass (`models.lockstep`).

    A context is encoded in the first step that needs it and kept, so that later steps compute its queries alone. An
    optimizer step is one pass in any case, whose modules run in the same order: ZeRO-3's trace of them stays valid.
    """

    def __init__(self, lm: PackedCausalLM, windows: list[Window], config: DistillConfig):
        self.lockstep, self.windows, self.config = Lockstep(lm), windows, config
        self.contexts = ContextCache(int(config.context_cache_gib * 2**30))

    def loss_fn(self, lm: PackedCausalLM, sequences: list[Sequence], leading: list[int]) -> torch.Tensor:
        """Divergence summed over the target positions of the sequences, in nats: `distill.loss_fn` without a store.

        lm: the model, or the engine around it.
        """
        device, loss_on = lm.device, self.config.loss_on
        sequences = sorted(sequences, key=lambda s: s.window)  # those of one context lie side by side
        new: dict[int, Prefix] = {}
        groups = []
        for w, members in groupby(sequences, key=lambda s: s.window):
            prefix = self.contexts.get(w)
            if prefix is None:
                prefix = new[w] = Prefix(self.lockstep.lm.placement)
                prefix.length = len(self.windows[w].token_ids)
            groups.append((prefix, len(list(members))))

        frozen = []
        for w, prefix in new.items():
            input_ids, lengths = pack([self.windows[w].token_ids], [], device)
            frozen.append((input_ids, PackedSequences(lengths, capture=prefix, device=device)))
        token_ids = [s.token_ids for s in sequences]
        input_ids, lengths = pack(token_ids, [], device)
        frozen.append((input_ids, PackedSequences(lengths, prefixes=groups, device=device)))
        input_ids, lengths = pack(token_ids, leading, device)
        trained = (input_ids, PackedSequences(lengths, device=device))
        teacher_at = target_rows(sequences, loss_on, [], device)
        student_at = target_rows(sequences, loss_on, leading, device)

        def divergence(teacher: torch.Tensor, student: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return hidden_divergence(student[student_at], teacher[teacher_at], weight, self.config)

        loss = self.lockstep.run(lm, frozen, trained, divergence)
        for w, prefix in new.items():
            self.contexts.put(w, prefix)
        return loss


class ContextCache:
    """Encoded contexts by window; where they take more than `capacity` bytes, the least recently used ones go."""

    def __init__(self, capacity: int):
        self.capacity, self.nbytes = capacity, 0
        self.prefixes: OrderedDict[int, Prefix] = OrderedDict()

    def get(self, window: int) -> Prefix | None:
        if window in self.prefixes:
            self.prefixes.move_to_end(window)
        return self.prefixes.get(window)

    def put(self, window: int, prefix: Prefix) -> None:
        self.prefixes[window] = prefix
        self.nbytes += prefix.nbytes
        while self.nbytes > self.capacity:
            self.nbytes -= self.prefixes.popitem(last=False)[1].nbytes


def sample_completions(
    lm: PackedCausalLM,
    sequences: list[Sequence],
    examples: list[int],
    config: Config,
    text: Text,
    ranks: Ranks,
    *,
    step: int,
) -> dict[int, Sequence]:
    """On-policy sequences of an optimizer step: some of its examples, continued by the student, by their index.

    Each example of the step is chosen with probability distill.on_policy. Choice and noise come from the run's seed,
    the step and the example alone, so they do not depend on the number of ranks or on where a run was resumed.
    A completion ends with the line, as an answer does, or after distill.on_policy_tokens.
    """
    d = config.distill
    chosen: dict[int, int] = {}  # example -> seed
    for i in examples:
        draw = random.Random(f"{config.seed}-{step}-{i}")
        if draw.random() < d.on_policy:
            chosen[i] = draw.getrandbits(63)
    if ranks.all(not chosen):
        return {}
    lm.eval()
    completions = generate(
        lm,
        [[*text.leading, *sequences[i].prompt] for i in chosen] or [[0]],  # a rank without any goes along with one
        stop=text.ends_line,
        keep_stop=True,
        max_new_tokens=d.on_policy_tokens,
        temperature=d.on_policy_temperature,
        seeds=list(chosen.values()) or [0],
        ranks=ranks,
    )
    return {i: replace(sequences[i], completion=tuple(ids)) for i, ids in zip(chosen, completions, strict=False)}
