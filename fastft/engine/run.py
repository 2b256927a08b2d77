"""A whole run: prepare, teach, evaluate the base, train, evaluate what was trained, report."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastft import memory, peft
from fastft.config import Config
from fastft.distributed import Ranks
from fastft.engine import deepspeed_config
from fastft.engine.base import Base, load_base
from fastft.engine.checkpoints import Checkpoint
from fastft.engine.clock import Clock
from fastft.engine.demonstrations import Demonstrations
from fastft.engine.documents import Documents
from fastft.engine.icl import evaluate_in_context
from fastft.engine.labelled import Labelled
from fastft.engine.launch import start
from fastft.engine.output import begin_results, check_room, check_tensorboard, open_output_dir, write_json
from fastft.engine.planned import compare_with_plan
from fastft.engine.profiled import Profiled
from fastft.engine.progress import Reporter
from fastft.engine.stop import StopRequest
from fastft.engine.summaries import SummaryDemonstrations, SummaryLabelled
from fastft.engine.teach import teach
from fastft.engine.trainer import Trainer
from fastft.engine.training import Training
from fastft.engine.watch import watched
from fastft.methods import ft
from fastft.models.quantized import parameter_count
from fastft.models.recompute import checkpoint_activations

# What a run learns from: how it is prepared, what a step minimises, and what is evaluated and reported.
SOURCES = {
    ("distill", "documents"): Documents,
    ("distill", "classification"): Demonstrations,
    ("pbft", "classification"): Labelled,
    ("ft", "classification"): Labelled,
    ("distill", "summarization"): SummaryDemonstrations,
    ("pbft", "summarization"): SummaryLabelled,
}
Source = Documents | Demonstrations | Labelled | SummaryDemonstrations | SummaryLabelled


@watched
def run(config: Config) -> dict[str, Any]:
    """Run a config from start to end; returns what summary.json holds."""
    if config.method == "icl":
        return evaluate_in_context(config, keep=True)
    check_tensorboard(config)
    deepspeed_config.check_file(config)
    stop = StopRequest()
    stop.install()
    clock = Clock()
    source = SOURCES[config.method, config.kind].load(config)
    ranks = start(config.deepspeed.threads_per_rank)
    out = Reporter(enabled=ranks.is_first)
    output_dir = Path(config.output_dir)
    profiled = Profiled(config, output_dir, clock, ranks, out)
    with profiled.reporting(), open_output_dir(config, output_dir, ranks, out) as resumed:
        return _run(config, source, resumed, stop, profiled, clock, ranks, out)


def _run(
    config: Config,
    source: Source,
    resumed: Checkpoint | None,
    stop: StopRequest,
    profiled: Profiled,
    clock: Clock,
    ranks: Ranks,
    out: Reporter,
) -> dict[str, Any]:
    output_dir = Path(config.output_dir)
    with clock.measure("load"):
        base = load_base(config, ranks, out)
    if resumed:
        resumed.check_base(base.fingerprint, config.model.name_or_path)
    out.line(f"{base.describe(config, ranks)}  ZeRO-{config.deepspeed.zero_stage}")

    with clock.measure("prepare"):
        prepared = source.prepare(base, ranks, out)
    if resumed:
        resumed.check_sequences(prepared.sequences)
    tokens = sum(len(s.token_ids) for s in prepared.sequences)
    kinds = Counter(s.kind for s in prepared.sequences)
    out.line(
        f"prepare    {source.describe(prepared)}; "
        + ", ".join(f"{n} {kind.replace('_', '-')}" for kind, n in kinds.items())
        + f" sequences, {tokens:,} tokens"
    )

    store = None
    if config.method == "distill" and config.distill.teacher == "stored":
        with clock.measure("teach"):
            store = teach(config, base, prepared, ranks, out)
        if config.peft.kind == "full" and config.distill.targets == "hidden":
            store.head = base.lm.head.weight.detach().clone()  # the model's own is about to be trained

    with clock.measure("evaluate_base"):
        before = source.evaluate_base(base, prepared, ranks, out)

    memory.release()  # blocks of other sizes than training's, which would stay beside them
    torch.manual_seed(config.seed)
    num_labels = source.num_labels if config.method == "ft" else None
    trained = inject(config, base, num_labels)
    number, total_number = sum(p.numel() for p in trained.values()), parameter_count(base.lm)
    out.line(
        f"train      {config.peft.kind}: {number:,} of {total_number:,} parameters "
        f"({100 * number / total_number:.3f} %), {config.train.steps} steps of {config.train.batch_size} sequences"
    )
    check_room(output_dir, number, sum(p.nbytes for p in trained.values()), config)
    if ranks.is_first:
        begin_results(config, output_dir, resumed)
    profiled.owns_folder = True
    ranks.barrier()
    base.lm.release_host_layers()  # from here on DeepSpeed brings them
    t = config.train  # behind the release, which gives the layers their own forward back
    checkpoint_activations(base.lm, t.activation_checkpointing, offloads=t.activation_offloading)
    trainer = Trainer(base.lm, trained, config, ranks)
    objective = source.objective(base, prepared, store)

    def progress() -> dict[str, float]:
        trainer.lm.eval()
        return source.progress(base, prepared, ranks, out)

    with clock.measure("train"):
        training = Training(
            config,
            base,
            prepared,
            objective,
            trainer,
            output_dir,
            progress,
            stop,
            ranks=ranks,
            out=out,
            recorded=profiled.around_steps(trainer),
        )
        history = training.run(resumed)

    tensors = trainer.trained_tensors()
    if ranks.is_first:  # before the evaluation, which may be stopped
        peft.save_adapter(
            output_dir / "adapter",
            tensors,
            config.peft,
            base_model=base.path,
            model=base.lm.model,
            num_labels=num_labels,
            head=config.ft.head,
        )
    has_adapter = bool(tensors)
    del tensors
    stop.state = f"stopped after training; the adapter is in {output_dir / 'adapter'}, its evaluation is missing"
    stop.deferred = False

    with clock.measure("evaluate"):
        trainer.lm.eval()
        after = source.evaluate(base, prepared, ranks, out)
    summary = source.summarize(base, prepared, before, after) | history
    if ranks.is_first:
        clock.seconds["total"] = time.monotonic() - clock.began
        summary["seconds"] = {k: round(v, 3) for k, v in clock.seconds.items()}
        profiled.close()
        summary["peak_memory_bytes"] = profiled.peak_memory_bytes
        summary["trained_parameters"] = number
        summary["plan"] = compare_with_plan(config, base, prepared, summary, ranks, num_labels, out)
        profiled.write("complete", step=summary["steps"], plan=summary["plan"])
        source.report(output_dir, summary, {**before, "student": after}, out)
        write_json(output_dir / "summary.json", summary)  # the last file: a folder with it is a whole run
        if has_adapter:
            out.line(f"adapter    {output_dir / 'adapter'}")
        if (output_dir / "report.html").is_file():
            out.line(f"report     {output_dir / 'report.html'}")
        out.line(f"summary    {output_dir / 'summary.json'}  ({clock.seconds['total']:.0f} s in all)")
    ranks.barrier()
    return summary


def inject(config: Config, base: Base, num_labels: int | None) -> dict[str, nn.Parameter]:
    """Make the configured parameters trainable, with a new head where num_labels are to be told apart."""
    if num_labels is None:
        return peft.inject(base.lm.model, config.peft)
    head = ft.replace_head(base.lm, num_labels, config.ft.head, dropout=config.model.dropout)
    return {**peft.inject(base.lm.model, config.peft), **{name: p.requires_grad_(True) for name, p in head.items()}}
