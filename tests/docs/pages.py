"""What stands in the code blocks of the documentation: commands, Python, YAML.

A command is a line of a code block (indented by four or fenced) that begins with a program's name and one space, with
environment variables in front of it or not; one that ends in a backslash goes on in the next line. In running text it
is code that begins with `python`. Words in [brackets] and what stands behind a # are left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"(?:[A-Z_]+=\S* )*(?:fastft|deepspeed|python|make|pip) (?! ).*")
INLINE = re.compile(r"`(python [^`]+)`")


@dataclass(frozen=True)
class Command:
    """A command line as it stands on a page; words: what a shell would make of it; optional: --options in brackets."""

    place: str
    words: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return shlex.join(self.words)


@dataclass(frozen=True)
class Block:
    """Lines of a fenced code block with a language."""

    place: str
    language: str
    text: str


def commands() -> list[Command]:
    """Every command of every page, each once."""
    found: dict[tuple[str, ...], Command] = {}
    for page in PAGES:
        for number, line in _code_lines(page):
            if COMMAND.fullmatch(line):
                optional = tuple(re.findall(r"\[(--[a-z-]+)", line))
                command = Command(f"{page.relative_to(ROOT)}:{number}", _words(line), optional)
                found.setdefault(command.words, command)
    return list(found.values())


def blocks(language: str) -> list[Block]:
    """The fenced code blocks of a language."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            place = f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
            found.append(Block(place, language, match[1]))
    return found


def _code_lines(page: Path) -> Iterator[tuple[int, str]]:
    fenced, begun = False, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            line = begun + line.strip()
            begun = f"{line[:-1].rstrip()} " if line.endswith("\\") else ""
            if not begun:
                yield number, line
        else:
            yield from ((number, code) for code in INLINE.findall(line))


def _words(line: str) -> tuple[str, ...]:
    """The command without [what may be left out], comments, variables in front, and the file that it is written to."""
    words = shlex.split(re.sub(r"(?<= )\[[^]]*\]| > \S+", "", line), comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return tuple(words)
