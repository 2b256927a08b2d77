"""The profile of a run: recorded while it trains, gathered from the ranks, and written down for its report."""

from __future__ import annotations

import functools
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from fastft import __version__, memory
from fastft.config import Config
from fastft.distributed import Ranks
from fastft.engine import watch
from fastft.engine.clock import Clock
from fastft.engine.output import write_json
from fastft.engine.progress import Reporter
from fastft.engine.trainer import Trainer
from fastft.errors import Interrupted
from fastft.profiling import MemoryTimeline, Range, Recording
from fastft.report import trace
from fastft.report.advice import advise
from fastft.report.html import last_step, write_unfinished_report


class Profiled:
    """What a run's report says beyond its results; each rank has one.

    figures: of each rank, as `report.trace.analyse` returns them; empty until the recorded steps are over.
    tracing: what writing the trace took of host memory, None until then.
    peak_memory_bytes: the run's own peak, without that; None until `close`.
    """

    def __init__(self, config: Config, folder: Path, clock: Clock, ranks: Ranks, out: Reporter):
        self.config, self.folder, self.clock, self.ranks, self.out = config, folder, clock, ranks, out
        self.owns_folder = False  # whether what is in the folder is of this run
        self.writing, self.cause_is_known = threading.Lock(), False
        self.figures: list[dict[str, Any]] = []
        self.recording: Recording | None = None
        self.tracing: memory.Apart | None = None
        self.peak_memory_bytes: int | None = None
        self.enabled = config.profile.steps > 0
        self.timeline = MemoryTimeline(clock.began) if self.enabled and config.profile.memory else None

    def around_steps(self, trainer: Trainer) -> Callable[[], AbstractContextManager]:
        """What is opened around each step of the training loop."""
        if not self.enabled:
            return nullcontext
        p = self.config.profile
        self.recording = Recording(
            trainer.lm.model,
            trainer.lm.head,
            self.folder / "profile" / f"rank_{self.ranks.rank}.trace.json.gz",
            wait=p.wait,
            steps=p.steps,
            memory=p.memory,
            finished=self._read,
            ranges=deepspeed_ranges,
            apart=self._apart,
        )
        return self.recording.step

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Around the profiler's own work: no part of the run's phases, of its peak or of its memory over time."""
        unseen = self.timeline.lock if self.timeline else nullcontext()
        with self.clock.measure("trace"), unseen, memory.apart() as self.tracing:
            yield

    def _read(self, path: Path, complete: bool) -> None:
        """Read the trace, and exchange the figures with the other ranks unless the run is failing."""
        own = {}
        with self.clock.measure("trace"):
            try:
                own = trace.read(path, self.ranks.rank)
            except RuntimeError as error:  # costs the report a section, not the run its results
                self.out.line(f"profile    {error}")
            if own:
                own |= {"threads": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))}
            self.figures = [f for f in (self.ranks.gather(own) if complete else [own]) if f]

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Around the run: one that fails or is stopped in a folder of its own leaves a report of what there is."""
        watch.last_words = functools.partial(self._report_failure, "failed", is_cause=True)
        try:
            yield
        except BaseException as error:
            state = "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            with suppress(Exception):  # of a full disk, say: it must not hide what went wrong
                self.close()
            self._report_failure(state, f"{type(error).__name__}: {error}")
            raise
        else:
            self.close()

    def _report_failure(self, state: str, error: str, *, is_cause: bool = False) -> None:
        """is_cause: the watch says it, in its own thread; what the lost connection raises here is no news then."""
        if not (self.ranks.is_first and self.owns_folder):
            return
        with self.writing:
            if self.cause_is_known:
                return
            self.cause_is_known = is_cause
            try:
                self.write(state, step=last_step(self.folder), error=error.splitlines()[0])
                self.out.line(f"report     {write_unfinished_report(self.folder, self.config)}")
            except Exception as problem:
                self.out.line(f"report     not written: {type(problem).__name__}: {problem}")

    def close(self) -> None:
        """End what is still recording or sampling: what follows is not in the run's peak."""
        if self.recording:
            self.recording.close()
        if self.timeline:
            self.timeline.stop()
        if self.peak_memory_bytes is None:
            self.peak_memory_bytes = memory.peak_memory_bytes()

    def write(self, state: str, *, step: int, plan: dict[str, Any] | None = None, error: str | None = None) -> None:
        """Write report.json, which report.html shows; for the first rank.

        state: complete, stopped or failed, then with the error's first line. step: the last one that was taken.
        """
        write_json(
            self.folder / "report.json",
            {
                "state": state,
                "error": error,
                "step": step,
                "steps": self.config.train.steps,
                "fastft": __version__,
                "torch": torch.__version__,
                "host": f"{platform.node()}, {len(os.sched_getaffinity(0))} cores",
                "device": str(self.ranks.device),
                "processes": self.ranks.world_size,
                "peak_memory_bytes": self.peak_memory_bytes or memory.peak_memory_bytes(),
                "tracing": self._tracing(),
                "spans": self.clock.spans,
                "memory": list(self.timeline.samples) if self.timeline else [],
                "profile": self.figures,
                "plan": plan,
                "advice": [asdict(advice) for advice in advise(self.figures, plan, self.config)],
            },
        )

    def _tracing(self) -> dict[str, Any] | None:
        """What the profiler itself took of memory, None where nothing was recorded."""
        if not (self.tracing and self.recording):
            return None
        return asdict(self.tracing) | {"record_bytes": self.recording.grown_bytes}


@contextmanager
def deepspeed_ranges() -> Iterator[None]:
    """DeepSpeed's NVTX ranges (`instrument_w_nvtx`) as ranges of the trace, also where its accelerator has none."""
    accelerator, opened = get_accelerator(), []

    def push(message: str, *_, **__) -> None:
        opened.append(Range(f"deepspeed.{message}"))
        opened[-1].__enter__()

    def pop(*_, **__) -> None:
        if opened:  # it was pushed before these ranges were
            opened.pop().__exit__(None, None, None)

    accelerator.range_push, accelerator.range_pop = push, pop  # instance attributes, in front of the class's methods
    try:
        yield
    finally:
        del accelerator.range_push, accelerator.range_pop
