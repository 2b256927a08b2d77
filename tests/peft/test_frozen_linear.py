"""Linear layers whose weight is frozen keep nothing for backward, whatever F.linear is."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn import functional as F

from fastft import peft
from fastft.config import PeftConfig
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from fastft.models.recompute import checkpoint_activations
from fastft.peft.frozen_linear import FrozenLinear
from tests.peft.test_masked_relu import lora, passed


def linears(model) -> dict[str, torch.nn.Module]:
    return {n.rpartition(".")[2]: m for n, m in model.named_modules() if hasattr(m, "in_features")}


def test_what_is_replaced(tiny):
    model = load_model(str(tiny("opt")), dtype="float32")
    names = set(model.state_dict())
    peft.inject(model, lora("q_proj"))
    found = linears(model)
    assert all(isinstance(found[n], FrozenLinear) for n in ("k_proj", "v_proj", "out_proj", "fc1", "fc2"))
    assert not isinstance(found["q_proj"], FrozenLinear) and not isinstance(found["lm_head"], FrozenLinear)
    assert names <= set(model.state_dict())
    full = load_model(str(tiny("opt")), dtype="float32")
    peft.inject(full, PeftConfig(kind="full"))
    assert not any(isinstance(m, FrozenLinear) for m in full.modules())


@pytest.mark.parametrize("config", [PeftConfig(kind="bitfit"), lora("q_proj", "v_proj")], ids=lambda c: c.kind)
def test_deepspeeds_linear_has_no_part_in_it(tiny, monkeypatch, config):
    """ZeRO-3 replaces F.linear by a function that keeps every input."""
    plain_bytes, plain = passed(str(tiny("opt")), config, checkpointed=False, dtype="float32")
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    kept_bytes, gradients = passed(str(tiny("opt")), config, checkpointed=False, dtype="float32")
    assert kept_bytes == plain_bytes
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient)
    monkeypatch.setattr(peft, "freeze_linears", lambda model: None)
    assert passed(str(tiny("opt")), config, checkpointed=False, dtype="float32")[0] > kept_bytes


@pytest.mark.parametrize(
    ("what", "again"),
    [
        ("full", {"k_proj": 2, "out_proj": 2, "fc1": 2, "fc2": 0}),
        ("attention", {"k_proj": 2, "out_proj": 0, "fc1": 0, "fc2": 0}),
    ],
)
def test_what_nothing_needs_is_not_computed_again(tiny, what, again):
    """Of a checkpointed layer with BitFit everything but fc2, of its attention everything but the output projection."""
    lm = PackedCausalLM(load_model(str(tiny("opt")), dtype="float32"))
    peft.inject(lm.model, PeftConfig(kind="bitfit"))
    checkpoint_activations(lm, what)
    loss = lm(torch.arange(5, 105)[None], PackedSequences([100])).square().sum()
    calls = dict.fromkeys(again, 0)
    for name, module in lm.named_modules():
        kind = name.rpartition(".")[2]
        if kind in calls:
            module.register_forward_pre_hook(lambda _, args, kind=kind: calls.update({kind: calls[kind] + 1}))
    loss.backward()
    assert calls == again
