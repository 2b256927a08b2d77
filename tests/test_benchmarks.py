"""Benchmarks run, and agree with their peers, on shapes of nothing."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT, clean_environment

SCRIPTS = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}


@pytest.fixture
def script(monkeypatch):
    """script(name): a module of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_every_benchmark_is_run_on_every_device(script):
    of_processors = {"bench_quantise", "bench_products"}  # on a GPU bitsandbytes quantises, and products are torch's
    assert set(script("gpu_suite").BENCHES) == SCRIPTS - of_processors
    assert {part.script for part in script("run_all").parts_of("cpu").values()} == SCRIPTS
    assert {part.script for part in script("run_all").parts_of("cuda").values()} == SCRIPTS - of_processors


def rows_of(seed: int, slower: float = 1.0, hour: float = 1.0, device_name: str = "EPYC, 2 threads") -> list[dict]:
    """A run of one case in four sizes, with peers; ours takes `slower` times as long, all take `hour` times."""
    noise = random.Random(seed)
    rows = []
    for rows_count in (32, 64, 128, 256):
        for impl, factor in (("fastft", slower), ("eager", 2.0), ("compile", 1.2), ("peft", 3.0)):
            times = sorted(rows_count * factor * hour * noise.lognormvariate(0, 0.03) for _ in range(7))
            shape = {"rows": rows_count, "hidden": 8}
            row = {"name": "op forward", "impl": impl, "shape": shape, "dtype": "float32", "device": "cpu"}
            row |= {"median_ms": times[3], "p20_ms": times[1], "p80_ms": times[5], "rounds": 7}
            row |= {"peak_memory_bytes": 2**20, "device_name": device_name, "error": None}
            rows.append(row)
    return rows


@pytest.fixture
def result(tmp_path):
    """result(name, rows): a file as run_all writes it."""

    def write(name: str, rows: list[dict], busy: float = 0.0):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"parts": {"op": {"busy_elsewhere": busy, "rows": rows}}}))
        return path

    return write


def test_a_slow_hour_is_noise_and_a_slower_kernel_is_not(script, result, capsys):
    compare = script("compare")
    kept = result("kept", rows_of(0))
    assert compare.report(result("same", rows_of(1, hour=1.7)), kept) == []
    moved = compare.report(result("slower", rows_of(2, slower=1.3)), kept)
    assert {c.key[1] for c in moved} == {"fastft"} and "all 4 sizes" in {c.key[2] for c in moved}
    assert all(1.2 < c.ratio < 1.4 for c in moved)
    assert "1 of 4 kernels in all their sizes moved" in capsys.readouterr().out.replace("\n", " ")


def test_false_alarms_are_rare(script, result):
    compare = script("compare")
    runs = [compare.read(result(f"run{i}", rows_of(i))) for i in range(20)]
    pairs = [c for a, b in itertools.pairwise(runs) for c in compare.changes(a, b)[0]]
    assert len(pairs) == 19 * 16 and sum(c.moved for c in pairs) <= len(pairs) / 20


def test_other_machines_are_compared_by_ratio_and_busy_ones_not_at_all(script, result, capsys):
    compare = script("compare")
    alone = [row for row in rows_of(0) if row["impl"] == "fastft"]
    elsewhere = [row for row in rows_of(1, hour=5.0, device_name="Xeon") if row["impl"] == "fastft"]
    assert compare.report(result("new", rows_of(1, hour=5.0, device_name="Xeon")), result("kept", rows_of(0))) == []
    assert "kept on EPYC, 2 threads: compared by the ratio" in capsys.readouterr().out
    assert compare.report(result("new", elsewhere), result("kept", alone)) == []
    assert "4 rows not compared: another machine" in capsys.readouterr().out
    assert compare.report(result("new", rows_of(1, slower=9.0), busy=0.5), result("kept", rows_of(0))) == []
    assert "16 rows not compared: something else ran" in capsys.readouterr().out


def test_compare_informs_and_fails_where_asked(script, result, monkeypatch):
    compare = script("compare")
    kept, new = result("kept", rows_of(0)), result("new", rows_of(1, slower=1.5))
    rows = kept.with_name("rows.json")
    rows.write_text(json.dumps(rows_of(0)))  # of a script alone
    for old, options, code in ((kept, [], 0), (kept, ["--fail"], 1), (rows, ["--fail"], 1)):
        monkeypatch.setattr(sys, "argv", ["compare.py", str(new), str(old), *options])
        assert compare.main() == code
    monkeypatch.setattr(sys, "argv", ["compare.py", str(kept), str(new), "--fail"])  # became faster
    assert compare.main() == 0


SCRIPT = """
import json, sys
if "--fail" in sys.argv:
    sys.exit(1)
json.dump([{"name": "op", "impl": "fastft"}] * (2 - ("--no-compile" in sys.argv)), open(sys.argv[-1], "w"))
"""


def test_run_all_keeps_what_ran(script, tmp_path, monkeypatch, capsys):
    run_all = script("run_all")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/bench_op.py").write_text(SCRIPT)
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({"parts": {"other": {"rows": []}, "op": {"rows": []}}}))
    parts = {
        "op": run_all.Part("bench_op", quick=True, compiles=True),
        "broken": run_all.Part("bench_op", ("--fail",), quick=True),
        "long": run_all.Part("bench_op"),
        "elsewhere": run_all.Part("bench_op", quick=True, needs="a moon"),
    }
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setattr(run_all, "parts_of", lambda device: parts)
    monkeypatch.setattr(run_all.compare, "kept", lambda device: kept)
    monkeypatch.setattr(run_all.compare, "report", lambda new, old: None)
    out = tmp_path / "new.json"
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--device", "cpu", "--quick", "--keep", "--json", str(out)])
    assert run_all.main() == 1
    printed = capsys.readouterr()
    assert "failed: broken" in printed.err and "left out: a moon" in printed.out
    found = json.loads(kept.read_text())["parts"]
    assert list(found) == ["other", "op"] and list(json.loads(out.read_text())["parts"]) == ["op"]
    entry = found["op"]
    assert entry["command"] == "python benchmarks/bench_op.py --device cpu --no-compile" and len(entry["rows"]) == 1
    assert entry["machine"]["cores"] >= 1 and entry["machine"]["cpu"] and entry["versions"]["torch"]
    assert entry["date"] and entry["seconds"] > 0 and 0 <= entry["busy_elsewhere"] <= 1


def test_quantising_is_that_of_bitsandbytes(script, tmp_path, monkeypatch):
    out = tmp_path / "rows.json"
    shape = ["--rows", "2", "3", "--columns", "64", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_quantise.py", "--device", "cpu", *shape, "--json", str(out)])
    assert script("bench_quantise").main() == 0
    rows = json.loads(out.read_text())
    assert len(rows) == 8 and not [row["error"] for row in rows if row["error"]]


OPS = {path.stem for path in (ROOT / "fastft/ops").glob("[a-z]*.py")} - {
    "reference",
    "index_check",
    "frozen_weight",
    "products",
    "summed_products",
}
KERNELS = {"kl", "lora_linear", "bias_adamw", "attention", "quantise", "elementwise", "norms", "relu"}


def test_the_short_form_has_every_kernel(script):
    quick = {part.script for part in script("run_all").parts_of("cpu").values() if part.quick}
    assert quick == {f"bench_{name}" for name in KERNELS}


def test_every_kernel_has_a_picture_of_its_sizes(script, tmp_path, monkeypatch):
    """Of made rows; and the pages show what the kept result has in several sizes."""
    plots = script("plots")
    assert set(plots.PICTURES) == OPS | {"quantise_4bit"}
    for sweeps in plots.PICTURES.values():
        rows = [
            row | {"name": sweep.case, "shape": {sweep.size: row["shape"]["rows"], **dict(sweep.among)}}
            for sweep in sweeps
            for row in rows_of(0)
        ]
        assert len(plots.draw(rows, sweeps).axes) == 2 * len(sweeps)
    monkeypatch.setattr(sys, "argv", ["plots.py", "--out", str(tmp_path)])
    assert plots.main() == 0
    drawn = list(tmp_path.glob("*.svg"))
    assert len(drawn) >= 7
    for path in drawn:
        assert path.read_text().count("<path") > 20
        assert (ROOT / f"docs/benchmarks/plots/{path.name}").exists()
        assert f"benchmarks/plots/{path.name}" in (ROOT / "docs/kernels.md").read_text()


def test_peers_of_a_gpu_are_called_as_their_functions_want_it(script, monkeypatch, capsys):
    """Unsloth's and LoRAFusion's signatures, of functions that check them; what cannot be imported is named."""
    lora = script("bench_lora_linear")
    args = argparse.Namespace(dtype="float32", device="cpu", rows=5, rank=2)
    data = lora.Data(args, 6, 4, 2)

    class LoRA_W:
        @staticmethod
        def apply(X, W, W_quant, A, B, S):
            assert X.dim() == 3 and W_quant is None
            return X @ W.t() + S * X @ A.t() @ B.t()

    def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0, linear_bias=None):
        assert x.dim() == 3
        return x @ linear_w.t() + alpha * x @ lora_a.t() @ lora_b.t()

    for name in ("unsloth", "unsloth.kernels", "lorafusion", "lorafusion.ops"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "unsloth.kernels.fast_lora", SimpleNamespace(LoRA_W=LoRA_W))
    monkeypatch.setitem(sys.modules, "lorafusion.ops.lora_v1", SimpleNamespace(fused_linear_lora=fused_linear_lora))
    expected, found = data.truth(backward=False), lora.gpu_peers(data)
    assert set(found) == {"unsloth", "lorafusion"}
    for layers in found.values():
        torch.testing.assert_close(tuple(layers(data.x)), expected)
    monkeypatch.setitem(sys.modules, "unsloth.kernels.fast_lora", None)
    assert set(lora.gpu_peers(data)) == {"lorafusion"}
    assert "left out: unsloth: ModuleNotFoundError" in capsys.readouterr().err


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
