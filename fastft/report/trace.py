"""What a trace of torch.profiler says about a step: its phases, operators, memory and communication.

A trace is Chrome's format: nested intervals for each thread, kernels and copies for each stream of a GPU, allocations
as instants. The time of a step is dealt out so that the parts add up to it:

    on a CPU   each moment of the thread that takes the steps belongs to the innermost range or operator at that moment
    on a GPU   each moment belongs to the kernel that runs, by the range in which it was launched; to a copy or a
               collective where no kernel runs; and where nothing does, it is idle, in the phase in which the host is

An operator of backward belongs to the module whose forward made it: both have the sequence number of the autograd node.
"""

from __future__ import annotations

import bisect
import functools
import gc
import gzip
import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastft.phases import PHASES, PREFIX
from fastft.report.floors import is_counted

MICRO = 1e-6  # a trace counts in microseconds
TOP_OPERATORS = 25
MOST_COPIES = 10
TIMELINE_POINTS = 400
STALL_SECONDS = 0.005
READ_PAUSE = 50e-6  # between reads in a loop

# Kinds of operators: the first whose pattern a name fits.
KINDS = {
    "communication": r"^(c10d|gloo|nccl|mpi|symm_mem)|record_param_comms|nccl|deepspeed",
    "fastft kernels": r"^fastft::",
    "synchronisation": r"::(item|_local_scalar_dense|is_nonzero|equal)$|Synchronize$",
    "host link": r"^Memcpy (HtoD|DtoH)",
    "matrix products": r"::(mm|addmm_?|bmm|baddbmm_?|mv|addmv_?|dot|linear|matmul|einsum|_scaled_mm|mkldnn_linear\w*)$",
    "attention": r"attention|flash|varlen",
    "copies": r"::(copy_|_to_copy|to|clone|contiguous|cat|stack|fill_|zero_|zeros\w*|repeat\w*|pin_memory)$"
    r"|Memcpy|Memset",
    "views, allocation": r"::(view|_unsafe_view|reshape|transpose|t|permute|expand|slice|select|split\w*|narrow|chunk|"
    r"as_strided|unsqueeze|squeeze|detach\w*|alias|flatten|unflatten|unbind|empty\w*|new_\w+|resize_|set_)$",
}
ELEMENTWISE, PYTHON, IDLE = "elementwise, reductions", "Python, no operator", "device idle"
COMMUNICATION = re.compile(KINDS["communication"])
# Of DeepSpeed's ranges: those that send, receive or wait, and those that cut, keep track of and free parameters.
GATHERS = re.compile(r"gather|fetch_sub_module|reduce|scatter|wait|broadcast", re.IGNORECASE)
PARTITIONS = re.compile(r"partition|release|free_param|ipg|coordinator|offload|Init\.", re.IGNORECASE)
ZERO = "ZeRO's bookkeeping"


class Context(NamedTuple):
    """What a moment belongs to: a phase of the step, and a kind of module within it, if any."""

    phase: str
    block: str | None = None


OUTSIDE, OTHER = Context("outside"), Context("other")


@dataclass(slots=True)
class Event:
    """An interval of a thread or stream; seconds. seconds_self: without what is nested in it."""

    name: str
    category: str
    start: float
    end: float
    thread: Any
    args: dict[str, Any]
    context: Context = OTHER
    seconds_self: float = 0.0

    @property
    def is_range(self) -> bool:
        return self.category == "user_annotation"

    @property
    def is_operator(self) -> bool:
        """Autograd's nodes have names without a namespace: what is their own is Python, or the engine."""
        return self.category == "cpu_op" and "::" in self.name and not self.name.startswith("autograd::engine::")


@dataclass
class Trace:
    """The events of a file, by what they are."""

    threads: dict[Any, list[Event]] = field(default_factory=lambda: defaultdict(list))
    device: list[Event] = field(default_factory=list)  # kernels, copies and fills of a GPU
    allocations: list[tuple[float, int, int, int]] = field(default_factory=list)  # (seconds, address, bytes, device)
    steps: list[Event] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Trace:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return cls.parse(json.loads(file.read())["traceEvents"])

    @classmethod
    def parse(cls, records: Iterable[dict[str, Any]]) -> Trace:
        trace = cls()
        for record in records:
            category, args = record.get("cat", ""), record.get("args", {})
            if record["name"] == "[memory]":
                where = args.get("Device Id", -1) if args.get("Device Type") else -1
                trace.allocations.append((record["ts"] * MICRO, args["Addr"], args["Bytes"], where))
            if record["ph"] != "X":
                continue
            start = record["ts"] * MICRO
            thread = (record["pid"], record["tid"])
            event = Event(record["name"], category, start, start + record["dur"] * MICRO, thread, args)
            if category in ("kernel", "gpu_memcpy", "gpu_memset"):
                trace.device.append(event)
            elif category in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
                trace.threads[thread].append(event)
            if category == "user_annotation" and event.name == f"{PREFIX}step":
                trace.steps.append(event)
        trace.allocations.sort()
        return trace


class Segment(NamedTuple):
    """A moment of the step's thread and what it belongs to; event: the innermost one."""

    start: float
    end: float
    event: Event


def analyse(trace: Trace, *, rank: int = 0) -> dict[str, Any]:
    """The figures of a trace, all in seconds and bytes of an average step; empty where it holds no whole step."""
    steps = trace.steps
    if not steps:
        return {}
    count, main = len(steps), steps[0].thread
    blocks: dict[int, str] = {}  # of a sequence number
    segments = [s for s in _segments(trace.threads[main], blocks) if s.event.context != OUTSIDE]
    others = [t for t in trace.threads if t != main]
    for thread in others:  # a GPU's backward runs in threads of its own
        for _ in _segments(trace.threads[thread], blocks, outermost=Context("backward")):
            pass
    time, kinds, python = Counter(), Counter(), Counter()
    if trace.device:
        for start, end, context, kind in _device_segments(trace, segments):
            time[context] += end - start
            kinds[kind] += end - start
    for segment in segments:
        seconds, event = segment.end - segment.start, segment.event
        if not event.is_operator and not event.category.startswith("cuda"):
            python[event.context.phase] += seconds
        if not trace.device:
            time[event.context] += seconds
            kinds[_kind_of(event)] += seconds
    phases = Counter()
    for context, seconds in time.items():
        phases[context.phase] += seconds
    return {
        "rank": rank,
        "device": "cuda" if trace.device else "cpu",
        "steps": [step.end - step.start for step in steps],
        "step_s": sum(step.end - step.start for step in steps) / count,
        "phases": {name: phases[name] / count for name in PHASES if phases[name]},
        "blocks": [
            {"phase": phase, "block": block, "seconds": seconds / count}
            for (phase, block), seconds in sorted(time.items(), key=lambda item: -item[1])
            if block
        ],
        "kinds": {kind: seconds / count for kind, seconds in kinds.most_common()},
        "python": {phase: seconds / count for phase, seconds in python.most_common()},
        "stalls": _stalls(segments, count),
        "synchronisations": _synchronisations(trace, segments, count),
        "copies": _copies(trace, main, count),
        "operators": _operators(trace, main, count),
        "calls": _calls(trace, main, count),
        "communication": _communication(trace, phases["communication"], count),
        "host_link": _host_link(trace, count),
        "memory": _memory(trace, segments),
    }


def _segments(events: list[Event], blocks: dict[int, str], outermost: Context = OUTSIDE) -> Iterator[Segment]:
    """Every moment of a thread with its innermost event; fills in the events' contexts and own seconds."""
    stack: list[Event] = []
    cursor = 0.0

    def until(moment: float) -> Iterator[Segment]:
        nonlocal cursor
        if stack and moment > cursor:
            stack[-1].seconds_self += moment - cursor
            yield Segment(cursor, moment, stack[-1])
        cursor = max(cursor, moment)

    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        while stack and stack[-1].end <= event.start:
            yield from until(stack[-1].end)
            stack.pop()
        yield from until(event.start)
        if stack:
            event.end = min(event.end, stack[-1].end)  # clocks of ranges and operators differ by less than 1 us
        event.context = _context(event, stack[-1].context if stack else outermost, blocks)
        cursor = event.start
        stack.append(event)
    while stack:
        yield from until(stack[-1].end)
        stack.pop()


def _context(event: Event, parent: Context, blocks: dict[int, str]) -> Context:
    """What an event inside of `parent` belongs to; remembers which module made which autograd node."""
    name, sequence = event.name, event.args.get("Sequence number", -1)
    if parent == OUTSIDE and name != f"{PREFIX}step":  # an evaluation between steps goes through the same modules
        return OUTSIDE
    if event.is_range and name.startswith(PREFIX):
        return _range_context(name.removeprefix(PREFIX), parent)
    if name.startswith("autograd::engine::evaluate_function"):
        return Context(parent.phase, blocks.get(sequence, parent.block))
    if event.is_range and name.startswith("deepspeed."):
        if GATHERS.search(name):
            return Context("communication")
        return Context(parent.phase, ZERO) if PARTITIONS.search(name) else parent
    if kind_of(name) == "communication":
        return Context("communication")
    if sequence >= 0 and parent.phase != "backward":
        block = "loss" if parent.phase == "loss" else parent.block
        if block:
            blocks[sequence] = block
    return parent


def _range_context(name: str, parent: Context) -> Context:
    kind, _, block = name.partition(".")
    if name == "step":
        return OTHER
    if parent.phase == "sample":  # generation goes through the same modules
        return Context("sample", block or None)
    if kind == "frozen":
        return Context("teach", block)
    if kind == "block":
        return Context("recompute" if parent.phase == "backward" else parent.phase, block)
    return Context(name)


def _kind_of(event: Event) -> str:
    return kind_of(event.name) if event.is_operator or event.category.startswith("cuda") else PYTHON


@functools.cache
def kind_of(name: str) -> str:
    """The kind of an operator, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), ELEMENTWISE)


def _device_segments(trace: Trace, host: list[Segment]) -> Iterator[tuple[float, float, Context, str]]:
    """Every moment of the steps as (start, end, context, kind), by what the GPU does."""
    launched = {
        event.args["External id"]: event
        for events in trace.threads.values()
        for event in events
        if event.is_operator and "External id" in event.args
    }

    def rank(event: Event) -> int:  # kernels hide copies, copies hide collectives
        return 0 if COMMUNICATION.search(event.name) else 1 if event.category == "gpu_memcpy" else 2

    moments = sorted(
        [(e.start, 1, i) for i, e in enumerate(trace.device)] + [(e.end, 0, i) for i, e in enumerate(trace.device)]
    )
    starts = [segment.start for segment in host]
    for step in trace.steps:
        active: dict[int, Event] = {}
        cursor = step.start
        for moment, begins, i in [*moments, (step.end, 0, -1)]:
            now = min(max(moment, step.start), step.end)
            if now > cursor:
                if active:
                    event = max(active.values(), key=lambda e: (rank(e), e.start))
                    origin = launched.get(event.args.get("External id"))
                    context = origin.context if origin else OTHER
                    if COMMUNICATION.search(event.name):
                        context = Context("communication")
                    link = event.category == "gpu_memcpy" and kind_of(event.name)
                    yield cursor, now, context, link or kind_of(origin.name if origin else event.name)
                else:
                    at = max(0, bisect.bisect_right(starts, cursor) - 1)
                    while at < len(host) and host[at].start < now:
                        begin, end = max(cursor, host[at].start), min(now, host[at].end)
                        if end > begin:
                            yield begin, end, Context(host[at].event.context.phase, IDLE), IDLE
                        at += 1
                cursor = now
            if i >= 0 and begins:
                active[i] = trace.device[i]
            elif i >= 0:
                active.pop(i, None)


def _stalls(segments: list[Segment], count: int) -> list[dict[str, Any]]:
    """Long stretches of the step's thread in no operator, by where they are; those that phases explain left out."""
    found: dict[Any, list[float]] = defaultdict(list)
    operator = "the step's begin"
    for start, end, event in segments:
        if event.is_operator:
            operator = event.name
        elif end - start >= STALL_SECONDS and event.context.phase not in ("data", "communication"):
            found[event.context, operator].append(end - start)
    rows = [
        {
            "phase": context.phase,
            "block": context.block,
            "after": after,
            "seconds": sum(own) / count,
            "longest_s": max(own),
        }
        for (context, after), own in found.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def _synchronisations(trace: Trace, segments: list[Segment], count: int) -> dict[str, Any]:
    """Values that the host reads from tensors, with the stretches of Python between reads that follow each other."""
    found: dict[Any, Counter] = defaultdict(Counter)
    pause: float | None = None  # since the last read, while only views and short stretches of Python follow
    for start, end, event in segments:
        kind, seconds = _kind_of(event), end - start
        if kind == "synchronisation":
            found[event.context, event.name] += Counter(
                {
                    "calls": int(event.start == start and not event.name.endswith("::item")),
                    "seconds": seconds + (pause or 0.0),
                }
            )
            pause = 0.0
        elif pause is not None:
            follows = kind in (PYTHON, "views, allocation") and seconds < READ_PAUSE
            pause = pause + seconds if follows else None
    total = Counter()
    for own in found.values():
        total += own
    most = max(found, key=lambda key: found[key]["seconds"], default=(Context(""), ""))
    return {
        "calls": total["calls"] / count,
        "seconds": total["seconds"] / count,
        "name": most[1],
        "phase": most[0].phase,
        "block": most[0].block,
    }


def _copies(trace: Trace, main: Any, count: int) -> list[dict[str, Any]]:
    """Operators that copy, by what they copy and where, the longest first."""
    found: dict[Any, Counter] = defaultdict(Counter)
    for event in trace.threads[main]:
        if event.is_operator and event.context != OUTSIDE and kind_of(event.name) == "copies":
            found[event.name, _shape(event.args.get("Input Dims", [])), event.context] += Counter(
                {"calls": 1, "seconds": event.seconds_self}
            )
    rows = [
        {
            "name": name,
            "shape": dims,
            "phase": context.phase,
            "block": context.block,
            "calls": own["calls"] / count,
            "seconds": own["seconds"] / count,
        }
        for (name, dims, context), own in found.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:MOST_COPIES]


def _shape(inputs: list[Any]) -> tuple[int, ...]:
    """The shape of an operator's first tensor, of a list's largest one; () where it has none, or has one number."""
    for dims in inputs:
        if dims:
            return tuple(max(dims, key=math.prod) if isinstance(dims[0], list) else dims)
    return ()


def _operators(trace: Trace, main: Any, count: int) -> list[dict[str, Any]]:
    """The operators with the longest time of their own: on a GPU that of the kernels which they launched."""
    found: dict[str, Counter] = defaultdict(Counter)
    launched = {}
    for thread, events in trace.threads.items():
        for event in events:
            if not event.is_operator or event.context == OUTSIDE:
                continue
            launched[event.args.get("External id")] = event.name
            if thread == main or trace.device:
                found[event.name] += Counter(calls=1)
                found[event.name]["host"] += event.seconds_self
    for event in trace.device:
        found[launched.get(event.args.get("External id"), event.name)]["device"] += event.end - event.start
    place = "device" if trace.device else "host"
    rows = [
        {"name": name, "kind": kind_of(name), "calls": f["calls"] / count, "seconds": f[place] / count}
        for name, f in found.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:TOP_OPERATORS]


def _calls(trace: Trace, main: Any, count: int) -> list[dict[str, Any]]:
    """Calls whose floor can be counted (`report.floors`), by their inputs, and whole seconds of a call.

    Whole: with the operators that it calls; on a GPU of all kernels that these launched.
    """
    found: dict[tuple, list[float]] = defaultdict(list)
    for thread, events in trace.threads.items():
        if thread != main and not trace.device:
            continue
        seconds_of = _kernel_seconds(trace, events) if trace.device else lambda event: event.end - event.start
        for event in events:
            if event.context == OUTSIDE or not event.is_operator or not is_counted(event.name):
                continue
            shapes, types, scalars = (event.args.get(k, []) for k in ("Input Dims", "Input type", "Concrete Inputs"))
            if seconds := seconds_of(event):
                found[event.name, json.dumps(shapes), json.dumps(types), json.dumps(scalars)].append(seconds)
    rows = [
        {
            "name": name,
            **dict(zip(("shapes", "types", "scalars"), map(json.loads, inputs), strict=True)),
            "calls": len(own) / count,
            "seconds": sum(own) / len(own),
        }
        for (name, *inputs), own in found.items()
    ]
    return sorted(rows, key=lambda row: -row["calls"] * row["seconds"])


def _kernel_seconds(trace: Trace, events: list[Event]) -> Callable[[Event], float]:
    """Of an operator of this thread: seconds of the kernels that it and the operators within it launched."""
    durations: Counter[Any] = Counter()
    for event in trace.device:
        durations[event.args.get("External id")] += event.end - event.start
    operators = sorted((event for event in events if event.is_operator), key=lambda event: event.start)
    starts = [event.start for event in operators]
    until = [0.0, *itertools.accumulate(durations[event.args.get("External id")] for event in operators)]

    def seconds(event: Event) -> float:
        return until[bisect.bisect_left(starts, event.end)] - until[bisect.bisect_left(starts, event.start)]

    return seconds


def _communication(trace: Trace, exposed: float, count: int) -> dict[str, float]:
    """Seconds of collectives, and those of them in which the step waits for nothing else."""
    if trace.device:
        total = sum(e.end - e.start for e in trace.device if COMMUNICATION.search(e.name))
    else:
        intervals = [
            (e.start, e.end)
            for events in trace.threads.values()
            for e in events
            if e.context != OUTSIDE
            and any(step.start <= e.start <= step.end for step in trace.steps)
            and (
                (e.is_operator and kind_of(e.name) == "communication")
                or (e.is_range and e.name.startswith("deepspeed.") and GATHERS.search(e.name))
            )
        ]
        total = max(_union(intervals), exposed)
    return {"seconds": total / count, "exposed_s": exposed / count}


def _union(intervals: list[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _host_link(trace: Trace, count: int) -> dict[str, float]:
    """Copies between host and GPU: offloaded parameters and states."""
    copies = [e for e in trace.device if re.search(KINDS["host link"], e.name)]
    return {
        "seconds": sum(e.end - e.start for e in copies) / count,
        "bytes": sum(e.args.get("bytes", e.args.get("Bytes", 0)) for e in copies) / count,
    }


def _memory(trace: Trace, segments: list[Segment]) -> dict[str, Any]:
    """Bytes that the recorded steps allocate and hold, over time, and who holds them at the highest moment.

    Relative to the first step's begin: what is there before (weights, optimizer state) counts as 0.
    """
    if not trace.allocations or not segments:
        return {}
    places = Counter(place for *_, place in trace.allocations)
    device = max(places) if max(places) >= 0 else -1
    starts = [segment.start for segment in segments]
    owners: dict[int, tuple[Context, int]] = {}
    held: Counter[Context] = Counter()
    total, highest, at_peak, peak_s = 0, 0, {}, 0.0
    begin, end = trace.steps[0].start, trace.steps[-1].end
    timeline = []
    for moment, address, nbytes, place in trace.allocations:
        if place != device or not begin <= moment <= end:
            continue
        if nbytes > 0:
            at = bisect.bisect_right(starts, moment) - 1
            context = segments[at].event.context if at >= 0 else OTHER
            owners[address] = context, nbytes
            held[context] += nbytes
        elif address in owners:
            context, _ = owners.pop(address)
            held[context] += nbytes
        total += nbytes
        timeline.append((moment - begin, total))
        if total > highest:
            highest, at_peak, peak_s = total, dict(held), moment - begin
    owned = sorted(((c, n) for c, n in at_peak.items() if n > 0), key=lambda item: -item[1])
    return {
        "peak_bytes": highest,
        "peak_s": peak_s,
        "held": [{"phase": c.phase, "block": c.block, "bytes": n} for c, n in owned],
        "timeline": _thinned(timeline),
    }


def _thinned(points: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """At most TIMELINE_POINTS of them, the highest of each stretch."""
    size = -(-len(points) // TIMELINE_POINTS) or 1
    return [max(points[i : i + size], key=lambda p: p[1]) for i in range(0, len(points), size)]


def read(path: Path, rank: int) -> dict[str, Any]:
    """The figures of a trace file, read in a process of its own: here it would show in the peak of a CPU's memory."""
    command = [sys.executable, "-m", "fastft.report.trace", str(path), str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"fastft profile: {path} cannot be read: {done.stderr.strip()[-200:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    gc.disable()  # it would look through all that was read again and again, four fifths of the time of reading it
    print(json.dumps(analyse(Trace.read(Path(sys.argv[1])), rank=int(sys.argv[2]))))
