"""What moved between two results of the benchmarks, beyond noise.

python benchmarks/compare.py NEW [KEPT] [--all] [--fail]

NEW and KEPT are results of benchmarks/run_all.py or rows of one script; KEPT is docs/benchmarks/kept-cuda.json, or
kept-cpu-avx512_bf16.json, -avx512, -avx2 (the instructions that fastft uses here), where it is not named. Rows are the
same measurement where name, impl, shape, dtype and device are. Exit code 0; with --fail 1 where a row of ours became
slower.

**What is compared.** Machines are shared and differ from hour to hour, and one slow hour hits all implementations of a
case alike: they run in alternating rounds. So a row's figure is the logarithm of its median over the middle one of the
case's other rows that are not ours (the yardstick). A row without any is compared in milliseconds, and only between
machines of the same name: those of another machine model say nothing about the code. What was measured while others
took more than BUSY of the cores is not compared at all: threads that wait for each other then lose far more than that.

**What is noise.** The difference d of two figures has the variance

    v = sum over the row and its yardstick, new and kept, of  (pi/2) s^2 / n  +  t^2

s = ln(p80 / p20) / 1.68 is the standard deviation of one round (20th and 80th percentile of a normal are 1.68 apart), n
the rounds, pi/2 what a median costs over a mean. t is what differs between processes and not between the rounds of one:
pages, clocks, what the neighbours do for a minute. A row moved where |d| > Z sqrt(v). The same implementation of a case
in several sizes is also judged as a whole, by the mean of its d weighted with 1 / v: what slows a kernel down slows it
down in every size, and the mean of three tells 1.3 from noise where one alone does not.

T and Z are measured on repeated runs, see "Noise" in docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

ROOT = Path(__file__).resolve().parent.parent
OURS = "fastft"
T, Z = 0.04, 3.0
BUSY = 0.1
ROUNDS = 7  # of rows that do not say
FILE_WIDTH = 120  # columns of what is printed where no terminal has a width
FIGURES = ("kept ms", "new ms", "new / kept", "noise")

Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Change:
    """A row in both results. ratio: its time now over what it was, by the yardstick; error: of its logarithm."""

    key: Key
    before_ms: float
    after_ms: float
    ratio: float
    error: float
    by: str  # "peers" or "ms"

    @property
    def moved(self) -> bool:
        return abs(math.log(self.ratio)) > Z * self.error

    @property
    def is_ours(self) -> bool:
        return self.key[1].startswith(OURS)


def kept(device: str) -> Path:
    """The result that the repository keeps for a kind of device: for a CPU, one for each set of instructions."""
    from fastft import ops  # with torch, which comparing two files does without

    kind = f"cpu-{ops.cpu_capability() or 'none'}" if device == "cpu" else device
    return ROOT / "docs" / "benchmarks" / f"kept-{kind}.json"


def read(path: Path) -> dict[Key, dict]:
    """Rows without an error, by what they measure."""
    found = json.loads(path.read_text())
    if isinstance(found, list):
        rows = found
    elif "parts" in found:
        rows = [row for part in found["parts"].values() for row in part["rows"]]
        for part in found["parts"].values():
            for row in part["rows"]:
                row["busy_elsewhere"] = part["busy_elsewhere"]
    else:
        rows = found["rows"]
    return {key(row): row for row in rows if not row.get("error")}


def key(row: dict) -> Key:
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    return row["name"], row["impl"], shape, row["dtype"], row["device"]


def changes(new: dict[Key, dict], old: dict[Key, dict]) -> tuple[list[Change], dict[Key, str]]:
    """What can be compared; and what stands in both and cannot, with the reason."""
    cases: dict[tuple, list[Key]] = defaultdict(list)
    left_out = {}
    for k in sorted(new.keys() & old.keys()):
        busy = max(rows[k].get("busy_elsewhere") or 0.0 for rows in (new, old))
        if busy > BUSY:
            left_out[k] = "something else ran on the machine meanwhile"
        else:
            cases[k[:1] + k[2:]].append(k)
    found = []
    for members in cases.values():
        for k in members:
            others = [o for o in members if o != k and not o[1].startswith(OURS)]
            if not others and not k[1].startswith(OURS):
                continue  # a peer alone is the yardstick of ours, and has none itself
            if not others and new[k]["device_name"] != old[k]["device_name"]:
                left_out[k] = "another machine, and no peer to compare with"
                continue
            d = figure(new, k, others) - figure(old, k, others)
            error = math.sqrt(variance(new, k, others) + variance(old, k, others))
            times = old[k]["median_ms"], new[k]["median_ms"]
            found.append(Change(k, *times, math.exp(d), error, "peers" if others else "ms"))
    return found, left_out


def differing(keys: list[Key]) -> dict[str, set[str]]:
    """name of a case -> the words of its shapes, and its dtypes, in which its rows differ."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, _, shape, dtype, _ in keys:
        for word in (*shape.split(), dtype):
            found[name][word.partition("=")[0] if "=" in word else "dtype"].add(word)
    return {name: set().union(*(w for w in words.values() if len(w) > 1)) for name, words in found.items()}


def by_kernel(found: list[Change]) -> list[Change]:
    """The changes of one implementation in several sizes as one, with the mean of its times."""
    groups: dict[tuple, list[Change]] = defaultdict(list)
    for c in found:
        groups[c.key[:2] + c.key[3:] + (c.by,)].append(c)
    pooled = []
    for (name, impl, dtype, device, by), own in groups.items():
        if len(own) > 1:
            weights = [c.error**-2 for c in own]
            d = sum(w * math.log(c.ratio) for w, c in zip(weights, own, strict=True)) / sum(weights)
            times = (statistics.geometric_mean(getattr(c, side) for c in own) for side in ("before_ms", "after_ms"))
            key = (name, impl, f"all {len(own)} sizes", dtype, device)
            pooled.append(Change(key, *times, math.exp(d), sum(weights) ** -0.5, by))
    return pooled


def figure(rows: dict[Key, dict], row: Key, others: list[Key]) -> float:
    """ln(the row's median over its yardstick, the middle one of the others)."""
    times = [math.log(rows[o]["median_ms"]) for o in others]
    return math.log(rows[row]["median_ms"]) - (statistics.median(times) if times else 0.0)


def variance(rows: dict[Key, dict], row: Key, others: list[Key]) -> float:
    """Of `figure`; the middle of several others is taken for their mean."""
    own = [squared_error(rows[k]) for k in (row, *others)]
    return own[0] + (sum(own[1:]) / len(others) ** 2 if others else 0.0)


def squared_error(row: dict) -> float:
    s = math.log(row["p80_ms"] / row["p20_ms"]) / 1.68
    return math.pi / 2 * s**2 / (row.get("rounds") or ROUNDS) + T**2


def report(new: Path, old: Path, everything: bool = False) -> list[Change]:
    """Print what moved (or with `everything` all rows), and what could not be compared; returns what moved."""
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    if not old.exists():
        console.print(f"nothing is kept in {old}; make bench KEEP=1 keeps this result")
        return []
    after, before = read(new), read(old)
    found, left_out = changes(after, before)
    kernels = by_kernel(found)
    moved = [c for c in (*kernels, *found) if c.moved]
    told_apart = differing([*after, *before])
    table = Table("case", "implementation", *(Column(name, justify="right") for name in FIGURES), box=None)
    for c in sorted((*kernels, *found) if everything else moved, key=lambda c: -abs(math.log(c.ratio))):
        name, impl, shape, dtype, _ = c.key
        words = [word for word in (*shape.split(), dtype) if word in told_apart[name]]
        where = f"{name}, {shape if c in kernels else ' '.join(words)}".removesuffix(", ")
        color = ("red" if c.ratio > 1 else "green") if c.moved and c.is_ours else ""
        times = (f"{c.before_ms:.3f}", f"{c.after_ms:.3f}", f"{c.ratio:.2f} by {c.by}", f"{math.exp(Z * c.error):.2f}")
        table.add_row(where, impl, *times, style=color)
    if table.row_count:
        console.print(table)
    machines = [sorted({row["device_name"] for row in rows.values()}) for rows in (before, after)]
    if found and machines[0] != machines[1]:
        console.print(f"kept on {', '.join(machines[0])}: compared by the ratio to peers alone")
    for reason, count in Counter(left_out.values()).items():
        console.print(f"{count} rows not compared: {reason}")
    rows, whole = sum(c.moved for c in found), sum(c.moved for c in kernels)
    console.print(
        f"{rows} of {len(found)} rows and {whole} of {len(kernels)} kernels in all their sizes moved beyond noise; "
        f"{len(after.keys() - before.keys())} rows are new"
    )
    return moved


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("new", type=Path, metavar="NEW")
    p.add_argument("kept", type=Path, nargs="?", metavar="KEPT")
    p.add_argument("--all", action="store_true", help="list rows that did not move as well")
    p.add_argument("--fail", action="store_true", help="exit code 1 where a row of ours became slower")
    args = p.parse_args()
    device = next(iter(read(args.new)))[4]
    moved = report(args.new, args.kept or kept(device), everything=args.all)
    return int(args.fail and any(c.is_ours and c.ratio > 1 for c in moved))


if __name__ == "__main__":
    raise SystemExit(main())
