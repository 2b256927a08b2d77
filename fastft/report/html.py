"""report.html: one self-contained file with the result, the plots of training and the configuration."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from fastft.config import Config
from fastft.files import write_bytes
from fastft.report import profile
from fastft.report.advice import ms
from fastft.report.curves import GIB, Run, curves, read_metrics
from fastft.report.page import Bar, Tile, bars, beside, contents, page, table, text, tiles
from fastft.report.table import before_after_rows, group_rows, number, sets_rows, sets_title

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
    head = [
        f"<h1>{text(config.model.name_or_path)}: context distillation</h1>",
        f"<p>{text(config.peft.kind)}, setting {text(summary['setting'])}, "
        f"{summary['trained_parameters']:,} trained parameters.</p>",
    ]
    parts = ["<h2 id=results>Results</h2>", *_distillation(folder, summary, read_metrics(folder))]
    if len(summary.get("documents", [])) > 1:
        parts += [
            "<h3>Documents</h3>",
            table(
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
    return _write_page(folder, config, head, parts, summary)


def write_sets_report(folder: Path, config: Config, summary: dict[str, Any]) -> Path:
    """Write <folder>/report.html of labels or summaries: figures of sets and groups, training, time, configuration."""
    metrics = read_metrics(folder)
    trained = f"; {summary['trained_parameters']:,} trained parameters" if metrics else ""
    tokens = summary["inference_tokens_per_query"]
    head = [
        f"<h1>{text(config.model.name_or_path)}: {METHODS[summary['method']]}</h1>",
        f"<p>{text(sets_title(summary))}; split {text(summary['split'])}; {tokens:,.0f} tokens per query{trained}.</p>",
    ]
    parts = [
        "<h2 id=results>Results</h2>",
        table(*sets_rows(summary)),
        f"<p>95 %: bootstrap interval of the {'ROUGE-L' if 'rougeL' in summary else 'accuracy'} over the examples. "
        f"{OF_SUMMARIES if 'rougeL' in summary else OF_LABELS}</p>",
    ]
    for name, figures in summary["sets"].items():
        if "groups" in figures:
            parts += [f"<h3>{text(name)}</h3>", table(*group_rows(figures, summary["labels"]))]
    if "recovery" in summary:
        parts += ["<h3>What the demonstrations teach</h3>", *_distillation(folder, summary, metrics)]
    return _write_page(folder, config, head, parts, summary)


def _distillation(folder: Path, summary: dict[str, Any], metrics: list[dict[str, Any]]) -> list[str]:
    """What of the context's effect is in the parameters: a table, and the plot that is also written as nll.svg."""
    heads, rows = before_after_rows(summary)
    if not rows:
        return ["<p>No questions: nothing was evaluated.</p>"]
    figures = [
        table(heads, rows),
        "<p class=note>NLL: negative log-likelihood of the gold answers in nats per token, or of the right label among "
        "the labels. Recovery: the share of the context's effect that the trained parameters hold; 0 learned nothing, "
        "1 equals the prompt. Control: the same for questions about other documents; near 0 means that this document "
        "was learned, and not how answers look.</p>",
    ]
    pictured = [_nll(folder, summary, metrics)]
    if not any("evaluated_nll" in m for m in metrics):
        pictured.append(
            "<p class=note>Measured before and after training only; <code>train.eval_every=5</code> measures every "
            "fifth step too.</p>"
        )
    return [beside(figures, pictured)]


def _nll(folder: Path, summary: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """NLL of the unseen questions against steps, between what the base says without and with the context."""
    from fastft.report import plots  # matplotlib: not before it is needed

    between = [(m["step"], m["evaluated_nll"]) for m in metrics if "evaluated_nll" in m]
    figure = plots.nll(
        [(0, summary["nll_no_context"]), *between, (summary["steps"], summary["nll_student"])],
        [
            plots.Level(summary["nll_no_context"], "no context", plots.GREY),
            plots.Level(summary["nll_teacher"], "in context", plots.GREEN),
        ],
        is_measured_between=bool(between),
    )
    write_bytes(folder / "nll.svg", plots.as_file(figure))
    return plots.shown(figure, "NLL of the unseen questions' gold answers over the optimizer steps.")


def _write_page(
    folder: Path, config: Config, head: list[str], results: list[str], summary: dict[str, Any] | None = None
) -> Path:
    """What the run came to at a glance, its results, then what every run has: where time and memory go, its curves."""
    report_file, metrics = folder / "report.json", read_metrics(folder)
    report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.is_file() else None
    parts = [*results]
    if report:
        parts += profile.sections(report)
        profile.write_rank_pages(folder, config.output_dir, report)
    parts += curves({config.output_dir: Run(metrics, summary)})
    parts += ["<h2 id=run>The run</h2>", *(_phases(report) if report else []), *_configuration(config)]
    glance = [_facts(report)] if report else []
    glance += [tiles(_tiles(report, metrics, summary or {})), contents(parts)]
    path = folder / "report.html"
    path.write_text(page(config.output_dir, [*head, *glance, *parts]), encoding="utf-8")
    return path


def _facts(report: dict[str, Any]) -> str:
    """What it ran on."""
    processes = f"{report['processes']} process{'es' if report['processes'] > 1 else ''}"
    facts = f"{report['host']}; {processes} on {report['device']}; fastft {report['fastft']}, torch {report['torch']}"
    return f"<p class=note>{text(facts)}</p>"


def _tiles(report: dict[str, Any] | None, metrics: list[dict[str, Any]], summary: dict[str, Any]) -> list[Tile]:
    """The figures that people look for first."""
    found = []
    if summary.get("recovery") is not None:
        control = summary.get("control_recovery")
        found.append(Tile("recovery", number(summary["recovery"]), "" if control is None else f"control {control:.2f}"))
    elif "sets" in summary:
        heads, rows = sets_rows(summary)
        found.append(Tile(f"{heads[2]}, {rows[0][0]}", rows[0][2], f"{heads[3]}: {rows[0][3]}"))
    times, rates = ([m[key] for m in metrics if m.get(key)] for key in ("time_s", "tokens_per_s"))
    if report and report["profile"]:
        found += profile.step_tiles(report, report["profile"][0])
    elif times:
        found.append(Tile("a step", ms(statistics.median(times)), f"median of {len(times)}"))
    if rates:
        found.append(Tile("target tokens/s", f"{statistics.median(rates):,.0f}", f"median of {len(rates)} steps"))
    if report:
        planned, record = (
            (report["plan"] or {}).get("planned_peak_bytes"),
            (report["tracing"] or {}).get("record_bytes"),
        )
        notes = [f"{planned / GIB:.2f} GiB planned"] if planned else []
        notes += [f"{record / GIB:.2f} the profiler's"] if record else []
        found.append(Tile("peak memory", f"{report['peak_memory_bytes'] / GIB:.2f} GiB", ", ".join(notes)))
    if "seconds" in summary:
        found.append(Tile("the whole run", f"{summary['seconds']['total']:,.0f} s"))
    return found


def _phases(report: dict[str, Any]) -> list[str]:
    """The run's own phases."""
    seconds = Counter()
    for name, begin, end in report["spans"]:
        seconds[name] += end - begin
    whole = max((end for *_, end in report["spans"]), default=0.0)
    rows = [Bar(profile.spoken(name), own) for name, own in seconds.items()]
    return [beside([bars(["phase"], rows, whole, lambda s: f"{s:.1f} s")])]


def _configuration(config: Config) -> list[str]:
    return [f"<details><summary>Configuration</summary><pre>{text(config.dump())}</pre></details>"]


def last_step(folder: Path) -> int:
    """The last optimizer step in metrics.jsonl; 0 before the first."""
    return max((m["step"] for m in read_metrics(folder)), default=0)


def write_unfinished_report(folder: Path, config: Config) -> Path:
    """Write <folder>/report.html of a run that failed or was stopped, from its report.json and metrics.jsonl."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    title = f"<h1>{text(config.model.name_or_path)}: {METHODS[config.method]}</h1>"
    state = (
        f"<p class=state><b>{text(report['state'].capitalize())} after step {report['step']} of {report['steps']}.</b> "
        f"{text(report['error'])}</p>"
    )
    return _write_page(folder, config, [title, state], [])
