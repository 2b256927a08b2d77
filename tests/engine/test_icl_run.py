"""Runs of in-context learning, started as a user starts them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from fastft.cli import main

FACTS = ["The mill was built by Tessa Bray.", "The ferry carries one goat.", "The bell was cast from anchors."]


def write(folder: Path, split: str, first: str, second: str, count: int, **columns) -> None:
    folder.mkdir(exist_ok=True)
    texts = [(f"{FACTS[i % 3]} {FACTS[i % 2]}"[: 20 + i], FACTS[i % 3]) for i in range(count)]
    rows = [{first: a, second: b, "label": i % 2, **columns} for i, (a, b) in enumerate(texts)]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def icl_config(tmp_path, tiny):
    write(tmp_path / "rte", "train", "sentence1", "sentence2", 20)
    write(tmp_path / "rte", "validation", "sentence1", "sentence2", 11)
    write(tmp_path / "hans", "validation", "premise", "hypothesis", 6, heuristic="overlap", subcase="swap")

    def make(kind: str = "llama", **sections) -> dict:
        return {
            "method": "icl",
            "output_dir": str(tmp_path / "run"),
            "model": {"name_or_path": str(tiny(kind)), "dtype": "float32"},
            "data": {"task": "rte", "root": str(tmp_path), "ood": ["hans"]},
            "icl": {"num_shots": 4},
            "evaluate": {"batch_size": 4},
            "deepspeed": {"zero_stage": 0, "threads_per_rank": 1},
            **sections,
        }

    return make


def ok(result) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def figures(folder: str | Path) -> tuple[dict, list[dict]]:
    rows = (Path(folder) / "predictions.jsonl").read_text().splitlines()
    return json.loads((Path(folder) / "summary.json").read_text()), [json.loads(row) for row in rows]


def test_a_run_leaves_what_is_documented(icl_config, launch, tmp_path, capsys):
    raw = icl_config()
    ok(launch(raw))
    summary, rows = figures(raw["output_dir"])
    assert {name: s["examples"] for name, s in summary["sets"].items()} == {"rte": 11, "hans": 6}
    assert summary["accuracy"] == summary["sets"]["rte"]["accuracy"]
    assert summary["sets"]["rte"]["majority"] == 6 / 11
    for name, figure in summary["sets"].items():
        own = [r for r in rows if r["set"] == name]
        assert figure["accuracy"] == sum(r["predicted"] == r["label"] for r in own) / len(own)
    assert all(r["log_probs"][r["predicted"]] == max(r["log_probs"]) for r in rows)
    assert "in-context learning" in (Path(raw["output_dir"]) / "report.html").read_text()

    # The stored configuration runs again by itself; a second run into the same folder is refused.
    stored = yaml.safe_load((Path(raw["output_dir"]) / "config.yaml").read_text())
    assert "train" not in stored and "icl" in stored
    refused = launch(stored)
    assert refused.returncode == 1 and "overwrite=true" in refused.stderr
    ok(launch({**stored, "output_dir": str(tmp_path / "again")}))
    assert figures(tmp_path / "again")[1] == rows

    # `fastft evaluate --json` prints the summary alone, and writes nothing.
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump({**stored, "output_dir": str(tmp_path / "unwritten")}))
    assert main(["evaluate", "--cfg", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["sets"]["rte"]["accuracy"] == summary["accuracy"]
    assert not (tmp_path / "unwritten").exists()


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_processes_and_zero_stages_agree(icl_config, launch, tmp_path, kind):
    reference = None
    for processes, stage, offload in ((1, 0, "none"), (1, 3, "cpu"), (2, 0, "none"), (2, 3, "none")):
        options = {"zero_stage": stage, "offload_param": offload, "threads_per_rank": 1}
        raw = icl_config(kind, deepspeed=options)
        raw["output_dir"] = str(tmp_path / f"run-{processes}-{stage}")
        done = launch(raw, processes=processes)
        ok(done)
        assert ("ZeRO-3" in done.stdout) == (stage == 3 and offload == "none")
        assert ("layers in host memory" in done.stdout) == (offload == "cpu")
        _, rows = figures(raw["output_dir"])
        reference = reference or rows
        for found, expected in zip(rows, reference, strict=True):
            assert found["log_probs"] == pytest.approx(expected["log_probs"], abs=1e-5)
            assert found["predicted"] == expected["predicted"]


def test_fewer_examples_and_no_demonstrations(icl_config, launch):
    raw = icl_config(icl={"num_shots": 0}, evaluate={"max_examples": 5})
    ok(launch(raw))
    summary, rows = figures(raw["output_dir"])
    assert [s["examples"] for s in summary["sets"].values()] == [5, 5]
    assert summary["num_shots"] == 0 and summary["demonstration_tokens"] == 1  # beginning of sequence
    assert len(rows) == 10


def test_a_calibrated_run(icl_config, launch, tmp_path):
    found = {}
    for calibrate in (False, True):
        raw = icl_config(icl={"num_shots": 4, "calibrate": calibrate})
        raw["output_dir"] = str(tmp_path / str(calibrate))
        done = launch(raw)
        ok(done)
        assert ("icl calibrated, 4 demonstrations" in done.stdout) == calibrate
        found[calibrate] = figures(raw["output_dir"])
    # The same factor between the two labels for every example, of both sets.
    odds = [[row["log_probs"][0] - row["log_probs"][1] for row in rows] for _, rows in found.values()]
    shift = [b - a for a, b in zip(*odds, strict=True)]
    assert shift == pytest.approx([shift[0]] * 17) and abs(shift[0]) > 1e-3
    assert found[True][0]["nll"] != found[False][0]["nll"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"icl": {"num_shots": 18}}, r"the model has 512 positions; \d+ demonstrations fit: set icl.num_shots="),
        ({"icl": {"num_shots": 3}}, "cannot be balanced over 2 labels; use 2 or 4"),
        ({"train": {"steps": 3}}, "method=icl with data.task=rte does not use train; remove"),
        (
            {"data": {"task": "narrativeqa"}},
            "method=icl needs a classification or summarization task, got data.task=",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(icl_config, launch, changes, message):
    result = launch({**icl_config(), **changes})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr


def test_evaluate_is_for_classification(base_config, tmp_path, capsys):
    path = tmp_path / "distill.yaml"
    path.write_text(yaml.safe_dump(base_config()))
    assert main(["evaluate", "--cfg", str(path)]) == 1
    assert "method=distill" in capsys.readouterr().err
