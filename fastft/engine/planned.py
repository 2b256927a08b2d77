"""The end of a run: what the planner counts for it beside what was measured."""

from __future__ import annotations

from typing import Any

from fastft.config import Config
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared
from fastft.engine.progress import Reporter

GIB = 2**30


def compare_with_plan(
    config: Config,
    base: Base,
    prepared: Prepared,
    summary: dict[str, Any],
    ranks: Ranks,
    num_labels: int | None,
    out: Reporter,
) -> dict[str, Any]:
    """Planned and measured peak bytes of the first rank and seconds of a step; prints them in a line.

    Seconds are planned where the device is in the planner's table, or is the CPU. A model that the planner cannot trace
    costs the comparison, not the run's results: the reason is returned under "error".
    """
    from fastft import plan  # not before it is needed: it imports what would show in the peak of a CPU

    measured, step = summary["peak_memory_bytes"], summary["step_time_s"]
    try:
        workload = plan.counted(
            config, prepared.windows, prepared.sequences, [*prepared.evaluated, *prepared.control], base.text, "the run"
        )
        device = plan.this_device(config.model.dtype)
        counted = plan.planned(
            config,
            base.lm.model.config,
            workload,
            device=device or plan.unknown_gpu(),
            ranks=ranks.world_size,
            num_labels=num_labels,
        )
    except Exception as error:
        out.line(f"plan       cannot be counted for this model: {type(error).__name__}: {error}")
        return {"error": f"{type(error).__name__}: {error}"}
    found = {
        "planned_peak_bytes": counted.allocated_bytes,
        "measured_peak_bytes": measured,
        "parts": counted.largest.device,
        "phase": counted.largest.name,
        "planned_step_s": counted.step_time_s if device else None,
        "measured_step_s": step,
    }
    text = f"peak {counted.allocated_bytes / GIB:.2f} GiB planned, {measured / GIB:.2f} measured"
    if device and step:
        text += f"; step {counted.step_time_s:.3f} s by the roofline, {step:.3f} s measured"
    out.line(f"plan       {text}")
    return found
