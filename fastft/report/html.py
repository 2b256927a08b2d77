"""report.html: one self-contained file with the result, the training curve and the configuration."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from fastft.config import Config
from fastft.report.table import before_after_rows, number, sets_rows, sets_title

STYLE = """
:root{color-scheme:light dark;--line:#8884;--accent:#2a6fdb}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
td,th{padding:.3rem .9rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}
svg{width:100%;height:auto}svg text{font-size:12px;fill:currentColor}
pre{background:#8881;padding:1rem;overflow-x:auto;border-radius:6px}
"""


def write_report(folder: Path, config: Config, summary: dict[str, Any]) -> Path:
    """Write <folder>/report.html from the summary and <folder>/metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [m for m in map(json.loads, lines) if "loss" in m]
    heads, rows = before_after_rows(summary)
    parts = [
        f"<h1>{_text(config.model.name_or_path)}: context distillation</h1>",
        f"<p>{_text(config.peft.kind)}, setting {_text(summary['setting'])}, "
        f"{summary['trained_parameters']:,} trained parameters, {summary['seconds']['total']:.0f} s.</p>",
        _table(heads, rows) if rows else "<p>No questions: nothing was evaluated.</p>",
        "<p>NLL: negative log-likelihood of the gold answers in nats per token, or of the right label among the "
        "labels. Recovery: the share of the context's effect that the trained parameters hold; 0 learned nothing, 1 "
        "equals the prompt. Control: the same for questions about other documents; near 0 means that this document was "
        "learned, and not how answers look.</p>",
        "<h2>Training loss</h2>",
        curve([(m["step"], m["loss"]) for m in steps], "step", "KL, nats per position"),
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
    seconds = summary["seconds"]
    parts += [
        "<h2>Time</h2>",
        _table(["phase", "seconds"], [[name, f"{value:.1f}"] for name, value in seconds.items()]),
        f"<h2>Configuration</h2><pre>{_text(config.dump())}</pre>",
    ]
    return _write_page(folder, config, parts)


def write_sets_report(folder: Path, config: Config, summary: dict[str, Any]) -> Path:
    """Write <folder>/report.html of a classification: accuracy on each set, time, configuration."""
    parts = [
        f"<h1>{_text(config.model.name_or_path)}: in-context learning</h1>",
        f"<p>{_text(sets_title(summary))}; split {_text(summary['split'])}; the demonstrations take "
        f"{summary['demonstration_tokens']:,} tokens.</p>",
        _table(*sets_rows(summary)),
        "<p>Majority: the accuracy of always answering the set's most frequent label.</p>",
        "<h2>Time</h2>",
        _table(["phase", "seconds"], [[name, f"{value:.1f}"] for name, value in summary["seconds"].items()]),
        f"<h2>Configuration</h2><pre>{_text(config.dump())}</pre>",
    ]
    return _write_page(folder, config, parts)


def _write_page(folder: Path, config: Config, parts: list[str]) -> Path:
    body = "\n".join(parts)
    path = folder / "report.html"
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastft: {_text(config.output_dir)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>{body}</body></html>\n',
        encoding="utf-8",
    )
    return path


def _text(value: str) -> str:
    return html.escape(str(value))


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_text(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def curve(points: list[tuple[float, float]], x_label: str, y_label: str) -> str:
    """A line plot as inline SVG."""
    if len(points) < 2:
        return "<p>Too few steps for a plot.</p>"
    width, height, left, bottom = 800, 280, 60, 40
    xs, ys = zip(*points, strict=True)
    x0, x1, y1 = min(xs), max(xs), max(ys)

    def at(x: float, y: float) -> str:
        return (
            f"{left + (width - left - 10) * (x - x0) / (x1 - x0):.1f},"
            f"{(height - bottom) - (height - bottom - 10) * y / (y1 or 1):.1f}"
        )

    line = " ".join(at(x, y) for x, y in points)
    ticks = "".join(
        f'<text x="{left - 8}" y="{float(at(x0, y1 * f).split(",")[1]) + 4:.1f}" text-anchor="end">{y1 * f:.2f}</text>'
        for f in (0, 0.5, 1)
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(y_label)} against {_text(x_label)}">'
        f'<polyline points="{at(x0, y1)} {at(x0, 0)} {at(x1, 0)}" fill="none" stroke="currentColor" opacity=".4"/>'
        f'<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="2"/>{ticks}'
        f'<text x="{left}" y="{height - 8}">{_text(x_label)} {x0:g} to {x1:g}; {_text(y_label)}</text></svg>'
    )
