"""The end of a run: what the planner counts for it beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastft.config import Config
from fastft.distributed import Ranks
from fastft.engine.base import Base, Prepared
from fastft.engine.progress import Reporter

if TYPE_CHECKING:
    from fastft import plan

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
    measured, step = summary["peak_memory_bytes"], summary["step_time_s"]
    try:
        from fastft import plan  # not before it is needed: it imports what would show in the peak of a CPU

        workload = plan.counted(
            config, prepared.windows, prepared.sequences, [*prepared.evaluated, *prepared.control], base.text, "the run"
        )
        device = plan.this_device(config.model.dtype)
        planner = plan.Planner(
            config,
            base.lm.model.config,
            workload,
            device=device or plan.unknown_gpu(),
            ranks=ranks.world_size,
            num_labels=num_labels,
        )
        counted = planner.plan()
        changes = [_changed(planner, counted, change) for change in _quicker(config)] if config.profile.steps else []
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
        "step_parts": counted.step if device else {},
        "step_flops": model_flops(counted),
        "device": None if device is None else _rates(device, config.model.dtype),
        "changes": changes,
    }
    text = f"peak {counted.allocated_bytes / GIB:.2f} GiB planned, {measured / GIB:.2f} measured"
    if device and step:
        text += f"; step {counted.step_time_s:.3f} s by the roofline, {step:.3f} s measured"
    out.line(f"plan       {text}")
    return found


def _rates(device: plan.Device, dtype: str) -> dict[str, Any]:
    """A device's figures, its rate in the model's dtype, and that in bfloat16."""
    from fastft import plan

    other = plan.this_device("bfloat16") if dtype == "float32" else device
    return asdict(device) | {"flops": device.flops(dtype), "flops_bfloat16": other.flops("bfloat16")}


def model_flops(counted: plan.Plan) -> float:
    """Operations that an average step of one rank cannot do without: those of model-FLOP utilisation.

    Forward, the gradient of every input, that of the trained weights, and the head. What is computed again, or written
    out of a quantised weight, is no work of the model's.
    """
    from fastft.plan.roofline import Roofline

    roofline = Roofline(counted.config, counted.counts, counted.workload, counted.device, counted.ranks)
    tokens, rows, squares = (n / counted.ranks for n in counted.workload.mean_step(counted.config))
    trained = 2.0 * (3 * counted.counts.adapter + counted.counts.trained_linear) * tokens
    teacher = counted.config.method == "distill" and counted.config.distill.targets == "hidden"
    head = (3 if teacher else 2) * roofline.head_flops(rows)
    return 2 * roofline.linear_flops(tokens) + 3 * roofline.attention_flops(squares / 2) + trained + head


def _quicker(config: Config) -> Iterator[dict[str, Any]]:
    """Changes that may make a step quicker, where the memory is there; batch_size: the time of as many examples."""
    t = config.train
    if t.activation_checkpointing != "none":
        yield {"train.activation_checkpointing": "none"}
    if t.micro_batches > 1:
        yield {"train.micro_batches": 1}
    if config.deepspeed.zero_stage == 3 and config.deepspeed.offload_param == "none":
        yield {"deepspeed.zero_stage": 2}
    yield {"train.batch_size": 2 * t.batch_size}


def _changed(planner: plan.Planner, now: plan.Plan, change: dict[str, Any]) -> dict[str, Any]:
    """What a change of the config does to the plan; seconds: of as many examples as a step has now."""
    from fastft.plan.planner import apply

    config = apply(planner.config, change)
    changed = planner.plan(config)
    share = now.config.train.batch_size / config.train.batch_size
    return {
        "change": change,
        "planned_peak_bytes": changed.allocated_bytes,
        "fits": changed.fits,
        "planned_step_s": share * changed.step_time_s,
    }
