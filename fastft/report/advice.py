"""What to change first: rules over a profile and a plan, each with the seconds of a step that it would save.

A prediction is an upper bound where it says "up to": all of a part's time, which nothing could take below zero. Where
the planner knows the change, its ratio of step times is applied to the measured step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastft.config import Config

SMALLEST = 0.02  # share of a step below which a change is not worth a line
BLAS = "matrix products"


@dataclass(frozen=True)
class Advice:
    """what: the change; why: the figures behind it; seconds: of a step, saved; share: of the step."""

    name: str
    what: str
    why: str
    seconds: float
    share: float = 0.0


@dataclass
class Findings:
    """What the rules look at: the figures of each rank and of the first, the plan with its changes, the config."""

    ranks: list[dict[str, Any]]
    plan: dict[str, Any]
    config: Config
    first: dict[str, Any] = field(init=False)

    def __post_init__(self):
        self.first = self.ranks[0]

    @property
    def step_s(self) -> float:
        return self.first["step_s"]

    def phase(self, name: str) -> float:
        return self.first["phases"].get(name, 0.0)

    def kind(self, name: str) -> float:
        return self.first["kinds"].get(name, 0.0)

    def change(self, key: str) -> dict[str, Any] | None:
        """What the planner says of changing this key, where it fits."""
        found = (c for c in self.plan.get("changes", []) if key in c["change"] and c["fits"])
        return next(found, None)


Rule = Callable[[Findings], Iterator[Advice]]


def advise(ranks: list[dict[str, Any]], plan: dict[str, Any] | None, config: Config) -> list[Advice]:
    """Everything that the rules find, the largest saving first; nothing without a profile."""
    if not ranks:
        return []
    findings = Findings(ranks, plan or {}, config)
    found = [advice for rule in RULES for advice in rule(findings)]
    shared = [Advice(a.name, a.what, a.why, a.seconds, a.seconds / findings.step_s) for a in found]
    return sorted((a for a in shared if a.share >= SMALLEST), key=lambda a: -a.seconds)


def data(f: Findings) -> Iterator[Advice]:
    waiting = f.phase("data")
    yield Advice(
        "data",
        "Have the batch ready before the step: look at what reads and packs the sequences, and at the disk behind the "
        "teacher store",
        f"the step waits {ms(waiting)} for its batch, {percent(waiting / f.step_s)} of it",
        waiting,
    )


def stalls(f: Findings) -> Iterator[Advice]:
    """Long stretches in which the step's thread is in no operator: it sleeps, waits or computes in Python."""
    found = f.first["stalls"]
    seconds = sum(stall["seconds"] for stall in found)
    if found:
        longest = found[0]
        yield Advice(
            "stall",
            f"Find what holds up the step {where(longest)}, after {longest['after']}",
            f"{ms(seconds)} of a step pass in stretches of 5 ms and more without any operator; the longest takes "
            f"{ms(longest['longest_s'])}",
            seconds,
        )


def synchronisations(f: Findings) -> Iterator[Advice]:
    s = f.first["synchronisations"]
    seconds = s["seconds"] + (f.kind("device idle") if f.first["device"] == "cuda" else 0.0)
    yield Advice(
        "synchronisation",
        "Keep values on the device: read them once a step, not one by one"
        + (f" (most are read {where(s)})" if s["phase"] else ""),
        f"{s['calls']:,.0f} values a step are read by the host ({s['name'] or 'item'}), which takes {ms(s['seconds'])}"
        + (f"; the GPU idles {ms(f.kind('device idle'))}" if f.first["device"] == "cuda" else ""),
        seconds,
    )


def copies(f: Findings) -> Iterator[Advice]:
    found = [copy for copy in f.first["copies"] if copy["seconds"] >= SMALLEST * f.step_s]
    if not found:  # small ones everywhere are how models are written
        return
    largest, seconds = found[0], sum(copy["seconds"] for copy in found)
    yield Advice(
        "copies",
        f"Avoid the large copies: most time goes to {largest['name']}{of(largest['shape'])} {where(largest)}",
        f"copies that take {percent(SMALLEST)} of a step and more sum up to {ms(seconds)}; this one is "
        f"{ms(largest['seconds'])} in {largest['calls']:,.0f} calls",
        seconds,
    )


def overhead(f: Findings) -> Iterator[Advice]:
    """Python between operators costs the same for a batch twice as large, so half of it per example."""
    stalled = sum(stall["seconds"] for stall in f.first["stalls"])
    between = sum(seconds for phase, seconds in f.first["python"].items() if phase not in ("data", "communication"))
    seconds = max(0.0, between - stalled) / 2 if f.first["device"] == "cpu" else 0.0
    size = f.config.train.batch_size
    yield Advice(
        "overhead",
        f"Take larger steps: train.batch_size={2 * size} halves what Python costs per sequence"
        + (", or train.micro_batches=1" if f.config.train.micro_batches > 1 else ""),
        f"{ms(2 * seconds)} of a step are Python between operators, whatever the size of the batch",
        seconds,
    )


def recompute(f: Findings) -> Iterator[Advice]:
    change = f.change("train.activation_checkpointing")
    if change:
        yield Advice(
            "recompute",
            "Keep the activations: train.activation_checkpointing=none fits",
            f"computing layers again takes {ms(f.phase('recompute'))}; without it the peak is planned at "
            f"{change['planned_peak_bytes'] / 2**30:.2f} GiB",
            f.phase("recompute"),
        )


def larger_batch(f: Findings) -> Iterator[Advice]:
    """Reading the weights, the collectives and the optimizer cost the same for more tokens."""
    change, now = f.change("train.batch_size"), f.plan.get("planned_step_s")
    if change and now and f.first["device"] == "cuda":
        size = change["change"]["train.batch_size"]
        seconds = f.step_s * max(0.0, 1 - change["planned_step_s"] / now)
        yield Advice(
            "batch",
            f"Take more tokens at once: train.batch_size={size}",
            f"at this size reading the weights bounds the step; {percent(seconds / f.step_s)} less for each token, "
            f"planned peak {change['planned_peak_bytes'] / 2**30:.2f} GiB",
            seconds,
        )


def micro_batches(f: Findings) -> Iterator[Advice]:
    change, now = f.change("train.micro_batches"), f.plan.get("planned_step_s")
    if change and now:
        seconds = f.step_s * max(0.0, 1 - change["planned_step_s"] / now)
        yield Advice(
            "micro_batches",
            "Take the batch in one pass: train.micro_batches=1 fits",
            f"each of the {f.config.train.micro_batches} passes reads all weights; planned "
            f"{percent(seconds / f.step_s)} less, peak {change['planned_peak_bytes'] / 2**30:.2f} GiB",
            seconds,
        )


def dtype(f: Findings) -> Iterator[Advice]:
    device = f.plan.get("device")
    faster = device and device.get("flops_bfloat16")
    if f.config.model.dtype == "float32" and faster and faster > device["flops"]:
        products = f.kind(BLAS) + f.kind("fastft kernels")
        yield Advice(
            "dtype",
            "Compute in bfloat16: model.dtype=bfloat16",
            f"products take {ms(products)} in float32; this device is {faster / device['flops']:.1f} times as fast in "
            "bfloat16",
            products * (1 - device["flops"] / faster),
        )


def teacher(f: Findings) -> Iterator[Advice]:
    if f.phase("teach") and not f.config.distill.on_policy:
        yield Advice(
            "teacher",
            "Compute each target once: distill.teacher=stored",
            f"the teacher takes {ms(f.phase('teach'))} of every step, for the same targets in every epoch",
            f.phase("teach"),
        )


def communication(f: Findings) -> Iterator[Advice]:
    exposed = f.first["communication"]["exposed_s"]
    if len(f.ranks) < 2 or not exposed:
        return
    slowest, fastest = (
        pick(f.ranks, key=lambda r: r["step_s"] - r["communication"]["exposed_s"]) for pick in (max, min)
    )
    work = [r["step_s"] - r["communication"]["exposed_s"] for r in (slowest, fastest)]
    waiting = min(exposed, work[0] - work[1])
    if waiting > exposed / 2:
        yield Advice(
            "imbalance",
            f"Even out the ranks: rank {slowest['rank']} works longest",
            f"rank {slowest['rank']} works {ms(work[0])} a step, rank {fastest['rank']} {ms(work[1])}; the others wait",
            waiting,
        )
    if f.change("deepspeed.zero_stage"):
        less = "Send less: deepspeed.zero_stage=2 fits, and gathers no weights"
    elif f.config.train.micro_batches > 1:
        less = "Send less often: fewer train.micro_batches, each of which gathers all weights"
    else:
        less = "Send less often for each token: a larger train.batch_size"
    yield Advice(
        "communication",
        less,
        f"the step waits {ms(exposed)} for collectives, {percent(exposed / f.step_s)} of it",
        exposed - (waiting if waiting > exposed / 2 else 0.0),
    )


def offload(f: Findings) -> Iterator[Advice]:
    link, d = f.first["host_link"], f.config.deepspeed
    offloaded = [k for k in ("offload_param", "offload_optimizer") if getattr(d, k) != "none"]
    if offloaded and link["seconds"]:
        yield Advice(
            "offload",
            f"Keep more on the device: deepspeed.{offloaded[0]}=none, with model.quantization where it does not fit",
            f"{link['bytes'] / 2**30:.2f} GiB cross the link to the host in a step, in up to {ms(link['seconds'])}",
            link["seconds"],
        )


def optimizer(f: Findings) -> Iterator[Advice]:
    seconds, kind = f.phase("optimizer"), f.config.train.optimizer
    if f.first["device"] == "cuda" and kind in ("auto", "adamw") and f.config.peft.kind != "bitfit":
        yield Advice(
            "optimizer",
            "Update in one launch with 8-bit state: train.optimizer=bias_adamw_8bit",
            f"the optimizer takes {ms(seconds)}; 8-bit state is 20 bytes of traffic per parameter less than 32",
            seconds * 12 / 32,
        )


def threads(f: Findings) -> Iterator[Advice]:
    cores, used = f.first["cores"], f.first["threads"] * len(f.ranks)
    if f.first["device"] == "cpu" and used < cores:
        computing = f.kind(BLAS) + f.kind("fastft kernels") + f.kind("attention")
        yield Advice(
            "threads",
            f"Use all cores: deepspeed.threads_per_rank={cores // len(f.ranks)}",
            f"{used} of {cores} cores compute; products and kernels take {ms(computing)}",
            computing * (1 - used / cores),
        )


RULES: tuple[Rule, ...] = (
    data,
    stalls,
    synchronisations,
    copies,
    overhead,
    recompute,
    larger_batch,
    micro_batches,
    dtype,
    teacher,
    communication,
    offload,
    optimizer,
    threads,
)


def where(found: dict[str, Any]) -> str:
    block = f", {found['block']}" if found.get("block") else ""
    return f"in {found['phase']}{block}"


def of(shape: list[int]) -> str:
    return f" of [{', '.join(map(str, shape))}]" if shape else ""


def ms(seconds: float) -> str:
    """Seconds as people read them."""
    unit, per_second = next((u for u in (("s", 1), ("ms", 1e3)) if seconds * u[1] >= 1), ("µs", 1e6))
    return f"{three_digits(per_second * seconds)} {unit}" if seconds > 0 else "0 ms"


def three_digits(value: float) -> str:
    """A positive number, never as a power of ten; smaller ones than 0.001 as 0.000."""
    decimals = 2 - math.floor(math.log10(value))
    return f"{value:,.{min(3, max(0, decimals))}f}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
