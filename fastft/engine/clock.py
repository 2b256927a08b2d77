"""When each phase of a run began and ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds of each phase, and where it lies in the run: (phase, begin, end), also of one that failed."""

    seconds: dict[str, float] = field(default_factory=dict)
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        begin = time.monotonic() - self.began
        try:
            yield
        finally:
            end = time.monotonic() - self.began
            self.seconds[phase] = self.seconds.get(phase, 0.0) + end - begin
            self.spans.append((phase, begin, end))
