"""The pictures of a comparison, by matplotlib: at the size of a paper's column, in colours that differ to every eye.

Each setting has a colour and a marker of its own (Okabe and Ito 2008, Color Universal Design, without the yellow).
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fastft.report.compare import COSTS, Comparison, Scores
from fastft.report.page import text
from fastft.report.stats import confidence_ellipse

COLUMN, PAGE = 3.3, 6.9  # widths in inches
INK = "#212121"  # text, axes and the first setting; report.html writes it in the colour of the text around
COLORS = (INK, "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.columnspacing": 1.4,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#88888844",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "lines.markersize": 5.5,
    "pdf.fonttype": 42,  # TrueType: what publishers ask for
    "svg.hashsalt": "fastft",  # the same picture is the same file
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
MAJORITY = {"color": INK, "linewidth": 0.7, "linestyle": (0, (4, 3)), "alpha": 0.6, "zorder": 1}


def draw(comparison: Comparison) -> dict[str, Figure]:
    """name -> picture, of those that the runs have something for."""
    with matplotlib.rc_context(STYLE):
        drawn = {function.__name__: function(comparison) for function in (scatter, shots, cost)}
    return {name: figure for name, figure in drawn.items() if figure}


def rendered(figure: Figure, kind: str, *, style: dict[str, Any] = STYLE, **more) -> bytes:
    """A picture's file, svg, pdf or png; without the date, so that the same picture is the same file."""
    file = io.BytesIO()
    undated = {"svg": dict.fromkeys(("Creator", "Date", "Format", "Type")), "pdf": {"CreationDate": None}, "png": {}}[
        kind
    ]
    with matplotlib.rc_context(style):
        figure.savefig(file, format=kind, dpi=300, metadata=undated, **more)
    return file.getvalue()


def inline(
    figure: Figure, caption: str, *, style: dict[str, Any] = STYLE, smallest: float = 0.85, captioned: bool = True
) -> str:
    """A picture in a page: in the colour of the page's text, on its ground, scrolled where the screen is too narrow.

    smallest: of its own width, to which it may shrink.
    """
    svg = rendered(figure, "svg", style=style, transparent=True).decode()
    svg = svg[svg.index("<svg ") :].replace(INK, "currentColor")
    width = figure.get_figwidth()
    size = f"min-width:{smallest * width:.2f}in;max-width:{1.4 * width:.2f}in"
    below = f"<figcaption>{text(caption)}</figcaption>" if captioned else ""
    described = f'<svg role="img" aria-label="{text(caption)}" style="{size}" '
    return f"<figure>{svg.replace('<svg ', described, 1)}{below}</figure>"


def scatter(comparison: Comparison) -> Figure | None:
    """Accuracy out of domain against in domain, a panel for each group and set; None without such a set.

    Small: a seed. Large: the mean, with its 95 % confidence ellipse, or where seeds are too few for one (see
    `confidence_ellipse`) its two intervals as a cross. Dashed: always answering the most frequent label.
    """
    panels = [(group, name) for group, name in comparison.panels if name and group.task in comparison.scores[group]]
    if not panels:
        return None
    figure, axes = _panels(len(panels), height=1.0)
    ends = []  # of what every panel has room for
    for (group, name), ax in zip(panels, axes, strict=True):
        own, other = comparison.scores[group][group.task], comparison.scores[group][name]
        for setting in comparison.settings:
            if setting in own and setting in other:
                ends += _mean_and_seeds(ax, _look(comparison, setting), own[setting], other[setting])
        ends += [*_majority(ax.axvline, own), *_majority(ax.axhline, other)]
        ax.set(
            xlabel=f"in domain: {group.task} (%)", ylabel=f"out of domain: {name} (%)", title=comparison.title(group)
        )
    margin = 0.04 * (max(ends) - min(ends)) + 0.5
    limits = min(ends) - margin, max(ends) + margin
    for ax in axes:
        ax.set(xlim=limits, ylim=limits, aspect="equal")
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
    return _with_legend(figure, comparison, [Line2D([], [], **MAJORITY, label="majority label")])


def _mean_and_seeds(ax: Axes, look: dict[str, str], own: Scores, other: Scores) -> list[float]:
    """Draw a setting; returns the ends of what the panel has to show of it."""
    points, resampled = own.beside(other)
    if not len(points):
        return []
    mean, color, shown = 100 * points.mean(0), look["color"], [100 * points]
    ax.plot(*shown[0].T, linestyle="none", alpha=0.4, markersize=3, markeredgewidth=0, zorder=2, **look)
    ellipse = confidence_ellipse(100 * points, 100 * resampled)
    if ellipse is not None:
        ax.add_patch(Polygon(ellipse, facecolor=color, alpha=0.08, linewidth=0, zorder=1))
        ax.add_patch(Polygon(ellipse, facecolor="none", edgecolor=color, alpha=0.8, linewidth=0.8, zorder=2))
        shown.append(ellipse.clip(0, 100))
    elif own.estimate.low is not None and other.estimate.low is not None:
        for estimate, at, line in ((own.estimate, mean[1], ax.hlines), (other.estimate, mean[0], ax.vlines)):
            shown.append(100 * np.array([estimate.low, estimate.high]))
            line(at, *shown[-1], color=color, linewidth=0.8, alpha=0.8, zorder=2)
    ax.plot(*mean[:, None], linestyle="none", markeredgecolor="white", markeredgewidth=0.5, zorder=3, **look)
    return [float(end) for part in shown for end in (part.min(), part.max())]


def shots(comparison: Comparison) -> Figure | None:
    """Mean accuracy against the number of labelled examples, its 95 % interval as a band, a panel for each set.

    None where no setting has more than one number.
    """
    panels: dict[tuple[str, str, str], dict[str, dict[int, Scores]]] = defaultdict(lambda: defaultdict(dict))
    for group, sets in comparison.scores.items():
        for name, found in sets.items():
            for setting, scores in found.items():
                panels[group.model, group.task, name][setting][group.num_shots] = scores
    if all(len(points) == 1 for found in panels.values() for points in found.values()):
        return None
    figure, axes = _panels(len(panels), height=0.8)
    for ((model, task, name), found), ax in zip(panels.items(), axes, strict=True):
        counts = sorted({count for points in found.values() for count in points})
        for setting in comparison.settings:
            points = sorted(found.get(setting, {}).items())
            estimates = [scores.estimate for _, scores in points]
            x = [counts.index(count) for count, _ in points]  # as far apart as each other: mostly powers of two
            look = _look(comparison, setting)
            ax.plot(x, [100 * estimate.mean for estimate in estimates], linewidth=1.1, markersize=4, **look)
            known = [(at, 100 * e.low, 100 * e.high) for at, e in zip(x, estimates, strict=True) if e.low is not None]
            if known:
                ax.fill_between(*zip(*known, strict=True), color=look["color"], alpha=0.12, linewidth=0)
        _majority(ax.axhline, {setting: next(iter(points.values())) for setting, points in found.items()})
        ax.set_xticks(range(len(counts)), list(map(str, counts)))
        title = [model] if len({group.model for group in comparison.scores}) > 1 else []
        title.append(f"{name} (trained on {task})" if name != task else task)
        ax.set(xlabel="labelled examples", ylabel="accuracy (%)", title=", ".join(title))
    return _with_legend(figure, comparison, [Line2D([], [], **MAJORITY, label="majority label")])


def cost(comparison: Comparison) -> Figure | None:
    """Mean accuracy against what a run costs: a row for each group and set out of domain, a column for each cost.

    Filled: in domain; hollow: out of domain. None where no cost is known.
    """
    panels, known = comparison.panels, defaultdict(list)
    for group, _ in panels:
        for own in comparison.scores[group].get(group.task, {}).values():
            for key in COSTS:
                known[key] += [value / COSTS[key].unit] if (value := own.mean(key)) is not None else []
    costs = [key for key in COSTS if known[key]]
    if not costs:
        return None
    figure = Figure(figsize=(PAGE, 1.75 * len(panels) + 0.6), layout="constrained")
    grid = figure.subplots(len(panels), len(costs), sharex="col", sharey="row", squeeze=False)
    for (group, name), axes in zip(panels, grid, strict=True):
        sets = comparison.scores[group]
        for setting, own in sets.get(group.task, {}).items():
            look, other = _look(comparison, setting), sets[name].get(setting) if name else None
            for key, ax in zip(costs, axes, strict=True):
                x, y = own.mean(key), 100 * own.estimate.mean
                if x is None:
                    continue
                x /= COSTS[key].unit
                ax.plot(x, y, linestyle="none", markeredgewidth=0.8, zorder=3, **look)
                if other:
                    below = 100 * other.estimate.mean
                    ax.vlines(x, y, below, color=look["color"], linewidth=0.7, alpha=0.5, zorder=1)
                    ax.plot(x, below, linestyle="none", markerfacecolor="none", markeredgewidth=0.9, zorder=2, **look)
        where = f"{group.task} → {name}" if name else group.task
        axes[0].yaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
        axes[0].set_ylabel("\n".join(filter(None, [comparison.title(group), where, "accuracy (%)"])))
    for key, ax in zip(costs, grid[-1], strict=True):
        ax.set_xlabel(COSTS[key].name)
        _log_scale(ax, known[key])
    marks = {"marker": "o", "linestyle": "none", "color": "#888888", "markersize": 5}
    filled = [Line2D([], [], **marks, label="filled: in domain")]
    hollow = [Line2D([], [], **marks, markerfacecolor="none", label="hollow: out of domain")]
    return _with_legend(figure, comparison, filled + hollow if any(name for _, name in panels) else [])


def _log_scale(ax: Axes, values: list[float]) -> None:
    """A logarithmic x axis, with a place for 0 where something costs nothing; left linear where all costs are 0."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    low, high = (math.log10(end) for end in (min(positive), max(positive)))
    if len(positive) < len(values):
        ax.set_xscale("symlog", linthresh=10.0 ** (math.floor(low) - 1), linscale=0.5)
        ax.set_xlim(-(10.0 ** (math.floor(low) - 1)) / 2, 10 ** (high + 0.4))
        powers = range(math.floor(low), math.floor(high + 0.4) + 1)
        places = [0.0, *(10.0**power for power in powers[:: 1 + len(powers) // 4])]
    else:
        margin = max(0.12, 0.18 - (high - low) / 2)
        ax.set_xscale("log")
        ax.set_xlim(10 ** (low - margin), 10 ** (high + margin))
        places = _round_numbers(*ax.get_xlim())
    ax.xaxis.set_major_locator(FixedLocator(places))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1000 else EngFormatter(sep="")(x)))


def _round_numbers(low: float, high: float) -> list[float]:
    """Two or more round numbers in [low, high], as round as there are; high is at least 2.25 times low."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [multiple * 10.0**power for power in powers for multiple in multiples]
        found = [number for number in found if low <= number <= high]
        if len(found) >= 2:
            break
    return found


def _panels(count: int, *, height: float) -> tuple[Figure, list[Axes]]:
    """Axes side by side, at most three in a row: one fits into a paper's column, more into its page."""
    columns = min(count, 2 if count in (2, 4) else 3)
    rows = -(-count // columns)
    width = COLUMN if count == 1 else PAGE
    figure = Figure(figsize=(width, rows * height * width / columns + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _look(comparison: Comparison, setting: str) -> dict[str, str]:
    i = comparison.settings.index(setting)
    shifted = i + i // len(MARKERS)  # the eighth has the first colour, but not its marker
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[shifted % len(MARKERS)]}


def _majority(line: Callable[..., object], found: dict[str, Scores]) -> list[float]:
    """Draw the accuracy of always answering a set's most frequent label, where it is known; returns it."""
    levels = [level for scores in found.values() if (level := scores.mean("majority")) is not None]
    if not levels:
        return []
    level = 100 * float(np.mean(levels))  # it differs where each seed has examples of its own
    line(level, **MAJORITY)
    return [level]


def _with_legend(figure: Figure, comparison: Comparison, more: list[Line2D]) -> Figure:
    """The settings' names under the panels, in as many columns as fit."""
    marks = {"linestyle": "none", "markeredgecolor": "white", "markeredgewidth": 0.5}
    handles = [Line2D([], [], label=name, **marks, **_look(comparison, name)) for name in comparison.settings] + more
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, int(figure.get_figwidth() / (0.06 * longest + 0.5)))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns, len(handles)))
    return figure
