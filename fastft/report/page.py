"""Self-contained HTML: one file, no script, nothing from a network; wide and narrow, light and dark."""

from __future__ import annotations

import html
from collections.abc import Callable

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--bar:#2a6fdb}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;overflow-wrap:anywhere}
h1{line-height:1.2}
h2{margin:2.5rem 0 .5rem;border-bottom:1px solid var(--line)}
h3{margin:1.6rem 0 .3rem}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}
td,th{padding:.3rem .9rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left;padding-left:0}
table.bars{display:table;width:100%;font-size:.92em}
table.bars td:first-child{white-space:normal;width:34%}
table.bars td.bar{width:30%;padding-right:0;text-align:left}
table.bars td.bar i{display:block;height:.8em;min-width:1px;background:var(--bar);border-radius:2px}
.stack{display:flex;height:1.6rem;border-radius:4px;overflow:hidden;margin:.6rem 0 .3rem}
.stack i{min-width:1px}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.88em;margin:0 0 1rem;padding:0;list-style:none}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em;vertical-align:-.05em}
.legend b{display:inline-block;width:1em;margin-right:.25em;text-align:center;font-weight:400}
.advice li{margin:.5rem 0}
.gain{white-space:nowrap;font-variant-numeric:tabular-nums}
.note,figcaption{font-size:.9em;opacity:.8}
.state{padding:.6rem 1rem;border-left:4px solid #c0392b;background:var(--soft)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 1.5rem}
.plots figure{margin:1rem 0}
svg{width:100%;height:auto}
figure{margin:1.5rem 0;overflow-x:auto}
pre{background:var(--soft);padding:1rem;overflow-x:auto;border-radius:6px;overflow-wrap:normal}
summary{cursor:pointer}
@media(max-width:34rem){
body{margin:1rem auto}
table{font-size:.85em}
td,th{padding:.3rem .4rem}
th,td:first-child{white-space:normal}
td:first-child{min-width:6rem}
th{overflow-wrap:normal}
table.bars{font-size:.85em}
table.bars td.bar{width:18%}
table.bars .extra{display:none}
}
"""
# Okabe and Ito 2008: colours that differ to every eye, on white and on black.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8a8f98", "#b8a000", "#7b61c9", "#555b66")


def page(title: str, parts: list[str]) -> str:
    """A document that needs nothing from outside."""
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastft: {text(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def text(value: object) -> str:
    return html.escape(str(value))


def table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{text(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{text(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def bars(
    heads: list[str], rows: list[tuple[str, float, list[str]]], whole: float, shown: Callable[[float], str]
) -> str:
    """A table whose rows (name, value, more cells) have their share of `whole` and a bar, the longest a column wide.

    heads: of the names and of the further cells.
    """
    first, *more = heads
    longest = max((value for _, value, _ in rows), default=0.0) or 1.0
    head = "".join(f"<th class=extra>{text(h)}</th>" for h in more)
    lines = [f"<tr><th>{text(first)}</th><th></th><th>share</th>{head}<th></th></tr>"]
    for name, value, cells in rows:
        extra = "".join(f"<td class=extra>{text(cell)}</td>" for cell in cells)
        lines.append(
            f"<tr><td>{text(name)}</td><td>{shown(value)}</td><td>{100 * value / (whole or 1.0):.1f} %</td>{extra}"
            f'<td class=bar><i style="width:{100 * value / longest:.1f}%"></i></td></tr>'
        )
    return f"<table class=bars>{''.join(lines)}</table>"


def stacked(parts: list[tuple[str, float]], shown: Callable[[float], str]) -> str:
    """Parts of a whole side by side, with a legend."""
    whole = sum(value for _, value in parts) or 1.0
    colored = [(name, value, COLORS[i % len(COLORS)]) for i, (name, value) in enumerate(parts)]
    blocks = "".join(
        f'<i style="width:{100 * value / whole:.2f}%;background:{color}" title="{text(name)}: {shown(value)}"></i>'
        for name, value, color in colored
    )
    names = [(color, f"{name} {100 * value / whole:.0f} %") for name, value, color in colored]
    return f"<div class=stack>{blocks}</div>{legend(names)}"


def legend(items: list[tuple[str, str]], marks: list[str] | None = None) -> str:
    """Names with the colours that stand for them, as squares or as marks; they wrap where the screen is narrow."""
    shown = [f'<b style="color:{c}">{m}</b>' for (c, _), m in zip(items, marks, strict=True)] if marks else []
    shown = shown or [f'<i style="background:{color}"></i>' for color, _ in items]
    lines = "".join(f"<li>{mark}{text(name)}</li>" for mark, (_, name) in zip(shown, items, strict=True))
    return f"<ul class=legend>{lines}</ul>"
