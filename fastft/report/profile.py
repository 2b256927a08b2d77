"""The part of report.html that says where time and memory go, from a run's report.json."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from fastft.phases import PHASES
from fastft.report.advice import ms, percent
from fastft.report.floors import floor, kernels
from fastft.report.page import bars, page, stacked, table, text

GIB, MIB = 2**30, 2**20
# The parts of the planner's step that a measured phase does.
PLANNED = {
    "forward": ("student_forward", "dequantise", "link"),
    "recompute": ("recompute",),
    "backward": ("backward",),
    "loss": ("head_and_loss",),
    "optimizer": ("optimizer",),
    "communication": ("communication",),
    "teach": ("teacher",),
}
MOST_BLOCKS, MOST_OPERATORS, MOST_HELD = 14, 15, 8
POINTS_OF_EACH = 6  # calls of an operator in the roofline plot, the longest ones


def sections(report: dict[str, Any]) -> list[str]:
    """HTML of all that the run's report.json holds about time and memory; nothing where it was not profiled."""
    parts = []
    if report["profile"]:
        first = report["profile"][0]
        parts += [*_head(report, first), *_advice(report["advice"]), *_phases(report, first)]
        parts += [*_ranks(report["profile"]), *_operators(first), *_kernels(first, report["plan"])]
    if report["memory"]:
        parts += _memory(report)
    return parts


def rank_sections(report: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    """HTML of one rank's figures."""
    held = ["<h2>Memory in a step</h2>", *_held(figures["memory"])] if figures["memory"] else []
    return [
        *_head(report, figures),
        *_phases(report, figures),
        *_operators(figures),
        *_kernels(figures, report["plan"]),
        *held,
    ]


def _head(report: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    plan, count = report["plan"] or {}, len(figures["steps"])
    facts = [f"{ms(figures['step_s'])} a step, mean of {count} steady step{'s' if count > 1 else ''}"]
    device = plan.get("device")
    if device and plan.get("step_flops"):
        rate = plan["step_flops"] / figures["step_s"]
        facts.append(
            f"{rate / 1e12:,.3g} TFLOP/s of the model's own operations: {percent(rate / device['flops'])} of "
            f"{device['title']} ({device['flops'] / 1e12:,.3g}; model-FLOP utilisation)"
        )
    communication = figures["communication"]
    if report["processes"] > 1 and communication["seconds"]:
        hidden = 1 - communication["exposed_s"] / communication["seconds"]
        facts.append(f"{ms(communication['seconds'])} of collectives, {percent(hidden)} behind computation")
    link = figures["host_link"]
    if link["bytes"]:
        facts.append(f"{link['bytes'] / GIB:.2f} GiB between host and device, {ms(link['seconds'])}")
    return ["<h2 id=time>Where the time goes</h2>", f"<p>{text('; '.join(facts))}.</p>"]


def _advice(advice: list[dict[str, Any]]) -> list[str]:
    if not advice:
        return ["<p>Nothing stands out: no rule predicts a gain of 2 % of a step.</p>"]
    items = "".join(
        f"<li><b>{text(a['what'])}</b><br>{text(a['why'])}. "
        f"<span class=gain>Up to {ms(a['seconds'])}, {percent(a['share'])} of a step.</span></li>"
        for a in advice
    )
    return [f"<h3>What to change first</h3><ol class=advice>{items}</ol>"]


def _phases(report: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    step, planned = figures["step_s"], (report["plan"] or {}).get("step_parts") or {}
    floors = {name: sum(planned.get(part, 0.0) for part in parts) for name, parts in PLANNED.items()}
    rows = [
        (PHASES[name], seconds, [ms(floors[name]) if floors.get(name) else ""] if planned else [])
        for name, seconds in figures["phases"].items()
    ]
    parts = [
        "<h3>Time by phase</h3>",
        stacked([(PHASES[name], seconds) for name, seconds in figures["phases"].items()], ms),
        bars(["phase", *(["roofline"] if planned else [])], rows, step, ms),
    ]
    if planned:
        parts.append(
            "<p class=note>Roofline: the planner's counted operations and bytes at this device's rates; nothing can "
            "be quicker.</p>"
        )
    if figures["blocks"]:
        blocks = [(f"{PHASES[b['phase']]}: {b['block']}", b["seconds"], []) for b in figures["blocks"][:MOST_BLOCKS]]
        parts += ["<h3>Time by module</h3>", bars(["phase and kind of module"], blocks, step, ms)]
    return parts


def _ranks(ranks: list[dict[str, Any]]) -> list[str]:
    if len(ranks) < 2:
        return []
    rows = []
    for figures in ranks:
        waits = figures["communication"]["exposed_s"]
        memory = figures["memory"].get("peak_bytes", 0)
        values = (ms(figures["step_s"]), ms(figures["step_s"] - waits), ms(waits), f"{memory / MIB:,.0f} MiB")
        rows.append([str(figures["rank"]), *values])
    work = {f["rank"]: f["step_s"] - f["communication"]["exposed_s"] for f in ranks}
    slowest, fastest = max(work, key=work.get), min(work, key=work.get)
    return [
        "<h3>Ranks</h3>",
        table(["rank", "step", "own work", "communication", "held in a step"], rows),
        f"<p>Rank {slowest} works longest, {ms(work[slowest] - work[fastest])} longer than rank {fastest}. Each rank's "
        "own report: <code>profile/rank_N.html</code>.</p>",
    ]


def _operators(figures: dict[str, Any]) -> list[str]:
    step = figures["step_s"]
    kinds = [(kind, seconds, []) for kind, seconds in figures["kinds"].items()]
    rows = [(o["name"], o["seconds"], [f"{o['calls']:,.0f}", o["kind"]]) for o in figures["operators"][:MOST_OPERATORS]]
    return [
        "<h3>Time by kind of operator</h3>",
        bars(["kind"], kinds, step, ms),
        "<details><summary>Operators with the longest time of their own</summary>",
        bars(["operator", "calls a step", "kind"], rows, step, ms),
        "</details>",
    ]


def _kernels(figures: dict[str, Any], plan: dict[str, Any] | None) -> list[str]:
    device = (plan or {}).get("device")
    if not device or not figures["calls"]:
        return []
    rows = []
    for k in kernels(figures["calls"], device):
        share = percent(k["floor_s"] / k["seconds"])
        rows.append([_breakable(k["name"]), f"{k['calls']:,.0f}", ms(k["seconds"]), ms(k["floor_s"]), share])
    return [
        "<h3>Kernels against their floors</h3>",
        _roofline(figures["calls"], device),
        table(["operator", "calls a step", "time", "floor", "floor / time"], rows),
        f"<p class=note>Floor: counted operations at {device['flops'] / 1e12:,.3g} TFLOP/s, or bytes at "
        f"{device['bandwidth'] / 1e9:,.4g} GB/s, whichever takes longer; for attention, the least that sequences of "
        "these many tokens in all can need. A call's time holds the operators that it calls.</p>",
    ]


def _breakable(name: str) -> str:
    """An operator's name that a narrow screen breaks between its parts."""
    return re.sub(r"(::|_)(?=\w)", "\\1\u200b", name)


def _roofline(calls: list[dict[str, Any]], device: dict[str, Any]) -> str:
    from fastft.report.plots import roofline  # matplotlib: not before it is needed

    points, shown = [], Counter()
    for call in calls:
        counted = floor(call, device)
        if counted["flops"] and shown[call["name"]] < POINTS_OF_EACH:
            shown[call["name"]] += 1
            points.append((call["name"], counted["flops"] / counted["bytes"], counted["flops"] / call["seconds"]))
    return roofline(points, device) if points else ""


def _memory(report: dict[str, Any]) -> list[str]:
    from fastft.report.plots import memory_over_time

    samples, what = report["memory"], "allocated on the GPU" if report["device"] != "cpu" else "resident"
    moment, highest = max(samples, key=lambda sample: sample[1])
    phase = next((name for name, begin, _ in reversed(report["spans"]) if begin <= moment), "its start")
    parts = [
        "<h2 id=memory>Memory</h2>",
        f"<p>At most {highest / GIB:.2f} GiB {what}, {moment:.1f} s into the run, in <b>{text(phase)}</b>"
        f"{_planned_peak(report['plan'])}.{_tracing(report['tracing'])}</p>",
        memory_over_time(samples, report["spans"], what),
    ]
    first = report["profile"][0] if report["profile"] else {}
    if first.get("memory"):
        parts += ["<h3>In a step</h3>", *_held(first["memory"])]
    if report["plan"] and report["plan"].get("parts"):
        planned = report["plan"]["parts"]
        rows = [(part, nbytes, []) for part, nbytes in sorted(planned.items(), key=lambda item: -item[1]) if nbytes]
        parts += [
            f"<h3>Planned, phase {text(report['plan']['phase'])}</h3>",
            bars(["part"], rows, sum(planned.values()), mib),
        ]
    return parts


def _planned_peak(plan: dict[str, Any] | None) -> str:
    return f"; {plan['planned_peak_bytes'] / GIB:.2f} GiB planned" if plan and "planned_peak_bytes" in plan else ""


def _tracing(tracing: dict[str, Any] | None) -> str:
    if tracing is None:
        return ""
    took = f" Writing the trace took the process to {tracing['peak_bytes'] / GIB:.2f} GiB of host memory, "
    if tracing["is_excluded"]:
        return took + "which is neither in this peak nor in the plot."
    return took + "which the measured peak holds: this system's record of it cannot be reset. The plot is without."


def _held(memory: dict[str, Any]) -> list[str]:
    from fastft.report.plots import memory_in_steps

    rows = [
        (f"{PHASES[h['phase']]}{': ' + h['block'] if h['block'] else ''}", h["bytes"], [])
        for h in memory["held"][:MOST_HELD]
    ]
    return [
        f"<p>The recorded steps hold up to {mib(memory['peak_bytes'])} more than there is before them. At that moment "
        "it belongs to what allocated it:</p>",
        memory_in_steps(memory["timeline"]),
        bars(["allocated in"], rows, memory["peak_bytes"], mib),
    ]


def mib(nbytes: float) -> str:
    return f"{nbytes / MIB:,.1f} MiB" if nbytes < 10 * MIB else f"{nbytes / MIB:,.0f} MiB"


def write_rank_pages(folder: Path, title: str, report: dict[str, Any]) -> None:
    """<folder>/profile/rank_N.html of every rank whose figures there are."""
    for figures in report["profile"]:
        parts = [f"<h1>{text(title)}: rank {figures['rank']}</h1>", *rank_sections(report, figures)]
        path = folder / "profile" / f"rank_{figures['rank']}.html"
        path.write_text(page(f"{title}, rank {figures['rank']}", parts), encoding="utf-8")
