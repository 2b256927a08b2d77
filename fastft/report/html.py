"""report.html: one self-contained file with the result, the plots of training and the configuration."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from fastft.config import Config
from fastft.report.plot import Level, as_file, line_plot
from fastft.report.table import before_after_rows, group_rows, number, sets_rows, sets_title

STYLE = """
:root{color-scheme:light dark;--line:#8884}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
td,th{padding:.3rem .9rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
svg{width:100%;height:auto}
figure{margin:2rem 0;overflow-x:auto}
figcaption{font-size:.9em}
pre{background:#8881;padding:1rem;overflow-x:auto;border-radius:6px}
"""


METHODS = {
    "icl": "in-context learning",
    "pbft": "pattern-based fine-tuning",
    "ft": "fine-tuning with a classification head",
    "distill": "context distillation",
}
OF_LABELS = (
    "F1: mean over the labels. NLL: of the right label among the labels, in nats. ECE: expected calibration error. No "
    "label: where the model's most likely token begins no label. Majority: the accuracy of always answering the set's "
    "most frequent label."
)
OF_SUMMARIES = (
    "ROUGE: F-measures of the words (1), pairs of words (2) and the longest common subsequence (L) that a greedy "
    "summary shares with the reference. NLL: of the references, in nats per token. Tokens: of a greedy summary."
)


def write_report(folder: Path, config: Config, summary: dict[str, Any]) -> Path:
    """Write <folder>/report.html and its first plot as nll.svg, from the summary and <folder>/metrics.jsonl."""
    metrics = _read_metrics(folder)
    parts = [
        f"<h1>{text(config.model.name_or_path)}: context distillation</h1>",
        f"<p>{text(config.peft.kind)}, setting {text(summary['setting'])}, "
        f"{summary['trained_parameters']:,} trained parameters, {summary['seconds']['total']:.0f} s.</p>",
        *_distillation(folder, summary, metrics),
        *_training_loss(metrics, "KL, nats per position"),
    ]
    if len(summary.get("documents", [])) > 1:
        parts += [
            "<h2>Documents</h2>",
            _table(
                ["document", "questions", "no context", "trained", "in context", "recovery"],
                [
                    [
                        d["id"],
                        str(d["questions"]),
                        *(f"{d[f'nll_{name}']:.3f}" for name in ("no_context", "student", "teacher")),
                        number(d["recovery"]),
                    ]
                    for d in summary["documents"]
                ],
            ),
        ]
    return _write_page(folder, config, [*parts, *_time_and_configuration(config, summary)])


def write_sets_report(folder: Path, config: Config, summary: dict[str, Any]) -> Path:
    """Write <folder>/report.html of labels or summaries: figures of sets and groups, training, time, configuration."""
    metrics = _read_metrics(folder)
    trained = f"; {summary['trained_parameters']:,} trained parameters" if metrics else ""
    tokens = summary["inference_tokens_per_query"]
    parts = [
        f"<h1>{text(config.model.name_or_path)}: {METHODS[summary['method']]}</h1>",
        f"<p>{text(sets_title(summary))}; split {text(summary['split'])}; {tokens:,.0f} tokens per query{trained}.</p>",
        _table(*sets_rows(summary)),
        f"<p>95 %: bootstrap interval of the {'ROUGE-L' if 'rougeL' in summary else 'accuracy'} over the examples. "
        f"{OF_SUMMARIES if 'rougeL' in summary else OF_LABELS}</p>",
    ]
    for name, figures in summary["sets"].items():
        if "groups" in figures:
            parts += [f"<h2>{text(name)}</h2>", _table(*group_rows(figures, summary["labels"]))]
    if "recovery" in summary:
        parts += ["<h2>What the demonstrations teach</h2>", *_distillation(folder, summary, metrics)]
    if metrics:
        parts += _training_loss(metrics, "nats per target")
    return _write_page(folder, config, [*parts, *_time_and_configuration(config, summary)])


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _distillation(folder: Path, summary: dict[str, Any], metrics: list[dict[str, Any]]) -> list[str]:
    """What of the context's effect is in the parameters: a table, and the plot that is also written as nll.svg."""
    heads, rows = before_after_rows(summary)
    parts = [
        _table(heads, rows) if rows else "<p>No questions: nothing was evaluated.</p>",
        "<p>NLL: negative log-likelihood of the gold answers in nats per token, or of the right label among the "
        "labels. Recovery: the share of the context's effect that the trained parameters hold; 0 learned nothing, 1 "
        "equals the prompt. Control: the same for questions about other documents; near 0 means that this document was "
        "learned, and not how answers look.</p>",
    ]
    if rows:
        plot = nll_plot(summary, metrics)
        (folder / "nll.svg").write_text(as_file(plot), encoding="utf-8")
        parts += ["<h2>Unseen questions</h2>", plot]
        if not any("evaluated_nll" in m for m in metrics):
            parts.append(
                "<p>Measured before and after training only; <code>train.eval_every=5</code> measures every fifth step "
                "too.</p>"
            )
    return parts


def _training_loss(metrics: list[dict[str, Any]], y_label: str) -> list[str]:
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    if len(losses) < 2:
        return ["<h2>Training loss</h2>", "<p>One step makes no plot.</p>"]
    return ["<h2>Training loss</h2>", line_plot(losses, x_label="optimizer steps", y_label=y_label, from_zero=True)]


def _time_and_configuration(config: Config, summary: dict[str, Any]) -> list[str]:
    return [
        "<h2>Time</h2>",
        _table(["phase", "seconds"], [[name, f"{value:.1f}"] for name, value in summary["seconds"].items()]),
        f"<h2>Configuration</h2><pre>{text(config.dump())}</pre>",
    ]


def _write_page(folder: Path, config: Config, parts: list[str]) -> Path:
    path = folder / "report.html"
    path.write_text(page(config.output_dir, parts), encoding="utf-8")
    return path


def page(title: str, parts: list[str]) -> str:
    """A document that needs nothing from outside."""
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastft: {text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>{body}</body></html>\n'
    )


def text(value: str) -> str:
    return html.escape(str(value))


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{text(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def nll_plot(summary: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """NLL of the unseen questions against steps, between what the base says without and with the context."""
    between = [(m["step"], m["evaluated_nll"]) for m in metrics if "evaluated_nll" in m]
    points = [(0, summary["nll_no_context"]), *between, (summary["steps"], summary["nll_student"])]
    return line_plot(
        points,
        x_label="optimizer steps",
        y_label="NLL, nats per answer token",
        name="trained",
        levels=(
            Level(summary["nll_no_context"], "no context", "#8a8f98"),
            Level(summary["nll_teacher"], "in context", "#1f9d67"),
        ),
        markers=True,
        dashed=not between,
    )
