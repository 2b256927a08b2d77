"""The sweep's file: which runs it comes to, and every problem at once."""

from __future__ import annotations

import pytest

from fastft.cli import main
from fastft.errors import ConfigError
from fastft.sweep.grid import load_sweep, select_part
from tests.conftest import ROOT

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.name)
def test_shipped_sweeps_are_valid(path):
    assert load_sweep(path).runs


def test_runs_are_every_combination_in_the_order_of_the_file(sweep_file):
    sweep = load_sweep(
        sweep_file(
            grid={
                "task": {
                    "rte": {"data": {"task": "rte", "ood": ["hans"]}},
                    "qqp": {"data": {"task": "qqp", "ood": []}},
                },
                "icl.num_shots": [2, 4],
                "seed": [0, 1],
            },
            base={"evaluate": {"batch_size": 3}},
        )
    )
    assert len(sweep.runs) == 2 * 2 * 2 * 2
    assert [run.name for run in sweep.runs[:3]] == [
        "icl-rte-num_shots2-seed0",
        "icl-rte-num_shots2-seed1",
        "icl-rte-num_shots4-seed0",
    ]
    last = sweep.runs[-1].config
    assert (last.method, last.data.task, last.icl.num_shots, last.seed) == ("pbft", "qqp", 4, 1)
    assert last.evaluate.batch_size == 3
    assert len({run.folder for run in sweep.runs}) == 16
    assert sweep.keys == ["method", "peft.kind", "data.task", "data.ood", "icl.num_shots", "seed"]


def test_a_run_may_take_a_section_of_the_base_out(sweep_file):
    """icl has no use for train, which is an error in a single config too."""
    base = {"data": {"task": "rte"}, "train": {"steps": 3}}
    runs = {"icl": {"method": "icl", "train": None}, "pbft": {"method": "pbft"}}
    configs = [run.config for run in load_sweep(sweep_file(base=base, runs=runs, grid={"seed": [0]})).runs]
    assert "train" not in configs[0].plain() and configs[1].train.steps == 3


def test_the_base_may_be_the_file_of_a_run(sweep_file):
    sweep = load_sweep(sweep_file(base=str(ROOT / "configs" / "icl_rte.yaml"), runs={}))
    assert [run.config.data.pattern for run in sweep.runs] == ["eval_harness"] * 3
    assert sweep.runs[0].folder.parent == sweep.output_dir / "runs" and not sweep.runs[0].config.overwrite


def test_folders_name_what_a_run_computes_not_where(sweep_file):
    """A changed value is another run; another cache or number of threads is not."""
    [first, *_], [other, *_], [elsewhere, *_] = (
        load_sweep(sweep_file(base={"data": {"task": "rte"}, **own})).runs
        for own in ({}, {"evaluate": {"max_examples": 5}}, {"cache_dir": "c", "deepspeed": {"threads_per_rank": 3}})
    )
    assert first.name == other.name and first.folder != other.folder
    assert first.folder == elsewhere.folder


def test_every_problem_of_every_run_is_listed(sweep_file):
    path = sweep_file(
        base={"icl": {"num_shots": 4}, "evaluate": {"batch_sise": 2}},
        runs={"icl": {"method": "icl"}, "pbft": {"method": "pbft", "train": {"steps": 0}}},
        grid={"data.task": ["rte", "hans"], "seed": [0, -1]},
    )
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 3 problems"
    assert "icl-rte-seed0, icl-rte-seed-1, icl-hans-seed0 and 5 more: evaluate.batch_sise: unknown key" in lines[1]
    assert "icl-rte-seed-1, icl-hans-seed-1, pbft-rte-seed-1 and 1 more: seed: got -1" in str(caught.value)
    assert "pbft-rte-seed0, pbft-rte-seed-1, pbft-hans-seed0 and 1 more: train.steps: got 0" in str(caught.value)


def test_what_a_task_does_not_have_is_a_problem_before_any_run(sweep_file):
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file(base={}, grid={"data.task": ["rte", "hans"], "data.pattern": ["minimal", "gpt4"]}))
    assert "icl-rte-gpt4, pbft-lora-rte-gpt4: data.pattern=gpt4: rte has minimal, gpt3" in str(caught.value)
    assert "data.task=hans has no train split" in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"paralel": 3}, "paralel: unknown key; did you mean parallel?"),
        ({"parallel": 0}, "parallel: got 0"),
        ({"runs": {}, "grid": {}}, "runs, grid: both are empty"),
        ({"runs": {"icl": 3}}, "runs.icl: got 3, expected values of keys"),
        ({"grid": {"seed": 3}}, "grid.seed: got 3, expected a list of values"),
        ({"grid": {"seed": []}}, "grid.seed: got [], expected a list of values"),
        ({"grid": {"task": {"rte": "rte"}}}, "grid.task: got {'rte': 'rte'}"),
        ({"grid": {"method": ["icl"]}}, "method: is set in two places of runs and grid"),
        ({"grid": {"output_dir": ["a"]}}, "output_dir: the sweep says this to each run itself"),
        ({"base": {"resume": "auto"}}, "base.resume: the sweep says this to each run itself"),
        ({"base": "none.yaml"}, "none.yaml: no such file"),
        ({"grid": {"seed": [1, 1]}}, "icl-seed1, icl-seed1: are the same run"),
        ({"grid": {"seed.x": [1]}, "base": {"seed": 3}}, "'seed.x': seed is not a section"),
    ],
)
def test_a_wrong_file_is_one_message(sweep_file, changes, message, capsys):
    assert main(["sweep", "--cfg", str(sweep_file(**changes))]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_parts_are_disjoint_and_whole(sweep_file):
    runs = load_sweep(sweep_file()).runs
    parts = [select_part(runs, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)
    assert [len(part) for part in parts] == [2, 2, 1, 1]
    assert select_part(runs, None) == runs
    for part in ("0/4", "5/4", "1", "a/b", "-1/2", "1/0"):
        with pytest.raises(ConfigError, match="expected i/n with 1 <= i <= n"):
            select_part(runs, part)


def test_a_dry_run_lists_and_writes_nothing(sweep_file, tmp_path, capsys):
    assert main(["sweep", "--cfg", str(sweep_file()), "--dry-run", "--part", "2/2"]) == 0
    said = capsys.readouterr().out
    assert said.count("to do") == 3 and "run 1/3  icl-seed1" in said and "0 of 3 runs are done" in said
    assert not (tmp_path / "sweep").exists()


def test_overrides_change_the_file(sweep_file, capsys):
    assert main(["sweep", "--cfg", str(sweep_file()), "--dry-run", "grid.seed=[7]", "base.icl.num_shots=2"]) == 0
    assert "icl-seed7" in capsys.readouterr().out


def test_help_says_how_a_file_looks(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    said = capsys.readouterr().out
    for word in ("--dry-run", "--part", "parallel: int >= 1 = 1", "grid:"):
        assert word in said
