"""The part of report.html that says where time and memory go, from a run's report.json."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from fastft.phases import PHASES
from fastft.report.advice import ms, percent, three_digits
from fastft.report.floors import floor, kernels
from fastft.report.page import COLORS, Bar, Markup, Tile, bars, beside, mark, page, stacked, table, text, tiles

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
PHASE_COLORS = dict(zip(PHASES, COLORS, strict=True))
MOST_BLOCKS, MOST_OPERATORS, MOST_HELD = 14, 15, 8
SMALLEST = 0.001  # share below which a module or an operator has no row
POINTS_OF_EACH = 6  # calls of an operator in the roofline plot, the longest ones


def sections(report: dict[str, Any]) -> list[str]:
    """HTML of all that the run's report.json holds about time and memory; nothing where it was not profiled."""
    parts = []
    if report["profile"]:
        first = report["profile"][0]
        parts += ["<h2 id=time>Where the time goes</h2>", *_advice(report["advice"]), *_time(report, first)]
        parts += [*_ranks(report["profile"]), *_traces(report["profile"])]
    if report["memory"]:
        parts += _memory(report)
    return parts


def rank_sections(report: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    """HTML of one rank's figures."""
    held = ["<h2>Memory in a step</h2>", beside(*_held(figures["memory"]))] if figures["memory"] else []
    return [tiles(step_tiles(report, figures)), "<h2>Where the time goes</h2>", *_time(report, figures), *held]


def step_tiles(report: dict[str, Any], figures: dict[str, Any]) -> list[Tile]:
    """What a recorded step comes to."""
    plan, count = report["plan"] or {}, len(figures["steps"])
    found = [Tile("a step", ms(figures["step_s"]), f"mean of {count}, steady" if count > 1 else "one recorded")]
    device = plan.get("device")
    if device and plan.get("step_flops"):
        rate = plan["step_flops"] / figures["step_s"]
        of = f"{three_digits(rate / 1e12)} of {three_digits(device['flops'] / 1e12)} TFLOP/s"
        found.append(Tile("model-FLOP utilisation", percent(rate / device["flops"]), of))
    communication = figures["communication"]
    if report["processes"] > 1 and communication["seconds"]:
        hidden = percent(1 - communication["exposed_s"] / communication["seconds"])
        found.append(Tile("collectives", ms(communication["seconds"]), f"{hidden} behind computation"))
    link = figures["host_link"]
    if link["bytes"]:
        found.append(Tile("host and device exchange", f"{link['bytes'] / GIB:.2f} GiB", f"in {ms(link['seconds'])}"))
    return found


def _advice(advice: list[dict[str, Any]]) -> list[str]:
    if not advice:
        return ["<p>Nothing stands out: no rule predicts a gain of 2 % of a step.</p>"]
    items = "".join(
        f"<li><span class=gain>{percent(a['share'])}<small>{ms(a['seconds'])}</small></span>"
        f"<div><b>{text(a['what'])}</b>{text(a['why'])}</div></li>"
        for a in advice
    )
    return [
        "<h3>What to change first</h3>",
        f"<ol class=advice>{items}</ol>",
        "<p class=note>Left: the most of a step that each can save.</p>",
    ]


def _time(report: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    """A step by phase and by kind of operator, by module and by operator, and its kernels."""
    return [
        beside(_phases(report, figures), _kinds(figures)),
        beside(_modules(figures), _operators(figures)),
        *_kernels(figures, report["plan"]),
    ]


def _phases(report: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    step, planned = figures["step_s"], (report["plan"] or {}).get("step_parts") or {}
    floors = {name: sum(planned.get(part, 0.0) for part in parts) for name, parts in PLANNED.items()}
    rows = []
    for name, seconds in figures["phases"].items():
        floor_s = floors.get(name, 0.0)
        cells = (ms(floor_s) if floor_s else "",) if planned else ()
        rows.append(Bar(PHASES[name], seconds, cells, floor_s, PHASE_COLORS[name]))
    note = (
        "<p class=note>Roofline, and the line across a bar: the planner's counted operations and bytes at this "
        "device's rates; nothing can be quicker.</p>"
    )
    return [
        "<h3>Time by phase</h3>",
        stacked(rows, ms),
        bars(["phase", *(["roofline"] if planned else [])], rows, step, ms),
        note if planned else "",
    ]


def _kinds(figures: dict[str, Any]) -> list[str]:
    step = figures["step_s"]
    rows = [Bar(kind, seconds) for kind, seconds in figures["kinds"].items() if seconds >= SMALLEST * step]
    return ["<h3>Time by kind of operator</h3>", bars(["kind"], rows, step, ms)]


def _modules(figures: dict[str, Any]) -> list[str]:
    step = figures["step_s"]
    rows = [
        Bar(f"{PHASES[b['phase']]}: {b['block']}", b["seconds"], color=PHASE_COLORS[b["phase"]])
        for b in figures["blocks"][:MOST_BLOCKS]
        if b["seconds"] >= SMALLEST * step
    ]
    return ["<h3>Time by module</h3>", bars(["phase: module"], rows, step, ms)] if rows else []


def _operators(figures: dict[str, Any]) -> list[str]:
    step = figures["step_s"]
    rows = [
        Bar(_breakable(o["name"]), o["seconds"], (f"{o['calls']:,.0f}",))
        for o in figures["operators"][:MOST_OPERATORS]
        if o["seconds"] >= SMALLEST * step
    ]
    return ["<h3>Operators by their own time</h3>", bars(["operator", "calls"], rows, step, ms)]


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
        table(["rank", "step", "own work", "waiting", "held in a step"], rows),
        "<p class=note>Waiting: for collectives, with nothing else to do.</p>",
        f"<p>Rank {slowest} works longest, {ms(work[slowest] - work[fastest])} longer than rank {fastest}.</p>",
    ]


def _traces(ranks: list[dict[str, Any]]) -> list[str]:
    """Links to what lies beside the report."""
    links = ", ".join(
        f'<a href="profile/rank_{i}.html">rank {i}</a> (<a href="profile/rank_{i}.trace.json.gz">trace</a>)'
        for i in (figures["rank"] for figures in ranks)
    )
    return [f"<p class=note>All figures of {links}. A trace opens in ui.perfetto.dev.</p>"]


def _kernels(figures: dict[str, Any], plan: dict[str, Any] | None) -> list[str]:
    device = (plan or {}).get("device")
    if not device or not figures["calls"]:
        return []
    from fastft.report.plots import GLYPHS, operator_looks  # matplotlib: not before it is needed

    found = kernels(figures["calls"], device)
    looks = operator_looks([k["name"] for k in found])
    rows = []
    for k in found:
        color, marker = looks[k["name"]]
        name = Markup(mark(GLYPHS[marker], color) + text(_breakable(k["name"])))
        share = percent(k["floor_s"] / k["seconds"])
        rows.append([name, f"{k['calls']:,.0f}", ms(k["seconds"]), ms(k["floor_s"]), share])
    return [
        "<h3>Kernels against their floors</h3>",
        beside(
            [_roofline(figures["calls"], device, looks)],
            [table(["operator", "calls", "time", "floor", "floor / time"], rows, extra=("calls",))],
        ),
        f"<p class=note>Floor: counted operations at {three_digits(device['flops'] / 1e12)} TFLOP/s, or bytes at "
        f"{three_digits(device['bandwidth'] / 1e9)} GB/s, whichever takes longer; for attention, the least "
        "that sequences of these many tokens in all can need. A call's time holds the operators that it calls.</p>",
    ]


def _breakable(name: str) -> str:
    """An operator's name that a narrow screen breaks between its parts."""
    return re.sub(r"(::|_)(?=\w)", "\\1\u200b", name)


def _roofline(calls: list[dict[str, Any]], device: dict[str, Any], looks: dict[str, tuple[str, str]]) -> str:
    from fastft.report.plots import roofline

    points, shown = [], Counter()
    for call in calls:
        counted = floor(call, device)
        if call["name"] in looks and counted["flops"] and shown[call["name"]] < POINTS_OF_EACH:
            shown[call["name"]] += 1
            points.append((call["name"], counted["flops"] / counted["bytes"], counted["flops"] / call["seconds"]))
    return roofline(points, device, looks) if points else ""


def _memory(report: dict[str, Any]) -> list[str]:
    from fastft.report.plots import memory_over_time

    samples, what = report["memory"], "allocated on the GPU" if report["device"] != "cpu" else "resident"
    moment, highest = max(samples, key=lambda sample: sample[1])
    phase = next((name for name, begin, _ in reversed(report["spans"]) if begin <= moment), "its start")
    over_run = [
        "<h3>Over the run</h3>",
        f"<p>At most {highest / GIB:.2f} GiB {what}, {moment:.1f} s into the run, in <b>{text(spoken(phase))}</b>"
        f"{_planned_peak(report['plan'])}.{_tracing(report['tracing'])}</p>",
        memory_over_time(samples, report["spans"], what, (report["plan"] or {}).get("planned_peak_bytes")),
    ]
    first = report["profile"][0] if report["profile"] else {}
    timeline, held = _held(first["memory"]) if first.get("memory") else ([], [])
    planned = []
    if report["plan"] and report["plan"].get("parts"):
        parts = report["plan"]["parts"]
        rows = [Bar(spoken(part), nbytes) for part, nbytes in sorted(parts.items(), key=lambda p: -p[1]) if nbytes]
        planned = [
            f"<h3>Planned peak, in {text(spoken(report['plan']['phase']))}</h3>",
            bars(["part"], rows, sum(parts.values()), mib),
        ]
    return ["<h2 id=memory>Memory</h2>", beside(over_run, timeline), beside(planned, held)]


def _planned_peak(plan: dict[str, Any] | None) -> str:
    return f"; {plan['planned_peak_bytes'] / GIB:.2f} GiB planned" if plan and "planned_peak_bytes" in plan else ""


def _tracing(tracing: dict[str, Any] | None) -> str:
    """The profiler's own part, where it is and where it is not."""
    if tracing is None:
        return ""
    record = (
        f" While the steps were taken the record of them grew to {mib(tracing['record_bytes'])}, which is in the plot."
    )
    took = f" Writing the trace took the process to {tracing['peak_bytes'] / GIB:.2f} GiB of host memory, "
    excluded = "which is neither in this peak nor in the plot."
    if not tracing["is_excluded"]:
        excluded = "which this peak holds: this system's record of it cannot be reset. The plot is without."
    return (record if tracing["record_bytes"] else "") + took + excluded


def _held(memory: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What the recorded steps hold over time, and who holds it at the highest moment."""
    from fastft.report.plots import memory_in_steps

    rows = [
        Bar(
            f"{PHASES[h['phase']]}{': ' + h['block'] if h['block'] else ''}",
            h["bytes"],
            color=PHASE_COLORS[h["phase"]],
        )
        for h in memory["held"][:MOST_HELD]
        if h["bytes"] >= SMALLEST * memory["peak_bytes"]
    ]
    timeline = [
        "<h3>In a step</h3>",
        f"<p>The recorded steps hold up to {mib(memory['peak_bytes'])} more than there is before them.</p>",
        memory_in_steps(memory["timeline"]),
    ]
    return timeline, [
        "<h3>Held at the highest moment</h3>",
        bars(["allocated in"], rows, sum(h["bytes"] for h in memory["held"]), mib),
    ]


def spoken(name: str) -> str:
    """A phase of the run or a part of the plan, as people write it."""
    return name.replace("_", " ")


def mib(nbytes: float) -> str:
    return f"{nbytes / MIB:,.1f} MiB" if nbytes < 10 * MIB else f"{nbytes / MIB:,.0f} MiB"


def write_rank_pages(folder: Path, title: str, report: dict[str, Any]) -> None:
    """<folder>/profile/rank_N.html of every rank whose figures there are."""
    for figures in report["profile"]:
        whole = '<nav><a href="../report.html">The whole run</a></nav>'
        parts = [f"<h1>{text(title)}: rank {figures['rank']}</h1>", whole, *rank_sections(report, figures)]
        path = folder / "profile" / f"rank_{figures['rank']}.html"
        path.write_text(page(f"{title}, rank {figures['rank']}", parts), encoding="utf-8")
