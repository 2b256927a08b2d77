"""A whole run: prepare, teach, evaluate the base, train, evaluate the student, report."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastft import peft
from fastft.config import Config
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared, load_base
from fastft.engine.documents import Documents
from fastft.engine.few_shot import FewShot
from fastft.engine.icl import evaluate_in_context
from fastft.engine.launch import start
from fastft.engine.output import begin_results, check_room, open_output_dir, write_json
from fastft.engine.progress import Reporter, peak_memory_bytes
from fastft.engine.stop import StopRequest
from fastft.engine.teach import teach
from fastft.engine.trainer import Trainer
from fastft.engine.training import Training
from fastft.methods.evaluation import QuestionSet, Scores, evaluate, recovery, total, truncated_nll
from fastft.methods.icl import evaluate_choices
from fastft.report import before_after, write_report


@dataclass
class Clock:
    """Seconds of each phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, phase: str):
        begin = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begin


def run(config: Config) -> dict[str, Any]:
    """Run a config from start to end; returns what summary.json holds."""
    if config.method == "icl":
        return evaluate_in_context(config, keep=True)
    stop = StopRequest()
    stop.install()
    began = time.monotonic()
    source = (Documents if config.kind == "documents" else FewShot).load(config)
    ranks = start(config.deepspeed.threads_per_rank)
    out = Reporter(enabled=ranks.is_first)
    clock = Clock()
    output_dir = Path(config.output_dir)
    resumed = open_output_dir(config, output_dir, ranks)

    with clock.measure("load"):
        base = load_base(config, ranks)
    count = sum(p.numel() for p in base.lm.parameters())
    out.line(
        f"model      {config.model.name_or_path}  {count:,} parameters  {config.model.dtype}  {base.lm.device}  "
        f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''} x {torch.get_num_threads()} threads  "
        f"ZeRO-{config.deepspeed.zero_stage}{base.attention}"
    )

    with clock.measure("prepare"):
        prepared = source.prepare(base, ranks, out)
    tokens = sum(len(s.token_ids) for s in prepared.sequences)
    kinds = {k: sum(s.kind == k for s in prepared.sequences) for k in ("passage", "self_study", "question", "input")}
    longest = max(len(w.token_ids) for w in prepared.windows)
    out.line(
        f"prepare    {source.describe(len(prepared.windows))} of up to {longest:,} tokens; "
        + ", ".join(f"{n} {k.replace('_', '-')}" for k, n in kinds.items() if n)
        + f" sequences, {tokens:,} tokens"
    )

    store = None
    if config.distill.teacher == "stored":
        with clock.measure("teach"):
            store = teach(config, base, prepared, ranks, out)

    with clock.measure("evaluate_base"):
        before = evaluate_base(config, base, prepared, ranks, out)

    torch.manual_seed(config.seed)
    trained = peft.inject(base.lm.model, config.peft)
    number, total_number = (sum(p.numel() for p in group) for group in (trained.values(), base.lm.parameters()))
    out.line(
        f"train      {config.peft.kind}: {number:,} of {total_number:,} parameters "
        f"({100 * number / total_number:.3f} %), {config.train.steps} steps of {config.train.batch_size} sequences"
    )
    check_room(output_dir, number, sum(p.nbytes for p in trained.values()), config)
    if ranks.is_first:
        begin_results(config, output_dir, resumed)
    ranks.barrier()
    trainer = Trainer(base.lm, trained, config, ranks)

    def student(sets: list[QuestionSet], answers: bool) -> list[Scores]:
        trainer.lm.eval()
        return run_evaluation(config, base, sets, ranks, out, name="student", in_context=False, answers=answers)

    def student_totals() -> dict[str, float]:
        return total(student(prepared.evaluated, answers=False))

    with clock.measure("train"):
        training = Training(
            config, base, prepared, store, trainer, output_dir, student_totals, stop, ranks=ranks, out=out
        )
        history = training.run(resumed)

    tensors = trainer.trained_tensors()
    if ranks.is_first:  # before the evaluation, which may be stopped
        peft.save_adapter(output_dir / "adapter", tensors, config.peft, base_model=base.path, model=base.lm.model)
    stop.state = f"stopped after training; the adapter is in {output_dir / 'adapter'}, its evaluation is missing"
    stop.deferred = False

    with clock.measure("evaluate_student"):
        after = {}
        for name, sets in (("evaluated", prepared.evaluated), ("control", prepared.control)):
            if sets:
                after[name] = student(sets, answers=name == "evaluated")
    summary = summarize(config, prepared, before, after, history)
    if ranks.is_first:
        clock.seconds["total"] = time.monotonic() - began
        summary["seconds"] = {k: round(v, 3) for k, v in clock.seconds.items()}
        summary["peak_memory_bytes"] = peak_memory_bytes()
        summary["trained_parameters"] = number
        write_json(output_dir / "summary.json", summary)
        write_report(output_dir, config, summary)
        out.show(before_after(summary))
        if tensors:
            out.line(f"adapter    {output_dir / 'adapter'}")
        out.line(f"report     {output_dir / 'report.html'}")
        out.line(f"summary    {output_dir / 'summary.json'}  ({clock.seconds['total']:.0f} s in all)")
    ranks.barrier()
    return summary


def run_evaluation(
    config: Config,
    base: Base,
    sets: list[QuestionSet],
    ranks: Ranks,
    out: Reporter,
    *,
    name: str,
    in_context: bool,
    answers: bool = False,
) -> list[Scores]:
    count = sum(len(s.prompts) * (len(s.windows) if in_context else 1) for s in sets)
    with out.phase(name, count, "questions") as phase:
        if config.kind == "classification":
            return evaluate_choices(
                base.lm,
                sets,
                ranks,
                in_context=in_context,
                leading=base.text.leading,
                batch_size=config.evaluate.batch_size,
                score=config.icl.score,
                advance=phase.advance,
            )
        return evaluate(
            base.lm,
            sets,
            base.text,
            ranks,
            in_context=in_context,
            batch_size=config.evaluate.batch_size,
            max_new_tokens=config.evaluate.max_new_tokens if answers and config.evaluate.answers else None,
            advance=phase.advance,
        )


def evaluate_base(
    config: Config, base: Base, prepared: Prepared, ranks: Ranks, out: Reporter
) -> dict[str, dict[str, list[Scores]]]:
    """Scores of the base without and with the context, for the evaluated and the control questions."""
    scores: dict[str, dict[str, list[Scores]]] = {}
    for name, sets in (("evaluated", prepared.evaluated), ("control", prepared.control)):
        if sets:
            # The control is a likelihood; answers are generated for the evaluated questions alone.
            options = {"answers": name == "evaluated"}
            scores[name] = {
                "no_context": run_evaluation(
                    config, base, sets, ranks, out, name="no context", in_context=False, **options
                ),
                "teacher": run_evaluation(
                    config, base, sets, ranks, out, name="in context", in_context=True, **options
                ),
            }
    return scores


def summarize(
    config: Config,
    prepared: Prepared,
    before: dict[str, dict[str, list[Scores]]],
    after: dict[str, list[Scores]],
    history: dict[str, Any],
) -> dict[str, Any]:
    """The final figures, for all documents together and one by one."""
    summary: dict[str, Any] = {
        "method": config.method,
        "setting": config.queries.setting if config.kind == "documents" else "demonstrations",
        "peft": config.peft.kind,
        "model": config.model.name_or_path,
        "nll_no_context": None,
        "nll_teacher": None,
        "nll_student": None,
        "recovery": None,
        "control_recovery": None,
        **history,
    }
    if "evaluated" in before:
        rows = {**before["evaluated"], "student": after["evaluated"]}
        for name, scores in rows.items():
            summary |= {f"{metric}_{name}": value for metric, value in total(scores).items()}
        summary["recovery"] = recovery(summary["nll_no_context"], summary["nll_student"], summary["nll_teacher"])
        if any(len(s.windows) > 1 for s in prepared.evaluated):
            summary["nll_truncated"] = nll = truncated_nll(rows["teacher"])
            summary["recovery_truncated"] = recovery(summary["nll_no_context"], nll, summary["nll_teacher"])
        summary["documents"] = [
            {
                "id": s.document,
                "questions": len(s.prompts),
                **{f"nll_{name}": scores[i].nll_per_token for name, scores in rows.items()},
                "recovery": recovery(*(rows[n][i].nll_per_token for n in ("no_context", "student", "teacher"))),
            }
            for i, s in enumerate(prepared.evaluated)
        ]
    if "control" in before:
        rows = {**before["control"], "student": after["control"]}
        control = {name: total(scores)["nll"] for name, scores in rows.items()}
        summary |= {f"control_nll_{name}": value for name, value in control.items()}
        summary["control_recovery"] = recovery(control["no_context"], control["student"], control["teacher"])
        summary["control_documents"] = [s.document for s in prepared.control]
    return summary
