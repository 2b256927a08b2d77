"""The files of a run's folder, each complete or not there."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.config import Config
from fastft.distributed import Ranks
from fastft.engine.checkpoints import Checkpoint, newest_intact, tidy
from fastft.engine.progress import Reporter
from fastft.errors import ConfigError, FastftError, Interrupted
from fastft.files import sync, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RESULTS = (
    "adapter",
    "checkpoints",
    "metrics.jsonl",
    "summary.json",
    "report.html",
    "report.json",
    "profile",
    "tensorboard",
    "nll.svg",
    "predictions.jsonl",
)
LOCK_PATIENCE_S = 10


@contextmanager
def open_output_dir(config: Config, folder: Path, ranks: Ranks, out: Reporter) -> Iterator[Checkpoint | None]:
    """Make the run's folder, which is this run's alone within the block.

    Gives the checkpoint to resume from, if any: the newest that is as it was written. What another run left there stays
    so far.
    Raises FastftError where another run is there and neither overwrite nor resume is set, where one is still at work,
    and where the checkpoint is of other settings.
    """
    problem, checkpoint, lock = None, None, None
    if ranks.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            lock = _lock(folder, out)
        except BlockingIOError:
            problem = (
                f"output_dir={folder}: another run is at work there; wait until it has ended, or choose another folder"
            )
        except OSError as error:
            problem = f"output_dir={folder}: cannot be written: {error.strerror}"
        else:
            problem, checkpoint = _what_is_there(config, folder, out)
    try:
        problem, checkpoint = ranks.gather((problem, checkpoint))[0]
        if problem:
            raise FastftError(problem)
        if checkpoint:
            checkpoint.check_config(config)
        yield checkpoint
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, out: Reporter) -> int:
    """A handle of the folder that holds its lock, which the kernel takes back when this process dies.

    A killed run holds it until the last of its memory is freed, which for a large model takes seconds; so this waits
    `LOCK_PATIENCE_S` for it.
    Raises BlockingIOError where another process still has it then. Some network file systems lock no folders: there is
    none then.
    """
    handle = os.open(folder, os.O_RDONLY)
    begin, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = time.monotonic() - begin
            if waited > LOCK_PATIENCE_S:
                os.close(handle)
                raise
            if waited > 1 and not said:
                out.line(f"wait       {folder}: another run is there; up to {LOCK_PATIENCE_S} s for it to end")
                said = True
            time.sleep(0.05)
        except OSError:
            return handle
        else:
            return handle


def _what_is_there(config: Config, folder: Path, out: Reporter) -> tuple[str | None, Checkpoint | None]:
    """Why a run may not begin in this folder, if it may not, and the checkpoint that it resumes from, if any."""
    existing = any((folder / name).exists() for name in RESULTS)
    if any(folder.iterdir()) and not (folder / "config.yaml").is_file():
        return f"output_dir={folder}: the folder holds something other than a run; choose another or empty it", None
    if existing and config.resume == "auto":
        checkpoint, damages = newest_intact(folder / "checkpoints")
        for damage in damages:
            out.line(f"damaged    {damage}; skipped")
        if damages and checkpoint is None:
            out.line("resume     no checkpoint is intact; the run begins anew")
        elif checkpoint is None and (folder / "summary.json").is_file():
            return f"output_dir={folder}: this run is complete; set overwrite=true to run it again", None
        return None, checkpoint
    if existing and not config.overwrite:
        return (
            f"output_dir={folder} holds another run; set resume=auto to go on with it, overwrite=true to replace it, "
            "or choose another folder"
        ), None
    return None, None


def begin_results(config: Config, folder: Path, checkpoint: Checkpoint | None) -> None:
    """Just before the first step: write config.yaml and, unless a checkpoint goes on, remove another run's results."""
    if checkpoint is None:
        for name in RESULTS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    tidy(folder / "checkpoints", checkpoint)
    write_text(folder / "config.yaml", config.dump())


def check_room(folder: Path, trained_numel: int, trained_bytes: int, config: Config) -> None:
    """Raise FastftError, before any step is paid for, where the disk cannot hold what the run is going to write."""
    checkpoint = trained_bytes + 12 * trained_numel  # float32 master, m and v
    kept = config.train.keep_checkpoints + 1 if config.train.save_every else 1  # a stopped run writes one too
    kept += config.train.keep_best
    needed = trained_bytes + kept * checkpoint
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FastftError(
            f"output_dir={folder}: the adapter and {kept} checkpoint{'s' if kept > 1 else ''} take "
            f"{needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; free some, choose another disk, or lower "
            "train.keep_checkpoints"
        )


def check_tensorboard(config: Config) -> None:
    """Raise ConfigError, before anything is computed, where TensorBoard's package is wanted and missing."""
    if config.train.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "train.tensorboard=true, but the package tensorboard is not installed; pip install tensorboard, or remove "
            "the key"
        )


def _board(folder: Path, first: int) -> SummaryWriter:
    """TensorBoard's events from step `first` + 1 on; what was there of later steps is hidden."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first + 1)


class Metrics:
    """metrics.jsonl: a line a step; a resumed run drops the lines after its checkpoint, and what a crash cut off.

    tensorboard: the same figures as TensorBoard's events, in the folder `tensorboard` beside it.
    """

    def __init__(self, path: Path, first: int, enabled: bool, tensorboard: bool = False):
        self.path = path if enabled else None
        self.board = _board(path.with_name("tensorboard"), first) if enabled and tensorboard else None
        if enabled:
            kept = []
            if first and path.is_file():
                for line in path.read_text(encoding="utf-8").splitlines():
                    with suppress(ValueError):
                        if line.strip() and json.loads(line)["step"] <= first:
                            kept.append(line + "\n")
            write_text(path, "".join(kept))

    def write(self, **values: Any) -> None:
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        if self.board:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, values["step"])
            self.board.flush()  # for who watches, and for a run that is killed

    def sync(self) -> None:
        """Bring the lines to the disk, before a checkpoint that goes on behind them."""
        if self.path:
            sync(self.path)


def draw_report(
    write: Callable[[Path, Config, dict[str, Any]], Path],
    folder: Path,
    config: Config,
    summary: dict[str, Any],
    out: Reporter,
) -> None:
    """Write report.html; a page that cannot be drawn costs itself, not the run's results."""
    try:
        write(folder, config, summary)
    except Interrupted:
        raise
    except Exception as error:
        out.line(f"report     cannot be drawn: {type(error).__name__}: {error}")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
