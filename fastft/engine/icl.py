"""A run of in-context learning: examples, demonstrations, every query behind them, figures of each set."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fastft.config import Config
from fastft.distributed import Ranks
from fastft.engine.base import load_base
from fastft.engine.demonstrations import Demonstrations
from fastft.engine.launch import start
from fastft.engine.output import begin_results, open_output_dir, write_json
from fastft.engine.progress import Reporter
from fastft.engine.stop import StopRequest
from fastft.engine.summaries import SummaryDemonstrations
from fastft.engine.trainer import start_engine
from fastft.engine.watch import watched
from fastft.memory import peak_memory_bytes
from fastft.models import loading
from fastft.models.causal import PackedCausalLM
from fastft.report import sets_table


@watched
def evaluate_in_context(config: Config, *, keep: bool) -> dict[str, Any]:
    """Evaluate the configured task and its sets of another distribution; returns what summary.json holds.

    keep: write config.yaml, summary.json, predictions.jsonl and report.html to output_dir; else nothing is written.
    """
    stop = StopRequest()
    stop.state = "stopped; nothing was written: the same command starts again"
    stop.install()
    began = time.monotonic()
    few_shot = (SummaryDemonstrations if config.kind == "summarization" else Demonstrations).load(config)
    ranks = start(config.deepspeed.threads_per_rank)
    out = Reporter(enabled=ranks.is_first)
    with open_output_dir(config, Path(config.output_dir), ranks, out) if keep else nullcontext():
        return _evaluate(config, few_shot, began, ranks, out, keep=keep)


def _evaluate(
    config: Config, few_shot: Demonstrations, began: float, ranks: Ranks, out: Reporter, *, keep: bool
) -> dict[str, Any]:
    output_dir, shown = Path(config.output_dir), len(few_shot.shots)
    base = load_base(config, ranks, out)
    described = base.describe(config, ranks)
    base.lm, stage = distribute(base.lm, config, ranks)
    out.line(f"{described}  {stage}")
    loaded = time.monotonic()

    sets = few_shot.encode_sets(base.text, loading.max_positions(base.lm.model.config))
    context = few_shot.encode_context(base.text)
    prefix = base.lm.encode_prefix(context) if context else None
    if prefix:
        out.line(
            f"prompt     {shown} demonstrations of {few_shot.task}, {len(context):,} tokens, encoded once: "
            f"{prefix.nbytes / 2**20:.1f} MiB of keys and values"
        )
    prepared = time.monotonic()
    answers = few_shot.answer(base, sets, ranks, out, prefix=prefix)
    if config.icl.calibrate:
        answers = few_shot.calibrate(base, answers, ranks, prefix=prefix)
    answered = time.monotonic()
    figures = few_shot.figures(answers, len(context))
    ended = time.monotonic()
    seconds = {
        "load": loaded - began,
        "prepare": prepared - loaded,
        "evaluate": answered - prepared,
        "total": ended - began,
    }
    summary = {
        **few_shot.summary(figures),
        "calibrated": config.icl.calibrate,
        "demonstration_tokens": len(context),
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        "trained_parameters": 0,
    }
    if ranks.is_first:
        if keep:
            begin_results(config, output_dir, None)
            few_shot.report(output_dir, summary, {"student": answers}, out)
            write_json(output_dir / "summary.json", summary)  # the last file: a folder with it is a whole run
            if (output_dir / "report.html").is_file():
                out.line(f"report     {output_dir / 'report.html'}")
            out.line(f"summary    {output_dir / 'summary.json'}  ({seconds['total']:.0f} s in all)")
        else:
            out.show(sets_table(summary))
    ranks.barrier()
    return summary


def distribute(lm: PackedCausalLM, config: Config, ranks: Ranks) -> tuple[PackedCausalLM, str]:
    """The model with its weights dealt out over the ranks (ZeRO-3), and what was done, in words.

    Other stages partition nothing that inference has, and neither does stage 3 on one process. With offloading each
    process runs the layers from its host's memory, which processes on one node share.
    """
    if lm.host_layers is not None:
        return lm, "layers in host memory"
    if config.deepspeed.zero_stage < 3 or ranks.world_size == 1:
        return lm, "whole model on each process"
    return start_engine(lm, config, ranks).module.eval(), "ZeRO-3"
