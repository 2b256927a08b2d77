"""Progress of a phase: a bar on a terminal, a plain line now and then elsewhere, nothing on other ranks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastft.memory import memory_bytes

PLAIN_INTERVAL_S = 10.0


class Reporter:
    """Prints for the first rank; silent on the others."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self.console = Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())

    def line(self, text: str = "") -> None:
        if self.enabled:
            self.console.print(text, markup=False)

    def show(self, renderable) -> None:
        if self.enabled:
            self.console.print(renderable)

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        """A phase with `total` steps; says how long it took when it ends."""
        phase = Phase(self, name, total, unit)
        try:
            yield phase
        finally:
            phase.close()


class Phase:
    def __init__(self, reporter: Reporter, name: str, total: int | None, unit: str):
        self.reporter, self.name, self.total, self.unit = reporter, name, total, unit
        self.done = 0
        self.start = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        if reporter.enabled and reporter.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=reporter.console,
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task(name, total=total, note="")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def advance(self, count: int = 1, note: str = "") -> None:
        self.done += count
        if self.bar:
            self.bar.update(self.task, advance=count, note=note or _gib(memory_bytes()))
        elif time.monotonic() - self.last_line >= PLAIN_INTERVAL_S and self.total and not note:
            self.last_line = time.monotonic()
            left = self.seconds / self.done * (self.total - self.done)
            self.reporter.line(
                f"{self.name:<10} {self.done}/{self.total} {self.unit}  {_gib(memory_bytes())}  {left:.0f} s left"
            )

    def close(self) -> None:
        if self.bar:
            self.bar.stop()


def _gib(count: int) -> str:
    return f"mem {count / 2**30:.2f} GiB"
