"""Whole runs, started as a user starts them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastft import peft
from fastft.config import PeftConfig, validate
from fastft.data.store import TeacherStore
from fastft.distributed import Ranks
from fastft.engine import output
from fastft.engine.progress import Reporter
from fastft.methods.evaluation import token_f1
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from tests.conftest import ROOT, clean_environment, losses, wait_for


def ok(result) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def summary_of(raw: dict) -> dict:
    return json.loads((Path(raw["output_dir"]) / "summary.json").read_text(encoding="utf-8"))


def predictions_of(raw: dict) -> list[dict]:
    lines = (Path(raw["output_dir"]) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_leaves_what_is_documented(base_config, launch):
    raw = base_config(train={"steps": 3, "save_every": 2})
    ok(launch(raw))
    folder = Path(raw["output_dir"])
    summary = summary_of(raw)
    for key in ("nll_no_context", "nll_teacher", "nll_student", "recovery", "control_recovery", "setting"):
        assert key in summary
    assert summary["setting"] == "document_only"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_bytes", "time_s"} <= set(rows[0])
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    predictions = predictions_of(raw)
    assert len(predictions) == summary["documents"][0]["questions"] > 0
    for name in ("no_context", "student", "teacher"):
        f1 = [max(token_f1(row[name], gold) for gold in row["gold"]) for row in predictions]
        assert sum(f1) / len(f1) == pytest.approx(summary[f"f1_{name}"])
    assert predictions[0]["document"] == summary["documents"][0]["id"] and predictions[0]["question"].endswith("?")
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_2"]
    # The stored configuration runs again by itself, finds the teacher's targets, and gives the same losses.
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    again = launch({**stored, "output_dir": str(folder.parent / "again")})
    ok(again)
    assert "found in" in again.stdout
    assert losses(folder) == losses(folder.parent / "again")


def test_processes_and_zero_stages_agree(base_config, launch, tmp_path):
    """1 and 2 processes, ZeRO-0 and ZeRO-3: the same losses over 20 steps, and the same evaluation."""
    reference, said = None, None
    for processes, stage in ((1, 0), (1, 3), (2, 0), (2, 3)):
        raw = base_config(
            peft={"lora_plus_ratio": 4.0},
            train={"steps": 20, "batch_size": 5},
            deepspeed={"zero_stage": stage},
        )
        raw["output_dir"] = str(tmp_path / f"run-{processes}-{stage}")
        raw["cache_dir"] = str(tmp_path / f"cache-{processes}")
        ok(launch(raw, processes=processes))
        found = torch.tensor(losses(Path(raw["output_dir"]))), summary_of(raw)
        assert len(found[0]) == 20
        reference = reference or found
        torch.testing.assert_close(found[0], reference[0], rtol=1e-4, atol=0)
        for key in ("nll_no_context", "nll_teacher", "nll_student", "control_nll_student"):
            assert found[1][key] == pytest.approx(reference[1][key], rel=1e-4)
        answers = [row["teacher"] for row in predictions_of(raw)]
        said = said or answers
        assert answers == said


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_dropout_of_the_model_is_used_only_where_asked_for(base_config, launch, tmp_path, family):
    """At lora_B = 0 torch's random numbers reach the first loss through dropout alone (the models' is 0.1)."""
    found = {}
    for dropout in (False, True):
        for seed_of_torch in (0, 1):
            raw = base_config(family, train={"steps": 1})
            raw["model"]["dropout"], raw["output_dir"] = dropout, str(tmp_path / f"{dropout}-{seed_of_torch}")
            with pytest.MonkeyPatch.context() as patch:
                seed = torch.manual_seed
                patch.setattr(torch, "manual_seed", lambda n, s=seed_of_torch, f=seed: f(n + s))
                ok(launch(raw))
            found[dropout, seed_of_torch] = losses(Path(raw["output_dir"]))[0]
    assert found[False, 0] == found[False, 1]
    assert abs(found[True, 0] - found[True, 1]) > 1e-4 * found[False, 0]


def test_zero_3_trains_the_upper_layers_alone(base_config, launch, tmp_path):
    """Nothing below the first trained layer needs a gradient, whose hooks DeepSpeed waits for."""
    found = []
    for stage in (0, 3):
        raw = base_config(peft={"target_modules": ["layers.1.mlp.down_proj"]}, deepspeed={"zero_stage": stage})
        raw["output_dir"] = str(tmp_path / f"run-{stage}")
        ok(launch(raw))
        found.append(torch.tensor(losses(Path(raw["output_dir"]))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)


def test_adapter_loads_in_peft_without_fastft(base_config, launch, tmp_path, tiny):
    """PeftModel in a process that never imports fastft gives the student's logits and answer likelihood."""
    raw = base_config(train={"steps": 8, "lr": 1e-2}, evaluate={"answers": False})
    ok(launch(raw))
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(_questions_of(Path(raw["data"]["path"]))))
    script = f"""
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained({str(tiny("llama"))!r}, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained({str(tiny("llama"))!r})
model = PeftModel.from_pretrained(base, {raw["output_dir"] + "/adapter"!r}).eval()
nll = count = 0
written = []
for prompt, answers in json.load(open({str(prompts)!r})):
    for answer in answers:
        head = tokenizer(prompt).input_ids
        tail = tokenizer(answer, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([head + tail])).logits[0]
        written.append((head + tail, logits))
        at = torch.arange(len(head) - 1, len(head) + len(tail) - 1)
        nll -= logits.log_softmax(-1)[at, torch.tensor(tail)].sum().item()
        count += len(tail)
assert not any(m.split(".")[0] == "fastft" for m in sys.modules)
torch.save(written, {str(tmp_path / "logits.pt")!r})
print(nll / count)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    summary = summary_of(raw)
    assert abs(summary["nll_student"] - summary["nll_no_context"]) > 1e-2  # the adapter does something
    assert float(result.stdout.split()[-1]) == pytest.approx(summary["nll_student"], rel=1e-5)

    model = load_model(str(tiny("llama")), dtype="float32")
    trained = peft.inject(model, PeftConfig(r=4))
    saved = load_file(Path(raw["output_dir"]) / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[f"base_model.model.{name}.weight"])
        lm = PackedCausalLM(model)
        for token_ids, logits in torch.load(tmp_path / "logits.pt"):
            packed = PackedSequences([len(token_ids)])
            ours = lm(torch.tensor([token_ids]), packed, lambda hidden, weight: hidden @ weight.t())
            torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


def _questions_of(path: Path) -> list:
    record = json.loads(path.read_text().splitlines()[0])
    return [(f"Question: {q['question']}\nAnswer:", [f" {a}" for a in q["answers"]]) for q in record["questions"]]


def test_bitfit_trains_biases_but_not_the_key_projections(base_config, launch):
    from transformers import AutoModelForCausalLM

    from fastft.peft.files import load_biases

    raw = base_config("opt", peft={"kind": "bitfit"}, train={"steps": 4, "lr": 1e-2}, deepspeed={"zero_stage": 3})
    ok(launch(raw))
    folder = Path(raw["output_dir"]) / "adapter"
    saved = load_file(folder / "biases.safetensors")
    base = AutoModelForCausalLM.from_pretrained(raw["model"]["name_or_path"], dtype=torch.float32)
    before = dict(base.named_parameters())
    assert not any("k_proj" in name for name in saved)
    assert {n for n in before if n.endswith("bias") and "k_proj" not in n} == set(saved)
    assert any(not torch.equal(saved[n], before[n]) for n in saved)
    loaded = load_biases(base, folder)
    assert all(torch.equal(dict(loaded.named_parameters())[n], saved[n]) for n in saved)


def test_bitfit_adds_biases_only_when_told(base_config, launch):
    raw = base_config(peft={"kind": "bitfit"})
    refused = launch(raw)
    assert refused.returncode == 1 and "add_biases=true" in refused.stderr and "Traceback" not in refused.stderr
    ok(launch(raw, "peft.add_biases=true", "overwrite=true"))


def test_full_fine_tuning_saves_a_model_that_loads(base_config, launch):
    from transformers import AutoModelForCausalLM

    raw = base_config(peft={"kind": "full"}, deepspeed={"zero_stage": 3})
    ok(launch(raw))
    before = AutoModelForCausalLM.from_pretrained(raw["model"]["name_or_path"])
    after = AutoModelForCausalLM.from_pretrained(Path(raw["output_dir"]) / "adapter")
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    assert pairs and any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lora", {}),
        ("lora", {"tail": False, "temperature": 2.0}),
        ("lora", {"direction": "reverse"}),
        ("lora", {"direction": "jsd", "beta": 0.2}),
        ("lora", {"direction": "jsd", "tail": False, "temperature": 2.0}),
        ("full", {}),
    ],
)
def test_topk_targets_with_all_tokens_equal_hidden_targets(base_config, launch, tmp_path, kind, options):
    """k = V: the top-k store holds the whole distribution, so the losses are those of the exact store.

    With all weights trained, the teacher's hidden states must not be read by the head that the student has by then.
    """
    found = []
    for name, distill in (("hidden", options), ("topk", {"targets": "topk", "top_k": 400, **options})):
        raw = {**base_config(peft={"kind": kind}), "distill": distill, "output_dir": str(tmp_path / name)}
        ok(launch(raw))
        found.append(torch.tensor(losses(Path(raw["output_dir"]))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_one_topk_store_trains_in_every_direction(base_config, launch, tmp_path):
    first_losses = set()
    for direction in ("forward", "reverse", "jsd"):
        raw = base_config(train={"steps": 20, "lr": 1e-2})
        raw |= {"distill": {"targets": "topk", "top_k": 16, "direction": direction}}
        raw |= {"output_dir": str(tmp_path / direction)}
        result = launch(raw)
        ok(result)
        assert ("found in" in result.stdout) == (direction != "forward")
        found = losses(tmp_path / direction)
        assert sum(found[-5:]) < 0.9 * sum(found[:5])
        first_losses.add(found[0])
    assert len(first_losses) == 3


def test_interrupted_run_resumes_with_the_same_numbers(base_config, launch, tmp_path):
    raw = base_config(train={"steps": 400, "batch_size": 2, "schedule": "constant"}, evaluate={"answers": False})
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(raw))
    command = [sys.executable, str(ROOT / "fastft" / "train.py"), "--cfg", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
    )
    metrics = Path(raw["output_dir"]) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "resume=auto" in stderr and "Traceback" not in stderr
    stopped_at = len(losses(Path(raw["output_dir"])))
    end = stopped_at + 4
    raw["train"]["steps"] = end
    refused = launch(raw)
    assert refused.returncode == 1 and "resume=auto" in refused.stderr
    ok(launch(raw, "resume=auto"))
    straight = {**raw, "output_dir": str(tmp_path / "straight")}
    ok(launch(straight))
    assert losses(Path(raw["output_dir"])) == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "straight")) == end


def test_the_deepspeed_launcher_runs_two_processes(base_config, launch):
    def buffers() -> set[Path]:
        return set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))

    before = buffers()
    raw = base_config(deepspeed={"zero_stage": 2})
    result = launch(raw, processes=2)
    ok(result)
    assert "2 processes" in result.stdout
    assert result.stdout.count("report     ") == 1  # one rank speaks
    left = buffers() - before  # other tests' runs have some too, but those go when they end
    wait_for(lambda: not left & buffers())


def test_non_finite_loss_names_the_step_and_keeps_a_checkpoint(base_config, launch):
    raw = base_config(train={"steps": 30, "lr": 1e30, "max_grad_norm": 0.0, "schedule": "constant", "save_every": 1})
    result = launch(raw)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "NonFiniteLossError" in result.stderr and "the loss is" in result.stderr  # caught before the update
    assert not (Path(raw["output_dir"]) / "summary.json").exists()


def test_a_planted_nan_is_found_in_its_example(base_config, launch, monkeypatch):
    """A target that is not a number: the message names the step, the example and its document; the state stays."""
    true_rows = TeacherStore.rows

    def rows(self, example):
        found = true_rows(self, example)
        return {name: torch.full_like(t, torch.nan) for name, t in found.items()} if example == 2 else found

    monkeypatch.setattr(TeacherStore, "rows", rows)
    raw = base_config(train={"steps": 30, "batch_size": 2, "save_every": 1})
    result = launch(raw)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "from example 2 (passage, document 'the-mill': " in result.stderr, result.stderr
    done = losses(Path(raw["output_dir"]))
    assert f"step {len(done) + 1}: the loss is nan" in result.stderr
    kept = [p.name for p in (Path(raw["output_dir"]) / "checkpoints").glob("step_*")]
    assert kept == ([f"step_{len(done)}"] if done else [])
    monkeypatch.undo()
    ok(launch(raw, f"resume={'auto' if done else 'never'}", f"overwrite={'false' if done else 'true'}"))
    assert len(losses(Path(raw["output_dir"]))) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"stepz": 3}}, "did you mean train.steps?"),
        ({"train": {"steps": 0}}, "train.steps"),
        ({"model": {"name_or_path": "/no/such/folder"}}, "no such folder"),
        ({"data": {"path": "/no/such/file.jsonl"}}, "no such file or folder"),
        ({"data": {"documents": [99]}}, "no document 99"),
        ({"data": {"window": {"enabled": False, "tokens": 10}}}, "window.enabled=true"),
        ({"peft": {"target_modules": ["nope"]}}, "no linear layer is named 'nope'"),
        pytest.param(
            {"model": {"dtype": "float16"}},
            "float16 needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has float16"),
        ),
    ],
)
def test_bad_input_gets_one_message(base_config, launch, change, message):
    raw = base_config(**change)
    result = launch(raw)
    assert result.returncode == 1
    assert message in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert not (Path(raw["output_dir"]) / "summary.json").exists()


def test_a_document_of_several_windows(base_config, launch):
    """Scored in its best window and cut to its first; the table and the summary say both."""
    window = {"tokens": 40, "overlap": 4}
    raw = base_config(data={"window": window}, queries={"self_study": {"count": 0}}, evaluate={"answers": False})
    result = launch(raw)
    ok(result)
    summary = summary_of(raw)
    assert "in context, cut to one window" in result.stdout and "1 document, 1 context" not in result.stdout
    assert summary["nll_truncated"] >= summary["nll_teacher"] and summary["recovery_truncated"] <= 1
    assert "nll_truncated" not in summary["documents"][0]


def test_results_stay_until_the_run_that_replaces_them_begins(base_config, launch):
    raw = base_config()
    ok(launch(raw))
    before = summary_of(raw)
    failed = launch(raw, "overwrite=true", "peft.target_modules=[nope]")
    assert failed.returncode == 1
    assert summary_of(raw) == before
    assert (
        yaml.safe_load((Path(raw["output_dir"]) / "config.yaml").read_text())["peft"]["target_modules"] == "all-linear"
    )


def test_a_port_in_use_is_one_message(base_config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(base_config()))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environment = {**clean_environment(), **told, "MASTER_PORT": str(taken.getsockname()[1])}
        result = subprocess.run(
            [sys.executable, str(ROOT / "fastft" / "train.py"), "--cfg", str(path)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert "deepspeed --master_port PORT" in result.stderr


def test_a_document_without_questions_is_distilled_too(base_config, launch, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text(
        json.dumps({"id": "a", "title": "A", "text": "The mill at Orrin was built in 1804. It burned twice."})
    )
    raw = base_config(data={"path": str(path), "documents": None, "control_documents": 0})
    result = launch(raw)
    ok(result)
    assert "nothing was evaluated" in result.stdout
    assert summary_of(raw)["recovery"] is None
    assert (Path(raw["output_dir"]) / "adapter" / "adapter_model.safetensors").is_file()


def test_another_run_in_the_folder_is_not_touched(base_config, launch):
    raw = base_config()
    folder = Path(raw["output_dir"])
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    result = launch(raw)
    assert result.returncode == 1 and "something other than a run" in result.stderr
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_a_report_that_cannot_be_drawn_costs_no_results(base_config, launch, monkeypatch):
    def write_report(*_):
        raise ValueError("no ink")

    monkeypatch.setattr("fastft.engine.documents.write_report", write_report)
    raw = base_config(train={"steps": 1})
    done = launch(raw)
    ok(done)
    assert "cannot be drawn: ValueError: no ink" in done.stdout and "report.html" not in done.stdout
    assert summary_of(raw)["steps"] == 1


def test_a_run_at_work_in_the_folder_is_left_alone(base_config, launch, monkeypatch):
    monkeypatch.setattr(output, "LOCK_PATIENCE_S", 2)
    raw = base_config()
    folder = Path(raw["output_dir"])
    folder.mkdir()
    with output.open_output_dir(validate(raw), folder, Ranks(0, 1), Reporter(enabled=False)):
        refused = launch(raw)
        assert refused.returncode == 1 and "another run is at work there; wait until it has ended" in refused.stderr
        assert "another run is there; up to 2 s" in refused.stdout
    ok(launch(raw))


def test_a_killed_runs_lock_is_waited_for(base_config, launch):
    """The kernel takes the lock back when the last of a killed run's memory is freed, a moment after the kill."""
    raw = base_config()
    folder = Path(raw["output_dir"])
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    late = threading.Timer(0.5, os.close, (handle,))
    late.start()
    ok(launch(raw))
    late.join()
