"""Bytes of each phase of a run on one rank, by part: what the device holds, and what the host holds for it.

The phases are not alive together, so a run needs the largest of them. Tensors of the model's own passes come from a
trace (`trace`), all others are counted here: what the engine keeps for the trained parameters (N of them, w ranks), a
context's keys and values, buffers of the collectives.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from fastft.config import Config
from fastft.distributed import GATHER_BYTES, REDUCE_BUCKET
from fastft.memory import KEPT_FREE, MAPPED_BLOCK, resident_at_start
from fastft.models.ulysses import check_heads, deal
from fastft.ops.frozen_weight import TILE_BYTES
from fastft.optim import BITSANDBYTES
from fastft.plan.architecture import ITEMSIZE, Counts
from fastft.plan.hardware import MIB, Device
from fastft.plan.trace import ACTIVATIONS, LIVE, LOGITS, Pass, Tracer
from fastft.plan.workload import Ask, Workload

# Parts, in the order in which they are shown: key -> title.
PARTS = {
    "base": "base weights",
    "scales": "scales of quantised weights",
    "adapters": "adapters, BitFit's copies",
    "gradients": "gradients",
    "optimizer": "optimizer: master, m, v",
    "activations": "activations kept for backward",
    "live_layer": "live layer",
    "dequantised": "dequantised weights",
    "logits": "logits chunk",
    "prefix": "prefix keys and values",
    "decode_cache": "decode cache",
    "communication": "gathered weights, buckets",
    "runtime": "runtime",
    "fragmentation": "fragmentation",
}
# A GPU's context and cuBLAS' workspace. Of host memory beside a GPU: Python, torch, transformers, DeepSpeed and theirs.
RUNTIME = {"gpu": 480 * MIB, "host": 442 * MIB}
# What a run on the CPU adds to the libraries that are there when it starts: those that come with the first calls.
LATER_LIBRARIES = 105 * MIB
# Of what comes and goes, what an allocator cannot use again: caching blocks of 2 MiB and cut ones.
FRAGMENTATION = 0.08
# Of a CPU's activations that come from glibc's heap, whose holes between longer-lived blocks stay. After twelve steps
# 0.4 where all batches have as many tokens, 0.8 to 1.3 where they are ragged.
HEAP_FRAGMENTATION = 1.0


@dataclass(frozen=True)
class Phase:
    """Bytes by part at the phase's highest moment, on the device and on the host (one rank's share)."""

    name: str
    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


class Memory:
    """The phases of a run."""

    def __init__(self, config: Config, counts: Counts, tracer: Tracer, workload: Workload, device: Device, ranks: int):
        self.config, self.counts, self.tracer, self.workload = config, counts, tracer, workload
        self.device, self.ranks = device, ranks
        self.itemsize = ITEMSIZE[config.model.dtype]
        self.sharing = sharing_ranks(config, ranks)
        self.kv_width = largest_share(counts, self.sharing) * counts.kv_width  # of a rank's keys behind a context

    def phases(self) -> list[Phase]:
        found = [] if self.device.is_cpu else [self._load()]
        found.append(self._frozen("teach", trained=False))
        if self.config.method != "icl":
            found += [self._train(), self._frozen("evaluate", trained=True)]
        return [p for p in found if p]

    def _finish(self, name: str, device: Counter[str], host: Counter[str]) -> Phase:
        moving = ("activations", "live_layer", "logits", "prefix", "decode_cache", "communication", "dequantised")
        if self.device.is_cpu:
            device, host = device + host, Counter()
            device["communication"] += self.ranks * SHARED_MEMORY if self.ranks > 1 else 0
        else:
            host["runtime"] = RUNTIME["host"]
            device["fragmentation"] = int(FRAGMENTATION * sum(device[part] for part in moving))
        # More than that is what somebody else has loaded into this process.
        libraries = min(resident_at_start(), 2 * RUNTIME["host"]) + LATER_LIBRARIES
        device["runtime"] = libraries if self.device.is_cpu else RUNTIME["gpu"]
        ordered = {part: device[part] for part in PARTS if device[part]}
        return Phase(name, ordered, {part: host[part] for part in PARTS if host[part]})

    def _load(self) -> Phase:
        """A plain checkpoint is on the host as a whole before it goes to the device, a quantised one layer by layer."""
        c = self.counts
        device, host = self._base(training=False)
        if self.config.model.quantization == "none":
            host["base"] = c.parameters * self.itemsize
        else:
            host["base"] += c.in_layers // c.layers * 4
        return self._finish("load", device, host)

    def _base(self, *, training: bool) -> tuple[Counter[str], Counter[str]]:
        """The base's weights on the device and on the host.

        Before there is a trainer every rank holds them whole, or the layers on the host, of which two visit the device.
        Then ZeRO-3 deals them out and gathers what is at work.
        """
        c, d = self.counts, self.config.deepspeed
        device, host = Counter(), Counter()
        weights, scales = base_bytes(c, self.config)
        whole, offloads = weights + scales, d.offload_param != "none"
        layers = whole - (c.parameters - c.in_layers) * self.itemsize
        if scales:
            device["dequantised"] = TILE_BYTES["cpu" if self.device.is_cpu else "cuda"]
        if training and d.zero_stage == 3 and (self.ranks > 1 or offloads):
            kept = c.small * self.itemsize  # whole on every rank
            if d.offload_param != "nvme":
                (host if offloads else device)["base"] = (whole - kept) // self.ranks
            device["base"] += kept
            device["communication"] = self._gathered(whole)
        elif self.config.has_host_layers and not training and not self.device.is_cpu:
            host["base"] = layers
            device["base"] = whole - layers
            device["communication"] = 2 * layers // c.layers
        else:
            device.update(base=weights, scales=scales)
        return device, host

    def _gathered(self, whole: int) -> int:
        """Bytes of what ZeRO-3 has gathered; what arrives lies in a buffer until each parameter is copied out of it."""
        c = self.counts
        layer = c.in_layers // c.layers
        return (2 * layer + max(c.head, layer)) * whole // c.parameters

    def _trained(self) -> tuple[Counter[str], Counter[str], int]:
        """What the trained parameters cost between steps, and the bytes that an optimizer step takes besides.

        That is the gradients in float32, under ZeRO out of a flat copy of them.
        """
        c, d, b = self.counts, self.config.deepspeed, self.itemsize
        n, share = c.trained, -(-c.trained // (self.ranks if d.zero_stage else 1))
        device, host = Counter(), Counter()
        held = {"none": device, "cpu": host, "nvme": Counter()}[d.offload_optimizer]
        device["adapters"] += c.bias_copies * b
        device["adapters"] += c.added * b // (self.ranks if d.zero_stage == 3 else 1)
        has_master = d.zero_stage > 0 or b == 2
        paged = 0 if self.device.is_cpu else paged_bytes(self.config, c, share)
        held["optimizer"] += (4 * share if has_master else 0) + optimizer_state_bytes(self.config, c, share) - paged
        host["optimizer"] += paged
        if d.zero_stage == 0 or d.zero_stage == 1:
            device["gradients"] += n * b
        else:
            held["gradients"] += share * b
        if d.zero_stage:
            device["communication"] += min(n, REDUCE_BUCKET) * b
        return device, host, (4 * share if has_master else 0) + (share * b if d.zero_stage else 0)

    def _train(self) -> Phase:
        device, host = self._base(training=True)
        own, own_host, step = self._trained()
        lengths, rows = self.workload.micro_batch(self.config, self.ranks)
        checkpointing = self.config.train.activation_checkpointing
        trace = self._peak(Pass(lengths, rows, trains=True, loss=self._loss(), checkpointing=checkpointing))
        layers = offloaded_layers(self.config, self.counts)
        if layers and not self.device.is_cpu:
            hidden = sum(lengths) * self.counts.hidden * self.itemsize
            host["activations"] = layers * hidden
            trace = {**trace, ACTIVATIONS: trace[ACTIVATIONS] - max(0, layers - 2) * hidden}  # two are on the device
        # What was trained is copied to the first rank's host memory at the end, under ZeRO-3 out of gathered groups.
        copied = self.counts.trained * self.itemsize
        gathered = min(copied, GATHER_BYTES) if self.config.deepspeed.zero_stage == 3 else 0
        # Of what a pass takes of glibc's heap some stays there behind it.
        of_heap = self.device.is_cpu and sum(lengths) * self.counts.hidden * self.itemsize < MAPPED_BLOCK
        in_heap = trace.get(ACTIVATIONS, 0) + trace.get(LIVE, 0) if of_heap else 0
        holes = int(HEAP_FRAGMENTATION * in_heap)
        left = min(in_heap, KEPT_FREE) + holes
        # ZeRO-1 and 2 free their bucket behind the backward pass, ZeRO-3 keeps it.
        bucket = own["communication"] if self.config.deepspeed.zero_stage < 3 else 0
        moments = {
            "pass": sum(trace.values()) + holes,
            "step": step - bucket + left,
            "copy": gathered + (copied if self.device.is_cpu else 0) + left,
        }
        highest = max(moments, key=lambda name: moments[name])
        device["fragmentation"] = holes if highest == "pass" else left
        if highest == "pass":
            device += Counter(
                activations=trace.get(ACTIVATIONS, 0), live_layer=trace.get(LIVE, 0), logits=trace.get(LOGITS, 0)
            )
        elif highest == "step":
            device["gradients"] += step
            own["communication"] -= bucket
        else:
            device["adapters"] += gathered + (copied if self.device.is_cpu else 0)
        if not self.device.is_cpu:
            host["adapters"] += copied
        if self.config.method == "distill" and self.config.distill.teacher == "online":
            # A GPU keeps a layer's weights so for the teacher and the student.
            if device["dequantised"] and not self.device.is_cpu:
                device["dequantised"] = self.counts.quantisable // self.counts.layers * self.itemsize
            device["prefix"] += min(
                int(self.config.distill.context_cache_gib * 2**30), self._prefix_bytes(sum(self.workload.contexts))
            )
        return self._finish("train", device + own, host + own_host)

    def _peak(self, job: Pass) -> dict[str, int]:
        return self.tracer.peak(replace(job, mlp_tile=self.config.model.mlp_tile))

    def _loss(self) -> str:
        if self.config.method != "distill":
            return "ce"
        return "kl" if self.config.distill.targets == "hidden" else "ce"

    def _frozen(self, name: str, *, trained: bool) -> Phase | None:
        """The largest moment of forwards without a gradient: contexts, teaching, questions with and without them."""
        device, host = self._base(training=trained)
        if trained:
            own, own_host, _ = self._trained()
            device, host = device + own, host + own_host
        moments = [self._ask(ask, in_context=not trained) for ask in self.workload.asked]
        if not moments and not trained and self._is_mapped() and self.config.distill.targets == "hidden":
            # What is mapped from a file takes memory where it is read: not the head, of the embeddings a few rows.
            outside = self.counts.parameters - self.counts.in_layers
            device["base"] -= self.counts.head * self.itemsize * (outside // self.counts.head)
        if not trained:
            w, e = self.workload, self.config.evaluate
            moments += [self._encode(max(w.contexts))] if w.contexts else []
            if self.config.method == "distill" and w.sequences:
                longest = tuple(sorted(w.sequences)[-e.batch_size :])
                moments.append(self._ask(Ask(max(w.contexts, default=0), longest), in_context=True, loss="none"))
        if not moments:
            return None
        moment = max(moments, key=lambda m: m.total())
        if self.config.model.prefix == "host" and not self.device.is_cpu:
            host["prefix"] += moment["prefix"]
            moment["prefix"] = 2 * moment["prefix"] // self.counts.layers  # the layer at work and the next
        if not trained and self.config.has_host_layers:
            # Everything goes through one layer before the next: hidden states wait on the host, of the contexts' keys
            # and values there is one layer, unless answers are generated behind them.
            tokens = sum(self.workload.contexts) // self.sharing + sum(self.workload.sequences)
            host["live_layer"] += tokens * self.counts.hidden * self.itemsize
            if not any(ask.new for ask in self.workload.asked):
                moment["prefix"] = self._prefix_bytes(sum(self.workload.contexts)) // self.counts.layers
        return self._finish(name, device + moment, host)

    def _is_mapped(self) -> bool:
        return self.device.is_cpu and self.config.model.quantization != "none"

    def _encode(self, tokens: int) -> Counter[str]:
        trace = self._peak(Pass((tokens,), 0, capture=True, ranks=self.sharing))
        prefix = int(2 * self.counts.layers * self.kv_width * self.itemsize * tokens)
        return Counter(prefix=self._prefix_bytes(tokens), live_layer=sum(trace.values()) - prefix)

    def _ask(self, ask: Ask, *, in_context: bool, loss: str = "ce") -> Counter[str]:
        size = self.config.evaluate.batch_size
        ask = replace(ask, lengths=tuple(sorted(ask.lengths)[-size:]))  # where the planner tries a smaller batch
        ranks = self.sharing if in_context and ask.context else 1
        trace = self._peak(Pass(ask.lengths, sum(ask.lengths), loss="none" if ask.new else loss, ranks=ranks))
        found = Counter(live_layer=trace.get(LIVE, 0), logits=trace.get(LOGITS, 0))
        if in_context:
            found["prefix"] = self._prefix_bytes(ask.context)
        if ask.new:
            width = self.kv_width * ranks if ranks > 1 else self.counts.kv_width  # of all ranks' sequences
            found["decode_cache"] = int(ask.cache_tokens * 2 * width * self.itemsize * self.counts.layers)
            vocabulary = self.counts.head // self.counts.hidden
            found["logits"] = len(ask.lengths) * vocabulary * (self.itemsize + 4)
        return found

    def _prefix_bytes(self, tokens: int) -> int:
        """Keys and values of a context on a rank; as int8 with a float32 scale for each vector of a head."""
        c = self.counts
        numbers = int(2 * c.layers * self.kv_width * tokens)
        if self.config.model.prefix == "int8":
            return numbers + 4 * numbers // c.head_size
        return numbers * self.itemsize

    def teacher_store(self) -> int:
        """Bytes on disk of the teacher's targets."""
        d, positions = self.config.distill, sum(self.workload.targets)
        if self.config.method != "distill" or d.teacher != "stored":
            return 0
        return positions * (self.counts.hidden * self.itemsize if d.targets == "hidden" else d.top_k * 8)


SHARED_MEMORY = 66 * 2**20  # DeepSpeed's buffers for all-reduce, of each process on one CPU, mapped by all of them


def sharing_ranks(config: Config, ranks: int) -> int:
    """How many ranks encode a context together."""
    return ranks if config.model.sequence_parallel == "ulysses" else 1


def largest_share(counts: Counts, ranks: int) -> float:
    """Of the key/value heads, and so of attention, what the rank with the most of them has."""
    heads = counts.kv_width // counts.head_size
    check_heads(heads, ranks)
    return deal(heads, ranks)[0] / heads


def offloaded_layers(config: Config, counts: Counts) -> int:
    """Decoder layers whose inputs wait in host memory between forward and backward."""
    t = config.train
    if not t.activation_offloading:
        return 0
    return counts.layers if t.activation_checkpointing == "full" else min(t.activation_checkpointing, counts.layers)


def base_bytes(counts: Counts, config: Config) -> tuple[int, int]:
    """(weights, scales): linears of the decoder layers in the base's quantisation, all else in model.dtype.

    nf4 with double quantisation: 4 bits a weight, one 8-bit absmax for 64 weights, one float32 for 256 of those
    (Dettmers et al. 2023, arXiv 2305.14314). int8: a byte a weight and a float32 a row.
    """
    itemsize, kind, linear = ITEMSIZE[config.model.dtype], config.model.quantization, counts.quantisable
    rest = (counts.parameters - linear) * itemsize
    if kind == "nf4":
        return rest + linear // 2, linear // 64 + 4 * linear // (64 * 256)
    if kind == "int8":
        return rest + linear, 4 * counts.quantisable_rows
    return rest + linear * itemsize, 0


def optimizer_kind(config: Config) -> str:
    kind, peft = config.train.optimizer, config.peft
    if kind != "auto":
        return kind
    return "bias_adamw" if peft.kind == "bitfit" and not peft.train_embeddings else "adamw"


def paged_bytes(config: Config, counts: Counts, share: int) -> int:
    """Of m and v, what bitsandbytes has in unified memory: tensors of 100,000 elements and more, scales apart.

    ZeRO gives the optimizer flat parts of many parameters.
    """
    kind = optimizer_kind(config)
    if not kind.startswith("paged_"):
        return 0
    sizes = [share] if config.deepspeed.zero_stage else counts.trained_sizes
    return sum(n for n in sizes if n >= 100_000) * (2 if kind.endswith("_8bit") else 8)


def optimizer_state_bytes(config: Config, counts: Counts, share: int) -> int:
    """m and v: float32, or 8-bit codes with a float32 scale for 256 of them."""
    kind = optimizer_kind(config)
    if not kind.endswith("_8bit"):
        return 8 * share
    eight_bit = share
    if kind in BITSANDBYTES and config.deepspeed.zero_stage == 0:  # bitsandbytes leaves small tensors in float32
        eight_bit = sum(n for n in counts.trained_sizes if n >= 4096)
    return int(eight_bit * (2 + 2 * 4 / 256)) + 8 * (share - eight_bit)
