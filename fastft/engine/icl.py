"""A run of in-context learning: examples, demonstrations, every query behind them, figures of each set."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import deepspeed
import torch

from fastft.config import Config
from fastft.distributed import Ranks
from fastft.engine import deepspeed_config
from fastft.engine.base import load_base
from fastft.engine.few_shot import FewShot
from fastft.engine.launch import start
from fastft.engine.output import begin_results, open_output_dir, write_json, write_text
from fastft.engine.progress import Reporter, peak_memory_bytes
from fastft.engine.stop import StopRequest
from fastft.engine.trainer import gather_by_layer
from fastft.methods import icl
from fastft.methods.evaluation import accuracy, matthews_correlation
from fastft.models import loading
from fastft.models.causal import PackedCausalLM
from fastft.report import sets_table, write_sets_report
from fastft.tasks import Example


def evaluate_in_context(config: Config, *, keep: bool) -> dict[str, Any]:
    """Evaluate the configured task and its sets of another distribution; returns what summary.json holds.

    keep: write config.yaml, summary.json, predictions.jsonl and report.html to output_dir; else nothing is written.
    """
    stop = StopRequest()
    stop.state = "stopped; nothing was written: the same command starts again"
    stop.install()
    began = time.monotonic()
    few_shot = FewShot.load(config)
    task, shown = few_shot.tasks[0], len(few_shot.demonstrations)

    ranks = start(config.deepspeed.threads_per_rank)
    out = Reporter(enabled=ranks.is_first)
    output_dir = Path(config.output_dir)
    if keep:
        open_output_dir(config, output_dir, ranks)
    base = load_base(config, ranks)
    count = sum(p.numel() for p in base.lm.parameters())
    lm, stage = partition(base.lm, config, ranks)
    out.line(
        f"model      {config.model.name_or_path}  {count:,} parameters  {config.model.dtype}  {ranks.device}  "
        f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''} x {torch.get_num_threads()} threads  {stage}"
        f"{base.attention}"
    )
    seconds = {"load": time.monotonic() - began}

    positions = loading.max_positions(base.lm.model)
    prefix = None
    sets, rows = {}, []
    for name, asked in few_shot.asked.items():
        begin = time.monotonic()
        queries = few_shot.encode(asked, base.text, positions)
        tokens = sum(queries.sizes)
        if name == task.name:
            context = few_shot.encode_context(base.text)
            prefix = lm.encode_prefix(context) if context else None
            tokens += len(context)
            if prefix:
                out.line(
                    f"prompt     {shown} demonstrations of {name}, {len(context):,} tokens, encoded once: "
                    f"{prefix.nbytes / 2**20:.1f} MiB of keys and values"
                )
        with out.phase(name, len(asked), "examples") as phase:
            log_probs = icl.classify(
                lm,
                queries,
                ranks,
                prefix=prefix,
                batch_size=config.evaluate.batch_size,
                score=config.icl.score,
                advance=phase.advance,
            )
        seconds[name] = spent = time.monotonic() - begin
        sets[name] = {
            **figures(asked, log_probs, task.metric),
            "tokens": tokens,
            "seconds": round(spent, 3),
            "tokens_per_s": tokens / spent,
        }
        rows += predictions(name, asked, log_probs)
    seconds["total"] = time.monotonic() - began
    summary = {
        "method": "icl",
        "model": config.model.name_or_path,
        "task": task.name,
        "split": config.data.split,
        "pattern": few_shot.pattern_name,
        "num_shots": shown,
        "balanced": config.icl.balanced,
        "seed": config.seed,
        **{key: value for key, value in sets[task.name].items() if key in ("accuracy", "mcc", "majority")},
        "sets": sets,
        "demonstration_tokens": len(context),
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if ranks.is_first:
        out.show(sets_table(summary))
        if keep:
            begin_results(config, output_dir, None)
            write_text(output_dir / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            write_json(output_dir / "summary.json", summary)
            write_sets_report(output_dir, config, summary)
            out.line(f"report     {output_dir / 'report.html'}")
            out.line(f"summary    {output_dir / 'summary.json'}  ({seconds['total']:.0f} s in all)")
    ranks.barrier()
    return summary


def figures(asked: list[Example], log_probs: torch.Tensor, metric: str) -> dict[str, float]:
    """What a set's log-probabilities of the choices [N, C] come to; majority is that of its most frequent label."""
    predicted, gold = log_probs.argmax(-1).tolist(), [e.label for e in asked]
    found = {"examples": len(gold), "accuracy": accuracy(predicted, gold)}
    if metric == "mcc":
        found["mcc"] = matthews_correlation(predicted, gold)
    return {**found, "majority": max(Counter(gold).values()) / len(gold)}


def predictions(name: str, asked: list[Example], log_probs: torch.Tensor) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl: examples in the order in which they were asked."""
    return [
        {
            "set": name,
            "index": i,
            "label": example.label,
            "predicted": int(values.argmax()),
            "log_probs": values[values > -torch.inf].tolist(),
        }
        for i, (example, values) in enumerate(zip(asked, log_probs, strict=True))
    ]


def partition(lm: PackedCausalLM, config: Config, ranks: Ranks) -> tuple[PackedCausalLM, str]:
    """The model with its weights dealt out over the ranks or kept on the host (ZeRO-3), and what was done, in words.

    Other stages partition nothing that inference has, and neither does stage 3 on one process without offloading.
    """
    if config.deepspeed.zero_stage < 3 or (ranks.world_size == 1 and config.deepspeed.offload_param == "none"):
        return lm, "whole model on each process"
    gather_by_layer(lm)
    engine, *_ = deepspeed.initialize(model=lm, config=deepspeed_config.derive(config, ranks.world_size))
    return engine.module.eval(), "ZeRO-3"
