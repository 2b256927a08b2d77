"""Time and memory against size, a picture for each kernel with its peers, from a result of benchmarks/run_all.py.

python benchmarks/plots.py [RESULT] [--out docs/benchmarks/plots]

RESULT is docs/benchmarks/kept-cpu-avx512_bf16.json where it is not named. Lines are medians, bands the 20th to 80th
percentile of the rounds; memory is what a call needs beyond its inputs. Dashed and grey: part of the work alone, or
other work.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parent))
import compare

from fastft.report.figures import COLORS, INK, MARKERS, PAGE, STYLE, rendered

PARTIAL = (
    "three_products",
    "linear_cross_entropy",
    "frozen",
    "fastft_kernels",
    "fastft_products",
    "fastft_epilogue",
    "bfloat16",
    "fastft_32bit",
)
RESULT = compare.ROOT / "docs/benchmarks/kept-cpu-avx512_bf16.json"
OURS = {"color": COLORS[1], "linewidth": 1.8, "marker": "o", "zorder": 3}


@dataclass(frozen=True)
class Sweep:
    """Rows of one case at several sizes. size: of a row's shape; among: what else its shape must have."""

    case: str
    size: str
    label: str
    among: tuple[tuple[str, int], ...] = ()


ROWS = "rows of logits"
PASSES = ("forward", "forward+backward")
PICTURES = {
    "log_softmax_kl": [Sweep("log_softmax_kl forward+backward", "rows", ROWS)],
    "linear_log_softmax_kl": [Sweep("linear_log_softmax_kl forward+backward", "rows", ROWS)],
    "linear_cross_entropy": [Sweep("linear_cross_entropy forward+backward", "rows", ROWS)],
    "linear_topk_kl": [Sweep("linear_topk_kl forward+backward", "rows", ROWS)],
    "lora_linear": [
        Sweep("lora_linear forward+backward", "M", "tokens", (("N", 2048),)),
        Sweep("lora_linears, q k v forward+backward", "M", "tokens"),
        Sweep("lora_linear, nf4 weight forward+backward", "M", "tokens"),
    ],
    "bias_adamw": [
        Sweep("bias_adamw list, 32-bit state", "parameters", "parameters"),
        Sweep("bias_adamw list, 8-bit state", "parameters", "parameters"),
        Sweep("bias_adamw flat, 32-bit state", "parameters", "parameters"),
    ],
    "relu": [Sweep(f"relu {passes}", "tokens", "tokens of 28,672") for passes in PASSES],
    "rms_norm": [Sweep(f"rms_norm {passes}", "tokens", "tokens of 2,048", (("hidden", 2048),)) for passes in PASSES],
    "rotary": [Sweep(f"rotary {passes}", "tokens", "tokens of 9 and 3 heads", (("heads", 9),)) for passes in PASSES],
    "swiglu": [Sweep(f"swiglu {passes}", "tokens", "tokens of 1,536", (("width", 1536),)) for passes in PASSES],
    "attention": [
        Sweep("attention of a pack forward+backward", "tokens", "tokens in 8 sequences"),
        Sweep("attention behind a prefix forward", "context", "tokens of context"),
    ],
    "quantise_4bit": [
        Sweep("quantise_4bit", "rows", "rows of 2,048 weights"),
        Sweep("dequantise_4bit", "rows", "rows of 2,048 weights"),
    ],
}


def points(rows: list[dict], sweep: Sweep) -> dict[str, list[dict]]:
    """impl -> its rows of a sweep in order of size."""
    found = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["shape"].get(sweep.size, 0)):
        if row["name"] == sweep.case and all(row["shape"][key] == value for key, value in sweep.among):
            found[row["impl"]].append(row)
    return found


def draw(rows: list[dict], sweeps: list[Sweep]) -> Figure | None:
    """A row of panels, time and memory, for each sweep; None where no sweep has two sizes."""
    sweeps = [s for s in sweeps if len({row["shape"][s.size] for own in points(rows, s).values() for row in own}) > 1]
    if not sweeps:
        return None
    names = list(dict.fromkeys(impl for sweep in sweeps for impl in points(rows, sweep)))
    looks = {name: look(name, names) for name in names}
    figure = Figure(figsize=(PAGE, 2.1 * len(sweeps) + 0.4), layout="constrained")
    panels = figure.subplots(len(sweeps), 2, squeeze=False)
    for sweep, (time, memory) in zip(sweeps, panels, strict=True):
        for impl, own in points(rows, sweep).items():
            sizes = [row["shape"][sweep.size] for row in own]
            time.plot(sizes, [row["median_ms"] for row in own], **looks[impl])
            ends = ([row[key] for row in own] for key in ("p20_ms", "p80_ms"))
            time.fill_between(sizes, *ends, color=looks[impl]["color"], alpha=0.12, linewidth=0)
            memory.plot(sizes, [(row["peak_memory_bytes"] or 0) / 2**20 for row in own], **looks[impl])
        time.set(yscale="log", ylabel="ms", title=sweep.case)
        memory.set_yscale("symlog", linthresh=1.0)
        memory.set(ylabel="MiB", ylim=(0, None), title="memory beyond the inputs")
        for ax in (time, memory):
            sizes_on_axis(ax, sorted({row["shape"][sweep.size] for own in points(rows, sweep).values() for row in own}))
            ax.set_xlabel(sweep.label)
            ax.yaxis.set_major_formatter("{x:g}")
        low, high = time.get_ylim()
        time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 200 else (1,)))
        time.yaxis.set_minor_locator(NullLocator())
    handles = [Line2D([], [], label=name, **looks[name]) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 6))
    return figure


def look(name: str, names: list[str]) -> dict[str, object]:
    if name == compare.OURS:
        return OURS
    if name in PARTIAL:
        return {
            "color": "#888888",
            "linestyle": (0, (4, 3)),
            "linewidth": 1.0,
            "marker": MARKERS[names.index(name) % 7],
        }
    own = [n for n in names if n != compare.OURS and n not in PARTIAL].index(name)
    colors = [INK, *COLORS[2:]]
    return {"color": colors[own % len(colors)], "linewidth": 1.0, "marker": MARKERS[1 + own % 6], "markersize": 4}


def sizes_on_axis(ax: Axes, sizes: list[int]) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(EngFormatter(sep="") if max(sizes) > 99_999 else lambda x, _: f"{x:,.0f}")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("result", type=Path, nargs="?", metavar="RESULT", default=RESULT)
    p.add_argument("--out", type=Path, metavar="DIR", default=compare.ROOT / "docs/benchmarks/plots")
    args = p.parse_args()
    rows = list(compare.read(args.result).values())
    args.out.mkdir(parents=True, exist_ok=True)
    for name, sweeps in PICTURES.items():
        with matplotlib.rc_context(STYLE):
            figure = draw(rows, sweeps)
            if figure:
                (args.out / f"{name}.svg").write_bytes(rendered(figure, "svg"))
        print(f"{name:<24}{args.out / name}.svg" if figure else f"{name:<24}no sizes in {args.result.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
