"""Optimizer steps through DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from fastft.config import Config
from fastft.data.sequences import Batch
from fastft.distributed import GATHER_BYTES, Ranks
from fastft.engine import deepspeed_config
from fastft.models.causal import PackedCausalLM
from fastft.optim import LR_SCALE, build_optimizer, learning_rate
from fastft.profiling import phase

LossFn = Callable[[list[int]], torch.Tensor]  # example indices -> loss summed over their target positions


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the target positions of the step, all ranks
    lr: float
    grad_norm: float
    stop: bool  # whether a rank was asked to stop


class Trainer:
    """A model under DeepSpeed, its trained parameters, and one optimizer step at a time."""

    def __init__(self, lm: PackedCausalLM, trained: dict[str, nn.Parameter], config: Config, ranks: Ranks):
        self.config, self.ranks, self.trained = config, ranks, trained
        self.engine = start_engine(lm, config, ranks, build_optimizer(trained, config.train, config.peft))
        self.optimizer = self.engine.optimizer
        self.lm: PackedCausalLM = self.engine.module

    def step(self, number: int, micro_batches: list[Batch], loss_fn: LossFn, stop: bool) -> StepResult:
        """Optimizer step `number` (from 1).

        DeepSpeed averages the gradient over ranks and micro-batches, so each loss is scaled such that the average is
        the mean over all target positions of the step, however they are dealt out.

        Raises NonFiniteStep before any parameter is touched if the loss is not finite.
        """
        lr = learning_rate(number, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group[LR_SCALE]
        self.engine.train()
        share = self.ranks.world_size * len(micro_batches)
        mean, asked = 0.0, 0.0
        for batch in micro_batches:
            with phase("forward"):
                # A rank without examples still takes part in the forward and backward, whose collectives need it.
                loss = loss_fn(batch.examples) if batch.examples else loss_fn([0]) * 0.0
            with phase("communication"):
                totals = torch.stack([loss.detach().double(), torch.tensor(float(stop), device=loss.device).double()])
                loss_sum, stops = self.ranks.sum(totals).tolist()
            if loss_sum != loss_sum or abs(loss_sum) == float("inf"):
                raise NonFiniteStep(number, batch, loss_sum)
            mean += loss_sum / batch.total_targets
            asked += stops
            with phase("backward"):
                self.engine.backward(loss * (share / batch.total_targets))
            with phase("optimizer"):
                # Without a ZeRO optimizer DeepSpeed clips but does not tell the norm.
                gradients = [p.grad for p in self.trained.values() if p.grad is not None]
                own_norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.tensor(float("nan"))
                self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return StepResult(mean, lr, float(own_norm if norm is None else norm), stop=asked > 0)

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """The trained parameters, whole, in the first rank's host memory, by name in the model; elsewhere {}.

        A collective under ZeRO-3, which gathers no more than GATHER_BYTES at a time: all weights may be trained.
        """
        partitioned = self.config.deepspeed.zero_stage == 3
        whole: dict[str, torch.Tensor] = {}
        for names in self._gathered_together():
            with deepspeed.zero.GatheredParameters([self.trained[name] for name in names], enabled=partitioned):
                if self.ranks.is_first:
                    whole |= {name: self.trained[name].detach().cpu().clone() for name in names}
        return whole

    def _gathered_together(self) -> Iterator[list[str]]:
        """The names of the trained parameters in groups of up to GATHER_BYTES, larger ones alone."""
        names, waiting = [], 0
        for name, p in self.trained.items():
            nbytes = getattr(p, "ds_numel", p.numel()) * p.element_size()
            if names and waiting + nbytes > GATHER_BYTES:
                yield names
                names, waiting = [], 0
            names, waiting = [*names, name], waiting + nbytes
        if names:
            yield names

    def described(self) -> dict[str, dict[str, Any]]:
        """Name -> dtype and whole shape of each trained parameter."""
        return {
            name: {"dtype": str(p.dtype).removeprefix("torch."), "shape": list(getattr(p, "ds_shape", p.shape))}
            for name, p in self.trained.items()
        }


def start_engine(
    lm: PackedCausalLM, config: Config, ranks: Ranks, optimizer: torch.optim.Optimizer | None = None
) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed, dealt out over the ranks where ZeRO-3 does so; without an optimizer, to infer."""
    derived = deepspeed_config.derive(config, ranks.world_size, lm)
    with one_thread():
        if config.deepspeed.zero_stage == 3:
            gather_by_layer(lm)
            partition_parameters(lm, derived, getattr(torch, config.model.dtype), ranks.device)
        return deepspeed.initialize(model=lm, optimizer=optimizer, config=derived)[0]


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets the threads of torch.distributed, which first do work in here, work alone.

    A thread takes the number of OpenMP threads that is set at its first parallel operation and keeps it. If gloo's
    threads start pools of their own, there are more OpenMP threads than cores, and GNU's runtime then puts every idle
    thread to sleep at once instead of letting it spin: each parallel region of the training step waits for a wake-up
    (a fifth of the time of an OPT-125M step on 2 cores).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gather_by_layer(lm: PackedCausalLM) -> None:
    """Make ZeRO-3 gather and release a whole decoder layer at a time, not each of its linears.

    A layer's parameters then come in one collective, and the hooks run once a layer instead of a dozen times.
    """
    for layer in lm.layers:
        set_z3_leaf_module(layer, True)
    # DeepSpeed reduces such a layer's gradients when the gradient of its input is there. Where the input needs none
    # (the embeddings are frozen) that hook fires before the layer's backward has run, so the first trained layer's
    # input is made to need one.
    for layer in lm.layers:
        if any(p.requires_grad for p in layer.parameters()):
            layer.register_forward_pre_hook(_require_input_grad)
            break


def partition_parameters(lm: PackedCausalLM, derived: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Deal the parameters out to the ranks, one after the other, from wherever they are; buffers go to the device.

    deepspeed.initialize would first move the whole model to the device, which a base that needs ZeRO-3 need not fit.
    """
    for parameter in lm.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(module=lm, config_dict_or_path=derived, dtype=dtype)
    for buffer in lm.buffers():
        buffer.data = buffer.data.to(device)


def _require_input_grad(module: nn.Module, args: tuple) -> tuple:
    if not torch.is_grad_enabled() or args[0].requires_grad:
        return args
    return args[0].detach().requires_grad_(), *args[1:]


class NonFiniteStep(Exception):
    """The loss of a step is inf or nan; no parameter was changed by it."""

    def __init__(self, step: int, batch: Batch, loss: float):
        super().__init__(f"step {step}: loss {loss}")
        self.step, self.batch, self.loss = step, batch, loss
