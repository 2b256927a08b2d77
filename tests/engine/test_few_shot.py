"""Distillation of demonstrations, started as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastft.config import validate
from fastft.distributed import Ranks
from fastft.engine.base import load_base
from fastft.engine.demonstrations import Demonstrations
from fastft.engine.progress import Reporter
from tests.conftest import losses
from tests.engine.test_icl_run import ok, write


@pytest.fixture
def few_shot_config(tmp_path, tiny):
    write(tmp_path / "rte", "train", "sentence1", "sentence2", 20)
    write(tmp_path / "rte", "validation", "sentence1", "sentence2", 11)

    def make(**sections) -> dict:
        return {
            "method": "distill",
            "output_dir": str(tmp_path / "run"),
            "cache_dir": str(tmp_path / "cache"),
            "model": {"name_or_path": str(tiny("llama")), "dtype": "float32"},
            "data": {"task": "rte", "root": str(tmp_path)},
            "icl": {"num_shots": 4},
            "distill": {"examples": 12},
            "peft": {"r": 4},
            "train": {"steps": 30, "batch_size": 4, "lr": 1e-2, "eval_every": 15, "log_every": 1},
            "deepspeed": {"zero_stage": 0, "threads_per_rank": 1},
            **sections,
        }

    return make


def test_runs_share_what_the_base_says(few_shot_config, launch, tmp_path):
    """Without and with the demonstrations; a damaged file is computed again."""
    sets = []
    for name, options in (("lora", []), ("bitfit", ["peft.kind=bitfit", "peft.add_biases=true"]), ("again", [])):
        raw = few_shot_config(output_dir=str(tmp_path / name), train={"steps": 1, "batch_size": 4})
        if name == "again":
            for path in (tmp_path / "cache" / "answers").iterdir():
                path.write_bytes(path.read_bytes()[:100])
        done = launch(raw, *options)
        ok(done)
        assert done.stdout.count("answers of the base found in") == (2 if name == "bitfit" else 0)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        sets.append([summary[key]["rte"] for key in ("sets_no_context", "sets_teacher")])
    lora, bitfit, again = sets
    assert bitfit == lora
    for first, second in zip(lora, again, strict=True):
        assert all(first[key] == second[key] for key in ("accuracy", "nll", "ece", "mcc"))


@pytest.mark.parametrize(("loss_on", "targets_per_query"), [("all", None), ("completion", 1)])
def test_the_student_learns_what_the_prompt_does(few_shot_config, launch, loss_on, targets_per_query):
    raw = few_shot_config(distill={"examples": 12, "loss_on": loss_on})
    done = launch(raw)
    ok(done)
    assert "4 demonstrations of rte in one context" in done.stdout and "12 input sequences" in done.stdout
    if targets_per_query:
        assert "teach      12 hidden targets" in done.stdout
    folder = Path(raw["output_dir"])
    found = losses(folder)
    assert sum(found[-5:]) < 0.7 * sum(found[:5])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["setting"] == "demonstrations"
    for name in ("no_context", "teacher", "student"):
        assert 0 <= summary[f"accuracy_{name}"] <= 1
    assert "NLL of the label" in (folder / "report.html").read_text()


def test_the_context_scores_as_in_context_learning_does(few_shot_config, launch, tmp_path):
    """accuracy_teacher is what method=icl finds for the same task, demonstrations and pattern."""
    raw = few_shot_config(train={"steps": 1})
    ok(launch(raw))
    icl = {k: raw[k] for k in ("model", "data", "icl", "deepspeed")}
    ok(launch({**icl, "method": "icl", "output_dir": str(tmp_path / "icl")}))
    found, expected = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("run", "icl"))
    assert found["accuracy_teacher"] == expected["accuracy"]
    rows = [json.loads(x) for x in (tmp_path / "icl" / "predictions.jsonl").read_text().splitlines()]
    nll = -sum(row["log_probs"][row["label"]] for row in rows) / len(rows)
    assert found["nll_teacher"] == pytest.approx(nll, rel=1e-6)


def test_inputs_are_not_the_demonstrations(few_shot_config):
    config = validate(few_shot_config(distill={"examples": None}))
    few_shot = Demonstrations.load(config)
    prepared = few_shot.prepare(load_base(config, Ranks(), Reporter(enabled=False)), Ranks(), Reporter(enabled=False))
    distinct = {tuple(sorted(e.fields.items())) for e in few_shot.shots}
    rest = [e for e in few_shot.train if tuple(sorted(e.fields.items())) not in distinct]
    assert len(prepared.sequences) == len(rest) < len(few_shot.train)
    assert all(s.completion == () and len(s.target_positions("completion")) == 1 for s in prepared.sequences)


def test_an_online_teacher_gives_the_same(few_shot_config, launch, tmp_path):
    found = []
    for teacher in ("stored", "online"):
        raw = few_shot_config(distill={"teacher": teacher, "examples": 12}, train={"steps": 6, "batch_size": 5})
        ok(launch({**raw, "output_dir": str(tmp_path / teacher)}))
        found.append(torch.tensor(losses(tmp_path / teacher)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)


def test_two_processes_give_the_same(few_shot_config, launch, tmp_path):
    found = []
    for processes, stage in ((1, 0), (2, 3)):
        raw = few_shot_config(train={"steps": 6, "batch_size": 5}, deepspeed={"zero_stage": stage})
        raw |= {"output_dir": str(tmp_path / f"run-{processes}"), "cache_dir": str(tmp_path / f"cache-{processes}")}
        ok(launch(raw, processes=processes))
        summary = json.loads((Path(raw["output_dir"]) / "summary.json").read_text())
        found.append(torch.tensor([*losses(Path(raw["output_dir"])), summary["nll_teacher"], summary["nll_student"]]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"icl": {"num_shots": 0}}, "nothing to distil"),
        ({"queries": {"setting": "with_questions"}}, "data.task=rte does not use queries"),
        (
            {"distill": {"teacher": "online", "on_policy": 1.0, "on_policy_tokens": 500}},
            "are more than the model's 512 positions; lower icl.num_shots or distill.on_policy_tokens",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(few_shot_config, launch, changes, message):
    result = launch({**few_shot_config(), **changes})
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
