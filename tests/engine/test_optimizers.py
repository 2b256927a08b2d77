"""BiasAdamW as DeepSpeed's client optimizer: the losses of torch's AdamW, in every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastft.engine import base
from tests.conftest import losses


def run(launch, raw: dict, *overrides: str, processes: int = 1) -> torch.Tensor:
    result = launch(raw, *overrides, processes=processes)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return torch.tensor(losses(Path(raw["output_dir"])))


def config(base_config, tmp_path, name: str, optimizer: str, stage: int, **train) -> dict:
    raw = base_config(
        "opt",
        peft={"kind": "bitfit"},
        train={"optimizer": optimizer, "lr": 1e-2, "steps": 6, "weight_decay": 0.01, **train},
        deepspeed={"zero_stage": stage},
        evaluate={"answers": False},
    )
    return {**raw, "output_dir": str(tmp_path / name)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bias_adamw_trains_as_adamw_does(base_config, launch, tmp_path, stage):
    found = {
        name: run(launch, config(base_config, tmp_path, name, name, stage))
        for name in ("adamw", "bias_adamw", "bias_adamw_8bit")
    }
    torch.testing.assert_close(found["bias_adamw"], found["adamw"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["bias_adamw_8bit"], found["adamw"], rtol=2e-2, atol=0)
    assert not torch.equal(found["bias_adamw_8bit"], found["adamw"])


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("stage", [0, 3])
def test_paged_state_is_written_and_read_in_its_own_memory(base_config, launch, tmp_path, monkeypatch, stage, name):
    """Unified memory being plain memory here: the losses are those without pages, and a run resumes bit for bit."""
    optimizer = pytest.importorskip("bitsandbytes.optim.optimizer")
    buffers, prefetched = [], set()

    def unified(self, p, dtype=torch.float32):
        buffer = torch.zeros_like(p, dtype=dtype)
        if self.is_paged:
            buffer.is_paged = True
            buffers.append(buffer)
        return buffer

    monkeypatch.setattr(optimizer.Optimizer8bit, "get_state_buffer", unified)
    monkeypatch.setattr(optimizer.F, "prefetch_tensor", lambda x: prefetched.add(id(x)))
    shared = {"save_every": 2, "schedule": "constant"}
    raw = config(base_config, tmp_path, "paged", name, stage, **shared)
    raw["peft"] = {"kind": "lora", "r": 4}
    refused = launch(raw)
    unpaged = name.removeprefix("paged_")
    assert refused.returncode == 1 and f"train.optimizer={name} needs a GPU" in refused.stderr
    assert f"use train.optimizer={unpaged}" in refused.stderr and not buffers
    monkeypatch.setattr(base, "refuse_what_needs_a_gpu", lambda config: None)
    straight = run(launch, raw)
    count = len(buffers)
    assert count and {id(x) for x in buffers} == prefetched
    plain = {**raw, "output_dir": str(tmp_path / "plain"), "train": {**raw["train"], "optimizer": unpaged}}
    # torch's AdamW rounds in another order than bitsandbytes' in 32 bits.
    torch.testing.assert_close(run(launch, plain), straight, rtol=0 if unpaged.endswith("8bit") else 1e-5, atol=0)
    buffers.clear(), prefetched.clear()
    resumed = {**raw, "output_dir": str(tmp_path / "resumed")}
    run(launch, resumed, "train.steps=4")
    buffers.clear(), prefetched.clear()
    assert torch.equal(run(launch, resumed, "resume=auto"), straight)
    # What was read lies in pages, and no copy of it elsewhere.
    assert len(buffers) == count and {id(x) for x in buffers} == prefetched


def test_two_processes_under_zero_3(base_config, launch, tmp_path):
    one = run(launch, config(base_config, tmp_path, "one", "bias_adamw", 3))
    two = run(launch, config(base_config, tmp_path, "two", "bias_adamw", 3), processes=2)
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_checkpoint_continues_with_the_same_numbers(base_config, launch, tmp_path, stage):
    shared = {"schedule": "constant", "save_every": 2}
    straight = run(launch, config(base_config, tmp_path, "straight", "bias_adamw_8bit", stage, **shared))
    raw = config(base_config, tmp_path, "resumed", "bias_adamw_8bit", stage, **shared)
    run(launch, raw, "train.steps=4")
    resumed = run(launch, raw, "resume=auto")
    assert torch.equal(resumed, straight)
