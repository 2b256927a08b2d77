"""Where a step's time and memory go: ranges for its phases, recorded by torch.profiler over a few steps.

While nothing is recorded, `phase` returns a context manager that does nothing, no module has a hook, and no thread
samples. While a `Recording` runs, each range is in the trace (and, on a GPU, an NVTX range), so that the trace alone
says what belongs to what (`report.trace` reads it):

    fastft.step                       an optimizer step, as the training loop sees it; what no range inside claims is
                                      the loop's own
    fastft.data, forward, loss, ...   its phases (`phases.PHASES`)
    fastft.block.attention, mlp, ...  the modules of the model, in forward and where they are computed again
    fastft.frozen.attention, ...      the same without gradient: the teacher's passes
    deepspeed.fetch_sub_module, ...   DeepSpeed's own ranges: gathering, reducing, partitioning
"""

from __future__ import annotations

import gzip
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fastft.memory import memory_bytes
from fastft.phases import PREFIX

WARM_UP = 1  # steps in which the profiler runs already, and what it sees is thrown away
SAMPLE_SECONDS = 0.005
MOST_SAMPLES = 4096
SNAPSHOT_ENTRIES = 200_000
COMPRESSION = 6  # of gzip: 9 takes five times as long for 10 % less

_off = nullcontext()
_recording = False


class Range(record_function):
    """A range of torch.profiler, and of NVTX where there is a GPU."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(self.name)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()


def phase(name: str) -> AbstractContextManager:
    """A part of a step under this name while steps are recorded; else nothing."""
    return Range(PREFIX + name) if _recording else _off


# The first that a module's name fits, of those outside of any that fits; in this order, for OPT's
# self_attn_layer_norm is a norm.
BLOCKS = {
    "norm": r"norm|^ln_",
    "attention": r"attn|attention",
    "embedding": r"embed|^wte$|^wpe$|rotary",
    "mlp": r"mlp|^fc\d|feed_forward|ffn",
}


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(kind, module) of the outermost modules whose name says what they are."""
    for name, module in model.named_children():
        kind = next((kind for kind, pattern in BLOCKS.items() if re.search(pattern, name.lower())), None)
        if kind:
            yield kind, module
        else:
            yield from blocks(module)


class _ModuleRanges:
    """Hooks that open a range around the forward of modules; `remove` takes them off again."""

    def __init__(self, model: nn.Module, head: nn.Module):
        self.open: list[Range] = []
        self.handles = []
        for kind, module in blocks(model):
            self._hook(module, f"block.{kind}", f"frozen.{kind}")
        self._hook(head, "loss", "loss")

    def _hook(self, module: nn.Module, trained: str, frozen: str) -> None:
        def begin(*_) -> None:
            self.open.append(Range(PREFIX + (trained if torch.is_grad_enabled() else frozen)))
            self.open[-1].__enter__()

        def end(*_) -> None:
            self.open.pop().__exit__(None, None, None)

        self.handles += [
            module.register_forward_pre_hook(begin, prepend=True),
            module.register_forward_hook(end, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Recording:
    """Records `steps` steady steps of a training loop, after `wait` others and one of warm-up, into a trace file.

    model, head: whose modules get ranges. path: the trace, gzip of Chrome's format, which ui.perfetto.dev opens.
    memory: also each allocation and release; on a GPU with the allocator's history, as <path>.memory.pickle for
    pytorch.org/memory_viz. finished: called once with the trace's path and whether all steps are in it: between two
    steps, or by `close` where the run ends before. ranges: opened together with the recording: ranges of someone
    else's code. apart: opened around the work of writing the trace, of which nothing is left behind it.

    Overhead is in the recorded steps alone: writing and reading the trace is between steps.

    grown_bytes: by how much the process's memory grew over the recorded steps, as the record of them does. 0 on a GPU,
    whose memory has no part of it.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        path: Path,
        *,
        wait: int,
        steps: int,
        memory: bool,
        finished: Callable[[Path, bool], None],
        ranges: Callable[[], AbstractContextManager] = nullcontext,
        apart: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.head, self.path, self.ranges, self.apart = model, head, path, ranges, apart
        self.wait, self.steps, self.memory, self.finished = wait, steps, memory, finished
        self.taken = 0  # steps that the loop has begun since it started
        self.before = self.grown_bytes = 0
        self.profiler: profile | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around each step of the loop."""
        if self.taken == self.wait:
            self._start()
        if self.taken == self.wait + WARM_UP:
            self.before = memory_bytes()
        self.taken += 1
        with phase("step"):
            yield
        if self.profiler is None:
            return
        if self.taken == self.wait + WARM_UP + self.steps:
            self.close(complete=True)
        else:
            self.profiler.step()

    def _start(self) -> None:
        global _recording
        cuda = torch.cuda.is_available()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if cuda and self.memory:
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_ENTRIES)
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])],
            schedule=schedule(wait=0, warmup=WARM_UP, active=self.steps, repeat=1),
            record_shapes=True,
            profile_memory=self.memory,
            on_trace_ready=self._write,
        )
        self.modules, self.foreign = _ModuleRanges(self.model, self.head), self.ranges()
        self.foreign.__enter__()
        _recording = True
        self.profiler.start()

    def _write(self, profiler: profile) -> None:
        plain = self.path.with_suffix("")
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as file, gzip.open(self.path, "wb", compresslevel=COMPRESSION) as compressed:
            shutil.copyfileobj(file, compressed, 2**20)
        plain.unlink()

    def close(self, *, complete: bool = False) -> None:
        """End the recording and hand over what there is of it; complete: after the last step."""
        global _recording
        if self.profiler is None:
            return
        _recording = False
        self.foreign.__exit__(None, None, None)
        self.modules.remove()
        if self.before and not torch.cuda.is_available():
            self.grown_bytes = max(0, memory_bytes() - self.before)
        with self.apart():
            profiler, self.profiler = self.profiler, None
            profiler.stop()
            if torch.cuda.is_available() and self.memory:
                torch.cuda.memory._dump_snapshot(f"{self.path}.memory.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
            del profiler
        if self.path.is_file():
            self.finished(self.path, complete)


class MemoryTimeline:
    """Memory of this process over time (`memory.memory_bytes`), sampled by a thread.

    samples: (seconds since `began`, by time.monotonic, the highest bytes since the sample before); at most
    MOST_SAMPLES of them, in time steps that double where a run is long. lock: no sample is taken while it is held.
    """

    def __init__(self, began: float):
        self.samples: list[tuple[float, int]] = []
        self.began, self.every, self.highest, self.seen = began, 1, 0, 0
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="fastft-memory", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while not self.stopped.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        with self.lock:
            self.highest, self.seen = max(self.highest, memory_bytes()), self.seen + 1
            if self.seen % self.every:
                return
            self.samples.append((time.monotonic() - self.began, self.highest))
            self.highest = 0
            if len(self.samples) == MOST_SAMPLES:
                pairs = zip(self.samples[::2], self.samples[1::2], strict=True)
                self.samples = [(later, max(low, high)) for (_, low), (later, high) in pairs]
                self.every *= 2

    def stop(self) -> list[tuple[float, int]]:
        """End the thread; the samples."""
        if not self.stopped.is_set():
            self.stopped.set()
            self.thread.join()
            self.every = 1
            self._sample()
        return self.samples
