"""What moved between two results of the benchmarks, beyond noise.

python benchmarks/compare.py NEW [KEPT] [--all] [--fail]

NEW and KEPT are results of benchmarks/run_all.py or rows of one script; KEPT is docs/benchmarks/kept-cpu.json (or
-cuda.json) where it is not named. Rows are the same measurement where name, impl, shape, dtype and device are. Exit code 0;
with --fail 1 where a row of ours became slower.

**What is compared.** Machines are shared and differ from hour to hour, and one slow hour hits all implementations of a case
alike: they run in alternating rounds. So a row's figure is the logarithm of its median over the median of the case's
other rows that are not ours (the yardstick). A row without any is compared in milliseconds, and only between
machines of the same name: those of another machine model say nothing about the code.

**What is noise.** The difference d of two figures has the variance

    v = sum over the row and its yardstick, new and kept, of  (pi/2) s^2 / n  +  t^2

s = ln(p80 / p20) / 1.68 is the standard deviation of one round (20th and 80th percentile of a normal are 1.68 apart), n
the rounds, pi/2 what a median costs over a mean. t is what differs between processes and not between the rounds of one:
pages, clocks, what the neighbours do for a minute. A row moved where |d| > Z sqrt(v).

T and Z are measured, see "Noise" in docs/benchmarks/README.md: of repeated runs of the same code.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OURS = "fastft"
T, Z = 0.05, 3.0
ROUNDS = 7  # of rows that do not say

Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Change:
    """A row in both results: what its time is now over what it was, by the yardstick, and its standard error in log."""

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
    """The result that the repository keeps for a kind of device."""
    return ROOT / "docs" / "benchmarks" / f"kept-{device}.json"


def read(path: Path) -> dict[Key, dict]:
    """Rows without an error, by what they measure."""
    found = json.loads(path.read_text())
    if isinstance(found, list):
        rows = found
    elif "parts" in found:
        rows = [row for part in found["parts"].values() for row in part["rows"]]
    else:
        rows = found["rows"]
    return {key(row): row for row in rows if not row.get("error")}


def key(row: dict) -> Key:
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    return row["name"], row["impl"], shape, row["dtype"], row["device"]


def changes(new: dict[Key, dict], old: dict[Key, dict]) -> tuple[list[Change], list[Key]]:
    """What can be compared, and the keys of what stands in both and cannot: another machine and no yardstick."""
    cases: dict[tuple, list[Key]] = defaultdict(list)
    for k in new.keys() & old.keys():
        cases[k[:1] + k[2:]].append(k)
    found, incomparable = [], []
    for members in cases.values():
        for k in sorted(members):
            others = [o for o in members if o != k and not o[1].startswith(OURS)]
            if not others and new[k]["device_name"] != old[k]["device_name"]:
                incomparable.append(k)
                continue
            d = figure(new, k, others) - figure(old, k, others)
            v = variance(new, k, others) + variance(old, k, others)
            change = Change(
                k, old[k]["median_ms"], new[k]["median_ms"], math.exp(d), v**0.5, "peers" if others else "ms"
            )
            found.append(change)
    return found, incomparable


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
    """Print what moved; returns it."""
    console = Console()
    if not old.exists():
        console.print(f"nothing is kept yet in {old}: nothing to compare with (make bench KEEP=1 keeps a result)")
        return []
    after, before = read(new), read(old)
    found, incomparable = changes(after, before)
    moved = sorted((c for c in found if c.moved or everything), key=lambda c: -abs(math.log(c.ratio)))
    table = Table("name", "shape", "dtype", "impl", "kept ms", "new ms", "new / kept", "noise", title=None)
    for c in moved:
        name, impl, shape, dtype, _ = c.key
        color = ("red" if c.ratio > 1 else "green") if c.moved and c.is_ours else ""
        cells = (f"{c.before_ms:.3f}", f"{c.after_ms:.3f}", f"{c.ratio:.2f} by {c.by}", f"± {Z * c.error:.0%}")
        table.add_row(name, shape, dtype, impl, *cells, style=color)
    if moved:
        console.print(table)
    machines = {row["device_name"] for row in before.values()} - {row["device_name"] for row in after.values()}
    if machines:
        console.print(f"kept on another machine ({', '.join(sorted(machines))}): compared by ratio to peers alone")
    for k in incomparable:
        console.print(f"not compared, another machine and no peer: {', '.join(k)}")
    count = sum(c.moved for c in found)
    alone = len(after.keys() - before.keys())
    console.print(
        f"{count} of {len(found)} rows moved beyond noise"
        + (f"; {alone} rows are new" if alone else "")
        + f" (kept: {old.name})"
    )
    return [c for c in found if c.moved]


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
