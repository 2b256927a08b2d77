"""BiasAdamW as DeepSpeed's client optimizer: the losses of torch's AdamW, in every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

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
