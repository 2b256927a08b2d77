"""Quantised bases: the bits of bitsandbytes, made layer by layer, and models on them against dequantised weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from fastft import peft
from fastft.config import PeftConfig
from fastft.errors import ModelError
from fastft.models import loading, quantized_loading
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.checkpoint import Checkpoint
from fastft.models.lockstep import Lockstep
from fastft.models.quantized import (
    KINDS,
    Packing,
    QuantizedLinear,
    QuantizedWeight,
    parameter_count,
    quantised_weights,
    quantize,
)

functional = pytest.importorskip("bitsandbytes.functional")


def whole(weight) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=torch.float32)
    weight.dequantise(0, weight.shape[0], out)
    return out


def files(folder, tmp_path, kind="nf4", dtype="float32", **options):
    return loading.quantized_files(str(folder), kind=kind, dtype=dtype, cache_dir=tmp_path, **options)


def load(folder, tmp_path, kind="nf4", dtype="float32", **options):
    found = files(folder, tmp_path, kind, dtype, **options)
    if not found.is_complete:
        found.make(found.lacking())
        found.finish()
    return loading.prepare_model(found.load(), str(folder), attention="auto", dropout=False)


def dequantised(folder, quantised, dtype=torch.float64) -> nn.Module:
    """transformers' model of a folder, its decoder linears with the values that the quantised ones stand for."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, module in quantised.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data = whole(module.weight)
    return plain.to(dtype).eval()


@pytest.mark.parametrize("shape", [(96, 128), (33, 70), (300, 704), (1, 1)], ids=str)
def test_nf4_is_that_of_bitsandbytes_bit_for_bit(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.bfloat16)
    parts = Packing("nf4", shape).views(quantize(weight, "nf4"))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(parts["packed"], packed.flatten())
    assert torch.equal(parts["absmax"], state.absmax)
    assert torch.equal(parts["absmax_scale"], state.state2.absmax)
    assert float(parts["absmax_offset"]) == float(state.offset)


def test_int8_is_within_half_a_step(monkeypatch):
    monkeypatch.setattr("fastft.models.quantized.CHUNK_ELEMENTS", 1000)
    torch.manual_seed(0)
    weight = torch.randn(37, 50)
    weight[3] = 0
    layer = QuantizedLinear(quantize(weight, "int8"), (37, 50), "int8", None, torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((whole(layer.weight) - weight).abs() <= step * 0.5001).all()


def test_bytes_a_weight():
    assert Packing("nf4", (7168, 28672)).nbytes / (7168 * 28672) == pytest.approx(
        0.5 + 1 / 64 + 4 / (64 * 256), rel=1e-4
    )
    assert Packing("int8", (7168, 28672)).nbytes == 7168 * 28672 + 4 * 7168


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_a_quantised_model_computes_with_its_dequantised_weights(tiny, tmp_path, family, kind):
    """Hidden states and the gradients of LoRA and biases, against transformers and PEFT's formula in float64."""
    folder = tiny(family)
    model = load(folder, tmp_path, kind)
    truth = dequantised(folder, model)
    ids = torch.arange(5, 30)[None]
    for inject in (PeftConfig(kind="lora", r=4), PeftConfig(kind="bitfit", add_biases=family == "llama")):
        ours, theirs = (load(folder, tmp_path, kind), dequantised(folder, model))
        for p in theirs.parameters():
            p.requires_grad_(False)
        torch.manual_seed(0)
        trained = peft.inject(ours, inject)
        lm = PackedCausalLM(ours)
        reference = peft.inject(theirs, inject)
        with torch.no_grad():
            for name, p in trained.items():
                p.add_(torch.randn_like(p) * 0.02)
                reference[name].copy_(p)
        hidden = lm(ids, PackedSequences([ids.shape[1]]))
        expected = theirs.get_decoder()(ids).last_hidden_state[0]
        torch.testing.assert_close(hidden.double(), expected, rtol=1e-4, atol=1e-4)
        weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
        (hidden * weights).sum().backward()
        (expected * weights).sum().backward()
        for name, p in trained.items():
            scale = reference[name].grad.abs().max()
            torch.testing.assert_close(
                p.grad.double(), reference[name].grad, rtol=1e-3, atol=1e-4 * float(scale) + 1e-6
            )
    assert parameter_count(model) == sum(p.numel() for p in truth.parameters())


@pytest.mark.parametrize("kind", ["lora", "bitfit"])
def test_teacher_and_student_in_one_pass_share_what_is_dequantised(tiny, tmp_path, monkeypatch, kind):
    """Each weight once for contexts, teacher and student, and once more in backward; nothing of it is kept."""
    model = load(tiny("llama"), tmp_path)
    trained = peft.inject(model, PeftConfig(kind=kind, r=4, add_biases=True))
    lm = PackedCausalLM(model)
    ids, query = torch.arange(5, 30)[None], PackedSequences([25])
    with torch.no_grad(), peft.adapter_off():
        teacher = lm(ids, query)
    student = lm(ids, query)

    weights = quantised_weights(model)
    assert len(weights) == 2 * 7  # layers, linears of each
    dequantised = []
    parts = QuantizedWeight._unpacked
    monkeypatch.setattr(QuantizedWeight, "_unpacked", lambda w: dequantised.append(w) or parts(w))
    lockstep = Lockstep(lm)
    lockstep.dequantised.devices = ("cpu", "cuda")
    frozen, own = lockstep.run(lm, [(ids, query), (ids, query)], (ids, query), lambda t, s, head: (t, s))
    assert sorted(map(weights.index, dequantised)) == list(range(len(weights)))
    assert all(w._whole is None for w in weights)
    torch.testing.assert_close((frozen, own), (teacher, student))
    own.sum().backward()
    assert len(dequantised) > len(weights) and all(w._whole is None for w in weights)
    assert all(p.grad is not None for p in trained.values())


def test_work_that_was_stopped_goes_on_and_a_second_start_makes_nothing(tiny, tmp_path, monkeypatch):
    folder = tiny("opt")
    first = files(folder, tmp_path)
    assert len(first.lacking()) == 3  # two layers and the rest
    first.make(first.lacking()[:1])
    again = files(folder, tmp_path)
    assert again.lacking() == first.lacking() and len(again.lacking()) == 2 and not again.is_complete
    monkeypatch.setattr(quantized_loading, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        again.make(again.lacking())
    assert len(list(again.folder.iterdir())) == 1  # nothing half-written
    monkeypatch.undo()
    again.make(again.lacking())
    again.finish()
    assert files(folder, tmp_path).is_complete
    total = sum(t.nbytes for unit in again.units for t in load_file(again._path(unit)).values())
    assert total == again.nbytes


def test_sharded_safetensors_and_old_pytorch_files_give_the_same(tiny, tmp_path):
    folder = tiny("opt")
    expected = load(folder, tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(
        {n.removeprefix("model."): t for n, t in model.state_dict().items()}, tmp_path / "bin" / "pytorch_model.bin"
    )
    for name in ("sharded", "bin"):
        found = load(tmp_path / name, tmp_path / "cache")
        for (n, a), (_, b) in zip(found.state_dict().items(), expected.state_dict().items(), strict=True):
            assert torch.equal(a, b), n


def test_names_that_transformers_changes_are_found(tmp_path):
    """GPT-NeoX's head is `embed_out` in its files, `lm_head` in the model."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    config = GPTNeoXConfig(num_attention_heads=4, **sizes)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    assert "embed_out.weight" in Checkpoint(tmp_path / "neox").names()
    model = load(tmp_path / "neox", tmp_path)
    ids = torch.arange(3, 12)[None]
    expected = dequantised(tmp_path / "neox", model, torch.float32)(ids).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_random_weights_are_those_of_the_seed(tiny, tmp_path):
    one = load(tiny("opt"), tmp_path / "a", random_weights=True, seed=1)
    same = load(tiny("opt"), tmp_path / "b", random_weights=True, seed=1)
    other = load(tiny("opt"), tmp_path / "b", random_weights=True, seed=2)
    for (name, a), (_, b), (_, c) in zip(*(m.state_dict().items() for m in (one, same, other)), strict=True):
        assert torch.equal(a, b), name
        assert "packed" not in name or not torch.equal(a, c), name
    layer = next(m for m in one.modules() if isinstance(m, QuantizedLinear))
    assert float(whole(layer.weight).std()) == pytest.approx(one.config.init_std, rel=0.1)
    assert torch.equal(one.get_output_embeddings().weight, one.get_input_embeddings().weight)


def test_what_cannot_be_loaded_is_refused(tiny, tmp_path):
    folder = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(folder, state_dict=state)
    broken = files(folder, tmp_path)
    with pytest.raises(
        ModelError, match=r"no tensor 'model.layers.1.mlp.up_proj.weight', which LlamaForCausalLM needs"
    ):
        broken.make(broken.lacking())
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights there; expected one of model\.safetensors\.index\.json"):
        Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantised already; name the model that it was made from"):
        files(folder, tmp_path)


@pytest.mark.parametrize("damaged", ["index.json", "model.layers.0.safetensors"])
def test_what_is_gone_or_damaged_is_made_anew(tiny, tmp_path, damaged):
    load(tiny("llama"), tmp_path)
    found = files(tiny("llama"), tmp_path)
    path, digest = found.folder / damaged, found.digest()
    if damaged == "index.json":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    assert not files(tiny("llama"), tmp_path).is_complete
    load(tiny("llama"), tmp_path)
    assert files(tiny("llama"), tmp_path).digest() == digest


def test_a_truncated_file_is_named(tiny, tmp_path):
    load(tiny("opt"), tmp_path)
    found = files(tiny("opt"), tmp_path)
    path = found._path("rest")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"remove {found.folder}, and the next run makes them anew"):
        found.load()


def test_a_disk_without_room_is_told_before_the_first_layer(tiny, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    found = files(tiny("opt"), tmp_path)
    with pytest.raises(ModelError, match=r"the quantised weights take .* GiB more"):
        found.make(found.lacking())
    assert list(found.folder.iterdir()) == []
