"""Parameter groups and schedules."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupLR

from fastft.config import PeftConfig, TrainConfig
from fastft.optim import LR_SCALE, BiasAdamW, build_optimizer, learning_rate


def parameters() -> dict[str, torch.nn.Parameter]:
    return {f"{layer}.{kind}": torch.nn.Parameter(torch.ones(2)) for layer in "ab" for kind in ("lora_A", "lora_B")}


def test_lora_plus_scales_the_rate_of_lora_B_alone():
    trained = parameters()
    groups = build_optimizer(trained, TrainConfig(), PeftConfig(lora_plus_ratio=8.0)).param_groups
    scale = {id(p): group[LR_SCALE] for group in groups for p in group["params"]}
    assert {name: scale[id(p)] for name, p in trained.items()} == {
        "a.lora_A": 1.0,
        "a.lora_B": 8.0,
        "b.lora_A": 1.0,
        "b.lora_B": 8.0,
    }


def test_without_lora_plus_there_is_one_group():
    groups = build_optimizer(parameters(), TrainConfig(), PeftConfig()).param_groups
    assert [(len(g["params"]), g[LR_SCALE]) for g in groups] == [(4, 1.0)]


@pytest.mark.parametrize(
    ("optimizer", "kind", "expected"),
    [
        ("auto", "lora", (torch.optim.AdamW, None)),
        ("auto", "bitfit", (BiasAdamW, 32)),
        ("bias_adamw", "full", (BiasAdamW, 32)),
        ("bias_adamw_8bit", "bitfit", (BiasAdamW, 8)),
        ("adamw", "bitfit", (torch.optim.AdamW, None)),
    ],
)
def test_the_optimizer_of_a_config(optimizer, kind, expected):
    config = TrainConfig(optimizer=optimizer, lr=0.5, weight_decay=0.25, betas=(0.5, 0.75), eps=1e-3)
    built = build_optimizer(parameters(), config, PeftConfig(kind=kind))
    assert (type(built), getattr(built, "state_bits", None)) == expected
    group = built.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.5, 0.25, (0.5, 0.75), 1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_schedule_warms_up_and_decays_to_almost_zero(schedule):
    config = TrainConfig(steps=20, warmup_steps=4, lr=1.0, schedule=schedule)
    rates = [learning_rate(step, config) for step in range(1, 21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == 1.0 if schedule == "constant" else 0 < rates[-1] < 0.1


@pytest.mark.parametrize("kind", ["linear", "log"])
@pytest.mark.parametrize("warmup_steps", [2, 3, 20])
def test_warmup_lr_is_that_of_deepspeed(kind, warmup_steps):
    """The rates with which an optimizer steps that DeepSpeed's scheduler is stepped behind."""
    schedule = {"linear": "warmup_lr", "log": "warmup_log_lr"}[kind]
    config = TrainConfig(steps=40, warmup_steps=warmup_steps, lr=0.3, schedule=schedule)
    optimizer = torch.optim.SGD(parameters().values(), lr=0.3)
    scheduler = WarmupLR(optimizer, warmup_max_lr=0.3, warmup_num_steps=warmup_steps, warmup_type=kind)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = [learning_rate(step, config) for step in range(1, 41)]
    assert rates == pytest.approx(expected)
    assert rates[:2] == [0, 0] and rates[2] > 0 and rates[-1] == 0.3


def test_warmup_lr_needs_a_warmup():
    with pytest.raises(ValueError, match=r"schedule=warmup_lr needs warmup_steps of 2 or more.*got 1"):
        TrainConfig(schedule="warmup_lr", warmup_steps=1)
