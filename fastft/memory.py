"""Bytes that this process takes: the GPU's allocator's, or resident in host memory where there is no GPU."""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

# glibc (engine/launch.py): smaller blocks come from its heap, larger ones are mapped one by one; and so much at the end
# of the heap is kept when it is free.
MAPPED_BLOCK, KEPT_FREE = 2 * 2**20, 64 * 2**20
STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what Linux wants to read there: proc_pid_clear_refs(5)

_before = 0  # the peak before the kernel's was reset
_process = functools.cache(psutil.Process)  # of a process id: a fork has another


def memory_bytes() -> int:
    """What is taken now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _process(os.getpid()).memory_info().rss


@functools.cache
def resident_at_start() -> int:
    """What was resident when this was first asked for: Python and its libraries, before anything is loaded.

    How much of a library that is depends on the system's page cache: 160 MB more on one Linux than on another.
    """
    return _process(os.getpid()).memory_info().rss


def peak_memory_bytes() -> int:
    """The most that was taken since the process began, without what was `apart`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else max(_before, _resident_peak())


@dataclass
class Apart:
    """peak_bytes: the most host memory that was resident meanwhile; is_excluded: whether the peak is without it."""

    peak_bytes: int = 0
    is_excluded: bool = True


@contextmanager
def apart() -> Iterator[Apart]:
    """What is done inside is no part of the process's peak; what it took goes back to the system at the end.

    On a CPU this needs Linux, whose record of the peak can be reset. Elsewhere `is_excluded` is False.
    """
    global _before
    before, found = max(_before, _resident_peak()), Apart(is_excluded=_reset_peak())
    if found.is_excluded:
        _before = before
    try:
        yield found
    finally:
        found.peak_bytes = _resident_peak()
        release()
        if found.is_excluded:
            _reset_peak()
        found.is_excluded |= torch.cuda.is_available()  # its peak is the allocator's, which host memory is no part of


def release() -> None:
    """Give free host memory back to the system, which glibc keeps where something above it is in use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def _resident_peak() -> int:
    """Linux's record of the process; elsewhere getrusage's, which begins at the peak of who started the process."""
    found = STATUS.is_file() and re.search(r"^VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak() -> bool:
    """Let the kernel's record of the peak begin anew, at what is resident now."""
    try:
        REFERENCES.write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True
