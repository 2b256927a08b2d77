"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math

import torch

from fastft.config import TrainConfig


def build_optimizer(parameters: list[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the trained parameters."""
    settings = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes  # slow to import; only the 8-bit optimizer needs it

    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of optimizer step `step` (from 1): linear warm-up, then decay to zero after the last step."""
    if step <= config.warmup_steps:
        return config.lr * step / (config.warmup_steps + 1)
    done = (step - 1 - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.lr * (1 - done)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr
