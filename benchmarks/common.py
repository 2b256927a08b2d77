"""What every benchmark shares: arguments, alternating rounds, peers, peaks, one table, JSON.

A benchmark describes cases; a case has several implementations of the same work, ours and its peers, each a function
that does the whole of it and returns tensors to compare. Outputs are compared before anything is timed, rounds
alternate between implementations so that a slow minute of the machine hits all of them, and medians are given
with the 20th and 80th percentile.

JSON rows: name, impl, shape, dtype, device, median_ms, p20_ms, p80_ms, peak_memory_bytes, ratio_to_peer,
roofline_fraction, and rounds, device_name, torch, error. ratio_to_peer is our median over that row's (in rows whose
impl starts with "fastft": that row's over the fastest peer's): below 1 we are faster.
roofline_fraction = max(bytes / bandwidth, flops / peak) / time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastft.ops import products
from fastft.plan import hardware

OURS = "fastft"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass
class Case:
    """The same work by several implementations."""

    name: str
    shape: dict[str, int]
    implementations: dict[str, Callable[[], tuple[torch.Tensor, ...]]]
    bytes: float  # least number of bytes that the work moves
    flops: float = 0.0
    reference: Callable[[], tuple[torch.Tensor, ...]] | None = None  # in float32 or better; else the first peer
    tolerance: dict[str, float] = field(default_factory=dict)  # per implementation, relative; else by dtype
    not_peers: tuple[str, ...] = ()  # rows shown for orientation: part of the work, or other work
    units: dict[str, int] = field(
        default_factory=dict
    )  # times the work that one call does (default 1); times are of one


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    # Where bfloat16 products are torch's own loops, a peer's call takes minutes.
    slow = not torch.cuda.is_available() and torch.bfloat16 in products.WIDENED
    p.add_argument("--dtype", default="float32" if slow else "bfloat16", choices=list(DTYPES))
    p.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    p.add_argument("--rounds", type=int, help="timed rounds (default 7 on the CPU, 30 on CUDA)")
    p.add_argument("--only", nargs="+", default=[""], help="only cases whose name contains one of these")
    p.add_argument("--no-compile", action="store_true", help="leave out the torch.compile peers")
    return p


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        line = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
        return f"{line.split(':')[1].strip()}, {torch.get_num_threads()} threads"
    except (OSError, StopIteration):
        return f"CPU, {torch.get_num_threads()} threads"


def peaks(device: str, dtype: torch.dtype) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s) by `fastft.plan.hardware`: a GPU's from its table, a CPU's measured now; None if unknown."""
    name = str(dtype).removeprefix("torch.")
    found = hardware.this_device(name) if device == "cuda" else hardware.device("cpu", dtype=name)
    if found is None or (device == "cuda" and name == "float64"):  # the table has no rate for float64
        return None
    return found.flops(name), found.bandwidth


class Clock:
    """Times a round of calls; on CUDA by events, synchronising once a round, with the L2 cache flushed between."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            l2 = torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(4 * l2, dtype=torch.uint8, device="cuda")

    def round(self, functions: dict[str, Callable[[], object]]) -> dict[str, float]:
        """Milliseconds of one call of each."""
        if not self.cuda:
            out = {}
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                out[name] = (time.perf_counter() - start) * 1e3
            return out
        events = {}
        for name, function in functions.items():
            self.flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def peak_memory(function: Callable[[], object], device: str) -> int | None:
    """Growth of the process's (CPU) or the allocator's (CUDA) high-water mark over one call; None if unknown."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None

    def high_water() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) * 1024

    # Free memory that the allocator keeps would be reused unseen. musl and others have no malloc_trim.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
    before = high_water()
    function()
    return high_water() - before


def relative_error(ours: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...]) -> float:
    """Largest error of any output, relative to that output's largest element."""
    worst = 0.0
    for a, b in zip(ours, truth, strict=True):
        scale = b.double().abs().max().clamp_min(1e-30)
        worst = max(worst, ((a.double() - b.double()).abs().max() / scale).item())
    return worst


def percentile(values: list[float], q: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, round(q * (len(values) - 1)))]


def run_case(case: Case, args, ceiling) -> list[dict]:
    dtype = DTYPES[args.dtype]
    base = {
        "name": case.name,
        "shape": case.shape,
        "dtype": args.dtype,
        "device": args.device,
        "device_name": device_name(args.device),
        "torch": torch.__version__,
    }
    truth = case.reference() if case.reference else None
    alive: dict[str, Callable] = {}
    errors: dict[str, str] = {}
    for impl, function in case.implementations.items():
        try:
            for _ in range(2):  # warm up; torch.compile compiles here
                result = function()
            if truth is None:
                truth = result
            if impl not in case.not_peers:
                error = relative_error(result, truth)
                allowed = case.tolerance.get(impl, 8 * torch.finfo(dtype).eps + 1e-5)
                if not error <= allowed:
                    raise ValueError(f"result is off by {error:.2e}, allowed {allowed:.2e}")
            alive[impl] = function
        except Exception as problem:
            errors[impl] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:160]}"
    truth = result = None  # large, and alive they would count as resident below
    memory = {impl: peak_memory(function, args.device) for impl, function in alive.items()}

    rounds = args.rounds or (30 if args.device == "cuda" else 7)
    clock = Clock(args.device)
    times: dict[str, list[float]] = {impl: [] for impl in alive}
    order = list(alive)
    for r in range(rounds):
        # Each round starts with another implementation: nobody always runs after the same one.
        turned = order[r % len(order) :] + order[: r % len(order)] if order else []
        for impl, ms in clock.round({i: alive[i] for i in turned}).items():
            times[impl].append(ms / case.units.get(impl, 1))

    median = {impl: statistics.median(ms) for impl, ms in times.items()}
    peers = [m for impl, m in median.items() if not impl.startswith(OURS) and impl not in case.not_peers]
    rows = []
    for impl in case.implementations:
        row = {**base, "impl": impl, "error": errors.get(impl)}
        if impl in alive:
            seconds = median[impl] / 1e3
            if impl.startswith(OURS):
                ratio = median[impl] / min(peers) if peers else None
            else:
                ratio = median[OURS] / median[impl] if OURS in median else None
            fraction = None
            if ceiling and impl not in case.not_peers:
                fraction = max(case.flops / ceiling[0], case.bytes / ceiling[1]) / seconds
            row |= {
                "median_ms": median[impl],
                "p20_ms": percentile(times[impl], 0.2),
                "p80_ms": percentile(times[impl], 0.8),
                "rounds": rounds,
                "peak_memory_bytes": memory[impl],
                "ratio_to_peer": ratio,
                "roofline_fraction": fraction,
                "gb_per_s": case.bytes / seconds / 1e9,
                "tflop_per_s": case.flops / seconds / 1e12,
            }
        rows.append(row)
    return rows


COLUMNS = ["impl", "median_ms", "p20", "p80", "MiB", "GB/s", "TFLOP/s", "%roofline", "ours/this"]


def print_rows(rows: list[dict]) -> None:
    """One table per case, in plain text."""
    by_name: dict[str, list[dict]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    for name, group in by_name.items():
        first = group[0]
        shape = " ".join(f"{k}={v}" for k, v in first["shape"].items())
        print(f"\n{name}, {shape}, {first['dtype']}, {first['device_name']}, torch {first['torch']}")
        table = [COLUMNS]
        for row in group:
            if row["error"]:
                table.append([row["impl"], "-", "-", "-", "-", "-", "-", "-", row["error"]])
                continue

            def number(key, form, scale=1.0, row=row):
                return "-" if row[key] is None else format(row[key] * scale, form)

            table.append(
                [
                    row["impl"],
                    number("median_ms", ".3f"),
                    number("p20_ms", ".3f"),
                    number("p80_ms", ".3f"),
                    number("peak_memory_bytes", ".0f", 2.0**-20),
                    number("gb_per_s", ".1f"),
                    number("tflop_per_s", ".3f"),
                    number("roofline_fraction", ".1f", 100),
                    number("ratio_to_peer", ".3f"),
                ]
            )
        widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS) - 1)]
        for line in table:
            cells = [line[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(line[1:-1], widths[1:], strict=True)]
            print("  " + "  ".join([*cells, line[-1]]))


def main(args, cases: list[Callable[[], Case]]) -> int:
    """Runs the cases one after the other (each is built when its turn comes: inputs are large)."""
    ceiling = peaks(args.device, DTYPES[args.dtype])
    rows: list[dict] = []
    failed = False
    for build in cases:
        case = build()
        if not any(word in case.name for word in args.only):
            continue
        new = run_case(case, args, ceiling)
        print_rows(new)
        rows += new
        failed |= any(row["impl"] == OURS and row["error"] for row in new)
        if "compile" in case.implementations:
            torch.compiler.reset()  # dynamo compiles one function for eight shapes and then runs it as it is
        del case
        gc.collect()
        if args.json:  # after every case: what is done stays if a later one is cut off
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(rows, indent=1))
    return 1 if failed else 0
