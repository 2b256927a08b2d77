"""Result tables: before and after a distillation, and the sets of a classification."""

from __future__ import annotations

from typing import Any

from rich.table import Table

ROWS = (("no context", "no_context"), ("trained, no context", "student"), ("in context", "teacher"))


def before_after_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads and rows as text; empty rows where no question was evaluated."""
    labels = "accuracy_student" in summary  # a classification: its NLL is that of the right label
    metrics = ["accuracy"] if labels else ["F1", "exact match"]
    heads = ["model", "NLL of the label" if labels else "NLL per token", "recovery", *metrics]
    if summary["nll_no_context"] is None:
        return heads, []
    shown = {"no_context": 0.0, "student": summary["recovery"], "teacher": 1.0}
    rows = []
    for label, name in ROWS:
        values = [percent(summary.get(f"{metric.lower().replace(' ', '_')}_{name}")) for metric in metrics]
        rows.append([label, f"{summary[f'nll_{name}']:.3f}", number(shown[name]), *values])
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


def sets_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column heads and a row for each evaluated set, as text."""
    sets = summary["sets"]
    with_mcc = any("mcc" in s for s in sets.values())
    heads = ["set", "examples", "accuracy", *(["MCC"] if with_mcc else []), "majority", "seconds", "tokens/s"]
    rows = [
        [
            name,
            f"{s['examples']:,}",
            percent(s["accuracy"]),
            *([number(s.get("mcc"))] if with_mcc else []),
            percent(s["majority"]),
            f"{s['seconds']:.1f}",
            f"{s['tokens_per_s']:,.0f}",
        ]
        for name, s in sets.items()
    ]
    return heads, rows


def sets_title(summary: dict[str, Any]) -> str:
    shots = f"{summary['num_shots']} demonstrations of {summary['task']}"
    balanced = ", balanced" if summary["balanced"] and summary["num_shots"] else ""
    return f"{summary['model']}, {shots}{balanced}, pattern {summary['pattern']}, seed {summary['seed']}"


def sets_table(summary: dict[str, Any]) -> Table:
    heads, rows = sets_rows(summary)
    table = Table(title=sets_title(summary), title_justify="left")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
