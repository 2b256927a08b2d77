"""Who computes attention on a GPU, what the libraries are given, and, where there is a GPU, what they return."""

from __future__ import annotations

import inspect
import sys
import typing
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from fastft.config import ModelConfig
from fastft.errors import ModelError
from fastft.models import attention, flash, loading
from fastft.models.attention import DecodeCache, PackedSequences, Prefix, packed_attention
from tests.models.conftest import PACKAGES, plain_attention

LENGTHS = [5, 9, 1, 7]
LAYER = SimpleNamespace(layer_idx=0)


def tensors(heads, kv_heads, tokens, size, dtype=torch.float64, device="cpu"):
    """q [1, H, T, D] and k, v [1, G, T, D], transposed in memory as a model's projections are."""
    generator = torch.Generator().manual_seed(1)
    for count in (heads, kv_heads, kv_heads):
        x = torch.randn(1, tokens, count, size, generator=generator, dtype=torch.float64)
        yield (2 * x).to(device, dtype).transpose(1, 2)


def prefix_of(k, v) -> Prefix:
    prefix = Prefix()
    prefix.put(0, k, v)
    return prefix


def expected(q, k, v, packed: PackedSequences, scale: float) -> torch.Tensor:
    """Each sequence alone behind its prefix, [1, T, H, D]."""
    before = [p for p, n in packed.prefixes or [(None, len(packed.lengths))] for _ in range(n)]
    outs, start = [], 0
    for length, prefix in zip(packed.lengths, before, strict=True):
        own_q, own_k, own_v = (x[:, :, start : start + length] for x in (q, k, v))
        earlier = 0
        if prefix is not None:
            earlier = prefix.length
            own_k, own_v = (
                torch.cat([x.to(q.dtype), y], 2) for x, y in zip(prefix.fetch(0), (own_k, own_v), strict=True)
            )
        mask = torch.ones(length, earlier + length, dtype=torch.bool, device=q.device).tril(earlier)
        outs.append(plain_attention(own_q, own_k, own_v, scale, mask)[0])
        start += length
    return torch.cat(outs, 2).transpose(1, 2)


# What each library is given


@pytest.mark.parametrize("name", [b.name for b in flash.BACKENDS])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [LENGTHS, [6, 6], [1], [1, 1, 1]])
def test_outputs_and_gradients_of_ragged_sequences(flash_on_cpu, name, heads, kv_heads, lengths):
    flash_on_cpu(name)
    q, k, v = (x.detach().requires_grad_() for x in tensors(heads, kv_heads, sum(lengths), 8))
    packed = PackedSequences(lengths)
    out, _ = packed_attention(LAYER, q, k, v, None, scaling=0.3, packed=packed)
    truth = expected(q, k, v, packed, 0.3)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    seed = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for found, right in zip(
        torch.autograd.grad(out, (q, k, v), seed), torch.autograd.grad(truth, (q, k, v), seed), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", [b.name for b in flash.BACKENDS])
@pytest.mark.parametrize("groups", [[4], [1, 3]])
def test_ragged_sequences_behind_prefixes(flash_on_cpu, name, groups):
    flash_on_cpu(name)
    q, k, v = tensors(6, 2, sum(LENGTHS), 8)
    prefixes = [(prefix_of(*list(tensors(6, 2, 10 + n, 8))[1:]), n) for n in groups]
    packed = PackedSequences(LENGTHS, prefixes=prefixes)
    out, _ = packed_attention(LAYER, q, k, v, None, scaling=0.3, packed=packed)
    torch.testing.assert_close(out, expected(q, k, v, packed, 0.3), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", [b.name for b in flash.BACKENDS])
def test_nothing_is_padded_or_expanded(flash_on_cpu, name, monkeypatch):
    """One call for all sequences, with the model's own memory and its key/value heads; one for each prefix."""
    backend = flash_on_cpu(name)
    calls = []
    block_causal, full = type(backend).block_causal, type(backend).full

    def count_block_causal(self, *tensors, **options):
        calls.append(("block_causal", *(x.shape for x in tensors[:3]), tensors[1].data_ptr()))
        return block_causal(self, *tensors, **options)

    def count_full(self, *tensors, **options):
        calls.append(("full", *(x.shape for x in tensors), tensors[1].data_ptr()))
        return full(self, *tensors, **options)

    monkeypatch.setattr(type(backend), "block_causal", count_block_causal)
    monkeypatch.setattr(type(backend), "full", count_full)
    monkeypatch.setattr(attention, "_pad", None)
    q, k, v = tensors(6, 2, 22, 8)
    prefixes = [(prefix_of(*list(tensors(6, 2, c, 8))[1:]), n) for c, n in ((11, 1), (13, 3))]
    packed_attention(LAYER, q, k, v, None, scaling=0.3, packed=PackedSequences(LENGTHS, prefixes=prefixes))
    first, second = (p.fetch(0)[0] for p, _ in prefixes)
    assert calls == [
        ("block_causal", (22, 6, 8), (22, 2, 8), (22, 2, 8), k.data_ptr()),
        ("full", (1, 2, 3 * 5, 8), (1, 2, 11, 8), (1, 2, 11, 8), first.data_ptr()),
        ("full", (1, 2, 3 * 17, 8), (1, 2, 13, 8), (1, 2, 13, 8), second.data_ptr()),
    ]


def test_what_torch_offers():
    """Names and order of arguments, and the layout of the log-sum-exp, as far as torch says without a GPU."""
    parameters = inspect.signature(varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"return_aux", "scale", "window_size"} <= set(parameters) and AuxRequest(lse=True).lse
    dense = torch.ops.aten._scaled_dot_product_flash_attention.default._schema
    assert [a.name for a in dense.arguments] == [
        "query",
        "key",
        "value",
        "dropout_p",
        "is_causal",
        "return_debug_mask",
        "scale",
    ]
    assert [r.name for r in dense.returns][:2] == ["output", "logsumexp"]
    backend = flash.BACKENDS[-1]
    q, k, v = (x[0].transpose(0, 1) for x in tensors(6, 2, 22, 64, torch.bfloat16, "meta"))
    out, lse = backend.block_causal(q, k, v, PackedSequences(LENGTHS, device="meta").cu_seqlens, 9, scale=0.3)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((22, 6, 64), torch.bfloat16, (6, 22), torch.float32)
    q, k, v = tensors(6, 6, 22, 64, torch.bfloat16, "meta")
    out, lse = backend.full(q, k[:, :, :9], v[:, :, :9], scale=0.3)
    assert (out.shape, lse.shape, lse.dtype) == ((1, 6, 22, 64), (1, 6, 22), torch.float32)


def test_a_padded_log_sum_exp_is_refused(install):
    package, fa2 = install("fa2"), next(b for b in flash.BACKENDS if b.name == "fa2")
    package.flash_attn_varlen_func = lambda q, *_, **__: (q, torch.zeros(4, 6, 9), None)
    q, k, v = (x[0].transpose(0, 1) for x in tensors(6, 2, 22, 8))
    with pytest.raises(ModelError, match=r"shape \(4, 6, 9\), expected \(heads, tokens\) = \(6, 22\)"):
        fa2.block_causal(q, k, v, PackedSequences(LENGTHS).cu_seqlens, 9, scale=0.3)


# The choice


@pytest.fixture
def gpu(monkeypatch):
    """gpu(9, 0): selection for a GPU of that compute capability, with no package installed; nothing is computed."""
    for backend in flash.BACKENDS:
        if backend.name in PACKAGES:
            monkeypatch.setitem(sys.modules, backend.module, None)

    def select(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return lambda choice, dtype=torch.bfloat16, size=64: flash.select.__wrapped__(
            choice, torch.device("cuda", 0), dtype, size
        )

    return select


@pytest.mark.parametrize(
    ("capability", "installed", "size", "name"),
    [
        ((8, 0), "", 64, "varlen"),
        ((8, 6), "fa2 fa3 fa4", 64, "fa2"),
        ((9, 0), "fa2 fa3 fa4", 64, "fa3"),
        ((9, 0), "fa2 fa4", 128, "fa4"),
        ((10, 0), "fa2 fa3 fa4", 64, "fa4"),
        ((10, 0), "fa2 fa3 fa4", 256, "fa2"),
        ((12, 0), "fa3 fa4", 64, "varlen"),
        ((7, 5), "fa2", 64, None),
        ((9, 0), "fa2 fa3 fa4", 20, None),
        ((9, 0), "fa2 fa3 fa4", 264, None),
    ],
)
def test_auto_takes_the_best_that_is_there(gpu, install, capability, installed, size, name):
    for package in installed.split():
        install(package)
    select = gpu(*capability)
    chosen = select("auto", size=size)
    assert (chosen and chosen.name) == name
    assert select("sdpa", size=size) is None
    assert select("auto", torch.float32) is None and select("auto", torch.float64) is None
    assert select("auto", torch.float16, size) is chosen


def test_what_is_asked_for_and_cannot_be_used_is_refused(gpu, install):
    select = gpu(9, 0)
    for name in PACKAGES:
        with pytest.raises(ModelError, match=f"model.attention={name}: flash-attn . cannot be imported: .*; use auto"):
            select(name)
    fa2, fa3 = install("fa2"), install("fa3")
    assert select("fa2").name == "fa2" and select("fa3").name == "fa3" and select("varlen").name == "varlen"
    with pytest.raises(ModelError, match="computes in float16 and bfloat16, got float32"):
        select("fa2", torch.float32)
    with pytest.raises(ModelError, match="multiple of 8, at most 256, got 20"):
        select("varlen", size=20)
    fa2.flash_attn_varlen_func = lambda q, k, v: None
    with pytest.raises(ModelError, match="flash_attn_varlen_func has no argument return_attn_probs"):
        select("fa2")
    assert select("auto").name == "fa3"
    del fa3.flash_attn_varlen_func
    assert select("auto").name == "varlen"
    with pytest.raises(ModelError, match=r"flash-attn 3 has no kernels for compute capability 8\.9"):
        gpu(8, 9)("fa3")
    with pytest.raises(ModelError, match="needs a GPU, got device cpu"):
        flash.select("varlen", torch.device("cpu"), torch.bfloat16, 64)
    assert flash.select("auto", torch.device("cpu"), torch.bfloat16, 64) is None


def test_the_configuration_has_every_choice():
    assert set(typing.get_args(ModelConfig.model_fields["attention"].annotation)) == set(flash.CHOICES)


def test_the_choice_reaches_the_model(tiny):
    """A back end that is named is not replaced by another in silence, not even by what a CPU can do."""
    ids, packed = torch.zeros(1, 3, dtype=torch.long), PackedSequences([3])
    model = loading.load_model(str(tiny("llama")), dtype="float32", attention="fa2")
    with pytest.raises(ModelError, match="=fa2: flash-attn 2 needs a GPU"):
        model(ids, position_ids=packed.position_ids, packed=packed)
    found = []
    for choice in ("auto", "sdpa"):
        model = loading.load_model(str(tiny("llama")), dtype="float32", attention=choice)
        found.append(model(ids, position_ids=packed.position_ids, packed=packed).logits)
    torch.testing.assert_close(*found)  # the project's kernel and torch's


def test_attention_dropout_is_not_dropped(flash_on_cpu):
    flash_on_cpu("fa2")
    q, k, v = tensors(4, 4, 22, 8)
    with pytest.raises(ModelError, match="=fa2 has no attention dropout"):
        packed_attention(LAYER, q, k, v, None, scaling=0.3, packed=PackedSequences(LENGTHS), dropout=0.1, choice="fa2")
    torch.manual_seed(0)
    dropped, _ = packed_attention(LAYER, q, k, v, None, scaling=0.3, packed=PackedSequences(LENGTHS), dropout=0.9)
    assert not torch.allclose(dropped, expected(q, k, v, PackedSequences(LENGTHS), 0.3))


# On a device, in its own dtypes

DEVICES = [
    ("cpu", "auto"),
    *(
        pytest.param("cuda", c, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
        for c in flash.CHOICES
    ),
]


def close(found, q_k_v, packed, scale, plain) -> None:
    """At most twice the error of plain products in the same dtype, and a floor."""
    truth = expected(*(x.double() for x in q_k_v), packed, scale)
    floor = 4 * torch.finfo(found.dtype).eps * truth.abs().max()
    assert (found.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + floor


@pytest.mark.parametrize(("device", "choice"), DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_attention_on_the_device(device, choice, dtype, size, heads, kv_heads):
    """A pack with its gradient, and behind two prefixes, against float64."""
    if choice not in ("auto", "sdpa"):
        backend = next(b for b in flash.BACKENDS if b.name == choice)
        if problem := backend.obstacle(torch.device("cuda", 0), dtype, size):
            pytest.skip(f"{backend.title} {problem}")
    lengths, scale = [70, 1, 200, 129], size**-0.5
    inputs = [x.detach().requires_grad_() for x in tensors(heads, kv_heads, sum(lengths), size, dtype, device)]
    packed = PackedSequences(lengths, device=device)
    out, _ = packed_attention(LAYER, *inputs, None, scaling=scale, packed=packed, choice=choice)
    plain = expected(*inputs, packed, scale)
    close(out.detach(), inputs, packed, scale, plain.detach())

    exact = [x.detach().double().requires_grad_() for x in inputs]
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    right = torch.autograd.grad(expected(*exact, packed, scale), exact, seed.double())
    ours, theirs = (torch.autograd.grad(y, inputs, seed) for y in (out, plain))
    for mine, other, truth in zip(ours, theirs, right, strict=True):
        floor = 4 * torch.finfo(dtype).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= 2 * (other.double() - truth).abs().max() + floor

    with torch.no_grad():
        prefixes = []
        for tokens, count in ((150, 1), (33, 3)):
            _, k, v = tensors(heads, kv_heads, tokens, size, dtype, device)
            prefixes.append((prefix_of(k, v), count))
        packed = PackedSequences(lengths, prefixes=prefixes, device=device)
        out, _ = packed_attention(LAYER, *inputs, None, scaling=scale, packed=packed, choice=choice)
        close(out, inputs, packed, scale, expected(*inputs, packed, scale))


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=DEVICES[1].marks)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [64, 20])
def test_masks_on_the_device(device, dtype, size):
    """Branches, and a decode cache step by step, with numbers of keys that are no multiple of anything."""
    scale = size**-0.5
    q, k, v = tensors(6, 2, 19, size, dtype, device)
    trunk, ends = 6, [3, 2]  # a second sequence of 8 tokens has none
    packed = PackedSequences([trunk, 8], branches=[ends, []], device=device)
    out, _ = packed_attention(LAYER, q, k, v, None, scaling=scale, packed=packed)
    rows = [[*range(6), *range(6, 9)], [*range(6), *range(9, 11)], [*range(11, 19)]]
    for index in rows:
        alone = PackedSequences([len(index)], device=device)
        parts = [x[:, :, index] for x in (q, k, v)]
        close(out[:, index], parts, alone, scale, expected(*parts, alone, scale))

    lengths, cache, start = [5, 5], DecodeCache(8), 0
    parts = [x[:, :, :10] for x in (q, k, v)]
    whole = expected(*(x.double() for x in parts), PackedSequences(lengths, device=device), scale).view(2, 5, 6, size)
    for step in (3, 1, 1):
        now = [x.unflatten(2, (2, 5))[:, :, :, start : start + step].flatten(2, 3) for x in parts]
        packed = PackedSequences([step, step], cache=cache, device=device)
        out, _ = packed_attention(LAYER, *now, None, scaling=scale, packed=packed)
        packed.advance()
        error = (out.view(2, step, 6, size).double() - whole[:, start : start + step]).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * whole.abs().max()
        start += step
