"""Which parameters LoRA and BitFit make trainable."""

from __future__ import annotations

import pytest
import torch

from fastft.errors import ModelError
from fastft.models.loading import load_model
from fastft.peft import bitfit, lora


def test_injected_lora_starts_as_the_base(tiny):
    model = load_model(str(tiny("opt")), dtype="float32")
    weights = {n: p.clone() for n, p in model.named_parameters()}
    trained = lora.inject(model, r=2, lora_alpha=4.0, target_modules=["q_proj", "fc1"])
    assert len(trained) == 2 * 2 * 2
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters() if n in weights)
    assert all(not p.any() for n, p in trained.items() if n.endswith("lora_B"))


def test_bitfit_of_opt(tiny):
    model = load_model(str(tiny("opt")), dtype="float32")
    trained = bitfit.inject(model, add_biases=False)
    assert trained and all(n.endswith("bias") and "k_proj" not in n for n in trained)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)


def test_bitfit_needs_biases(tiny):
    model = load_model(str(tiny("llama")), dtype="float32")
    with pytest.raises(ModelError, match="add_biases=true"):
        bitfit.inject(model, add_biases=False)
    trained = bitfit.inject(model, add_biases=True)
    assert len(trained) == 2 * 6 and not any("k_proj" in n or "lm_head" in n for n in trained)
