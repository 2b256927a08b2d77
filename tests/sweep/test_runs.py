"""A sweep of real runs of a tiny model."""

from __future__ import annotations

import os
import signal
import time

import pytest
import yaml

from tests.conftest import ROOT
from tests.engine.test_icl_run import write
from tests.sweep.conftest import ends, read_rows, table, wait_until

TRAIN = ROOT / "fastft" / "train.py"


@pytest.fixture
def distillations(tmp_path, tiny):
    """A function: the file of a sweep of two distillations of the same demonstrations, with a checkpoint a step."""
    write(tmp_path / "rte", "train", "sentence1", "sentence2", 20)
    write(tmp_path / "rte", "validation", "sentence1", "sentence2", 11)
    write(tmp_path / "hans", "validation", "premise", "hypothesis", 6, heuristic="overlap", subcase="swap")

    def make(name: str):
        base = {
            "method": "distill",
            "cache_dir": str(tmp_path / f"cache-{name}"),
            "model": {"name_or_path": str(tiny("llama")), "dtype": "float32"},
            "data": {"task": "rte", "root": str(tmp_path), "ood": ["hans"]},
            "icl": {"num_shots": 4},
            "distill": {"examples": 8},
            "train": {"steps": 12, "batch_size": 3, "lr": 1e-2, "warmup_steps": 1, "save_every": 1, "log_every": 1},
            "evaluate": {"batch_size": 4},
            "deepspeed": {"zero_stage": 0},
        }
        runs = {"lora": {"peft": {"kind": "lora", "r": 4}}, "bitfit": {"peft": {"kind": "bitfit", "add_biases": True}}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / name), "parallel": 2, "base": base, "runs": runs}))
        return path, tmp_path / name

    return make


@pytest.mark.slow
def test_runs_share_a_teacher_and_survive_a_kill(distillations, start, tmp_path):
    path, folder = distillations("undisturbed")
    ends(start("--cfg", path, train=TRAIN, TORCH_EXTENSIONS_DIR=str(tmp_path / "built")))
    logs = [log.read_text() for log in (folder / "logs").glob("*.log")]
    assert sorted("targets" in log and "written to" in log for log in logs) == [False, True]
    assert sum("found in" in log for log in logs) == 1
    assert {(row["peft"], row["set"], row["examples"]) for row in read_rows(folder)} == {
        *(("lora", "rte", "11"), ("lora", "hans", "6"), ("bitfit", "rte", "11"), ("bitfit", "hans", "6"))
    }
    # A run of one process builds nothing: torch's lock of a build would outlive a killed one and stop all others.
    assert not (tmp_path / "built").exists()

    path, killed = distillations("killed")
    process = start("--cfg", path, train=TRAIN)
    wait_until(lambda: list(killed.glob("runs/*/checkpoints/step_3")))
    process.kill()
    process.wait()
    time.sleep(0.2)
    pids = [pid for pid in os.listdir("/proc") if pid.isdigit() and _runs_in(pid, str(killed))]
    for pid in pids:
        os.kill(int(pid), signal.SIGKILL)
    assert not pids  # the runs died with their sweep
    assert not list(killed.glob("runs/*/summary.json"))
    said = ends(start("--cfg", path, train=TRAIN))
    assert "goes on after step" in said
    assert table(killed) == table(folder)


def _runs_in(pid: str, folder: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return f"{folder}/logs/" in file.read()
    except OSError:
        return False
