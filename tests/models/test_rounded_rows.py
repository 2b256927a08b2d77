"""Passes whose number of rows is rounded up for oneDNN: few numbers occur, and the results are the same."""

from __future__ import annotations

import pytest
import torch

from fastft.models import causal
from fastft.models.attention import DecodeCache, PackedSequences, Prefix
from fastft.models.causal import PackedCausalLM
from fastft.models.loading import load_model
from fastft.ops import linear_cross_entropy, linear_log_softmax_kl, linear_topk_kl, products
from tests.models.test_attention import MODELS
from tests.models.test_layerwise import on_host, results
from tests.models.test_lockstep import adapted, student_alone, test_pass


@pytest.fixture
def compiles(monkeypatch):
    """As on a processor where oneDNN has products of bfloat16."""
    monkeypatch.setattr(products, "WIDENED", ())


@pytest.fixture
def rounds(monkeypatch):
    """Whatever the dtype: to multiples of 16. A list of the numbers that were asked for."""
    asked = []

    def rounded(rows: int, like: torch.Tensor) -> int:
        asked.append(rows)
        return -(-rows // 16) * 16

    monkeypatch.setattr(causal, "rounded_rows", rounded)
    return asked


def test_sixteen_numbers_an_octave(compiles):
    like = torch.empty(0, dtype=torch.bfloat16)
    rounded = [products.rounded_rows(n, like) for n in range(5000)]
    assert rounded[:33] == list(range(33)) and rounded[300] == 304
    assert all(n <= r <= n * 17 / 16 for n, r in enumerate(rounded))
    assert rounded == sorted(rounded) and len(set(rounded[256:513])) == 17
    assert products.rounded_rows(300, like.float()) == 300
    assert products.rounded_rows(300, like.to("meta")) == 300


def test_nothing_is_rounded_where_products_are_widened(monkeypatch):
    monkeypatch.setattr(products, "WIDENED", (torch.bfloat16,))
    assert products.rounded_rows(300, torch.empty(0, dtype=torch.bfloat16)) == 300


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("layers", ["device", "host"])
def test_hidden_states_are_the_same(tiny, rounds, monkeypatch, family, layers):
    """Behind contexts, with branches, pack by pack and layer by layer."""

    def found():
        lm = PackedCausalLM(load_model(str(tiny(family)), dtype="float32"))
        return results(on_host(lm) if layers == "host" else lm)

    ours = found()
    assert any(n % 16 for n in rounds)
    monkeypatch.setattr(causal, "rounded_rows", lambda rows, like: rows)
    for (_, one), (_, other) in zip(ours, found(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_positions_end_where_the_sequence_does(rounds):
    """OPT's table of positions has no room behind a sequence that fills it."""
    model = MODELS["opt"]().eval()
    room = model.config.max_position_embeddings
    model.set_attn_implementation("fastft")
    ids = torch.arange(room)[None] % 90
    assert room % 16 == 0
    hidden = PackedCausalLM(model)(ids[:, : room - 3], PackedSequences([room - 3]))
    longer = PackedCausalLM(model)(torch.cat([ids[:, :2], ids], 1), PackedSequences([2, room]))
    torch.testing.assert_close(longer[2:-3], hidden, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS])
def test_gradients_and_lockstep_are_the_same(rounds, monkeypatch, name):
    def found():
        lm = adapted(MODELS[name]).eval()  # dropout would draw other numbers
        passes = test_pass(lm), student_alone(lm)
        (passes[0][1].square().sum() + passes[1].square().sum()).backward()
        return [*passes[0], passes[1], *(p.grad for p in lm.parameters() if p.requires_grad)]

    ours = found()
    monkeypatch.setattr(causal, "rounded_rows", lambda rows, like: rows)
    for one, other in zip(ours, found(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_others_read_is_not_extended(tiny, rounds):
    lm = PackedCausalLM(load_model(str(tiny("llama")), dtype="float32"))
    prefix = lm.encode_prefix((5, 9, 11))
    assert prefix.fetch(0)[0].shape[2] == 3
    cache = DecodeCache(8)
    with torch.no_grad():
        lm(torch.tensor([[1, 2, 3]]), PackedSequences([2, 1], prefixes=[(prefix, 2)], cache=cache))
    assert cache.buffers(0, 2, torch.empty(3, 2, 8))[0][0, 2:].eq(0).all()
    for options in ({"capture": Prefix()}, {"cache": DecodeCache(8)}):
        with pytest.raises(ValueError, match="cannot be extended"):
            PackedSequences([3], **options).extended(2)


def test_few_numbers_of_rows_reach_the_products(tiny, compiles):
    lm = PackedCausalLM(load_model(str(tiny("llama")), dtype="bfloat16"))
    seen = set()
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, y: seen.add(args[0].numel() // args[0].shape[-1]))
    with torch.no_grad():
        for tokens in range(100, 200):
            assert len(lm(torch.zeros(1, tokens, dtype=torch.long), PackedSequences([tokens - 40, 40]))) == tokens
    assert len(seen) <= 17


@pytest.mark.parametrize("op", ["kl", "ce", "topk"])
def test_chunks_of_logits_are_rounded_too(compiles, monkeypatch, op):
    """And numbers behind a chunk's own rows go nowhere: whatever was in the memory."""
    made, empty = [], torch.Tensor.new_empty

    def poisoned(x, *shape, **options):
        found = empty(x, *shape, **options)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    def mm(a, b, *, out=None):
        made.append(a.shape[0])
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)

    torch.manual_seed(0)
    hidden, teacher, weight = (torch.randn(n, 24).bfloat16() for n in (133, 133, 90))

    def call(chunk_rows):
        leaf = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_()
        if op == "kl":
            loss = linear_log_softmax_kl(leaf, teacher, head, chunk_rows=chunk_rows)
        elif op == "ce":
            loss = linear_cross_entropy(leaf, head, torch.arange(133) % 90, chunk_rows=chunk_rows)
        else:
            ids = torch.stack([torch.randperm(90)[:7] for _ in range(133)])
            loss = linear_topk_kl(leaf, head, ids, torch.full(ids.shape, -2.5), chunk_rows=chunk_rows)
        return loss, *torch.autograd.grad(loss, (leaf, head))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(products, "mm", mm)
    torch.manual_seed(1)
    rounded = call(67)
    hidden_products = {n for n in made if n != len(weight)}
    assert all(n == products.rounded_rows(n, hidden) for n in hidden_products)
    monkeypatch.setattr(products, "rounded_rows", lambda rows, like: rows)
    torch.manual_seed(1)
    for one, other in zip(rounded, call(67), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
