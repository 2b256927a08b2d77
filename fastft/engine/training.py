"""The optimizer steps of a run: progress, metrics, checkpoints, stopping, losses that are not finite."""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastft import profiling
from fastft.config import Config
from fastft.data.sequences import Batch, Sequence, batches
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared
from fastft.engine.checkpoints import Checkpoint, Checkpoints, list_checkpoints
from fastft.engine.objective import Objective
from fastft.engine.output import Metrics
from fastft.engine.progress import Phase, Reporter
from fastft.engine.stop import StopRequest
from fastft.engine.trainer import NonFiniteStep, StepResult, Trainer
from fastft.errors import Interrupted, NonFiniteLossError
from fastft.memory import peak_memory_bytes
from fastft.methods.online import sample_completions
from fastft.ops import raise_deferred_errors


@dataclass
class Training:
    """The optimizer steps of a run, and what they work with.

    objective: what a step minimises.
    evaluate: figures of what is trained, called every train.eval_every steps.
    recorded: opened around each step, see `profiling.Recording`.
    """

    config: Config
    base: Base
    prepared: Prepared
    objective: Objective
    trainer: Trainer
    output_dir: Path
    evaluate: Callable[[], dict[str, float]]
    stop: StopRequest
    ranks: Ranks
    out: Reporter
    recorded: Callable[[], AbstractContextManager] = nullcontext

    def __post_init__(self):
        self.sampled: dict[int, Sequence] = {}  # on-policy: what the student wrote for this step, by example
        self.last_line = 0
        self.step_seconds: list[float] = []
        self.loss = float("nan")  # of the last step
        self.checkpoints = Checkpoints(
            self.output_dir / "checkpoints",
            self.config,
            self.base.fingerprint,
            self.prepared.sequences,
            self.ranks,
        )

    def run(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """Take the steps, from a checkpoint on or all; figures of the whole: steps, last loss, where it resumed from.

        Signals stay deferred at the end: the caller has something to save first.
        """
        t, first = self.config.train, 0
        if checkpoint:
            self.checkpoints.load(self.trainer, checkpoint)
            first, self.loss = checkpoint.step, checkpoint.about["loss"]
        metrics = Metrics(
            self.output_dir / "metrics.jsonl", first, enabled=self.ranks.is_first, tensorboard=t.tensorboard
        )
        self.stop.deferred = True
        if first:
            self.out.line(f"resume     from step {first} ({checkpoint.path})")
        with self.out.phase("train", t.steps, "steps") as phase:
            phase.advance(first)
            plan = self._plan()
            for number in range(1, t.steps + 1):
                if number <= first:
                    next(plan)
                    continue
                with self.recorded():
                    begin = time.monotonic()
                    result, targets = self._take(number, plan)
                    self.loss, seconds = result.loss, time.monotonic() - begin
                self.step_seconds.append(seconds)
                tokens_per_s = targets / seconds
                metrics.write(
                    step=number,
                    loss=self.loss,
                    lr=result.lr,
                    grad_norm=result.grad_norm,
                    tokens_per_s=tokens_per_s,
                    peak_memory_bytes=peak_memory_bytes(),
                    time_s=seconds,
                )
                self._show(number, first, result, tokens_per_s, phase)
                is_last, nll = number == t.steps, None
                if is_last and not t.keep_best:
                    break
                if t.eval_every and (is_last or number % t.eval_every == 0) and self.prepared.evaluated:
                    scores = self.evaluate()
                    nll = scores["nll"]
                    metrics.write(step=number, **{f"evaluated_{k}": v for k, v in scores.items()})
                    self.out.line(f"step {number}/{t.steps}  nll {nll:.4f}")
                is_due = t.save_every and number % t.save_every == 0 and not is_last
                stops = result.stop and not is_last
                if is_due or stops or self.checkpoints.is_best(nll):
                    metrics.sync()
                    saved = self.checkpoints.save(self.trainer, number, loss=self.loss, nll=nll)
                    if stops:
                        raise Interrupted(
                            f"stopped after step {number} of {t.steps}; checkpoint {saved}. To go on, run the same "
                            "command with resume=auto",
                            self.stop.signum or signal.SIGTERM,
                        )
        return {
            "steps": t.steps,
            "loss": self.loss,
            "resumed_from": first,
            "step_time_s": statistics.median(self.step_seconds) if self.step_seconds else None,
        }

    def _plan(self) -> Iterator[list[Batch]]:
        t = self.config.train
        return batches(
            [self.objective.count_targets(s) for s in self.prepared.sequences],
            steps=t.steps,
            batch_size=t.batch_size,
            micro_batches=t.micro_batches,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.config.seed,
        )

    def _take(self, number: int, plan: Iterator[list[Batch]]) -> tuple[StepResult, int]:
        """The next step of the plan, and its target positions over all ranks."""
        with profiling.phase("data"):
            micro_batches = next(plan)
        if self.config.distill.on_policy:
            with profiling.phase("sample"):
                micro_batches = self._sample(number, micro_batches)
        return self._step(number, micro_batches), micro_batches[0].total_targets

    def _sample(self, number: int, micro_batches: list[Batch]) -> list[Batch]:
        """On-policy: let the student continue some of the step's examples; the batches with their new totals."""
        config, sequences = self.config, self.prepared.sequences
        examples = [i for batch in micro_batches for i in batch.examples]
        self.sampled = sample_completions(
            self.trainer.lm, sequences, examples, config, self.base.text, self.ranks, step=number
        )
        mine = [self.sampled.get(i, sequences[i]) for i in examples]
        total = sum(self.ranks.gather(sum(map(self.objective.count_targets, mine))))
        return [Batch(batch.examples, total) for batch in micro_batches]

    def _loss(self, examples: list[int]) -> torch.Tensor:
        """The loss summed over the target positions of these examples."""
        sequences = [self.sampled.get(i, self.prepared.sequences[i]) for i in examples]
        return self.objective.loss_fn(self.trainer.engine, examples, sequences)

    def _step(self, number: int, micro_batches: list[Batch]) -> StepResult:
        """One optimizer step; raises NonFiniteLossError where loss or gradient are not finite."""
        t = self.config.train
        try:
            result = self.trainer.step(number, micro_batches, self._loss, self.stop.signum is not None)
        except NonFiniteStep as error:
            raise self._describe(error) from None
        if result.loss != result.loss or (t.max_grad_norm and result.grad_norm != result.grad_norm):
            raise NonFiniteLossError(
                f"step {number}: the gradient is not finite; lower train.lr ({t.lr:g}). " + self._kept_checkpoint()
            )
        return result

    def _show(self, number: int, first: int, result: StepResult, tokens_per_s: float, phase: Phase) -> None:
        """The progress bar; a line now and then where the output is not a terminal."""
        t, memory = self.config.train, peak_memory_bytes() / 2**30
        phase.advance(1, f"loss {result.loss:.4f}  {tokens_per_s:,.0f} tok/s  mem {memory:.2f} GiB")
        if self.out.console.is_terminal or (number - self.last_line < t.log_every and number < t.steps):
            return
        self.last_line = number
        left = phase.seconds / (number - first) * (t.steps - number)
        self.out.line(
            f"step {number}/{t.steps}  loss {result.loss:.4f}  grad_norm {result.grad_norm:.3f}  lr {result.lr:.2e}  "
            f"tok/s {tokens_per_s:,.0f}  mem {memory:.2f}GiB  left {left:.0f} s"
        )

    def _describe(self, error: NonFiniteStep) -> NonFiniteLossError:
        """Find the examples behind a loss that is not finite; keep the state before the step as a checkpoint."""
        raise_deferred_errors()  # a token id that a CUDA kernel found out of range explains it best
        culprits = []
        size = max(self.ranks.gather(len(error.batch.examples)))
        with torch.no_grad():
            for i in range(size):  # every rank makes the same number of forwards
                mine = error.batch.examples[i : i + 1]
                value = self._loss(mine or [0])
                if mine and not torch.isfinite(value):
                    culprits.append(mine[0])
        culprits = sorted(c for part in self.ranks.gather(culprits) for c in part)
        finite = self.ranks.all(all(bool(torch.isfinite(p).all()) for p in self.trainer.trained_tensors().values()))
        where = "no single example alone"
        if culprits:
            s = self.prepared.sequences[culprits[0]]
            snippet = self.base.text.decode(list(s.token_ids))[:80]
            of = f", document {self.prepared.windows[s.window].document!r}" if self.prepared.windows else ""
            where = f"example {culprits[0]} ({s.kind}{of}: {snippet!r}...)"
        if finite and error.step > 1:
            self.checkpoints.save(self.trainer, error.step - 1, loss=self.loss)
        return NonFiniteLossError(
            f"step {error.step}: the loss is {error.loss}, from {where}; no parameter was changed by this step. "
            f"{self._kept_checkpoint()} Lower train.lr, or look at the example."
        )

    def _kept_checkpoint(self) -> str:
        found = list_checkpoints(self.output_dir / "checkpoints")
        return f"The last checkpoint is {found[-1]}." if found else "There is no checkpoint."
