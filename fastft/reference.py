"""docs/configuration.md, written from the schema: `python -m fastft.reference > docs/configuration.md`."""

from __future__ import annotations

import json
import sys

from fastft.config import UNUSED, describe
from fastft.sweep import grid

INTRODUCTION = """\
# Configuration reference

Every key of a run, written from the schema in `fastft/config.py` by

    python -m fastft.reference

(a test compares this page with what it prints). `fastft train --help` shows the same in a terminal.

A configuration is a YAML file of plain values, sections nested; `key.sub=value` on the command line overrides it, its
value read as YAML. An unknown key, a wrong type and a value out of range are errors, all reported at once; so is a key
that the method has no use for. Only `output_dir` has no default.

    fastft train --cfg FILE train.steps=200 peft.r=8 'data.documents=[0, 1]'
"""

SWEEPS = """\
## Sweeps

The file of `fastft sweep`: a grid of runs, described in [methods](methods.md#comparing-them).
"""


def markdown() -> str:
    """The page."""
    parts, rows = [INTRODUCTION], [*describe()]
    plain = [row for row in rows if row[1] != "section" and "." not in row[0]]
    parts.append("## The run\n\n" + _table(plain))
    for section, kind, _, text in rows:
        if kind == "section":
            own = [r for r in rows if r[1] != "section" and r[0].rpartition(".")[0] == section]
            heading = "###" if "." in section else "##"
            used = _users(section)
            parts.append(
                f"{heading} {section}\n\n{text[0].upper()}{text[1:]}." + (f" For {used}." if used else "") + "\n"
            )
            if own:
                parts[-1] += "\n" + _table(own, inherited=used)
    parts.append(SWEEPS + "\n" + _table([*describe(grid.SweepConfig)]))
    return "\n".join(parts)


def _table(rows: list[tuple[str, str, str, str]], inherited: str = "") -> str:
    lines, below = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"], []
    for key, kind, default, text in rows:
        if "\\n" in default and len(default) > 80:
            words = json.loads(default).rstrip().replace("\n", "\n    ").replace("\n    \n", "\n\n")
            below.append(f"\n`{key}` is by default\n\n    {words}\n")
            default = "see below"
        else:
            default = f"`{default}`"
        used = _users(key)
        if used and used != inherited:
            text = f"{text} (for {used})"
        cells = (f"`{key.rpartition('.')[2]}`", f"`{kind}`", default, text.replace("<", "&lt;"))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n" + "".join(below)


def _users(key: str) -> str:
    """The methods and kinds of data that use a key; "" where all do."""
    section = key.partition(".")[0]
    users = [pair for pair, unused in UNUSED.items() if not {key, section} & set(unused)]
    others = [pair for pair in UNUSED if pair not in users]
    return min(_names(users), f"all but {_names(others)}", key=len) if others else ""


def _names(pairs: list[tuple[str, str]]) -> str:
    names = []
    for method in dict.fromkeys(method for method, _ in pairs):
        kinds, possible = ([k for m, k in some if m == method] for some in (pairs, UNUSED))
        names.append(f"`{method}`" + ("" if kinds == possible else f" of {' and '.join(kinds)}"))
    return ", ".join(names)


if __name__ == "__main__":
    sys.stdout.write(markdown())
