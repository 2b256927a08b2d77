"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math

import torch

from fastft.config import PeftConfig, TrainConfig
from fastft.optim.bias_adamw import BiasAdamW

__all__ = ["LR_SCALE", "BiasAdamW", "build_optimizer", "learning_rate"]

# The optimizers of bitsandbytes. Paged (QLoRA, Dettmers et al. 2023, arXiv 2305.14314): state of tensors of 100,000
# elements and more is in CUDA's unified memory, which the driver moves to the host where the GPU has no room.
BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}

LR_SCALE = "lr_scale"  # in a parameter group: its learning rate over the schedule's


def build_optimizer(
    trained: dict[str, torch.nn.Parameter], config: TrainConfig, peft: PeftConfig
) -> torch.optim.Optimizer:
    """The configured optimizer over the trained parameters (by name).

    With peft.lora_plus_ratio each lora_B learns that much faster than its lora_A: B starts at zero and has fan-in r, A
    has the layer's width, so one rate is too small for B or too large for A (LoRA+, Hayou et al. 2024, arXiv
    2402.12354).
    """
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    is_fast = {name: name.endswith(".lora_B") and peft.lora_plus_ratio != 1 for name in trained}
    parameters = [
        {"params": [p for name, p in trained.items() if is_fast[name] == fast], LR_SCALE: scale}
        for fast, scale in ((False, 1.0), (True, peft.lora_plus_ratio))
        if fast in is_fast.values()
    ]
    kind = config.optimizer
    if kind == "auto":
        kind = "bias_adamw" if peft.kind == "bitfit" and not peft.train_embeddings else "adamw"
    if kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if kind in ("bias_adamw", "bias_adamw_8bit"):
        return BiasAdamW(parameters, **settings, state_bits=8 if kind == "bias_adamw_8bit" else 32)
    import bitsandbytes  # slow to import; only its own optimizers need it

    return getattr(bitsandbytes.optim, BITSANDBYTES[kind])(parameters, **settings)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The schedule's rate at optimizer step `step` (from 1): linear warm-up, then decay to zero after the last.

    warmup_lr, warmup_log_lr: what a DeepSpeed engine has with the scheduler WarmupLR, min_lr 0, in place of both. The
    engine steps it behind the optimizer and counts from 0, so that two steps come before its rate rises.
    """
    if config.schedule in ("warmup_lr", "warmup_log_lr"):
        done, last = max(step - 2, 0), config.warmup_steps
        if config.schedule == "warmup_log_lr":
            done, last = math.log(done + 1), math.log(last)
        return config.lr * min(done / last, 1.0)
    if step <= config.warmup_steps:
        return config.lr * step / (config.warmup_steps + 1)
    done = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1 - done)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr
