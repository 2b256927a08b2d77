"""When each phase of a run began and ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds of each phase, and where it lies in the run: (phase, begin, end), also of one that failed.

    A phase within another interrupts it: each moment belongs to one.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    _current: tuple[str, float] | None = field(default=None, init=False)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        outer = self._current
        self._turn_to(phase)
        try:
            yield
        finally:
            self._turn_to(outer and outer[0])

    def _turn_to(self, phase: str | None) -> None:
        now = time.monotonic() - self.began
        if self._current:
            name, begin = self._current
            self.seconds[name] = self.seconds.get(name, 0.0) + now - begin
            self.spans.append((name, begin, now))
        self._current = (phase, now) if phase else None
