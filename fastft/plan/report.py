"""A plan as tables on a terminal, and as plain values."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fastft.plan.memory import PARTS
from fastft.plan.planner import Plan, Planner, apply
from fastft.plan.roofline import STEP_PARTS

GIB = 2**30
WIDTH = 14  # of the bars


def as_values(plan: Plan, source: str, alternatives: list[dict[str, Any]], suggestion: dict[str, Any] | None) -> dict:
    """What `fastft plan --json` prints: bytes of one rank, seconds of the whole."""
    return {
        "fits": plan.fits,
        "total_bytes": plan.total_bytes,
        "parts": plan.largest.device,
        "step_time_s": plan.step_time_s,
        "short_bytes": max(0, plan.short),
        "host_short_bytes": max(0, plan.host_short),
        "device": {"name": plan.device.name, "memory_bytes": plan.device.memory, "ranks": plan.ranks},
        "phase": plan.largest.name,
        "phases": {p.name: {"total_bytes": p.total, "parts": p.device} for p in plan.phases},
        "host_bytes": plan.host_bytes,
        "host_parts": max(plan.phases, key=lambda p: p.host_total).host,
        "teacher_store_bytes": plan.teacher_store,
        "step_time_parts": plan.step,
        "run_time_s": plan.run_time_s,
        "run_time_parts": plan.run,
        "parameters": plan.counts.parameters,
        "trained_parameters": plan.counts.trained,
        "model_config": source,
        "lengths": plan.workload.how,
        "contexts": len(plan.workload.contexts),
        "longest_context": max(plan.workload.contexts, default=0),
        "sequences": len(plan.workload.sequences),
        "longest_sequence": max(plan.workload.sequences, default=0),
        "changes": alternatives,
        "suggestion": suggestion,
        "notes": plan.notes,
    }


def alternatives(planner: Planner, plan: Plan) -> list[dict[str, Any]]:
    """What each single change does to bytes and seconds, the quickest run first."""
    rows = []
    for change in planner.changes():
        other = planner.plan(apply(plan.config, change))
        rows.append(
            {
                "change": change,
                "fits": other.fits,
                "total_bytes": other.total_bytes,
                "host_bytes": other.host_bytes,
                "step_time_s": other.step_time_s,
                "run_time_s": other.run_time_s,
            }
        )
    return sorted(rows, key=lambda row: row["run_time_s"])


def show(plan: Plan, source: str, rows: list[dict[str, Any]], suggestion: dict[str, Any] | None) -> None:
    console = Console(highlight=False)
    console.print(_head(plan, source))
    console.print(_memory(plan))
    if plan.step:
        console.print(_seconds("an optimizer step", plan.step, STEP_PARTS))
    console.print(_seconds("the run", plan.run, {}))
    console.print(_verdict(plan))
    if rows:
        console.print(_changes(plan, rows, suggestion))
    for note in plan.notes:
        console.print(f"note       {note}", soft_wrap=True)


def _head(plan: Plan, source: str) -> Group:
    c, w, config = plan.counts, plan.workload, plan.config
    held = (
        config.model.dtype
        if config.model.quantization == "none"
        else f"{config.model.quantization} + {config.model.dtype}"
    )
    device = f"{plan.ranks} x {plan.device.title}" if plan.ranks > 1 else plan.device.title
    lines = [
        f"model      {config.model.name_or_path}  {c.parameters:,} parameters  {held}  ({source})",
        f"trained    {config.peft.kind}: {c.trained:,} ({100 * c.trained / c.parameters:.3f} %)"
        if config.method != "icl"
        else "trained    nothing",
        f"device     {device}  {plan.device.memory / GIB:.1f} GiB  ZeRO-{config.deepspeed.zero_stage}",
        f"lengths    {len(w.contexts)} context{'s' if len(w.contexts) != 1 else ''} of up to "
        f"{max(w.contexts, default=0):,} tokens, {len(w.sequences):,} sequences of up to "
        f"{max(w.sequences, default=0):,}; from {w.how}",
    ]
    return Group(*(Text(line) for line in lines))


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, min_width=56
    )


def _memory(plan: Plan) -> Table:
    """A column for each phase; the phase that needs most decides."""
    table = _table("memory of a rank at each phase's peak, GiB")
    table.add_column("part", no_wrap=True)
    for phase in plan.phases:
        style = "bold" if phase is plan.largest else None
        table.add_column(phase.name, justify="right", no_wrap=True, style=style)
    table.add_column("", no_wrap=True)
    shown = [part for part in PARTS if any(part in p.device for p in plan.phases)]
    for part in shown:
        values = [p.device.get(part, 0) for p in plan.phases]
        bar = "█" * round(WIDTH * plan.largest.device.get(part, 0) / max(plan.total_bytes, 1))
        table.add_row(PARTS[part], *(_gib(v) if v else "" for v in values), bar)
    table.add_section()
    table.add_row("total", *(_gib(p.total) for p in plan.phases), f"of {_gib(plan.device.memory)}")
    if not plan.device.is_cpu:
        table.add_row("on the host", *(_gib(p.host_total) for p in plan.phases), f"of {_gib(plan.host_memory)}")
    return table


def _seconds(what: str, parts: dict[str, float], titles: dict[str, str]) -> Table:
    total = sum(parts.values())
    table = _table(f"seconds of {what}, at least")
    table.add_column("part", no_wrap=True)
    table.add_column("s", justify="right")
    table.add_column("", no_wrap=True)
    for name, seconds in parts.items():
        table.add_row(titles.get(name, name), f"{seconds:,.3f}", "█" * round(WIDTH * seconds / max(total, 1e-30)))
    table.add_section()
    table.add_row("total", f"{total:,.3f}", "")
    return table


def _verdict(plan: Plan) -> Text:
    if plan.fits:
        return Text(f"fits       {_gib(-plan.short)} GiB to spare", style="bold green")
    missing = []
    if plan.short > 0:
        part = max(plan.largest.device, key=plan.largest.device.get)
        missing.append(
            f"{_gib(plan.short)} GiB of device memory in phase {plan.largest.name}, most of which is {PARTS[part]}"
        )
    if plan.host_short > 0:
        missing.append(f"{_gib(plan.host_short)} GiB of host memory")
    return Text(f"too large  short of {' and '.join(missing)}", style="bold red")


def change_text(change: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items())


def _changes(plan: Plan, rows: list[dict[str, Any]], suggestion: dict[str, Any] | None) -> Group:
    table = _table("what one change does")
    table.add_column("change", overflow="fold")
    for column in ("GiB", "step s", "run s", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row["total_bytes"] >= 0.999 * plan.total_bytes:
            continue
        table.add_row(
            change_text(row["change"]),
            f"{(row['total_bytes'] - plan.total_bytes) / GIB:+.2f}",
            f"{row['step_time_s'] - plan.step_time_s:+.3f}",
            f"{row['run_time_s'] - plan.run_time_s:+.2f}",
            "yes" if row["fits"] else "",
        )
    if suggestion is None:
        return Group(table, Text("change     nothing that the planner knows makes it fit", style="bold red"))
    line = (
        f"change     {change_text(suggestion['change'])}: {_gib(suggestion['total_bytes'])} GiB, "
        f"{suggestion['step_time_s']:.3f} s a step"
    )
    return Group(table, Text(line, style="bold green"))
