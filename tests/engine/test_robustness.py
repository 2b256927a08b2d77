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
import yaml

from fastft.engine.documents import Documents
from fastft.engine.launch import extensions_folder
from fastft.models.causal import PackedCausalLM
from tests.conftest import ROOT, clean_environment, launch_processes, losses
from tests.engine.test_run import ok


def test_offload_changes_nothing_but_where_tensors_live(base_config, launch, tmp_path):
    found = []
    for name, settings, layers in (
        ("plain", {"zero_stage": 0}, "device"),
        ("offload", {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}, "device"),
        ("host layers", {"zero_stage": 3}, "host"),
    ):
        raw = {**base_config(model={"layers": layers}, deepspeed=settings), "output_dir": str(tmp_path / name)}
        ok(launch(raw))
        found.append(torch.tensor(losses(Path(raw["output_dir"]))))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=0)


@pytest.mark.parametrize("settings", [{}, {"offload_param": "cpu"}], ids=["on the device", "offloaded"])
def test_under_zero_3_the_model_is_never_moved_as_a_whole(base_config, launch, monkeypatch, settings):
    moved, to = [], PackedCausalLM.to
    monkeypatch.setattr(
        PackedCausalLM, "to", lambda lm, *args, **kwargs: (moved.append(args), to(lm, *args, **kwargs))[1]
    )
    ok(launch(base_config(deepspeed={"zero_stage": 3, **settings}, evaluate={"answers": False})))
    assert not moved


def test_on_nvme_a_run_computes_what_it_computes_in_memory(base_config, tiny, tmp_path):
    """Bfloat16, as DeepSpeed's swapping asks for; in a process of its own, whose swap threads end with it."""
    if not list(extensions_folder().rglob("async_io.so")):
        pytest.skip("DeepSpeed's async_io op has not been compiled on this machine (four minutes)")
    found = []
    swap = {"zero_stage": 3, "offload_optimizer": "nvme", "offload_param": "nvme", "nvme_path": str(tmp_path / "swap")}
    wide = tmp_path / "wide"  # tensors of less than 1 MiB never go to the disk
    shutil.copytree(tiny("opt"), wide, ignore=shutil.ignore_patterns("*.safetensors"))
    about = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(
        json.dumps({**about, "hidden_size": 512, "ffn_dim": 2048, "word_embed_proj_dim": 512})
    )
    for name, settings in (("memory", {"zero_stage": 3}), ("disk", swap)):
        model = {"name_or_path": str(wide), "random_weights": True, "dtype": "bfloat16"}
        raw = base_config(model=model, deepspeed=settings, evaluate={"answers": False})
        raw["output_dir"] = str(tmp_path / name)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
        ok(launch_processes(["--cfg", str(tmp_path / "config.yaml")], 1, tmp_path))
        found.append(torch.tensor(losses(tmp_path / name)))
    torch.testing.assert_close(found[0], found[1], rtol=2e-3, atol=0)
    assert list((tmp_path / "swap").rglob("*.swp"))


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
    own.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": {"stage": 2, "reduce_bucket": 1}}))
    refused = launch(base_config(deepspeed={"config_file": str(own)}), "overwrite=true")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    for said in (
        "train_batch_size: set train.batch_size",
        "zero_optimization.stage: set deepspeed.zero_stage",
        "zero_optimization.reduce_bucket: Extra inputs are not permitted",
    ):
        assert said in refused.stderr
    assert "teach " not in refused.stdout
    own.write_text(json.dumps({"zero_optimization": [2]}))
    refused = launch(base_config(deepspeed={"config_file": str(own)}), "overwrite=true")
    assert refused.returncode == 1 and "zero_optimization is list, expected an object" in refused.stderr


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


def test_half_of_a_launchers_environment_is_refused(base_config, launch, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    result = launch(base_config())
    assert (
        result.returncode == 1 and "RANK=0 is set, as for one process of several, but not WORLD_SIZE" in result.stderr
    )


def test_stopping_the_last_evaluation_does_not_lose_the_adapter(base_config, launch, monkeypatch):
    monkeypatch.setattr(Documents, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    raw = base_config()
    result = launch(raw)
    adapter = Path(raw["output_dir"]) / "adapter"
    assert result.returncode == 128 + signal.SIGTERM and "Traceback" not in result.stderr
    assert f"stopped after training; the adapter is in {adapter}" in result.stderr
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not (Path(raw["output_dir"]) / "summary.json").exists()
