"""Modules that run on fastft's kernels compute what transformers' own do, and transformers stays as it is."""

from __future__ import annotations

import copy
import functools
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama import modeling_llama

from fastft import peft
from fastft.config import PeftConfig
from fastft.models import gated_mlp, loading, rotary
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.fused import fuse
from fastft.models.gated_mlp import fuse_gated_mlps
from fastft.models.rotary import fuse_rotary
from fastft.peft.lora import LoraLinear
from tests.conftest import losses
from tests.engine.test_run import ok

SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.arange(1, 25).view(2, 12)


def tiny_model(kind: str, **changes) -> nn.Module:
    config = CONFIG_MAPPING[kind]()
    for name, value in {**SHAPE, **changes}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # larger than the default initialisation, so that positions and gates matter
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    return model


def fused(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


def logits_and_gradients(model: nn.Module) -> list[torch.Tensor]:
    logits = model(IDS).logits
    logits.square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """To 1e-5 of the largest element."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-12


@pytest.mark.parametrize(
    ("kind", "in_a_layer"),
    [("llama", 2), ("mistral", 2), ("qwen2", 2), ("qwen3", 2), ("olmo2", 2), ("gpt_neox", 1), ("gemma", 1),
     ("cohere", 1), ("glm", 0), ("opt", 0)],
)  # fmt: skip
def test_logits_and_gradients_are_those_of_transformers(kind, in_a_layer):
    """GPT-NeoX rotates a quarter of a head; Gemma's gate is a GELU; Cohere's and GLM's pairs are neighbours."""
    plain = tiny_model(kind)
    ours = copy.deepcopy(plain)
    fuse(ours)
    assert len(fused(ours)) == 2 * in_a_layer
    assert_close(logits_and_gradients(ours), logits_and_gradients(plain))
    assert list(ours.state_dict()) == list(plain.state_dict())
    # A model made later, and one made before, are as transformers makes them.
    assert not fused(plain) and not fused(tiny_model(kind))


def test_transformers_functions_are_untouched():
    theirs = modeling_llama.apply_rotary_pos_emb
    fuse(tiny_model("llama"))
    assert modeling_llama.apply_rotary_pos_emb is theirs
    assert modeling_llama.LlamaAttention.forward.__globals__ is vars(modeling_llama)


@contextmanager
def counting(monkeypatch):
    """Names of the kernels that are called within."""
    called: list[str] = []
    with monkeypatch.context() as patch:
        for module, name in ((rotary, "rotary"), (gated_mlp, "swiglu")):
            whole = getattr(module, name)
            patch.setattr(module, name, lambda *x, whole=whole, name=name: called.append(name) or whole(*x))
        yield called


def test_a_copy_is_its_own():
    """deepcopy binds the forward to the copy; a second call changes nothing."""
    model = tiny_model("llama")
    fuse(model)
    forwards = [module.forward for module in fused(model)]
    fuse(model)
    assert [module.forward for module in fused(model)] == forwards
    other = copy.deepcopy(model)
    assert all(module.forward.__self__ is module for module in fused(other)) and len(fused(other)) == 4
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not other(IDS).logits.any() and model(IDS).logits.any()


@pytest.mark.parametrize("kind", ["llama", "olmo2"])
def test_a_pickle_computes_the_same(kind):
    model = tiny_model(kind)
    fuse(model)
    again = pickle.loads(pickle.dumps(model))
    assert_close(logits_and_gradients(again), logits_and_gradients(model))


def test_forwards_that_are_wrapped_or_different_are_left_alone():
    class Wrapped(modeling_llama.LlamaMLP):
        @functools.wraps(modeling_llama.LlamaMLP.forward)
        def forward(self, x):
            return super().forward(x)

    class Doubled(modeling_llama.LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    class Residual(modeling_llama.LlamaMLP):
        def forward(self, x):
            return super().forward(self.norm(x))

    config = tiny_model("llama").config
    for kind in (Wrapped, Doubled, Residual):
        module = kind(config)
        fuse_gated_mlps(module)
        assert not fused(module)
    for activation in (nn.GELU(), nn.ReLU()):
        module = modeling_llama.LlamaMLP(config)
        module.act_fn = activation
        fuse_gated_mlps(module)
        assert not fused(module)

    attention = modeling_llama.LlamaAttention(config, 0)
    attention.forward = whole = attention.forward  # somebody's own
    fuse_rotary(attention)
    assert attention.forward is whole


def test_another_rotation_is_left_alone(monkeypatch):
    theirs = modeling_llama.apply_rotary_pos_emb
    for other in (
        lambda q, k, cos, sin, unsqueeze_dim=1: theirs(q, k, cos, -sin, unsqueeze_dim),
        lambda q, k, cos, sin, position_ids=None, unsqueeze_dim=1: theirs(q, k, cos, sin, unsqueeze_dim),
        lambda q, k, cos, sin, unsqueeze_dim=1: theirs(q, k, cos, sin, unsqueeze_dim)[:1],
    ):
        with monkeypatch.context() as patch:
            patch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
            model = tiny_model("llama")
            fuse_rotary(model)
            assert not fused(model)
    fuse_rotary(model)
    assert len(fused(model)) == 2


def test_embeds_heads_behind_tokens():
    """unsqueeze_dim=2, and float32 angles beside float64."""
    q, k = torch.randn(2, 5, 4, 8, dtype=torch.float64), torch.randn(2, 5, 2, 8, dtype=torch.float64)
    cos, sin = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    found = rotary.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    expected = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="unsqueeze_dim is 0, expected 1 or 2"):
        rotary.apply_rotary_pos_emb(q, k, cos, sin, 0)


def test_compiles():
    model = tiny_model("llama")
    fuse(model)
    layer, x = model.model.layers[0], torch.randn(1, 6, 32)
    angles = model.model.rotary_emb(x, torch.arange(6)[None])
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(compiled(x, position_embeddings=angles), layer(x, position_embeddings=angles))


def test_every_loaded_model_has_them(tiny, tmp_path, monkeypatch):
    """With whole weights and quantised, and what LoRA puts in their linears' place is called."""
    path = str(tiny("llama"))
    files = loading.quantized_files(path, kind="nf4", dtype="float32", cache_dir=tmp_path)
    files.make(files.lacking())
    files.finish()
    for model in (
        loading.load_model(path, dtype="float32"),
        loading.prepare_model(files.load(), path, attention="auto", dropout=False),
    ):
        lm = PackedCausalLM(model)
        trained = peft.inject(model, PeftConfig(kind="lora", target_modules=["gate_proj", "up_proj", "q_proj"]))
        assert isinstance(lm.layers[0].mlp.gate_proj, LoraLinear)
        with counting(monkeypatch) as called:
            lm(torch.arange(5, 17)[None], PackedSequences([7, 5])).square().sum().backward()
        assert called == ["rotary", "swiglu"] * 2
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


def test_runs_agree_under_zero3(base_config, launch, tmp_path, monkeypatch):
    """A run without them, with them, and with them under ZeRO-3 with layers computed again."""
    found = {}
    for name, stage, checkpointing in (("plain", 0, "none"), ("fused", 0, "none"), ("zero3", 3, "full")):
        raw = base_config("llama", deepspeed={"zero_stage": stage}, evaluate={"answers": False})
        raw["train"]["activation_checkpointing"] = checkpointing
        raw |= {"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / f"cache-{name}")}
        with monkeypatch.context() as patch:
            if name == "plain":
                patch.setattr(loading, "fuse", lambda model: None)
            ok(launch(raw))
        found[name] = torch.tensor(losses(tmp_path / name))
    assert len(found["plain"]) == 4
    for name in ("fused", "zero3"):
        torch.testing.assert_close(found[name], found["plain"], rtol=1e-4, atol=0)
