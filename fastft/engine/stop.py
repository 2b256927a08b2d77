"""Stopping a run from outside."""

from __future__ import annotations

import signal

from fastft.errors import Interrupted


class StopRequest:
    """Ctrl-C and SIGTERM: while training, the step is finished first; elsewhere the run ends at once.

    state: what there is at the moment, for the message.
    """

    def __init__(self):
        self.signum: int | None = None
        self.deferred = False
        self.state = "stopped before training; nothing is lost: the same command starts again"

    def install(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame) -> None:
        self.signum = self.signum or signum
        if not self.deferred:
            raise Interrupted(self.state, signum)
