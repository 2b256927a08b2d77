"""Whole runs on quantised bases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import losses
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


def test_the_adapter_names_the_base_and_loads_in_peft(base_config, launch, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    raw = base_config("opt", model={"quantization": "nf4"}, evaluate={"answers": False})
    ok(launch(raw))
    model = AutoModelForCausalLM.from_pretrained(raw["model"]["name_or_path"])
    adapted = PeftModel.from_pretrained(model, Path(raw["output_dir"]) / "adapter")
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in adapted.named_parameters())
    summary = json.loads((Path(raw["output_dir"]) / "summary.json").read_text())
    assert summary["trained_parameters"] == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)


def test_full_fine_tuning_of_quantised_weights_is_refused(base_config, launch):
    raw = base_config(model={"quantization": "nf4"}, peft={"kind": "full"})
    del raw["peft"]["r"]
    refused = launch(raw)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "model.quantization=nf4 holds weights that take no gradient" in refused.stderr
