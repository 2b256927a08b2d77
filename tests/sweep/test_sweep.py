"""Sweeps of stub runs: what is started, skipped, shared, stopped, killed; and the table."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml

from fastft.sweep.grid import load_sweep
from tests.sweep.conftest import STUB, ends, read_rows, table, wait_until, write_sweep


def logs(folder: Path) -> dict[str, str]:
    return {path.name.rpartition("-")[0]: path.read_text() for path in (folder / "logs").glob("*.log")}


def begun(folder: Path) -> list[str]:
    """Process ids of the runs, from their logs."""
    return [pid for log in logs(folder).values() for pid in re.findall(r"pid (\d+)", log)]


def test_every_run_is_done_once_and_in_the_table(sweep_file, start, tmp_path):
    path, folder = sweep_file(), tmp_path / "sweep"
    said = ends(start("--cfg", path))
    assert "6 runs, 0 done, 2 at once" in said and "icl-seed2" in said and "rte 62.5 %, hans 62.5 %" in said
    rows = read_rows(folder)
    methods = ["icl"] * 6 + ["pbft"] * 6
    assert [(row["method"], row["seed"], row["set"]) for row in rows] == [
        (method, str(i // 2 % 3), ("rte", "hans")[i % 2]) for i, method in enumerate(methods)
    ]
    icl, pbft = rows[4], rows[-1]
    assert (icl["run"], icl["accuracy"], icl["accuracy_low"], icl["accuracy_high"]) == (
        "icl-seed2",
        "0.625",
        "0.5",
        "0.75",
    )
    assert (icl["peft"], pbft["peft"], pbft["num_shots"], pbft["data_seed"]) == ("", "lora", "4", "2")
    assert pbft["inference_tokens_per_query"] == "9.5" and pbft["trained_parameters"] == "5"
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert all(f", {share} threads, GPU None" in log for log in logs(folder).values())

    stored = pyarrow.parquet.read_table(folder / "results.parquet")
    assert stored.column_names == list(rows[0])
    assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in stored.to_pylist()] == rows
    assert str(stored.schema.field("accuracy").type) == "double" and str(stored.schema.field("seed").type) == "int64"

    before = sorted(begun(folder))
    again = ends(start("--cfg", path))
    assert "6 runs, 6 done" in again and "starts" not in again
    assert sorted(begun(folder)) == before

    more = ends(start("--cfg", path, "grid.seed=[0,1,2,3]"))
    assert "8 runs, 6 done" in more and more.count("starts") == 2
    assert len(read_rows(folder)) == 16


def test_columns_are_stable(sweep_file, start, tmp_path):
    """Others read them by name; the keys of the grid that have no shorter name follow data_seed."""
    ends(start("--cfg", sweep_file(grid={"seed": [0], "evaluate.max_examples": [5]})))
    assert list(read_rows(tmp_path / "sweep")[0]) == [
        *("run", "folder", "method", "peft", "task", "set", "model", "split", "pattern", "num_shots", "balanced"),
        *("calibrated", "seed", "data_seed", "evaluate.max_examples"),
        *("examples", "accuracy", "accuracy_low", "accuracy_high", "nll"),
        *("seconds", "peak_memory_bytes", "trained_parameters", "inference_tokens_per_query", "tokens_per_s"),
    ]


def test_a_failed_run_stops_no_other_and_is_tried_again(sweep_file, start, tmp_path):
    folder = tmp_path / "sweep"
    runs = {"icl": {"method": "icl"}, "bad": {"method": "pbft", "train.log_every": 2}}
    path = sweep_file(runs=runs, grid={"seed": [0, 1]})
    said = ends(start("--cfg", path), code=1)
    assert "2 of 4 runs failed, 2 are done" in said
    assert "bad-seed0: exit code 1" in said and "the stub fails" in said and "logs/bad-seed1-" in said
    assert {row["run"] for row in read_rows(folder)} == {"icl-seed0", "icl-seed1"}
    (folder / "mended").touch()
    said = ends(start("--cfg", path))
    assert "4 runs, 2 done" in said and said.count("starts") == 2
    assert len(read_rows(folder)) == 8


def test_two_sweeps_on_one_folder_share_the_work(sweep_file, start, tmp_path):
    path, folder = sweep_file(grid={"seed": list(range(8))}), tmp_path / "sweep"
    both = [start("--cfg", path) for _ in range(2)]
    said = [ends(process) for process in both]
    assert sum(text.count("starts") for text in said) == 16
    assert all(text.count("starts") for text in said)
    assert len(begun(folder)) == len(set(begun(folder))) == 16
    assert len(read_rows(folder)) == 32


def test_gpus_are_divided_among_the_runs(sweep_file, start, tmp_path):
    ends(start("--cfg", sweep_file(), CUDA_VISIBLE_DEVICES="5,7"))
    used = {re.search(r"GPU (\S+)", log)[1] for log in logs(tmp_path / "sweep").values()}
    assert used == {"5", "7"}


def test_parts_fill_one_table(sweep_file, start, tmp_path):
    path = sweep_file()
    assert ends(start("--cfg", path, "--part", "1/2")).count("starts") == 3
    assert len(read_rows(tmp_path / "sweep")) == 6
    assert ends(start("--cfg", path, "--part", "2/2")).count("starts") == 3
    assert len(read_rows(tmp_path / "sweep")) == 12


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    ends(start("--cfg", write_sweep(folder)))
    return table(folder / "sweep")


@pytest.mark.parametrize("moment", ["at once", "first log", "first run", "first table", "fifth run"])
def test_killed_at_any_moment_the_table_is_the_same(undisturbed, sweep_file, start, tmp_path, moment):
    path, folder = sweep_file(), tmp_path / "sweep"
    process = start("--cfg", path)
    moments = {
        "at once": folder.exists,
        "first log": lambda: logs(folder),
        "first run": lambda: begun(folder),
        "first table": lambda: (folder / "results.csv").exists(),
        "fifth run": lambda: len(begun(folder)) >= 5,
    }
    wait_until(moments[moment])
    process.kill()
    process.wait()
    killed = begun(folder)
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() and _is_stub(pid) for pid in killed), 5)
    assert len(list((folder / "runs").glob("*/summary.json"))) < 6
    ends(start("--cfg", path))
    assert table(folder) == undisturbed
    assert sorted(p.name for p in folder.iterdir()) == ["logs", "results.csv", "results.parquet", "runs"]


def _is_stub(pid: str) -> bool:
    try:
        return str(STUB.name) in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended since
        return False


def test_sigint_lets_the_runs_write_their_checkpoints(sweep_file, start, tmp_path):
    folder = tmp_path / "sweep"
    path = sweep_file(runs={"slow": {"method": "pbft", "train.log_every": 3}}, grid={"seed": [0, 1, 2]})
    process = start("--cfg", path)
    wait_until(lambda: sum("waiting" in log for log in logs(folder).values()) == 2)
    process.send_signal(signal.SIGINT)
    said = ends(process, code=128 + signal.SIGINT)
    assert said.count("stopped after step 7") == 2 and "0 of 3 runs are done; the same command goes on" in said
    process = start("--cfg", path)
    wait_until(lambda: "waiting" in logs(folder).get("slow-seed2", ""))  # the others have gone on meanwhile
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the stub does not hear it
    said = ends(process, code=128 + signal.SIGTERM)
    assert said.count("goes on after step 7") == 2
    assert {row["run"] for row in read_rows(folder)} == {"slow-seed0", "slow-seed1"}


def test_a_folder_with_something_else_is_left_alone(sweep_file, start, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.tex").touch()
    said = ends(start("--cfg", sweep_file()), code=1)
    assert "the folder holds something other than a sweep" in said
    assert [p.name for p in (tmp_path / "sweep").iterdir()] == ["thesis.tex"]


def test_a_run_of_another_config_in_its_folder_is_not_taken_for_done(sweep_file, start, tmp_path):
    path, folder = sweep_file(), tmp_path / "sweep"
    ends(start("--cfg", path))
    [first, *_] = load_sweep(path).runs
    stored = yaml.safe_load((first.folder / "config.yaml").read_text())
    (first.folder / "config.yaml").write_text(yaml.safe_dump({**stored, "seed": 9}))
    summary = json.loads((first.folder / "summary.json").read_text())
    summary["sets"]["rte"]["accuracy"] = 0.001
    (first.folder / "summary.json").write_text(json.dumps(summary))
    (folder / ".results.csv.partial-1").write_text("half a ta")  # of a sweep that was killed
    (folder / "results.csv").write_text("")
    said = ends(start("--cfg", path))
    assert said.count("starts") == 1 and read_rows(folder)[0]["accuracy"] == "0.375"
    assert len(read_rows(folder)) == 12 and not list(folder.glob(".results*"))
