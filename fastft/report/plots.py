"""Plots of a run's report, by matplotlib, as SVG inside of the page: in the colour of its text, on its ground."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastft.report import page
from fastft.report.figures import COLORS, INK, MARKERS, STYLE, inline

GIB, MIB = 2**30, 2**20
WIDE, SMALL = (5.4, 2.3), (3.4, 2.0)  # inches
SCREEN = {
    **STYLE,
    "svg.fonttype": "none",  # text stays text: smaller, and it can be searched
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
}
BLUE, ORANGE = "#2a6fdb", "#D55E00"


def plot(size: tuple[float, float], caption: str, draw: Callable[[Axes], None], *, captioned: bool = True) -> str:
    """A figure with one panel as an HTML figure; captioned: below it too, not only for who cannot see it."""
    with matplotlib.rc_context(SCREEN):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        return inline(figure, caption, style=SCREEN, smallest=0.6, captioned=captioned)


def roofline(points: list[tuple[str, float, float]], device: dict[str, Any]) -> str:
    """Calls as (operator, operations per byte, operations/s) under the roof of a device."""

    def draw(ax: Axes) -> None:
        intensities = [x for _, x, _ in points]
        knee = device["flops"] / device["bandwidth"]
        ends = min(*intensities, knee) / 2, max(*intensities, knee) * 2
        roof = [min(device["flops"], x * device["bandwidth"]) for x in (ends[0], knee, ends[1])]
        ax.plot((ends[0], knee, ends[1]), roof, color=INK, linewidth=1)
        for i, name in enumerate(dict.fromkeys(name for name, *_ in points)):
            own = [(x, y) for other, x, y in points if other == name]
            look = {"color": COLORS[1:][i % (len(COLORS) - 1)], "marker": MARKERS[i % len(MARKERS)]}
            ax.plot(*zip(*own, strict=True), linestyle="none", markersize=5, label=name, **look)
        lowest = min(*(y for *_, y in points), device["flops"] / 100)
        ax.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations/s")
        ax.set_ylim(lowest / 1.5, device["flops"] * 3)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))

    caption = "Calls under the roof of the device: left of the knee bytes bound them, right of it operations."
    return plot((5.9, 2.7), caption, draw)


def memory_over_time(samples: list[tuple[float, int]], spans: list[tuple[str, float, float]], what: str) -> str:
    """The whole run, with its phases as a strip of colours above it, and their names below."""
    names = dict.fromkeys(name for name, *_ in spans)
    colors = {name: page.COLORS[i % len(page.COLORS)] for i, name in enumerate(names)}

    def draw(ax: Axes) -> None:
        x, y = zip(*((t, n / GIB) for t, n in samples), strict=True)
        ax.fill_between(x, y, color=BLUE, alpha=0.25, linewidth=0)
        ax.plot(x, y, color=BLUE, linewidth=1)
        ax.set(xlim=(0, x[-1]), ylim=(0, 1.15 * max(y)), xlabel="seconds", ylabel="GiB")
        for name, begin, end in spans:
            ax.axvspan(begin, end, 0.94, 1, color=colors[name], linewidth=0)
            ax.axvspan(begin, end, 0, 0.94, color=colors[name], alpha=0.07, linewidth=0)

    figure = plot((6.6, 2.4), f"Memory {what}, over the run and its phases.", draw)
    return figure + page.legend([(color, name) for name, color in colors.items()])


def memory_in_steps(timeline: list[tuple[float, int]]) -> str:
    """Bytes that the recorded steps hold, relative to their begin."""

    def draw(ax: Axes) -> None:
        x, y = zip(*((t, n / MIB) for t, n in timeline), strict=True)
        ax.fill_between(x, y, color=BLUE, alpha=0.25, linewidth=0)
        ax.plot(x, y, color=BLUE, linewidth=1)
        ax.set(xlim=(0, x[-1]), xlabel="seconds since the first recorded step", ylabel="MiB")
        ax.xaxis.set_major_locator(MaxNLocator(6))

    return plot(WIDE, "What the recorded steps hold, more than there was before the first of them.", draw)


def curve(runs: dict[str, list[tuple[float, float]]], order: list[str], y_label: str) -> str:
    """A figure of training over the optimizer steps, a line for each run; order: of all runs, for their colours."""

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

    return plot(SMALL, f"{y_label} over the optimizer steps", draw, captioned=False)


def run_color(order: list[str], name: str) -> str:
    return BLUE if len(order) == 1 else COLORS[order.index(name) % len(COLORS)]


def legend(order: list[str]) -> str:
    """The names of runs in their colours, as HTML."""
    return page.legend([(run_color(order, name).replace(INK, "currentColor"), name) for name in order])
