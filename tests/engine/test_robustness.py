"""DeepSpeed's options, and runs that die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastft.engine.documents import Documents
from tests.conftest import ROOT, clean_environment, losses
from tests.engine.test_run import ok


def test_offload_changes_nothing_but_where_tensors_live(base_config, launch, tmp_path):
    found = []
    for name, settings in (
        ("plain", {"zero_stage": 0}),
        ("offload", {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}),
    ):
        raw = {**base_config(deepspeed=settings), "output_dir": str(tmp_path / name)}
        ok(launch(raw))
        found.append(torch.tensor(losses(Path(raw["output_dir"]))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)


def test_eight_bit_adamw_follows_adamw(base_config, launch, tmp_path):
    pytest.importorskip("bitsandbytes")
    found = []
    for name in ("adamw", "adamw_8bit"):
        raw = {**base_config(train={"optimizer": name, "steps": 6}), "output_dir": str(tmp_path / name)}
        ok(launch(raw))
        found.append(torch.tensor(losses(Path(raw["output_dir"]))))
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0)


def test_a_deepspeed_file_of_ones_own_is_merged(base_config, launch, tmp_path):
    own = tmp_path / "ds.json"
    own.write_text(json.dumps({"zero_optimization": {"stage3_prefetch_bucket_size": 1000}, "dump_state": False}))
    ok(launch(base_config(deepspeed={"zero_stage": 3, "config_file": str(own)})))
    own.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 2}}))
    refused = launch(base_config(deepspeed={"config_file": str(own)}), "overwrite=true")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    for said in ("train_batch_size: set train.batch_size", "zero_optimization.stage: set deepspeed.zero_stage"):
        assert said in refused.stderr


def test_a_run_that_is_killed_again_and_again_ends_as_one_left_alone(tmp_path):
    """In the teach phase and inside a checkpoint; `--times 20` of benchmarks/kill_proof.py does it in earnest."""
    json_file = tmp_path / "kills.json"
    command = [sys.executable, str(ROOT / "benchmarks/kill_proof.py"), "--phase", "teach", "checkpoint", "--together"]
    command += ["--times", "1", "--json", str(json_file)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(json_file.read_text())["rows"]
    assert row["differences"] == [] and row["resumes"] >= 1
    assert {kill["phase"] for kill in row["kills"] if kill["inside"]} == {"teach", "checkpoint"}
    assert all(kill["problems"] == [] for kill in row["kills"])


def test_a_disk_without_room_for_the_adapter_is_told_before_the_first_step(base_config, launch, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    raw = base_config()
    result = launch({**raw, "distill": {"targets": "topk", "top_k": 1}, "queries": {"self_study": {"count": 0}}})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "the adapter and 1 checkpoint take" in result.stderr and "MiB are free" in result.stderr
    assert not (Path(raw["output_dir"]) / "metrics.jsonl").exists()
    monkeypatch.undo()
    ok(launch(raw))  # the folder of a run that never began is not in the way


def test_stopping_the_last_evaluation_does_not_lose_the_adapter(base_config, launch, monkeypatch):
    monkeypatch.setattr(Documents, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    raw = base_config()
    result = launch(raw)
    adapter = Path(raw["output_dir"]) / "adapter"
    assert result.returncode == 128 + signal.SIGTERM and "Traceback" not in result.stderr
    assert f"stopped after training; the adapter is in {adapter}" in result.stderr
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (Path(raw["output_dir"]) / "summary.json").exists()
