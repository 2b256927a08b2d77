"""The optimizer steps of a run: progress, metrics, checkpoints, stopping, losses that are not finite."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastft.config import Config
from fastft.data.sequences import Batch, Sequence, batches
from fastft.data.store import TeacherStore
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared
from fastft.engine.output import Metrics
from fastft.engine.progress import Reporter, peak_memory_bytes
from fastft.engine.trainer import NonFiniteStep, Trainer, list_checkpoints
from fastft.errors import Interrupted, NonFiniteLossError
from fastft.methods import distill
from fastft.methods.online import OnlineTeacher, sample_completions
from fastft.ops import raise_deferred_errors


class StopRequest:
    """Ctrl-C and SIGTERM: while training, the step is finished first; elsewhere the run ends at once.

    state: what there is at the moment, for the message.
    """

    def __init__(self):
        self.signum: int | None = None
        self.deferred = False
        self.state = "stopped before training; nothing is lost: the same command starts again"

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame) -> None:
        self.signum = self.signum or signum
        if not self.deferred:
            raise Interrupted(self.state, signum)


def train(
    config: Config,
    trainer: Trainer,
    prepared: Prepared,
    store: TeacherStore | None,
    base: Base,
    output_dir: Path,
    checkpoint: Path | None,
    stop: StopRequest,
    evaluate: Callable[[], dict[str, float]],
    ranks: Ranks,
    out: Reporter,
) -> dict[str, Any]:
    """The optimizer steps. Returns figures of the whole: steps, last loss, where it resumed from.

    store: the teacher's targets; None where distill.teacher=online computes them in each step.
    Signals stay deferred at the end: the caller has something to save first.
    checkpoint: where to go on from; evaluate: the student's scores, called every train.eval_every steps.
    """
    t = config.train
    counts = [len(s.target_positions(config.distill.loss_on)) for s in prepared.sequences]
    first = trainer.load_checkpoint(checkpoint) if checkpoint else 0
    metrics = Metrics(output_dir / "metrics.jsonl", first, enabled=ranks.is_first)
    plan = batches(
        counts,
        steps=t.steps,
        batch_size=t.batch_size,
        micro_batches=t.micro_batches,
        rank=ranks.rank,
        world_size=ranks.world_size,
        seed=config.seed,
    )

    online = OnlineTeacher(trainer.lm, prepared.windows, config.distill) if store is None else None
    sampled: dict[int, Sequence] = {}  # on-policy: what the student wrote for this step, by example

    def loss_fn(examples: list[int]) -> torch.Tensor:
        engine, leading = trainer.engine, base.text.leading
        if online is None:
            return distill.loss_fn(engine, prepared.sequences, examples, store, config.distill, leading)
        return online.loss_fn(engine, [sampled.get(i, prepared.sequences[i]) for i in examples], leading)

    stop.deferred = True
    loss = float("nan")
    last_line = 0
    if first:
        out.line(f"resume     from step {first} ({checkpoint})")
    with out.phase("train", t.steps, "steps") as phase:
        phase.advance(first)
        for number, micro_batches in enumerate(plan, 1):
            if number <= first:
                continue
            begin = time.monotonic()
            if config.distill.on_policy:
                examples = [i for batch in micro_batches for i in batch.examples]
                sampled = sample_completions(
                    trainer.lm, prepared.sequences, examples, config, base.text, ranks, step=number
                )
                mine = [sampled.get(i, prepared.sequences[i]) for i in examples]
                total = sum(ranks.gather(sum(len(s.target_positions(config.distill.loss_on)) for s in mine)))
                micro_batches = [Batch(batch.examples, total) for batch in micro_batches]
            try:
                result = trainer.step(number, micro_batches, loss_fn, stop.signum is not None)
            except NonFiniteStep as error:
                raise describe_non_finite(error, prepared, loss_fn, base, trainer, output_dir, ranks) from None
            loss = result.loss
            if loss != loss or (t.max_grad_norm and result.grad_norm != result.grad_norm):
                raise NonFiniteLossError(
                    f"step {number}: the gradient is not finite; lower train.lr ({t.lr:g}). "
                    + kept_checkpoint(output_dir)
                )
            seconds = time.monotonic() - begin
            tokens = micro_batches[0].total_targets
            metrics.write(
                step=number,
                loss=loss,
                lr=result.lr,
                grad_norm=result.grad_norm,
                tokens_per_s=tokens / seconds,
                peak_memory_bytes=peak_memory_bytes(),
                time_s=seconds,
            )
            note = f"loss {loss:.4f}  {tokens / seconds:,.0f} tok/s  mem {peak_memory_bytes() / 2**30:.2f} GiB"
            phase.advance(1, note)
            if not out.console.is_terminal and (number - last_line >= t.log_every or number == t.steps):
                last_line = number
                left = phase.seconds / (number - first) * (t.steps - number)
                out.line(
                    f"step {number}/{t.steps}  loss {loss:.4f}  grad_norm {result.grad_norm:.3f}  lr {result.lr:.2e}  "
                    f"tok/s {tokens / seconds:,.0f}  mem {peak_memory_bytes() / 2**30:.2f}GiB  left {left:.0f} s"
                )
            if t.eval_every and number % t.eval_every == 0 and number < t.steps and prepared.evaluated:
                scores = evaluate()
                metrics.write(step=number, **{f"evaluated_{k}": v for k, v in scores.items()})
                out.line(f"step {number}/{t.steps}  nll {scores['nll']:.4f}")
            stopping = result.stop and number < t.steps
            if stopping or (t.save_every and number % t.save_every == 0 and number < t.steps):
                saved = trainer.save_checkpoint(number, output_dir / "checkpoints")
                if stopping:
                    signum = stop.signum or signal.SIGTERM
                    raise Interrupted(
                        f"stopped after step {number} of {t.steps}; checkpoint {saved}. To go on, run the same command "
                        "with resume=auto",
                        signum,
                    )
    return {"steps": t.steps, "loss": loss, "resumed_from": first}


def describe_non_finite(error, prepared, loss_fn, base, trainer, output_dir, ranks) -> NonFiniteLossError:
    """Find the examples behind a loss that is not finite; keep the state before the step as a checkpoint."""
    raise_deferred_errors()  # a token id that a CUDA kernel found out of range explains it best
    culprits = []
    size = max(ranks.gather(len(error.batch.examples)))
    with torch.no_grad():
        for i in range(size):  # every rank makes the same number of forwards
            mine = error.batch.examples[i : i + 1]
            value = loss_fn(mine or [0])
            if mine and not torch.isfinite(value):
                culprits.append(mine[0])
    culprits = sorted(c for part in ranks.gather(culprits) for c in part)
    finite = all(bool(torch.isfinite(p).all()) for p in trainer.trained_tensors().values())
    where = "no single example alone"
    if culprits:
        s = prepared.sequences[culprits[0]]
        snippet = base.text.decode(list(s.token_ids))[:80]
        where = f"example {culprits[0]} ({s.kind}, document {prepared.windows[s.window].document!r}: {snippet!r}...)"
    if finite and error.step > 1:
        trainer.save_checkpoint(error.step - 1, output_dir / "checkpoints")
    return NonFiniteLossError(
        f"step {error.step}: the loss is {error.loss}, from {where}; no parameter was changed by this step. "
        f"{kept_checkpoint(output_dir)} Lower train.lr, or look at the example."
    )


def kept_checkpoint(output_dir: Path) -> str:
    found = list_checkpoints(output_dir / "checkpoints")
    return f"The last checkpoint is {found[-1]}." if found else "There is no checkpoint."
