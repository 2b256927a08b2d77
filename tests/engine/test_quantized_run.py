"""Whole runs on quantised bases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from fastft.export import export
from fastft.models import loading
from fastft.models.quantized import dequantise
from tests.conftest import ROOT, launch_processes, losses
from tests.engine.test_run import ok

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize(("kind", "peft"), [("nf4", "lora"), ("int8", "bitfit")])
def test_processes_and_zero_stages_agree(base_config, launch, tmp_path, kind, peft):
    found = {}
    settings = (("one", 0, 1), ("offload", 3, 1), ("two", 3, 2))
    for name, stage, processes in settings:
        offload = {"offload_param": "cpu", "offload_optimizer": "cpu"} if name == "offload" else {}
        raw = base_config(
            "opt",
            model={"quantization": kind},
            peft={"kind": peft},
            deepspeed={"zero_stage": stage, **offload},
            evaluate={"answers": False},
        )
        if peft == "bitfit":
            del raw["peft"]["r"]
        raw["output_dir"] = str(tmp_path / name)
        result = launch(raw, processes=processes)
        ok(result)
        found[name] = torch.tensor(losses(Path(raw["output_dir"])))
    assert len(found["one"]) == 4 and found["one"][-1] != found["one"][0]
    for name in ("offload", "two"):
        torch.testing.assert_close(found[name], found["one"], rtol=1e-4, atol=0)


def test_an_online_teacher_learns_what_a_stored_one_teaches(base_config, launch, tmp_path):
    raw = base_config("opt", model={"quantization": "nf4"}, evaluate={"answers": False})
    for teacher in ("online", "stored"):
        ok(launch({**raw, "distill": {"teacher": teacher}, "output_dir": str(tmp_path / teacher)}))
    online, stored = (torch.tensor(losses(tmp_path / name)) for name in ("online", "stored"))
    torch.testing.assert_close(online, stored, rtol=1e-4, atol=0)


def test_the_adapter_loads_in_peft_and_merges_into_what_it_was_trained_on(base_config, launch, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    raw = base_config("opt", model={"quantization": "nf4"}, train={"steps": 3, "save_every": 1, "lr": 0.05})
    ok(launch({**raw, "evaluate": {"answers": False}}))
    folder = Path(raw["output_dir"])
    model = AutoModelForCausalLM.from_pretrained(raw["model"]["name_or_path"], dtype=torch.float32)
    source = {"kind": "nf4", "dtype": "float32", "cache_dir": Path(raw["cache_dir"])}
    quantised = loading.quantized_files(raw["model"]["name_or_path"], **source).load()
    dequantise(quantised)
    model.load_state_dict(quantised.state_dict())
    adapted = PeftModel.from_pretrained(model, folder / "adapter").eval()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trained_parameters"] == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        expected, base = adapted(input_ids=ids).logits, quantised(input_ids=ids).logits
    assert (expected - base).abs().max() > 0.01
    merged = export(folder, kind="merged", out=tmp_path / "merged")
    export(folder, kind="merged", checkpoint="last", out=tmp_path / "last")  # it names the same base
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_of_quantised_weights_is_refused(base_config, launch):
    raw = base_config(model={"quantization": "nf4"}, peft={"kind": "full"})
    del raw["peft"]["r"]
    refused = launch(raw)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "model.quantization=nf4 holds weights that take no gradient" in refused.stderr


def test_no_gathered_weight_is_pinned(base_config, launch, tmp_path):
    """Two processes, ZeRO-3, nothing kept gathered on purpose; the last run pins weights to show that it is seen."""
    own = tmp_path / "ds.json"
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    own.write_text(json.dumps({"zero_optimization": zero}))
    names = []
    for quantization, peft in (
        ("none", "lora"),
        ("nf4", "lora"),
        ("int8", "bitfit"),
        ("none", "pin"),
    ):
        raw = base_config(
            "opt",
            model={"quantization": quantization},
            train={"steps": 2, "batch_size": 4, "warmup_steps": 1},
            deepspeed={"zero_stage": 3, "config_file": str(own)},
            evaluate={"answers": False},
        )
        raw["peft"] = {"kind": "lora", "r": 4} if peft == "lora" else {"kind": "bitfit"}
        raw["output_dir"] = str(tmp_path / f"{quantization}-{peft}")
        names.append(tmp_path / f"{quantization}-{peft}.yaml")
        names[-1].write_text(yaml.safe_dump(raw))
    script = ROOT / "tests" / "engine" / "count_pinned.py"
    result = launch_processes([str(n) for n in names], 2, tmp_path, script=script)
    assert result.returncode == 0, result.stderr
    found = [
        json.loads(line.removeprefix("pinned ")) for line in result.stdout.splitlines() if line.startswith("pinned ")
    ]
    assert len(found) == 4 and all(run["released_bytes"] > 0 and len(run["pinned_bytes"]) == 2 for run in found)
    for run in found[:-1]:
        assert run["pinned_bytes"] == [0, 0]
    assert min(found[-1]["pinned_bytes"]) > 0
