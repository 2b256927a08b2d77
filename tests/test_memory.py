"""What a process takes at most, and what is left out of it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastft.engine.clock import Clock

TOLERANCE = 40  # MiB: imports have had a little more than they keep
# Touches 300 MiB apart in pieces that malloc keeps, then 100 MiB, of a process's own; prints MiB of each moment.
SCRIPT = """
import sys
from pathlib import Path
from fastft import memory

memory.REFERENCES = Path(sys.argv[1])
begin = memory.memory_bytes()
with memory.apart() as tracing:
    pieces = [bytes(8192) for _ in range(300 * 128)]
    above = bytes(8192)
    del pieces
behind, now = memory.peak_memory_bytes(), memory.memory_bytes()
own = bytearray(100 * 2**20)
end = memory.peak_memory_bytes()
for n in (tracing.peak_bytes - begin, behind - begin, now - begin, end - begin):
    print(n / 2**20)
print(tracing.is_excluded)
"""


def measured(references: str) -> tuple[list[float], bool]:
    ballast = bytearray(2**30)  # what this process takes is no part of another's peak
    done = subprocess.run([sys.executable, "-c", SCRIPT, references], capture_output=True, text=True, check=True)
    del ballast
    *figures, excluded = done.stdout.split()
    return [float(f) for f in figures], excluded == "True"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's peak is its allocator's")
def test_what_is_apart_is_not_in_the_peak_and_is_given_back():
    (apart, behind, now, end), excluded = measured("/proc/self/clear_refs")
    assert excluded and apart == pytest.approx(300, abs=TOLERANCE)
    assert max(behind, now) < TOLERANCE
    assert end == pytest.approx(100, abs=TOLERANCE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's peak is its allocator's")
def test_where_the_peak_cannot_be_reset_it_says_so():
    (apart, behind, now, end), excluded = measured("/proc/self/there-is-no-such-file")
    assert not excluded and apart == pytest.approx(300, abs=TOLERANCE)
    assert behind == pytest.approx(apart, abs=1) and end == pytest.approx(apart, abs=1) and now < TOLERANCE


def test_phases_take_turns(monkeypatch):
    moments = iter([1, 4, 6, 10, 20, 21])
    monkeypatch.setattr("time.monotonic", lambda: next(moments))
    clock = Clock(began=0.0)
    with clock.measure("train"), clock.measure("trace"):
        pass
    with pytest.raises(ValueError, match="planted"), clock.measure("evaluate"):
        raise ValueError("planted")
    assert clock.spans == [("train", 1, 4), ("trace", 4, 6), ("train", 6, 10), ("evaluate", 20, 21)]
    assert clock.seconds == {"train": 7, "trace": 2, "evaluate": 1}
