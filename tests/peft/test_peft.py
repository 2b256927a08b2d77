"""LoRA against PEFT's layer and float64; BitFit's choice of parameters."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from fastft.errors import ModelError
from fastft.models.loading import load_model
from fastft.ops.lora_linear import lora_linear
from fastft.peft import bitfit, lora


def test_lora_linear_gradients():
    generator = torch.Generator().manual_seed(0)

    def make(*shape, grad=True):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    x, weight, A, B, bias = make(2, 3, 5), make(4, 5), make(2, 5), make(4, 2), make(4)
    expected = x @ weight.T + bias + 0.7 * (x @ A.T) @ B.T
    torch.testing.assert_close(lora_linear(x, weight, A, B, 0.7, bias), expected)
    assert gradcheck(lambda *t: lora_linear(*t[:4], 0.7, t[4]), (x, weight, A, B, bias))
    frozen = weight.detach()
    assert gradcheck(lambda x, A, B: lora_linear(x, frozen, A, B, 0.7), (x, A, B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_linear_is_as_exact_as_pytorch(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight, A, B = (torch.randn(*s, generator=generator).to(dtype) for s in ((64, 96), (80, 96), (8, 96), (80, 8)))
    truth = x.double() @ weight.double().T + 0.5 * (x.double() @ A.double().T) @ B.double().T
    plain = torch.nn.functional.linear(x, weight) + 0.5 * (x @ A.T) @ B.T
    ours = lora_linear(x, weight, A, B, 0.5)
    floor = torch.finfo(dtype).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor


def test_lora_linear_names_a_wrong_shape():
    x, weight = torch.zeros(2, 5), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"lora_A is \[2, 6\], expected \[2, 5\]"):
        lora_linear(x, weight, torch.zeros(2, 6), torch.zeros(4, 2), 1.0)
    with pytest.raises(ValueError, match=r"lora_B is \[3, 2\], expected \[4, 2\]"):
        lora_linear(x, weight, torch.zeros(2, 5), torch.zeros(3, 2), 1.0)


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
