"""Benchmarks run, and agree with their peers, on shapes of nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

from tests.conftest import ROOT, clean_environment


def test_the_gpu_suite_knows_every_benchmark():
    spec = importlib.util.spec_from_file_location("gpu_suite", ROOT / "benchmarks/gpu_suite.py")
    suite = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = suite
    spec.loader.exec_module(suite)
    assert set(suite.BENCHES) == {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}


def run(bench: str, *options: str, json_file) -> dict[tuple[str, str], dict]:
    """Rows of a benchmark in float32 on the CPU, by name and implementation."""
    command = [sys.executable, str(ROOT / f"benchmarks/{bench}.py"), "--device", "cpu", "--dtype", "float32"]
    command += ["--rounds", "1", "--json", str(json_file), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=300)
    assert result.returncode == 0, result.stderr
    rows = {(row["name"], row["impl"]): row for row in json.loads(json_file.read_text())}
    assert not [row["error"] for row in rows.values() if row["error"]]
    assert all(row["median_ms"] > 0 for row in rows.values())
    return rows


def test_attention_of_a_pack_is_that_of_its_sequences_alone(tmp_path):
    shape = ["--sequences", "3", "--longest", "17", "--context", "9"]
    rows = run("bench_attention", *shape, json_file=tmp_path / "rows.json")
    pack, prefix = "attention of a pack forward+backward", "attention behind a prefix forward"
    ours = {"fastft", "fastft_sdpa"}  # the project's kernel and torch's; on a GPU others as well
    assert {impl for case, impl in rows if case == pack} >= ours | {"padded", "masked"}
    assert {impl for case, impl in rows if case == prefix} >= ours | {"expanded"}


def test_a_distillation_step_is_that_of_transformers_and_peft(tmp_path):
    """Loss and gradient norm, in float32; from stored targets, and with the teacher in the step."""
    shape = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 64, "vocab": 100, "context": 8, "query": 4, "batch": 3}
    options = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    rows = run("bench_distill_step", *options, "--rank", "2", "--queries", "6", json_file=tmp_path / "rows.json")
    assert {impl for _, impl in rows} == {
        "peft_eager",
        "peft_query_logits",
        "fastft_online",
        "fastft_first_epoch",
        "fastft",
    }
