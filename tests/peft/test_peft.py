"""Which parameters LoRA and BitFit make trainable."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fastft.config import PeftConfig
from fastft.errors import ModelError
from fastft.models.loading import load_model
from fastft.peft import adapter_off, bitfit, inject, load_trained, lora, save_adapter


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
        assert all(m.shared_input.found is None for m in layers if m.shared_input)
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


def test_layers_that_share_an_input_compute_the_same_in_two_threads():
    """Each thread has an input of its own, and may be stopped between any two steps of the other."""
    torch.manual_seed(0)
    layers = [lora.LoraLinear(nn.Linear(4, 4, bias=False), 2, 4.0).requires_grad_(False) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    shared = lora.SharedInput(layers)
    wrong = []

    def call(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3000):
            x = torch.randn(1, 4, generator=generator)
            found = [shared.output(layer, x) for layer in layers]
            expected = [x @ (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).t() for layer in layers]
            wrong.extend(a for a, b in zip(found, expected, strict=True) if not torch.allclose(a, b, atol=1e-4))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(call, range(2)))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_copy_waits_for_nothing(tiny):
    model = load_model(str(tiny("llama")), dtype="float32")
    inject(model, PeftConfig())
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 3, 32, requires_grad=True)
    attention.q_proj(x)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.model.layers[0].self_attn.k_proj(x), attention.k_proj(x))


def test_bitfit_of_opt(tiny):
    model = load_model(str(tiny("opt")), dtype="float32")
    trained = bitfit.inject(model, add_biases=False)
    assert trained and all(n.endswith("bias") and "k_proj" not in n for n in trained)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_with_bitfit_is_its_own(tiny, copied):
    model, base = (AutoModelForCausalLM.from_pretrained(tiny("opt")).eval() for _ in range(2))
    for parameter in inject(model, PeftConfig(kind="bitfit")).values():
        torch.nn.init.normal_(parameter)
    ids = torch.arange(3, 9)[None]
    trained = model(ids).logits
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(other(ids).logits, trained)
    with adapter_off():
        torch.testing.assert_close(other(ids).logits, base(ids).logits)


def test_bitfit_needs_biases(tiny):
    model = load_model(str(tiny("llama")), dtype="float32")
    with pytest.raises(ModelError, match="add_biases=true"):
        bitfit.inject(model, add_biases=False)
    trained = bitfit.inject(model, add_biases=True)
    assert len(trained) == 2 * 6 and not any("k_proj" in n or "lm_head" in n for n in trained)


class Bottleneck(nn.Module):
    """A linear layer and a bottleneck with biases and ReLU beside it, in plain PyTorch."""

    def __init__(self, linear: nn.Linear, r: int, scale: float):
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, r), nn.Linear(r, linear.out_features)
        self.scale = nn.Parameter(torch.tensor([scale]))

    def forward(self, x):
        return self.linear(x) + self.scale * self.up(self.down(x).relu())


def test_relu_and_biases_between_lora_a_and_lora_b():
    torch.manual_seed(0)
    linear = nn.Linear(6, 5).double().requires_grad_(False)
    ours = lora.BottleneckLinear(linear, 3, 3.0, activation="relu", biases=True, trained_scale=True)
    plain = Bottleneck(linear, 3, 2.0).double()
    assert ours.lora_scale.item() == 1.0
    assert not ours.lora_B.any() and not ours.lora_A_bias.any() and not ours.lora_B_bias.any()
    pairs = {
        ours.lora_A: plain.down.weight,
        ours.lora_A_bias: plain.down.bias,
        ours.lora_B: plain.up.weight,
        ours.lora_B_bias: plain.up.bias,
        ours.lora_scale: plain.scale,
    }
    with torch.no_grad():
        for own, other in pairs.items():
            own.copy_(other)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x), plain(x))
    gradients = [torch.autograd.grad(ours(x).square().sum(), (x, *pairs))]
    gradients.append(torch.autograd.grad(plain(x).square().sum(), (x, *pairs.values())))
    torch.testing.assert_close(*gradients)
    with adapter_off():
        torch.testing.assert_close(ours(x), linear(x))


def test_biases_alone_and_relu_alone():
    linear = nn.Linear(6, 5).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    for activation, biases in (("none", True), ("relu", False)):
        ours = lora.BottleneckLinear(linear, 3, 3.0, activation=activation, biases=biases, trained_scale=False)
        nn.init.normal_(ours.lora_B)
        hidden = x @ ours.lora_A.t()
        expected = linear(x) + (hidden.relu() if activation == "relu" else hidden) @ ours.lora_B.t()
        if biases:
            nn.init.normal_(ours.lora_A_bias)
            nn.init.normal_(ours.lora_B_bias)
            expected = expected + ours.lora_A_bias @ ours.lora_B.t() + ours.lora_B_bias
        torch.testing.assert_close(ours(x), expected)


def test_alpha_pattern_undoes_the_scaling_of_the_query(tiny):
    """llmft adds its adapter's output to the scaled query: that is sqrt(head size) times lora_alpha in front of it."""
    model = load_model(str(tiny("opt")), dtype="float32")
    attention = next(m for m in model.modules() if hasattr(m, "q_proj"))
    root = attention.head_dim**0.5
    linear, x = attention.q_proj, torch.randn(3, model.config.hidden_size)
    config = PeftConfig(
        r=4,
        lora_alpha=4 * 1.5,
        alpha_pattern={"q_proj": 4 * 1.5 * root},
        target_modules=["q_proj", "v_proj"],
        activation="relu",
    )
    expected = linear(x) * attention.scaling
    inject(model, config)
    q = attention.q_proj
    nn.init.normal_(q.lora_B)
    expected = expected + 1.5 * (x @ q.lora_A.t()).relu() @ q.lora_B.t()
    torch.testing.assert_close(q(x) * attention.scaling, expected)
    assert attention.v_proj.scaling == 1.5
    with pytest.raises(ModelError, match=r"peft.alpha_pattern: no layer of peft.target_modules is named 'fc1'"):
        lora.inject(model, r=1, lora_alpha=1, target_modules=["out_proj"], alpha_pattern={"fc1": 2})


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("kind", ["lora", "bitfit"])
def test_embeddings_are_trained_too(tiny, family, kind):
    model = load_model(str(tiny(family)), dtype="float32")
    without = set(inject(load_model(str(tiny(family)), dtype="float32"), PeftConfig(kind=kind, add_biases=True)))
    trained = inject(model, PeftConfig(kind=kind, add_biases=True, train_embeddings=True))
    expected = {
        "opt": {"model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight"},  # the head is tied
        "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    }
    assert set(trained) - without == expected[family] and without < set(trained)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "relu", "adapter_biases": True, "trained_scale": True, "target_modules": ["q_proj", "v_proj"]},
        {"train_embeddings": True},
        {"kind": "bitfit", "train_embeddings": True},
    ],
)
def test_what_peft_cannot_hold_comes_back(tiny, tmp_path, changes):
    """Saved in no format that PEFT would take for LoRA, and loaded into a fresh base it gives the same logits."""
    base, config = str(tiny("opt")), PeftConfig(**changes)
    model = load_model(base, dtype="float32").eval()
    trained = inject(model, config)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_adapter(tmp_path, trained, config, base_model=base, model=model)
    assert {p.name for p in tmp_path.iterdir()} == {"trained.safetensors", "trained_config.json"}
    loaded = load_trained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), tmp_path)
    ids = torch.arange(2, 12)[None]
    untrained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    reference = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    inject(reference, config)
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded(ids).logits, reference(ids).logits)
    assert not torch.allclose(loaded(ids).logits, untrained(ids).logits, atol=1e-2)
    with pytest.raises(ModelError, match=r"does not fit|no linear layer is named|has no bias parameters"):
        load_trained(AutoModelForCausalLM.from_pretrained(tiny("llama")), tmp_path)
    with pytest.raises(ModelError, match="expected the adapter/ folder"):
        load_trained(untrained, Path(tmp_path) / "elsewhere")


def test_peft_reads_the_alpha_pattern(tiny, tmp_path):
    from peft import PeftModel

    base = str(tiny("llama"))
    config = PeftConfig(r=2, lora_alpha=4.0, alpha_pattern={"q_proj": 11.0}, target_modules=["q_proj", "v_proj"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    trained = inject(model, config)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_()
    save_adapter(tmp_path, trained, config, base_model=base, model=model)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path)
    ids = torch.arange(2, 12)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_files_have_the_modes_that_the_user_asks_for(tiny, tmp_path):
    model = load_model(str(tiny("llama")), dtype="float32")
    before = os.umask(0o077)
    try:
        save_adapter(tmp_path / "adapter", inject(model, PeftConfig()), PeftConfig(), base_model="base", model=model)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "adapter").iterdir()} == {0o600}
