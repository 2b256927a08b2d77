"""Running what is not done yet: one process a run, several at once.

What is on disk is all that a sweep knows, so that it can be killed at any moment. A run is done when its folder holds
summary.json, the last file that a run writes, and a config.yaml that says the same. Its log is also its lock: the
run's process alone keeps it open, so the kernel frees it when that process is dead, and sweeps on one folder share
the work. A run dies with its sweep.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import fastft
from fastft.config import load_config
from fastft.errors import ConfigError, FastftError, Interrupted
from fastft.files import write_text
from fastft.report.rows import rows_of
from fastft.report.table import percent
from fastft.sweep.grid import Run, Sweep, identity, select_part
from fastft.sweep.table import seeds_table, write_table

TRAIN = Path(fastft.__file__).with_name("train.py")
POLL_SECONDS = 0.1
LAST_LINES = 6
TABLE_WIDTH = 120  # where there is no terminal to ask
PR_SET_PDEATHSIG = 1  # linux/prctl.h
TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Started:
    run: Run
    process: subprocess.Popen
    began: float


@dataclass
class Runner:
    """The runs of a sweep, or of a part of it (`--part i/n`)."""

    sweep: Sweep
    runs: list[Run]
    started: dict[int, Started] = field(default_factory=dict)  # by place, of which there are sweep.parallel
    failed: dict[str, str] = field(default_factory=dict)  # name -> why
    signums: list[int] = field(default_factory=list)

    def __post_init__(self):
        tty = sys.stdout.isatty()
        self.console = Console(highlight=False, soft_wrap=not tty, width=None if tty else TABLE_WIDTH)
        self.summaries: dict[Path, dict[str, Any]] = {}  # what is done stays done
        self.gpus = _gpus() if self.sweep.parallel > 1 else []

    def run(self) -> int:
        """Start what is not done, and wait for it; returns the exit code: 1 where a run failed.

        Raises Interrupted after SIGINT or SIGTERM, when the runs at work have written their checkpoints.
        """
        open_folder(self.sweep)
        done = [run for run in self.runs if self.summary(run)]
        self.say(f"sweep      {len(self.runs)} runs, {len(done)} done, {self.sweep.parallel} at once")
        self.write_table()
        pending = [run for run in self.runs if not self.summary(run)]
        with self.signals(), self.bar() as advance:
            try:
                while pending or self.started:
                    if self.signums:
                        pending = []
                    self.start_some(pending)
                    for place, own in list(self.started.items()):
                        if own.process.poll() is not None:
                            del self.started[place]
                            self.finish(own)
                    advance(sum(run.folder in self.summaries for run in self.runs), self.left())
                    time.sleep(POLL_SECONDS)
            finally:
                for own in self.started.values():
                    own.process.kill()
                    own.process.wait()
        return self.end()

    def start_some(self, pending: list[Run]) -> None:
        """Fill the free places with runs that no other sweep is at; takes what is started or done off `pending`."""
        for run in list(pending):
            place = next((i for i in range(self.sweep.parallel) if i not in self.started), None)
            if place is None:
                return
            if self.summary(run):
                pending.remove(run)
                self.say(f"{self.number(run)}  done by another sweep")
                self.write_table()
                continue
            process = self.start(run, place)
            if process:
                pending.remove(run)
                self.started[place] = Started(run, process, time.monotonic())

    def start(self, run: Run, place: int) -> subprocess.Popen | None:
        """A process for the run; None where another sweep has it."""
        with open(self.log(run), "ab") as log:
            if not _lock(log) or self.summary(run):
                return None
            step = checkpoint_step(run)
            if step is None:
                log.truncate(0)
                if run.folder.exists():
                    shutil.rmtree(run.folder)  # of a run that was killed before its first checkpoint
            path = self.log(run).with_suffix(".yaml")
            write_text(path, self.resolved(run, resume=step is not None))
            environment = {key: value for key, value in os.environ.items() if key not in TOLD}
            if self.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
            self.say(f"{self.number(run)}  " + ("starts" if step is None else f"goes on after step {step}"))
            return subprocess.Popen(
                [sys.executable, str(TRAIN), "--cfg", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C comes to the sweep alone, which passes it on
                preexec_fn=functools.partial(_die_with, os.getpid()),  # this process has one thread
            )

    def resolved(self, run: Run, *, resume: bool) -> str:
        """The run's config file, with its share of the cores unless the sweep's file says how many threads."""
        config = run.config.model_copy(update={"resume": "auto" if resume else "never", "overwrite": False})
        if config.deepspeed.threads_per_rank is None and self.sweep.parallel > 1:
            share = max(1, len(os.sched_getaffinity(0)) // self.sweep.parallel)
            own = config.deepspeed.model_copy(update={"threads_per_rank": share})
            config = config.model_copy(update={"deepspeed": own})
        return config.dump()

    def finish(self, own: Started) -> None:
        """Say what came of a run whose process has ended, and write the table."""
        run, seconds, code = own.run, time.monotonic() - own.began, own.process.returncode
        summary = self.summary(run)
        if summary:
            found = ", ".join(_headline(name, figures) for name, figures in summary.get("sets", {}).items())
            self.say(f"{self.number(run)}  {seconds:.0f} s  {found}")
            self.write_table()
        elif self.signums:
            step = checkpoint_step(run)
            self.say(f"{self.number(run)}  stopped" + ("" if step is None else f" after step {step}"))
        else:
            how = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.Signals(-code).name})"
            lines = [line for line in self.log(run).read_text("utf-8", "replace").splitlines() if line.strip()]
            self.failed[run.name] = "\n".join([f"{run.name}: {how}; {self.log(run)} ends with", *lines[-LAST_LINES:]])
            self.say(f"{self.number(run)}  failed after {seconds:.0f} s: {how}")

    def end(self) -> int:
        rows = self.write_table()
        if rows:
            self.console.print(seeds_table(self.sweep, rows))
            self.say(f"table      {self.sweep.output_dir / 'results.csv'}, results.parquet: {len(rows)} rows")
        done = sum(self.summary(run) is not None for run in self.runs)
        if self.signums:
            raise Interrupted(
                f"stopped: {done} of {len(self.runs)} runs are done; the same command goes on", self.signums[0]
            )
        if self.failed:
            raise FastftError(
                f"{len(self.failed)} of {len(self.runs)} runs failed, {done} are done; the same command tries the "
                "failed ones again\n" + "\n".join(self.failed.values())
            )
        return 0

    def summary(self, run: Run) -> dict[str, Any] | None:
        """What a finished run found; None for one that is not finished, or whose folder holds another config."""
        if run.folder not in self.summaries:
            path = run.folder / "summary.json"
            if not path.is_file() or not holds(run):
                return None
            self.summaries[run.folder] = json.loads(path.read_text(encoding="utf-8"))
        return self.summaries[run.folder]

    def write_table(self) -> list[dict[str, Any]]:
        """The rows of all runs of the sweep that are done, this part's and others'."""
        with open(self.sweep.output_dir / "logs" / "results.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a sweep that reads before another writes must also write before it
            done = [(run, self.summary(run)) for run in self.sweep.runs]
            rows = [
                row for run, found in done if found for row in rows_of(run.name, run.config, found, self.sweep.keys)
            ]
            if rows:
                write_table(self.sweep.output_dir, rows)
        return rows

    def left(self) -> str:
        """Seconds to go by the mean of the runs that are done, those of the same method where there are any."""
        seconds = defaultdict(list)
        for run in self.runs:
            if run.folder in self.summaries:
                seconds[run.config.method].append(self.summaries[run.folder]["seconds"]["total"])
        if not seconds:
            return ""
        overall = mean(value for values in seconds.values() for value in values)
        waiting = [run for run in self.runs if run.folder not in self.summaries and run.name not in self.failed]
        total = sum(mean(seconds[run.config.method] or [overall]) for run in waiting)
        return f"{total / self.sweep.parallel:.0f} s left"

    def log(self, run: Run) -> Path:
        return self.sweep.output_dir / "logs" / f"{run.folder.name}.log"

    def number(self, run: Run) -> str:
        return f"run {self.runs.index(run) + 1}/{len(self.runs)}  {run.name}"

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextmanager
    def bar(self):
        """A progress bar on a terminal: a function that moves it. Drawn by this thread: a forking process has one."""
        columns = (
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TimeElapsedColumn(),
        )
        progress = Progress(*columns, console=self.console, transient=True, auto_refresh=False)
        task = progress.add_task("runs", total=len(self.runs), left="")

        def advance(done: int, left: str) -> None:
            progress.update(task, completed=done, left=left, refresh=True)

        if not self.console.is_terminal:
            yield lambda done, left: None
            return
        with progress:
            yield advance

    @contextmanager
    def signals(self):
        """SIGINT and SIGTERM are passed on to the runs, which finish their step; the second one kills them."""

        def handle(signum: int, frame) -> None:
            self.signums.append(signum)
            for own in self.started.values():
                own.process.send_signal(signum if len(self.signums) == 1 else signal.SIGKILL)

        before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def run_sweep(sweep: Sweep, *, part: str | None = None) -> int:
    return Runner(sweep, select_part(sweep.runs, part)).run()


def list_runs(sweep: Sweep, *, part: str | None = None) -> int:
    """Print each run with its state; starts and writes nothing."""
    runner = Runner(sweep, select_part(sweep.runs, part))
    for run in runner.runs:
        step = checkpoint_step(run)
        state = "done" if runner.summary(run) else "to do" if step is None else f"goes on after step {step}"
        runner.say(f"{runner.number(run)}  {state}  {run.folder}")
    runner.say(f"{len(runner.summaries)} of {len(runner.runs)} runs are done")
    return 0


def open_folder(sweep: Sweep) -> None:
    """Make the sweep's folder; raises FastftError where it holds something else, or cannot be written."""
    folder, mark = sweep.output_dir, sweep.output_dir / "logs"
    try:
        if folder.is_dir() and any(folder.iterdir()) and not mark.is_dir():
            raise FastftError(
                f"output_dir={folder}: the folder holds something other than a sweep; choose another or empty it"
            )
        mark.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FastftError(f"output_dir={folder}: cannot be written: {error.strerror}") from None


def holds(run: Run) -> bool:
    """Whether the run's folder was written by this very run."""
    try:
        return identity(load_config(run.folder / "config.yaml")) == identity(run.config)
    except ConfigError:
        return False


def checkpoint_step(run: Run) -> int | None:
    """The step of the checkpoint from which the run goes on."""
    steps = [int(path.name.removeprefix("step_")) for path in (run.folder / "checkpoints").glob("step_*[0-9]")]
    return max(steps) if steps and holds(run) else None


def _lock(file: BinaryIO) -> bool:
    """Lock a file for as long as it is open in any process; False where another has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _die_with(parent: int) -> None:
    """In a new process: be killed when `parent` ends, however it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may say to a run, one GPU each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return visible.split(",") if visible else []
    if not any(Path("/dev").glob("nvidia[0-9]*")):  # spare the import
        return []
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _headline(name: str, figures: dict[str, Any]) -> str:
    figure = next(key for key in ("accuracy", "rougeL") if key in figures)
    return f"{name} {percent(figures[figure])}"
