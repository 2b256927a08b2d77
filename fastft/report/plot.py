"""Line plots as SVG text: inline in report.html, or a file of their own."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

WIDTH, HEIGHT = 800, 320
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 16, 44  # margins
NAMES = 130  # room for the names at the right, where there are any
ACCENT = "#2a6fdb"


@dataclass(frozen=True)
class Level:
    """A horizontal line with its name at the right."""

    y: float
    name: str
    color: str


def line_plot(
    points: list[tuple[float, float]],
    *,
    x_label: str,
    y_label: str,
    name: str = "",
    levels: tuple[Level, ...] = (),
    from_zero: bool = False,
    markers: bool = False,
    dashed: bool = False,
) -> str:
    """One series of (x, y) in order of x, named at its last point.

    x counts something: whole numbers are marked. markers: a dot at every point; dashed: nothing was measured between
    the points; from_zero: the y axis starts at 0. Text and axes have the colour of the text around.
    """
    heights = [y for _, y in points] + [level.y for level in levels]
    x0, x1 = points[0][0], points[-1][0]
    end = WIDTH - RIGHT - (NAMES if name or levels else 0)
    margin = 0.06 * (max(heights) - min(heights)) or 1.0
    y0, y1 = 0.0 if from_zero else min(heights) - margin, max(heights) + margin

    def at_x(x: float) -> float:
        return LEFT + (end - LEFT) * (x - x0) / ((x1 - x0) or 1)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y0) / (y1 - y0)

    def text(x: float, y: float, value: str, anchor: str = "middle", more: str = "") -> str:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        return f'<text {place} fill="currentColor"{more}>{html.escape(value)}</text>'

    def line(y: float, color: str, more: str) -> str:
        x = (at_x(x0), at_x(x1))
        return f'<path d="M{x[0]:.1f} {y:.1f}H{x[1]:.1f}" stroke="{color}" fill="none" {more}/>'

    parts = []
    for y in ticks(y0, y1):
        parts += [line(at_y(y), "currentColor", 'opacity=".12"'), text(LEFT - 8, at_y(y) + 4, f"{y:g}", "end")]
    parts += [text(at_x(x), HEIGHT - BOTTOM + 18, f"{x:g}") for x in ticks(x0, x1) if x == int(x)]
    parts += [text((LEFT + end) / 2, HEIGHT - 6, x_label)]
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts += [text(14, middle, y_label, more=f' transform="rotate(-90 14 {middle:.1f})"')]
    parts += [line(at_y(level.y), level.color, 'stroke-width="1.5" stroke-dasharray="2 4"') for level in levels]
    path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)
    dash = ' stroke-dasharray="7 5"' if dashed else ""
    parts += [
        f'<polyline points="{path}" fill="none" stroke="{ACCENT}" stroke-width="2.5" stroke-linejoin="round"{dash}/>'
    ]
    if markers:
        parts += [f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.5" fill="{ACCENT}"/>' for x, y in points]
    names = [(at_y(level.y), f"{level.name} {level.y:.2f}") for level in levels]
    if name:
        names.append((at_y(points[-1][1]), f"{name} {points[-1][1]:.2f}"))
    parts += [text(end + 10, y + 4, value, "start") for y, value in apart(names)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(y_label)} against {html.escape(x_label)}" '
        f'font-family="system-ui, sans-serif" font-size="13">{"".join(parts)}</svg>'
    )


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers in [low, high], 1, 2 or 5 times a power of ten apart, at most `count` and one of them."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def apart(names: list[tuple[float, str]], gap: float = 16.0) -> list[tuple[float, str]]:
    """The same names, moved down where two would stand less than `gap` apart."""
    placed: list[tuple[float, str]] = []
    for y, value in sorted(names):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, value))
    return placed


def as_file(svg: str) -> str:
    """A plot to stand alone: dark on white."""
    return svg.replace("<svg ", '<svg style="background:white;color:#222" ', 1) + "\n"
