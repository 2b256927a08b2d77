"""Self-contained HTML: one file, no script, nothing from a network; wide and narrow, light and dark."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--bar:#2a6fdb}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:74rem;margin:2rem auto;padding:0 1rem;overflow-wrap:anywhere}
h1{line-height:1.2;margin:0 0 .4rem}
h2{margin:2.5rem 0 .8rem;padding-bottom:.2rem;border-bottom:1px solid var(--line)}
h3{margin:1.4rem 0 .3rem}
p{max-width:48rem}
a{color:inherit}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.95em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:.7rem;margin:1.2rem 0}
.tiles div{background:var(--soft);border-radius:8px;padding:.6rem .9rem}
.tiles dt,.tiles small{font-size:.85em;display:block}
.tiles dd{margin:0}
.tiles b{font-size:1.5em;line-height:1.3}
.beside{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,28rem),1fr));gap:0 3rem}
.beside>div{min-width:0}
.beside td,.beside th{padding:.25rem .5rem}
.beside th{white-space:normal;overflow-wrap:normal}
.beside table{font-size:.92em}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .8rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
td:first-child,th:first-child,.beside td:first-child,.beside th:first-child{text-align:left;padding-left:0}
table.bars{display:table;width:100%}
table.bars td:first-child{white-space:normal;width:38%}
table.bars td.bar{width:28%;padding-right:0;text-align:left;position:relative}
.bar i{display:block;height:.8em;min-width:1px;background:var(--bar);border-radius:2px;position:relative}
.bar u{position:absolute;top:-.2em;height:1.2em;border-left:2px solid}
.stack{display:flex;height:1.6rem;border-radius:4px;overflow:hidden;margin:.6rem 0}
.stack i{min-width:1px}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.88em;margin:0 0 1rem;padding:0;list-style:none}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em;vertical-align:-.05em}
.mark{display:inline-block;width:1em;margin-right:.3em;text-align:center;font-weight:400}
.advice{list-style:none;padding:0;max-width:60rem}
.advice li{display:grid;grid-template-columns:5.5rem 1fr;margin:.9rem 0}
.advice b{display:block}
.gain{font-size:1.3em;line-height:1.3;font-variant-numeric:tabular-nums}
.gain small{display:block;font-size:.65em}
.note,figcaption{font-size:.9em;opacity:.8}
.state{padding:.6rem 1rem;border-left:4px solid #c0392b;background:var(--soft)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 1.5rem}
.plots figure{margin:1rem 0}
svg{width:100%;height:auto}
figure{margin:1rem 0;overflow-x:auto}
pre{background:var(--soft);padding:1rem;overflow-x:auto;border-radius:6px;overflow-wrap:normal}
summary{cursor:pointer}
@media(max-width:34rem){
body{margin:1rem auto}
.tiles{grid-template-columns:1fr 1fr}
.advice li{grid-template-columns:4.2rem 1fr}
table,.beside table{font-size:.85em}
td,th,.beside td,.beside th{padding:.3rem .4rem}
th,td:first-child{white-space:normal}
td:first-child{min-width:6rem}
th{overflow-wrap:normal}
table.bars td.bar{width:18%}
.extra{display:none}
}
"""
# Okabe and Ito 2008: colours that differ to every eye, on white and on black.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8a8f98", "#b8a000", "#7b61c9", "#555b66")


class Markup(str):
    """HTML already, where text is expected."""


@dataclass(frozen=True)
class Tile:
    """A figure that a page begins with."""

    name: str
    figure: str
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A row of `bars`. cells: further columns; mark: a value to hold this one against, drawn across the bar."""

    name: str
    value: float
    cells: tuple[str, ...] = ()
    mark: float = 0.0
    color: str = "var(--bar)"


def page(title: str, parts: list[str]) -> str:
    """A document that needs nothing from outside."""
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastft: {text(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def text(value: object) -> str:
    return value if isinstance(value, Markup) else html.escape(str(value))


def contents(parts: list[str]) -> str:
    """Links to the headings of these parts that have an id."""
    found = re.findall(r"<h2 id=(\w+)>(.*?)</h2>", "".join(parts))
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in found)
    return f"<nav>{links}</nav>"


def tiles(items: list[Tile]) -> str:
    """Figures in a row, or in several where the screen is narrow."""
    shown = (
        f"<div><dt>{text(item.name)}</dt><dd><b>{text(item.figure)}</b><small>{text(item.note)}</small></dd></div>"
        for item in items
    )
    return f"<dl class=tiles>{''.join(shown)}</dl>"


def beside(*columns: list[str]) -> str:
    """Columns next to each other where the screen is wide enough, else below each other."""
    shown = "".join(f"<div>{''.join(column)}</div>" for column in columns)
    return f"<div class=beside>{shown}</div>"


def table(heads: list[str], rows: list[list[str]], *, extra: tuple[str, ...] = ()) -> str:
    """extra: heads of columns that a narrow screen has no room for."""

    def line(tag: str, cells: list[str]) -> str:
        kinds = (" class=extra" if head in extra else "" for head in heads)
        shown = (f"<{tag}{kind}>{text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(shown)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', heads)}</thead><tbody>{body}</tbody></table>"


def bars(heads: list[str], rows: list[Bar], whole: float, shown: Callable[[float], str]) -> str:
    """A table whose rows have their value, its share of `whole` and a bar, the longest a column wide.

    heads: of the names and of the further cells.
    """
    first, *more = heads
    longest = max((end for row in rows for end in (row.value, row.mark)), default=0.0) or 1.0
    head = "".join(f"<th class=extra>{text(h)}</th>" for h in more)
    lines = [f"<tr><th>{text(first)}</th><th></th><th>share</th>{head}<th></th></tr>"]
    for row in rows:
        extra = "".join(f"<td class=extra>{text(cell)}</td>" for cell in row.cells)
        mark = f'<u style="left:{100 * row.mark / longest:.1f}%"></u>' if row.mark else ""
        lines.append(
            f"<tr><td>{text(row.name)}</td><td>{shown(row.value)}</td><td>{100 * row.value / (whole or 1.0):.1f} %</td>"
            f'{extra}<td class=bar><div style="position:relative">'
            f'<i style="width:{100 * row.value / longest:.1f}%;background:{row.color}"></i>{mark}</div></td></tr>'
        )
    return f"<table class=bars>{''.join(lines)}</table>"


def stacked(rows: list[Bar], shown: Callable[[float], str]) -> str:
    """Parts of a whole side by side, in the colours of their rows in a table below."""
    whole = sum(row.value for row in rows) or 1.0
    blocks = "".join(
        f'<i style="width:{100 * row.value / whole:.2f}%;background:{row.color}" '
        f'title="{text(row.name)}: {shown(row.value)}"></i>'
        for row in rows
    )
    return f"<div class=stack>{blocks}</div>"


def legend(items: list[tuple[str, str]]) -> str:
    """Names with the colours that stand for them; they wrap where the screen is narrow."""
    lines = "".join(f'<li><i style="background:{color}"></i>{text(name)}</li>' for color, name in items)
    return f"<ul class=legend>{lines}</ul>"


def mark(glyph: str, color: str) -> Markup:
    """The mark that stands for something in a plot."""
    return Markup(f'<span class=mark style="color:{color}">{glyph}</span>')
