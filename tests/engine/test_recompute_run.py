"""Activation checkpointing changes what is kept, not what is computed."""

from __future__ import annotations

import pytest
import torch

from fastft import peft
from fastft.config import PeftConfig
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from fastft.models.recompute import checkpoint_activations
from tests.conftest import losses
from tests.engine.test_run import ok


class Kept:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters apart."""

    def __init__(self, model):
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.found: dict[int, torch.UntypedStorage] = {}

    def pack(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.found[storage.data_ptr()] = storage
        return x

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes() for s in self.found.values())


@pytest.mark.parametrize("kind", ["lora", "bitfit"])
def test_same_gradients_from_fewer_kept_bytes(tiny, kind):
    found = []
    for what in ("none", "attention", 1, "full"):
        lm = PackedCausalLM(load_model(str(tiny("opt")), dtype="float32"))
        torch.manual_seed(0)
        trained = peft.inject(lm.model, PeftConfig(kind=kind))
        checkpoint_activations(lm, what)
        kept = Kept(lm)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x):
            hidden = lm(torch.arange(5, 300)[None], PackedSequences([200, 95]))
        hidden.sum().backward()
        found.append((kept.nbytes, {n: p.grad for n, p in trained.items()}))
    (all_kept, expected), (attention, first), (one, second), (inputs, third) = found
    assert inputs < one < all_kept and inputs < all_kept / 3 and inputs < attention < all_kept
    for gradients in (first, second, third):
        for name, gradient in expected.items():
            assert torch.equal(gradients[name], gradient), name


def test_runs_agree(base_config, launch, tmp_path):
    found = {}
    for name, recomputed, teacher, stage, processes in (
        ("none", "none", "stored", 0, 1),
        ("full", "full", "stored", 0, 1),
        ("attention", "attention", "stored", 0, 1),
        ("attention_two", "attention", "stored", 3, 2),
        ("online", "full", "online", 0, 1),
        ("two", 1, "stored", 3, 2),
    ):
        raw = base_config(
            "opt",
            train={"steps": 4, "batch_size": 4, "warmup_steps": 1, "activation_checkpointing": recomputed},
            deepspeed={"zero_stage": stage},
            evaluate={"answers": False},
        )
        raw |= {"distill": {"teacher": teacher}, "output_dir": str(tmp_path / name)}
        ok(launch(raw, processes=processes))
        found[name] = torch.tensor(losses(tmp_path / name))
    for name in ("full", "attention"):
        assert torch.equal(found[name], found["none"])
    for name in ("online", "two", "attention_two"):
        torch.testing.assert_close(found[name], found["none"], rtol=1e-4, atol=0)
