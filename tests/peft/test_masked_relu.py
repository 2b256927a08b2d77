"""ReLUs that keep one bit an element: where they stand, what they save, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fastft import peft
from fastft.config import PeftConfig
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from fastft.models.recompute import checkpoint_layers
from fastft.peft.masked_relu import MaskedReLU, mask_relus
from tests.conftest import losses
from tests.engine.test_run import ok

LENGTHS = [200, 88]  # 288 rows, a number that is not rounded


def lora(*targets: str) -> PeftConfig:
    return PeftConfig(kind="lora", r=2, target_modules=list(targets))


@pytest.mark.parametrize(
    ("config", "masked"),
    [
        (PeftConfig(kind="bitfit"), True),
        (lora("q_proj", "v_proj"), True),
        (lora("fc1"), True),
        (lora("fc2"), False),
        (PeftConfig(kind="lora", r=2, target_modules="all-linear"), False),
        (PeftConfig(kind="full"), False),
    ],
)
def test_only_where_the_next_layer_keeps_no_input(tiny, config, masked):
    model = load_model(str(tiny("opt")), dtype="float32")
    peft.inject(model, config)
    relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    assert len(relus) == 2 and all(isinstance(m, MaskedReLU) == masked for m in relus)


def test_a_gated_product_keeps_its_relu(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), hidden_act="relu").requires_grad_(False)
    peft.inject(model, lora("q_proj"))
    assert [type(m) for m in model.modules() if isinstance(m, nn.ReLU)] == [nn.ReLU, nn.ReLU]


def passed(folder: str, config: PeftConfig, *, checkpointed: bool, dtype: str):
    """(bytes kept for backward, parameters apart; gradients) of a pass."""
    lm = PackedCausalLM(load_model(folder, dtype=dtype))
    torch.manual_seed(0)
    trained = peft.inject(lm.model, config)
    if checkpointed:
        checkpoint_layers(lm)
    parameters = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = lm(torch.arange(5, 5 + sum(LENGTHS))[None], PackedSequences(LENGTHS))
    hidden.float().square().sum().backward()
    return sum(s.nbytes() for s in kept.values()), {name: p.grad for name, p in trained.items()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [PeftConfig(kind="bitfit"), lora("q_proj", "v_proj")], ids=lambda c: c.kind)
def test_same_gradients_from_a_bit_an_element(tiny, monkeypatch, config, dtype, checkpointed):
    masked_bytes, masked = passed(str(tiny("opt")), config, checkpointed=checkpointed, dtype=dtype)
    monkeypatch.setattr(peft, "mask_relus", lambda model: None)
    plain_bytes, plain = passed(str(tiny("opt")), config, checkpointed=checkpointed, dtype=dtype)
    for name, gradient in plain.items():
        assert torch.equal(masked[name], gradient), name
    elements, layers = sum(LENGTHS) * 64, 2
    saved = 0 if checkpointed else layers * (elements * getattr(torch, dtype).itemsize - elements // 8)
    assert plain_bytes - masked_bytes == saved


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"activation_checkpointing": "full"}},
        {"deepspeed": {"zero_stage": 3}},
        {"distill": {"teacher": "online"}},
        {"model": {"quantization": "int8"}},
    ],
    ids=["plain", "checkpointed", "zero3", "online", "int8"],
)
def test_a_run_has_the_losses_of_one_without(base_config, launch, tmp_path, monkeypatch, sections):
    found = []
    for name in ("masked", "plain"):
        raw = base_config("opt", evaluate={"answers": False})
        raw |= {"peft": {"kind": "bitfit"}, "output_dir": str(tmp_path / name)}
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        used = []
        replace = mask_relus if name == "masked" else used.append
        monkeypatch.setattr(peft, "mask_relus", replace)
        ok(launch(raw))
        assert bool(used) == (name == "plain")
        found.append(losses(tmp_path / name))
    assert len(found[0]) == 4 and found[0] == found[1]
