"""Models with fused norms: which modules are replaced, and that nothing but rounding changes."""

import copy
import json

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, GptOssConfig, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastft.models.fused import fuse
from fastft.models.loading import load_model
from fastft.models.norms import RMSNorm, fuse_norms
from fastft.ops import reference
from tests.conftest import ROOT, launch_processes, losses

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {"llama": LlamaConfig(**SIZES), "qwen3": Qwen3Config(**SIZES)}


def build(config, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(0.5 + torch.rand_like(p))
    return model


def norms_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, RMSNorm)}


def results(model):
    """Logits, and the gradient of every parameter."""
    ids = torch.arange(24).reshape(2, 12) * 7 % 60
    logits = model(input_ids=ids).logits
    loss = logits.float().log_softmax(-1)[:, :, 3].mean()
    return logits.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(kind):
    plain = build(CONFIGS[kind])
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert len(norms_of(fused)) == (5 if kind == "llama" else 9) and not norms_of(plain)
    (logits, gradients), (expected, expected_gradients) = results(fused), results(plain)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_parameters_and_their_names_stay():
    model = build(CONFIGS["qwen3"])
    before = dict(model.named_parameters())
    fuse(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[n] is before[n] for n in before)
    fuse(model)  # once more changes nothing
    assert all(type(m) is RMSNorm for m in norms_of(model).values())


def test_a_model_without_data_is_fused_alike():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    fuse(model)
    assert len(norms_of(model)) == 5 and all(p.is_meta for p in model.parameters())
    with torch.device("meta"):  # nor does a default device matter
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
        fuse(model)
    assert len(norms_of(model)) == 5


def test_loaded_models_have_them(tiny):
    assert len(norms_of(load_model(str(tiny("llama")), dtype="float32"))) == 5


def test_gemma_multiplies_by_one_plus_weight_and_stays():
    model = build(GemmaConfig(**SIZES))
    fuse(model)
    assert not norms_of(model)


def test_the_dtype_beside_a_float32_weight_is_the_modules_own():
    sizes = SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}
    x = torch.randn(4, 32).bfloat16()
    for config, dtype in ((CONFIGS["llama"], torch.float32), (GptOssConfig(**sizes), torch.bfloat16)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        kind = type(model.model.norm)
        module = nn.ModuleDict({"norm": kind(32)})
        plain = module.norm
        fuse(module)
        assert type(module.norm) is RMSNorm and plain(x).dtype == module.norm(x).dtype == dtype


class Scaled(nn.Module):
    """Base of the modules below: each is called an RMSNorm, and is another in one respect."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-5

    def forward(self, x):
        return reference.rms_norm(x, self.weight, self.eps)


class SameRMSNorm(Scaled):
    pass


class ShiftedRMSNorm(Scaled):
    def forward(self, x):
        return reference.rms_norm(x, self.weight, self.eps) + 1e-3


class EpsBesideTheRootRMSNorm(Scaled):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


class CentredRMSNorm(Scaled):
    def forward(self, x):
        return reference.rms_norm(x - x.mean(-1, keepdim=True), self.weight, self.eps)


class GatedRMSNorm(Scaled):
    def forward(self, x, gate):
        return reference.rms_norm(x * gate, self.weight, self.eps)


class BiasedRMSNorm(Scaled):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(32))


class CountingRMSNorm(Scaled):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))


class WithoutEpsRMSNorm(Scaled):
    def __init__(self):
        super().__init__()
        del self.eps


KINDS = [ShiftedRMSNorm, EpsBesideTheRootRMSNorm, CentredRMSNorm, GatedRMSNorm, BiasedRMSNorm, CountingRMSNorm]


@pytest.mark.parametrize("kind", [*KINDS, WithoutEpsRMSNorm, Scaled])
def test_what_is_another_formula_stays(kind):
    model = nn.Sequential(kind(), SameRMSNorm())
    fuse_norms(model)
    assert type(model[0]) is kind and type(model[1]) is RMSNorm


def test_a_module_whose_forward_somebody_has_replaced_stays():
    model = nn.Sequential(LlamaRMSNorm(32), LlamaRMSNorm(32))
    model[0].forward = lambda x: x
    fuse_norms(model)
    assert type(model[0]) is LlamaRMSNorm and type(model[1]) is RMSNorm


@pytest.mark.parametrize("peft", [{"kind": "full"}, {"kind": "lora", "r": 4}], ids=lambda p: p["kind"])
def test_partitioned_weights(base_config, launch, tmp_path, peft):
    """Two processes under ZeRO-3 that keeps nothing gathered train as one process does, and no weight is pinned."""
    own = tmp_path / "ds.json"
    zero = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    own.write_text(json.dumps({"zero_optimization": zero}))
    train = {"steps": 3, "batch_size": 4, "warmup_steps": 1}
    raw = base_config(train=train, evaluate={"answers": False}) | {"peft": peft}
    assert launch(raw).returncode == 0
    partitioned = {"zero_stage": 3, "threads_per_rank": 1, "config_file": str(own)}
    other = raw | {"output_dir": str(tmp_path / "partitioned"), "deepspeed": partitioned}
    path = tmp_path / "partitioned.yaml"
    path.write_text(yaml.safe_dump(other))
    done = launch_processes([str(path)], 2, tmp_path, script=ROOT / "tests" / "engine" / "count_pinned.py")
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "run"), losses(tmp_path / "partitioned")
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-5) and one[-1] != one[0]
    (found,) = [json.loads(x.removeprefix("pinned ")) for x in done.stdout.splitlines() if x.startswith("pinned ")]
    assert found["released_bytes"] > 0 and found["pinned_bytes"] == [0, 0, 0]
