"""Training curves of one run, or of several on the same axes: what their metrics.jsonl say, step by step."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.report.page import table
from fastft.report.table import number

GIB = 2**30

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A plot: what of a line of metrics.jsonl it shows, in which unit; is_amount: against 0."""

    key: str
    label: str
    unit: float = 1
    is_amount: bool = False


PANELS = (
    Panel("loss", "loss, nats"),
    Panel("recovery", "recovery"),
    Panel("evaluated_nll", "evaluated NLL, nats"),
    Panel("lr", "learning rate"),
    Panel("tokens_per_s", "target tokens/s", is_amount=True),
    Panel("peak_memory_bytes", "peak memory, GiB", GIB, is_amount=True),
    Panel("grad_norm", "gradient norm"),
)


@dataclass(frozen=True)
class Run:
    """Lines of metrics.jsonl and the final figures, None of a run that has not finished; state: how it ended."""

    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None = None
    state: str = "not finished"

    @classmethod
    def read(cls, folder: Path) -> Run:
        summary, report = (
            json.loads(path.read_text(encoding="utf-8")) if (path := folder / name).is_file() else None
            for name in ("summary.json", "report.json")
        )
        state = "complete" if summary else (report or {}).get("state", cls.state)
        return cls(read_metrics(folder), summary, state)

    def points(self, panel: Panel) -> Points:
        if panel.key == "recovery":
            return self._recovery()
        found = [(m["step"], m[panel.key] / panel.unit) for m in self.metrics if m.get(panel.key) is not None]
        return [(x, y) for x, y in found if y == y]

    def _recovery(self) -> Points:
        """At each evaluation; a run that was evaluated at its end alone has no curve."""
        from fastft.methods.evaluation import recovery  # which imports the models

        s = self.summary or {}
        if s.get("recovery") is None:
            return []
        between = [(m["step"], m["evaluated_nll"]) for m in self.metrics if m.get("evaluated_nll") is not None]
        points = [(x, recovery(s["nll_no_context"], nll, s["nll_teacher"])) for x, nll in between]
        return [(0, 0.0), *points, (s["steps"], s["recovery"])] if points else []


def runs_table(runs: dict[str, Run]) -> list[str]:
    """HTML of a table of the runs' final figures; nothing of none."""
    if not runs:
        return []
    rows = []
    for name, run in runs.items():
        summary, last = run.summary or {}, max((m["step"] for m in run.metrics), default=0)
        rates = [m["tokens_per_s"] for m in run.metrics if "tokens_per_s" in m]
        losses = [m["loss"] for m in run.metrics if "loss" in m]
        peak = max((m.get("peak_memory_bytes", 0) for m in run.metrics), default=0)
        rows.append(
            [
                name,
                run.state,
                str(last),
                f"{losses[-1]:.4f}" if losses else "",
                number(summary.get("recovery")) if summary.get("recovery") is not None else "",
                f"{statistics.median(rates):,.0f}" if rates else "",
                f"{peak / GIB:.2f}",
            ]
        )
    heads = ["run", "state", "steps", "last loss", "recovery", "tokens/s", "peak, GiB"]
    return [table(heads, rows, extra=("steps", "last loss", "tokens/s"))]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def curves(runs: dict[str, Run]) -> list[str]:
    """HTML of a plot for each figure that a run has, a line for each run; nothing where no step was taken."""
    from fastft.report.plots import curve, legend  # matplotlib: not before it is needed

    plots = []
    shown = {panel: {name: points for name, run in runs.items() if (points := run.points(panel))} for panel in PANELS}
    for panel, found in shown.items():
        if not found or (panel.key == "evaluated_nll" and any(p.key == "recovery" and f for p, f in shown.items())):
            continue
        plots.append(curve(found, list(runs), panel.label, is_amount=panel.is_amount))
    if not plots:
        return []
    names = [legend(list(runs))] if len(runs) > 1 else []
    return ["<h2 id=training>Training</h2>", *names, f"<div class=plots>{''.join(plots)}</div>"]
