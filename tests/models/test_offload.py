"""Activation offloading, with the CPU as the device: what leaves, what comes back and when; results stay the same."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fastft import peft
from fastft.config import PeftConfig, validate
from fastft.errors import ConfigError
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from fastft.models.offload import ActivationOffloading
from fastft.models.recompute import checkpoint_layers


class Watched(ActivationOffloading):
    """Notes the sizes that are sent, and for each fetch which inputs are on the device at its end."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.sent: list[torch.Size] = []
        self.fetched: list[tuple[int, list[int]]] = []

    def _send(self, x):
        self.sent.append(x.shape)
        return super()._send(x)

    def _fetch(self, forward, i):
        found = super()._fetch(forward, i)
        self.fetched.append((i, [j for j, kept in enumerate(forward) if kept.back is not None]))
        return found


def checkpointed(folder, kind: str, offloading: ActivationOffloading | None, count: int | None = None):
    lm = PackedCausalLM(load_model(str(folder), dtype="float32"))
    torch.manual_seed(0)
    trained = peft.inject(lm.model, PeftConfig(kind=kind))
    checkpoint_layers(lm, count, offloading)
    return lm, trained


def loss_of(lm: PackedCausalLM, lengths: list[int]) -> torch.Tensor:
    return lm(torch.arange(5, 5 + sum(lengths))[None], PackedSequences(lengths)).square().sum()


@pytest.mark.parametrize(("family", "kind"), [("opt", "bitfit"), ("opt", "lora"), ("llama", "lora")])
def test_same_gradients_over_two_micro_batches(tiny, family, kind):
    found = []
    for offloading in (None, Watched()):
        lm, trained = checkpointed(tiny(family), kind, offloading)
        for lengths in ([60, 40], [30]):
            loss_of(lm, lengths).backward()
        found.append({n: p.grad for n, p in trained.items()})
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name
    assert offloading.sent == [(1, 100, 32)] * 2 + [(1, 30, 32)] * 2
    assert offloading.fetched == [(1, [0]), (0, [])] * 2  # the one before sets out with each that is fetched


def test_two_forwards_before_their_backwards(tiny):
    found = []
    for offloading in (None, Watched()):
        lm, trained = checkpointed(tiny("opt"), "bitfit", offloading)
        losses = [loss_of(lm, lengths) for lengths in ([60, 40], [30])]
        for loss in losses:
            loss.backward()
        found.append([p.grad for p in trained.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("offloads", "gone"), [(False, [False, False]), (True, [True, True])])
def test_inputs_are_gone_between_forward_and_backward(tiny, offloads, gone):
    lm, _ = checkpointed(tiny("opt"), "bitfit", Watched() if offloads else None)
    inputs: list[StorageWeakRef] = []
    for layer in lm.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage())))
    loss = loss_of(lm, [60, 40])
    gc.collect()
    assert [ref.expired() for ref in inputs] == gone
    loss.backward()


def test_only_checkpointed_layers_and_passes_with_gradient(tiny):
    offloading = Watched()
    lm, _ = checkpointed(tiny("opt"), "bitfit", offloading, count=1)
    with torch.no_grad():
        loss_of(lm, [60, 40])
    assert not offloading.sent
    loss_of(lm, [60, 40]).backward()
    assert offloading.sent == [(1, 100, 32)]


def test_a_run_on_the_cpu_is_refused(base_config, launch):
    raw = base_config("opt", train={"activation_checkpointing": "full", "activation_offloading": True})
    result = launch(raw)
    assert result.returncode == 1
    assert "train.activation_offloading=true needs a GPU" in result.stderr


@pytest.mark.parametrize("what", ["none", "attention"])
def test_it_needs_checkpointed_layers(base_config, what):
    raw = base_config("opt", train={"activation_checkpointing": what, "activation_offloading": True})
    with pytest.raises(ConfigError, match=f"needs activation_checkpointing=full or a number of layers, got {what}"):
        validate(raw)
