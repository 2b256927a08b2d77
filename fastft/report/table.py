"""Result tables: before and after a distillation, and the sets of a classification."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table

from fastft.phases import PHASES
from fastft.report.advice import ms

ROWS = (("no context", "no_context"), ("trained, no context", "student"), ("in context", "teacher"))


def before_after_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows as text; empty rows where no question was evaluated."""
    labels = "accuracy_student" in summary  # a classification: its NLL is that of the right label
    metrics = {"accuracy": "accuracy"} if labels else {"F1": "f1", "exact match": "exact_match"}
    if "rougeL_student" in summary:
        metrics = {"ROUGE-L": "rougeL"}
    metrics = {head: metric for head, metric in metrics.items() if summary.get(f"{metric}_student") is not None}
    heads = ["model", "NLL of the label" if labels else "NLL per token", "recovery", *metrics]
    if summary["nll_no_context"] is None:
        return heads, []
    share = summary["recovery"]  # None where the context does not help, and there is nothing to have a share of
    shown = {} if share is None else {"no_context": 0.0, "student": share, "teacher": 1.0}
    rows = []
    for label, name in ROWS:
        values = [percent(summary.get(f"{metric}_{name}")) for metric in metrics.values()]
        rows.append([label, f"{summary[f'nll_{name}']:.3f}", number(shown.get(name)), *values])
    if "nll_truncated" in summary:
        shown = number(summary["recovery_truncated"])
        rows.append(["in context, cut to one window", f"{summary['nll_truncated']:.3f}", shown, *[""] * len(metrics)])
    control = summary["control_recovery"]
    if control is not None:
        nll = f"{summary['control_nll_student']:.3f}"
        rows.append(["control: other documents", nll, number(control), *[""] * len(metrics)])
    return heads, rows


def before_after(summary: dict[str, Any]) -> Table | str:
    heads, rows = before_after_rows(summary)
    if not rows:
        return "no questions: nothing was evaluated"
    table = Table(title=f"{summary['model']}, {summary['peft']}, {summary['setting']}", title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(*row, style="bold" if i == 1 else None, end_section=_starts_control(rows, i + 1))
    return table


def _starts_control(rows: list[list[str]], i: int) -> bool:
    return i < len(rows) and rows[i][0].startswith("control")


SET_FIGURES = {
    "accuracy": "accuracy",
    "MCC": "mcc",
    "F1": "macro_f1",
    "NLL": "nll",
    "ECE": "ece",
    "no label": "non_label_fraction",
    "majority": "majority",
}
SUMMARY_FIGURES = {
    "ROUGE-L": "rougeL",
    "ROUGE-1": "rouge1",
    "ROUGE-2": "rouge2",
    "NLL": "nll",
    "tokens": "summary_tokens",
}
PERCENTAGES = ("accuracy", "non_label_fraction", "majority", "rougeL", "rouge1", "rouge2")
WIDE = ("F1", "ECE")  # what a terminal of 80 columns has no room for


def sets_rows(summary: dict[str, Any], hidden: Iterable[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Column heads and a row for each evaluated set, as text: its figures, and the 95 % interval of the first."""
    known = SUMMARY_FIGURES if "rougeL" in summary else SET_FIGURES
    shown = {head: key for head, key in known.items() if head not in hidden}
    heads = ["set", "n", *shown, "95 %"]
    keys = list(shown.values())
    rows = []
    for name, figures in summary["sets"].items():
        values = [percent(figures[key]) if key in PERCENTAGES else number(figures[key]) for key in keys]
        low, high = figures["intervals"][keys[0]]
        rows.append([name, f"{figures['examples']:,}", *values, f"{100 * low:.0f}-{100 * high:.0f}"])
    for row in (heads, *rows):
        row.insert(3, row.pop())  # the interval belongs behind its figure
    return heads, rows


def group_rows(figures: dict[str, Any], labels: list[str]) -> tuple[list[str], list[list[str]]]:
    """Column heads and a row for each group of a set's examples: accuracy overall and by label."""
    labels = labels or [str(i) for i in range(len(figures["class_accuracy"]))]
    heads = ["group", "examples", "accuracy", *(f"label {label}" for label in labels)]
    rows = [
        [f"{kind} {group}", f"{own['examples']:,}", percent(own["accuracy"]), *map(percent, own["class_accuracy"])]
        for kind, groups in figures["groups"].items()
        for group, own in groups.items()
    ]
    return heads, rows


def sets_title(summary: dict[str, Any]) -> str:
    method = summary["method"] + (f" {summary['peft']}" if summary["peft"] else "")
    method += " calibrated" if summary.get("calibrated") else ""
    shots = f"{summary['num_shots']} {'demonstrations' if summary['method'] == 'icl' else 'shots'} of {summary['task']}"
    balanced = ", balanced" if summary["balanced"] and summary["num_shots"] else ""
    seeds = f"seed {summary['seed']}" + (
        f", data seed {summary['data_seed']}" if summary["data_seed"] != summary["seed"] else ""
    )
    pattern = " ".join(summary["pattern"].split())
    return f"{summary['model']}, {method}, {shots}{balanced}, pattern {pattern}, {seeds}"


def sets_table(summary: dict[str, Any]) -> Table:
    heads, rows = sets_rows(summary, hidden=WIDE)
    table = Table(title=sets_title(summary), title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def profile_tables(report: dict[str, Any]) -> Iterator[Table | str]:
    """Where a step's time goes and what to change first, of a run's report.json."""
    if not report["profile"]:
        yield "no step was recorded: the run ended before"
        return
    first = report["profile"][0]
    table = Table(title=f"{ms(first['step_s'])} a step, mean of {len(first['steps'])}", title_justify="left")
    table.add_column("phase", no_wrap=True)
    for head in ("time", "share"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, seconds in first["phases"].items():
        table.add_row(PHASES[name], ms(seconds), percent(seconds / first["step_s"]))
    yield table
    for place, advice in enumerate(report["advice"], 1):
        yield f"{place}. {advice['what']}\n   {advice['why']}; up to {percent(advice['share'])} of a step"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
