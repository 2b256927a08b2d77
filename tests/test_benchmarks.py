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


def test_a_distillation_step_is_that_of_transformers_and_peft(tmp_path):
    """Loss and gradient norm, in float32; from stored targets, and with the teacher in the step."""
    shape = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 64, "vocab": 100, "context": 8, "query": 4, "batch": 3}
    command = [sys.executable, str(ROOT / "benchmarks/bench_distill_step.py"), "--device", "cpu", "--dtype", "float32"]
    command += [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    command += ["--rank", "2", "--queries", "6", "--rounds", "1", "--json", str(tmp_path / "rows.json")]
    result = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), timeout=300)
    assert result.returncode == 0, result.stderr
    rows = {row["impl"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {"peft_eager", "peft_query_logits", "fastft_online", "fastft_first_epoch", "fastft"}
    assert not [row["error"] for row in rows.values() if row["error"]]
    assert all(row["median_ms"] > 0 for row in rows.values())
