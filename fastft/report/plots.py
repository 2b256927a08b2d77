"""Plots of a run's report, by matplotlib, as SVG inside of the page: in the colour of its text, on its ground."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastft.report import page
from fastft.report.advice import three_digits
from fastft.report.figures import COLORS, INK, MARKERS, STYLE, inline, rendered

GIB, MIB = 2**30, 2**20
WIDE, SMALL = (3.7, 2.0), (3.4, 1.9)  # inches: a telephone has room for it
SMALLEST = 0.9  # of its size, to which a plot shrinks on a narrow screen
SCREEN = {
    **STYLE,
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "DejaVu Sans"],
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
}
BLUE, GREY, GREEN = "#2a6fdb", "#8a8f98", "#1f9d67"
GLYPHS = dict(zip(MARKERS, "●■▲◆▼✚✖", strict=True))
DOTTED = (0, (1.5, 2.5))
GAP_SECONDS = 1.0  # without a sample of memory


def drawn(size: tuple[float, float], draw: Callable[[Axes], None]) -> Figure:
    """A figure with one panel."""
    with matplotlib.rc_context(SCREEN):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return figure


def plot(size: tuple[float, float], caption: str, draw: Callable[[Axes], None], *, captioned: bool = True) -> str:
    """A figure with one panel as an HTML figure; captioned: below it too, not only for who cannot see it."""
    return shown(drawn(size, draw), caption, captioned=captioned)


def shown(figure: Figure, caption: str, *, captioned: bool = True) -> str:
    with matplotlib.rc_context(SCREEN):
        return inline(figure, caption, style=SCREEN, smallest=SMALLEST, captioned=captioned)


def as_file(figure: Figure) -> bytes:
    """A figure as an SVG file of its own: dark on white."""
    return rendered(figure, "svg", style=SCREEN)


@dataclass(frozen=True)
class Level:
    """A horizontal line, named at its right."""

    y: float
    name: str
    color: str


def nll(points: list[tuple[float, float]], levels: list[Level], *, is_measured_between: bool) -> Figure:
    """What is trained against the optimizer steps, between levels; dashed where nothing was measured between."""

    def draw(ax: Axes) -> None:
        for level in levels:
            ax.axhline(level.y, color=level.color, linewidth=1.2, linestyle=DOTTED)
        dashes = "-" if is_measured_between else (0, (5, 3))
        ax.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=3.5, linestyle=dashes, gid="trained")
        low, high = ax.get_ylim()
        names = [(level.y, f"{level.name} {level.y:.2f}") for level in levels]
        names.append((points[-1][1], f"trained {points[-1][1]:.2f}"))
        for y, name in apart(names, gap=0.08 * (high - low)):
            _name_level(ax, y, name)
        ax.set(ylim=(low, high), xlabel="optimizer steps", ylabel="NLL, nats per token")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))

    return drawn(WIDE, draw)


def _name_level(ax: Axes, y: float, name: str) -> None:
    """Write at the right, outside of the panel, what stands at this height."""
    ax.annotate(name, (1, y), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=7.5)


def apart(names: list[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """The same names, moved up where two would stand less than `gap` apart."""
    placed: list[tuple[float, str]] = []
    for y, value in sorted(names):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, value))
    return placed


def operator_looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """operator -> its colour and marker under the roof."""
    return {
        name: (COLORS[1:][i % (len(COLORS) - 1)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(dict.fromkeys(names))
    }


def roofline(points: list[tuple[str, float, float]], device: dict[str, Any], looks: dict[str, tuple[str, str]]) -> str:
    """Calls as (operator, operations per byte, operations/s) under the roof of a device."""

    def draw(ax: Axes) -> None:
        intensities = [x for _, x, _ in points]
        knee = device["flops"] / device["bandwidth"]
        ends = min(*intensities, knee) / 2, max(*intensities, knee) * 2
        roof = [min(device["flops"], x * device["bandwidth"]) for x in (ends[0], knee, ends[1])]
        ax.plot((ends[0], knee, ends[1]), roof, color=INK, linewidth=1)
        for name, x, y in points:
            color, marker = looks[name]
            ax.plot(x, y, linestyle="none", markersize=5, color=color, marker=marker)
        lowest = min(*(y for *_, y in points), device["flops"] / 100)
        ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations/s")
        ax.set_ylim(lowest / 1.5, device["flops"] * 3)
        said = f"{three_digits(device['flops'] / 1e12)} TFLOP/s, {three_digits(device['bandwidth'] / 1e9)} GB/s"
        ax.annotate(said, (ends[1], device["flops"]), (0, 3), textcoords="offset points", ha="right", fontsize=8)

    caption = "Calls under the roof of the device: left of the knee bytes bound them, right of it operations."
    return plot((3.7, 2.8), caption, draw)


def memory_over_time(
    samples: list[tuple[float, int]], spans: list[tuple[str, float, float]], what: str, planned: int | None = None
) -> str:
    """The whole run, with its phases as a strip of colours above it; where nothing was sampled, nothing is drawn.

    planned: the planner's peak, a dotted line.
    """
    names = dict.fromkeys(name for name, *_ in spans)
    colors = {name: page.COLORS[i % len(page.COLORS)] for i, name in enumerate(names)}

    def draw(ax: Axes) -> None:
        x, y = zip(*((t, n / GIB) for t, n in _with_gaps(samples)), strict=True)
        ax.fill_between(x, y, color=BLUE, alpha=0.25, linewidth=0)
        ax.plot(x, y, color=BLUE, linewidth=1)
        highest = max(*(n for _, n in samples), planned or 0) / GIB
        if planned:
            ax.axhline(planned / GIB, color=INK, linewidth=1, linestyle=DOTTED)
            _name_level(ax, planned / GIB, "planned")
        ax.set(xlim=(0, x[-1]), ylim=(0, 1.15 * highest), xlabel="seconds", ylabel="GiB")
        for name, begin, end in spans:
            ax.axvspan(begin, end, 0.94, 1, color=colors[name], linewidth=0)
            ax.axvspan(begin, end, 0, 0.94, color=colors[name], alpha=0.07, linewidth=0)

    figure = plot(WIDE, f"Memory {what}, over the run and its phases.", draw, captioned=False)
    return figure + page.legend([(color, name.replace("_", " ")) for name, color in colors.items()])


def _with_gaps(samples: list[tuple[float, int]]) -> list[tuple[float, float]]:
    """The samples, with a NaN where the next one comes much later than they do otherwise."""
    usual = statistics.median([b - a for (a, _), (b, _) in pairwise(samples)] or [0.0])
    found: list[tuple[float, float]] = []
    for (moment, nbytes), (later, _) in pairwise([*samples, samples[-1]]):
        found.append((moment, nbytes))
        if later - moment > max(GAP_SECONDS, 10 * usual):
            found.append((moment, math.nan))
    return found


def memory_in_steps(timeline: list[tuple[float, int]]) -> str:
    """Bytes that the recorded steps hold, relative to their begin."""

    def draw(ax: Axes) -> None:
        x, y = zip(*((t, n / MIB) for t, n in timeline), strict=True)
        ax.fill_between(x, y, color=BLUE, alpha=0.25, linewidth=0)
        ax.plot(x, y, color=BLUE, linewidth=1)
        ax.set(xlim=(0, x[-1]), xlabel="seconds since the first recorded step", ylabel="MiB")
        ax.xaxis.set_major_locator(MaxNLocator(6))

    caption = "What the recorded steps hold, more than there was before the first of them."
    return plot(WIDE, caption, draw, captioned=False)


def curve(runs: dict[str, list[tuple[float, float]]], order: list[str], y_label: str, *, is_amount: bool) -> str:
    """A figure of training over the optimizer steps, a line for each run.

    order: of all runs, for their colours. is_amount: its axis begins at 0.
    """

    def draw(ax: Axes) -> None:
        for name, points in runs.items():
            few = len(points) <= 12
            ax.plot(
                *zip(*points, strict=True),
                color=run_color(order, name),
                linewidth=1.3,
                marker="o" if few else None,
                markersize=3,
            )
        ax.set(xlabel="optimizer steps", ylabel=y_label)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_formatter("{x:g}")
        if is_amount:
            ax.set_ylim(0, 1.08 * ax.get_ylim()[1])

    return plot(SMALL, f"{y_label} over the optimizer steps", draw, captioned=False)


def run_color(order: list[str], name: str) -> str:
    return BLUE if len(order) == 1 else COLORS[order.index(name) % len(COLORS)]


def legend(order: list[str]) -> str:
    """The names of runs in their colours, as HTML."""
    return page.legend([(run_color(order, name).replace(INK, "currentColor"), name) for name in order])
