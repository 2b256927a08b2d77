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


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_layers_that_share_an_input_compute_the_same(tiny, family):
    """Forward and backward of a model in which query, key and value are one call, against one where they are three."""
    results = []
    for shared in (True, False):
        model = load_model(str(tiny(family)), dtype="float32").double()
        torch.manual_seed(0)
        trained = lora.inject(model, r=2, lora_alpha=4.0, target_modules="all-linear")
        layers = [m for m in model.modules() if isinstance(m, lora.LoraLinear)]
        assert {len(m.shared_input.layers) for m in layers if m.shared_input} == ({3} if family == "opt" else {2, 3})
        for layer in layers:
            torch.nn.init.normal_(layer.lora_B)
            layer.double()
            layer.shared_input = layer.shared_input if shared else None
        hidden = torch.randn(1, 5, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
        attention = next(m for m in model.modules() if hasattr(m, "q_proj"))
        total = sum(getattr(attention, n)(hidden).square().sum() for n in ("q_proj", "k_proj", "v_proj"))
        total.backward()
        results.append((total, hidden.grad, *(p.grad for p in trained.values() if p.grad is not None)))
        waiting = [m.shared_input.waiting for m in layers if m.shared_input]
        assert not any(waiting)
    torch.testing.assert_close(results[0], results[1])


def test_a_shared_output_is_not_taken_for_another_input_or_other_weights(tiny):
    model = load_model(str(tiny("llama")), dtype="float32")
    lora.inject(model, r=2, lora_alpha=4.0, target_modules="all-linear")
    attention = next(m for m in model.modules() if hasattr(m, "q_proj"))
    q, k = attention.q_proj, attention.k_proj

    def alone(layer, x):
        return x @ layer.weight.t() + layer.scaling * (x @ layer.lora_A.t()) @ layer.lora_B.t()

    x, other = torch.randn(2, 3, model.config.hidden_size), torch.randn(2, 3, model.config.hidden_size)
    q(x)
    torch.testing.assert_close(k(other), alone(k, other))
    q(x)
    with torch.no_grad():
        k.lora_B.normal_()
    torch.testing.assert_close(k(x), alone(k, x))
    q(x)
    x.add_(1)
    torch.testing.assert_close(k(x), alone(k, x))
    with torch.no_grad():
        q(x)
    assert k(x).requires_grad


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
