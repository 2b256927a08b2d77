"""Runs on texts with summaries, started as a user starts them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import FACTS, losses
from tests.engine.test_icl_run import figures, ok

ROWS = [{"document": f"{text} It was said in {year}.", "summary": f"{name.title()}:\n{answer}."}
        for year in (1804, 1912) for name, text, _, answer in FACTS]  # fmt: skip
METHODS = ("icl", "pbft", "distill")


@pytest.fixture
def summary_config(tmp_path, tiny):
    def write(split: str, rows: list[dict]) -> str:
        path = tmp_path / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    files = {
        "train": write("train", ROWS),
        "validation": write("validation", ROWS[:4]),
        "late": write("late", ROWS[4:]),
    }

    def make(method: str, kind: str = "llama", **sections) -> dict:
        raw = {
            "method": method,
            "output_dir": str(tmp_path / f"run-{method}"),
            "cache_dir": str(tmp_path / "cache"),
            "model": {"name_or_path": str(tiny(kind)), "dtype": "float32"},
            "data": {"task": "summarization", "files": files, "pattern": "{document}\nIn short:", "ood": ["late"]},
            "icl": {"num_shots": 2},
            "peft": {"kind": "lora", "r": 4},
            "train": {"steps": 4, "batch_size": 3, "lr": 1e-2, "warmup_steps": 1, "log_every": 1},
            "evaluate": {"batch_size": 3, "max_summary_tokens": 12},
            "deepspeed": {"zero_stage": 0, "threads_per_rank": 1},
        }
        if method == "icl":
            del raw["peft"], raw["train"]
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        return raw

    return make


def test_all_methods_say_the_same_things(summary_config, launch):
    summaries = {}
    for method in METHODS:
        raw = summary_config(method)
        done = launch(raw)
        ok(done)
        assert "ROUGE-L" in done.stdout
        summaries[method], rows = figures(raw["output_dir"])
        for name, own in summaries[method]["sets"].items():
            asked = [row for row in rows if row["set"] == name]
            assert own["examples"] == len(asked) == {"summarization": 4, "late": 2}[name]
            for key in ("rouge1", "rouge2", "rougeL"):
                assert own[key] == pytest.approx(sum(row[key] for row in asked) / len(asked))
                low, high = own["intervals"][key]
                assert low <= own[key] <= high
        assert "longest common subsequence" in (Path(raw["output_dir"]) / "report.html").read_text()
    own = [set(s["sets"]["late"]) for s in summaries.values()]
    assert own[0] == own[1] == own[2]
    # The student's teacher is in-context learning.
    assert summaries["distill"]["sets_teacher"]["late"]["nll"] == pytest.approx(summaries["icl"]["sets"]["late"]["nll"])
    assert summaries["distill"]["rougeL_teacher"] == pytest.approx(summaries["icl"]["rougeL"])


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("num_shots", [0, 2])
def test_summaries_and_likelihoods_equal_transformers(summary_config, launch, tokenizer, tiny, kind, num_shots):
    raw = summary_config("icl", kind, icl={"num_shots": num_shots}, data={"ood": []})
    ok(launch(raw))
    rows = figures(raw["output_dir"])[1]
    model = AutoModelForCausalLM.from_pretrained(tiny(kind), dtype=torch.float32).eval()
    shown = _shots(raw)
    for row, example in zip(rows, ROWS, strict=False):
        prompt = "\n\n".join([*shown, f"{example['document']}\nIn short:"])
        ids = torch.tensor([tokenizer(prompt).input_ids])
        reference = tokenizer(" " + " ".join(example["summary"].split()), add_special_tokens=False).input_ids
        with torch.no_grad():
            whole = torch.cat([ids, torch.tensor([reference])], 1)
            log_probs = model(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
            written = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
        nll = -log_probs[torch.arange(len(reference)), torch.tensor(reference)].sum().item()
        assert row["nll"] == pytest.approx(nll, rel=1e-4)
        text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0].strip()
        assert row["summary"] == text


def _shots(raw: dict) -> list[str]:
    from fastft.config import validate
    from fastft.engine.summaries import SummaryDemonstrations

    source = SummaryDemonstrations.load(validate(raw))
    return [source.pattern.demonstrate(e) for e in source.shots]


def test_fine_tuning_learns_to_write_and_to_stop(summary_config, launch):
    raw = summary_config(
        "pbft",
        data={"ood": [], "split": "train"},
        icl={"num_shots": 6},
        train={"steps": 60, "batch_size": 6, "eval_every": 30},
        evaluate={"max_summary_tokens": 40},
        peft={"kind": "full"},
    )
    ok(launch(raw))
    summary, rows = figures(raw["output_dir"])
    assert [row["summary"] for row in rows] == [" ".join(row["summary"].split()) for row in ROWS]
    assert summary["rougeL"] == 1.0 and summary["nll"] < 0.1
    metrics = [json.loads(x) for x in (Path(raw["output_dir"]) / "metrics.jsonl").read_text().splitlines()]
    assert sum("evaluated_rougeL" in row for row in metrics) == 1


def test_the_student_learns_the_teachers_summaries(summary_config, launch):
    raw = summary_config("distill", data={"ood": []}, distill={"examples": 4, "loss_on": "completion"})
    raw["train"] |= {"steps": 30, "batch_size": 4}
    done = launch(raw)
    ok(done)
    assert "4 input sequences" in done.stdout
    found = losses(Path(raw["output_dir"]))
    assert sum(found[-4:]) < 0.7 * sum(found[:4])


def test_an_online_teacher_gives_the_same(summary_config, launch, tmp_path):
    found = []
    for teacher in ("stored", "online"):
        raw = summary_config("distill", data={"ood": []}, distill={"teacher": teacher})
        ok(launch({**raw, "output_dir": str(tmp_path / teacher)}))
        found.append(torch.tensor(losses(tmp_path / teacher)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_agree_with_one(summary_config, launch, tmp_path, method):
    found = []
    for processes, stage in ((1, 0), (2, 3)):
        raw = summary_config(method, deepspeed={"zero_stage": stage})
        raw |= {"output_dir": str(tmp_path / f"run-{processes}"), "cache_dir": str(tmp_path / f"cache-{processes}")}
        ok(launch(raw, processes=processes))
        found.append(figures(raw["output_dir"])[1])
    for one, two in zip(*found, strict=True):
        assert one["nll"] == pytest.approx(two["nll"], rel=1e-3)
    if method == "icl":
        assert [row["summary"] for row in found[0]] == [row["summary"] for row in found[1]]


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "icl",
            {"data": {"target": "abstract"}},
            "train.jsonl:1: missing 'abstract'; found 'document', 'summary'; set",
        ),
        ("icl", {"data": {"pattern": "{text}"}}, "missing 'text'; found 'document', 'summary'; write data.pattern"),
        ("icl", {"data": {"verbalizer": {"a": "b", "c": "d"}}}, "data.task=summarization does not use data.verbalizer"),
        ("icl", {"evaluate": {"max_summary_tokens": 300}}, r"\d demonstrations fit: set icl.num_shots=\d"),
        ("icl", {"evaluate": {"max_summary_tokens": 500}}, "no demonstration fits"),
        ("pbft", {"evaluate": {"max_summary_tokens": 500}}, "tokens with its answer, but the model has 512"),
        ("ft", {}, "method=ft needs a classification task, got data.task=summarization"),
    ],
)
def test_what_cannot_be_right_is_refused(summary_config, launch, method, changes, message):
    if "evaluate" in changes and method == "icl":
        changes |= {"icl": {"num_shots": 6}}
    result = launch(summary_config(method, **changes))
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert re.search(message, result.stderr), result.stderr
