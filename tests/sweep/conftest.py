"""Sweeps of stub runs, in processes of their own so that they can be killed."""

from __future__ import annotations

import csv
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fastft.sweep.table import COSTS
from tests.conftest import ROOT, clean_environment

STUB = Path(__file__).with_name("stub_train.py")


def write_sweep(folder: Path, **changes) -> Path:
    """The file of a sweep of two methods and three seeds of RTE, with changes; six runs of a stub."""
    raw = {
        "output_dir": str(folder / "sweep"),
        "parallel": 2,
        "base": {"data": {"task": "rte", "ood": ["hans"]}, "icl": {"num_shots": 4}},
        "runs": {"icl": {"method": "icl"}, "pbft-lora": {"method": "pbft", "peft.kind": "lora"}},
        "grid": {"seed": [0, 1, 2]},
        **changes,
    }
    path = folder / f"sweep-{len(list(folder.glob('sweep-*')))}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


@pytest.fixture
def sweep_file(tmp_path):
    return functools.partial(write_sweep, tmp_path)


@pytest.fixture(scope="session")
def start():
    """A function: `fastft sweep` with arguments as a process; with another train.py where one is given."""
    started = []

    def run(*arguments: str | Path, train: Path = STUB, **environment: str) -> subprocess.Popen:
        script = f"""
import sys
from pathlib import Path
from fastft.cli import main
from fastft.sweep import runner
runner.TRAIN = Path({str(train)!r})
sys.exit(main(["sweep", *sys.argv[1:]]))
"""
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**clean_environment(), "PYTHONPATH": str(ROOT), **environment},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def ends(process: subprocess.Popen, code: int = 0) -> str:
    """Wait for a sweep; returns what it printed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return out + err


def wait_until(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def read_rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(folder: Path) -> str:
    """results.csv as it is, but for the columns of time and memory."""
    measured = set(COSTS) - {"trained_parameters", "inference_tokens_per_query"}
    rows = read_rows(folder)
    names = [name for name in rows[0] if name not in measured]
    return "\n".join([",".join(names), *(",".join(row[name] for name in names) for row in rows)])
