"""A plan: what a run takes on a device, whether it fits, and what to change where it does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
from transformers import PretrainedConfig

from fastft.config import Config
from fastft.models import loading
from fastft.plan import architecture, hardware
from fastft.plan.architecture import Counts
from fastft.plan.hardware import Device
from fastft.plan.memory import Memory, Phase, base_bytes, optimizer_kind
from fastft.plan.roofline import Roofline
from fastft.plan.trace import Tracer
from fastft.plan.workload import Workload, estimate

LABELS = 3  # rows of a classification head, where nobody has counted the labels


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank and seconds of the whole, counted.

    phases: each with its parts; they are not alive together. step, run: seconds by part of an optimizer step, and by
    phase of the run. host_memory: bytes that the ranks of this machine share.
    """

    config: Config
    counts: Counts
    device: Device
    ranks: int
    host_memory: int
    phases: list[Phase]
    step: dict[str, float]
    run: dict[str, float]
    workload: Workload
    teacher_store: int
    notes: list[str] = field(default_factory=list)

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda p: p.total)

    @property
    def total_bytes(self) -> int:
        return self.largest.total

    @property
    def allocated_bytes(self) -> int:
        """What a GPU's allocator would report; on a CPU the process's resident memory."""
        parts = self.largest.device
        outside = 0 if self.device.is_cpu else parts["runtime"] + parts.get("fragmentation", 0)
        return self.total_bytes - outside

    @property
    def host_bytes(self) -> int:
        return self.ranks * max(p.host_total for p in self.phases)

    @property
    def short(self) -> int:
        """Bytes that a device lacks; negative: that it has to spare."""
        return self.total_bytes * (self.ranks if self.device.is_cpu else 1) - self.device.memory

    @property
    def host_short(self) -> int:
        return -1 if self.device.is_cpu else self.host_bytes - self.host_memory

    @property
    def fits(self) -> bool:
        return self.short <= 0 and self.host_short <= 0

    @property
    def step_time_s(self) -> float:
        return sum(self.step.values())

    @property
    def run_time_s(self) -> float:
        return sum(self.run.values())


class Planner:
    """Plans of one model on one device, for a config and for changes of it."""

    def __init__(
        self,
        config: Config,
        model_config: PretrainedConfig,
        workload: Workload,
        *,
        device: Device,
        ranks: int = 1,
        host_memory: int | None = None,
        num_labels: int | None = None,
    ):
        num_labels = (num_labels or LABELS) if config.method == "ft" else None
        self.config, self.workload, self.device, self.ranks = config, workload, device, ranks
        self.host_memory = host_memory or psutil.virtual_memory().total
        self.counts = architecture.count(model_config, config, num_labels)
        self.tracer = Tracer(model_config, config.peft, config.model.dtype, num_labels, config.ft.head)

    def plan(self, config: Config | None = None) -> Plan:
        config = config or self.config
        memory = Memory(config, self.counts, self.tracer, self.workload, self.device, self.ranks)
        roofline = Roofline(config, self.counts, self.workload, self.device, self.ranks)
        step = roofline.step()
        return Plan(
            config=config,
            counts=self.counts,
            device=self.device,
            ranks=self.ranks,
            host_memory=self.host_memory,
            phases=memory.phases(),
            step=step,
            run=roofline.phases(sum(step.values())),
            workload=self.workload,
            teacher_store=memory.teacher_store(),
            notes=list(self._notes(config)),
        )

    def _notes(self, config: Config) -> Iterator[str]:
        if optimizer_kind(config).endswith("_8bit") and config.peft.kind == "bitfit":
            saved = 6 * self.counts.trained / 2**20
            yield (
                f"train.optimizer={config.train.optimizer}: 8-bit states of BitFit's {self.counts.trained:,} "
                f"parameters save {saved:.0f} MiB, which is nothing beside the base; use auto"
            )

    def changes(self) -> list[dict[str, Any]]:
        """Single changes of the config that this model and method can make, as {key: value}."""
        return [change for axis in self._axes() for change in axis if change]

    def _axes(self) -> list[list[dict[str, Any]]]:
        """Alternatives of each kind, the config as it is ({}) first; one of each may be taken together."""
        c = self.config
        trains, axes = c.method != "icl", []

        def axis(key: str, *values: Any) -> None:
            section, _, name = key.partition(".")
            now = getattr(getattr(c, section), name)  # a value that is there already is no change
            axes.append([{}, *({key: value} for value in values if value != now)])

        axis("evaluate.batch_size", *_halves(c.evaluate.batch_size))
        if trains:
            axis("train.micro_batches", *_doubles(c.train.micro_batches, -(-c.train.batch_size // self.ranks)))
            layers = self.counts.layers
            offloads, some = c.train.activation_offloading, [layers // 2] if layers > 1 else []
            axis("train.activation_checkpointing", *([] if offloads else ["attention"]), *some, "full")
            if not self.device.is_cpu and not offloads:
                full = {} if c.train.activation_checkpointing == "full" else {"train.activation_checkpointing": "full"}
                axes[-1].append({**full, "train.activation_offloading": True})
            if optimizer_kind(c) == "adamw":
                axis("train.optimizer", "adamw_8bit")
        if c.peft.kind != "full":
            axis("model.quantization", *{"none": ("int8", "nf4"), "int8": ("nf4",)}.get(c.model.quantization, ()))
        if self.workload.contexts:
            axis("model.prefix", *(("int8",) if self.device.is_cpu else ("int8", "host")))
            kv_heads = self.counts.kv_width // self.counts.head_size
            online = c.method == "distill" and c.distill.teacher == "online"
            if 1 < self.ranks <= kv_heads and c.method in ("icl", "distill") and not online:
                axis("model.sequence_parallel", "ulysses")
        if not self.device.is_cpu and c.deepspeed.nvme_path is None:
            zero3 = {"deepspeed.zero_stage": 3}
            offload = [{}, {**zero3, "deepspeed.offload_param": "cpu"}]
            if self.ranks > 1 and c.model.layers == "device":  # the base fits all devices, but not each
                offload.append({**zero3, "model.layers": "host"})
            if trains:
                stage = {"deepspeed.zero_stage": max(1, c.deepspeed.zero_stage)}
                offload += [
                    {**stage, "deepspeed.offload_optimizer": "cpu"},
                    {**zero3, "deepspeed.offload_optimizer": "cpu", "deepspeed.offload_param": "cpu"},
                ]
            axes.append(offload)
        if self.ranks > 1 and c.deepspeed.zero_stage < 3 and self.device.is_cpu:
            axis("deepspeed.zero_stage", 3)
        return axes

    def cheapest(self) -> tuple[dict[str, Any], Plan] | None:
        """Of all combinations of changes that fit, the one with the shortest run; of equal ones the one with fewest.

        Equal: within a hundredth. None where none fits.
        """
        combinations = (
            {k: v for part in chosen for k, v in part.items()} for chosen in itertools.product(*self._axes())
        )
        timed = sorted(((self._run_time(change), change) for change in combinations), key=lambda item: item[0])
        best: tuple[float, dict[str, Any], Plan] | None = None
        for seconds, change in timed:
            if best is not None and seconds > 1.01 * best[0]:
                break
            changed = apply(self.config, change)
            if (best is not None and len(change) >= len(best[1])) or self._base_is_too_large(changed):
                continue
            plan = self.plan(changed)
            if plan.fits:
                best = (best[0] if best else seconds), change, plan
        return None if best is None else best[1:]

    def _run_time(self, change: dict[str, Any]) -> float:
        roofline = Roofline(apply(self.config, change), self.counts, self.workload, self.device, self.ranks)
        return sum(roofline.phases(sum(roofline.step().values())).values())

    def _base_is_too_large(self, config: Config) -> bool:
        """Whether the base alone does not fit, which saves looking further."""
        is_whole = self.device.is_cpu or not config.has_host_layers
        return is_whole and sum(base_bytes(self.counts, config)) > self.device.memory


def _halves(size: int) -> list[int]:
    return [n for n in (16, 4, 1) if n < size]


def _doubles(now: int, most: int) -> list[int]:
    """Twice and four times as many, and as many as there are."""
    return sorted({n for n in (2 * now, 4 * now, most) if now < n <= most})


def apply(config: Config, change: dict[str, Any]) -> Config:
    """The config with other values under some dotted keys, not validated again."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in change.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(
        update={section: getattr(config, section).model_copy(update=values) for section, values in sections.items()}
    )


def planned(
    config: Config,
    model_config: PretrainedConfig,
    workload: Workload,
    *,
    device: Device,
    ranks: int = 1,
    num_labels: int | None = None,
) -> Plan:
    """The plan of a run whose workload is known."""
    return Planner(config, model_config, workload, device=device, ranks=ranks, num_labels=num_labels).plan()


def planner(
    config: Config, name: str, *, gpus: int = 1, host_memory: int | None = None, memory: int | None = None
) -> tuple[Planner, str]:
    """A planner for a config that is not running, and where the model's configuration is from."""
    model_config, source = architecture.find_config(config)
    workload = estimate(config, loading.max_positions(model_config))
    device = hardware.device(name, memory=memory, dtype=config.model.dtype)
    return Planner(config, model_config, workload, device=device, ranks=gpus, host_memory=host_memory), source
