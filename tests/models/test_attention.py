"""Packed and shared-prefix attention against transformers' own attention, one sequence at a time, in float64."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastft.models import attention, flash
from fastft.models.attention import IMPLEMENTATION, DecodeCache, PackedSequences, Prefix, merge

COMMON = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def _opt():
    return OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=24, max_position_embeddings=64, **COMMON))


MODELS = {
    "opt": _opt,
    "llama-gqa": lambda: LlamaForCausalLM(LlamaConfig(intermediate_size=32, num_key_value_heads=2, **COMMON)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, **COMMON)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(intermediate_size=32, num_key_value_heads=2, **COMMON)),
}


@pytest.fixture(autouse=True, params=["kernel", "materialised", "flash", *(b.name for b in flash.BACKENDS)])
def path(request, monkeypatch, flash_on_cpu):
    """The CPU's ways: the project's kernel, and torch's, few scores materialised, many flash; and the GPU's."""
    if request.param == "kernel":
        return
    monkeypatch.setattr(attention, "_has_kernel", lambda q: False)
    if request.param == "flash":
        monkeypatch.setattr(attention, "MATERIALISED_SCORES", 0)
    elif request.param != "materialised":
        flash_on_cpu(request.param)


@pytest.fixture(params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().double().eval()
    # Default initialisation makes attention nearly uniform; sharpen it so that a wrong key would show.
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "query_key_value" in name:
                p.mul_(20)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def tokens(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (n,), generator=generator) for n in lengths]


def reference(model, contexts, queries):
    """Hidden states of each query behind its context, each sequence alone through torch's own attention."""
    model.set_attn_implementation("sdpa")
    rows = []
    for context, query in zip(contexts, queries, strict=True):
        hidden = model.get_decoder()(torch.cat([context, query])[None], use_cache=False).last_hidden_state[0]
        rows.append(hidden[len(context) :])
    model.set_attn_implementation(IMPLEMENTATION)
    return torch.cat(rows)


def run(model, queries, packed):
    decoder = model.get_decoder()
    ids = torch.cat(queries)[None]
    return decoder(ids, position_ids=packed.position_ids, packed=packed, use_cache=False).last_hidden_state[0]


def prefix_of(model, context):
    prefix = Prefix()
    run(model, [context], PackedSequences([len(context)], capture=prefix))
    prefix.length = len(context)
    return prefix


def assert_close(actual, expected):
    # RMSNorm computes in float32 whatever the model's dtype is.
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def rms_norm(module, x):
    return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


@pytest.mark.parametrize("lengths", [(5, 9, 1, 7), (6, 6), (1,)])
def test_packed_sequences_do_not_see_each_other(model, lengths):
    queries = tokens(*lengths)
    expected = reference(model, [q[:0] for q in queries], queries)
    assert_close(run(model, queries, PackedSequences(list(lengths))), expected)


def test_gradient_of_packed_sequences(model):
    """Every parameter's gradient, with sequences of different lengths (padding must not leak into it)."""
    queries = tokens(5, 9, 1, 7)
    seed = torch.randn(22, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model.requires_grad_(True)
    (reference(model, [q[:0] for q in queries], queries) * seed).sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (run(model, queries, PackedSequences([5, 9, 1, 7])) * seed).sum().backward()
    assert expected
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@torch.no_grad()
def test_shared_prefixes(model):
    """Two contexts in one pack, each shared by two ragged queries."""
    first, second, *queries = tokens(17, 11, 5, 9, 1, 7)
    expected = reference(model, [first, first, second, second], queries)
    groups = [(prefix_of(model, first), 2), (prefix_of(model, second), 2)]
    assert_close(run(model, queries, PackedSequences([5, 9, 1, 7], prefixes=groups)), expected)


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("branches", [[[3, 2, 1], [], [4], [1, 1]], [[2, 2]] * 4])
def test_branches_equal_separate_sequences(model, shared, branches, monkeypatch):
    """Each branch behind its question, with and without two contexts in one pack."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # transformers' rounds to float32
            monkeypatch.setattr(type(module), "forward", rms_norm)
    first, second, *questions = tokens(17, 11, 5, 9, 1, 7)
    contexts = [first, first, second, second] if shared else [first[:0]] * 4
    ends = [tokens(*b) for b in branches]
    queries = [torch.cat([q, *e]) for q, e in zip(questions, ends, strict=True)]
    groups = [(prefix_of(model, first), 2), (prefix_of(model, second), 2)] if shared else None
    packed = PackedSequences([len(q) for q in questions], branches=branches, prefixes=groups)
    found = run(model, queries, packed)
    expected = []
    for context, question, own in zip(contexts, questions, ends, strict=True):
        expected.append(reference(model, [context], [question]))
        for end in own:
            expected.append(reference(model, [context], [torch.cat([question, end])])[len(question) :])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("steps", [(3, 1, 1), (1, 4)])
def test_decode_cache(model, steps):
    """Queries fed in pieces, of one token and of several, give the last piece's hidden states."""
    context, a, b = tokens(13, 5, 5)
    expected = reference(model, [context, context], [a, b]).view(2, 5, -1)
    prefix, cache, done = prefix_of(model, context), DecodeCache(8), 0
    for step in steps:
        packed = PackedSequences([step, step], prefixes=[(prefix, 2)], cache=cache)
        hidden = run(model, [a[done : done + step], b[done : done + step]], packed).view(2, step, -1)
        packed.advance()
        assert_close(hidden, expected[:, done : done + step])
        done += step


@torch.no_grad()
def test_decode_cache_keeps_the_right_sequences(model):
    queries = tokens(4, 6, 3)
    full = reference(model, [q[:0] for q in queries], queries).split([4, 6, 3])
    cache = DecodeCache(8)
    packed = PackedSequences([3, 5, 2], cache=cache)
    run(model, [q[:-1] for q in queries], packed)
    packed.advance()
    cache.keep(torch.tensor([2, 1]))
    packed = PackedSequences([1, 1], cache=cache)
    hidden = run(model, [queries[2][-1:], queries[1][-1:]], packed)
    assert_close(hidden, torch.stack([full[2][-1], full[1][-1]]))


def test_merge_of_a_part_that_sees_nothing():
    o = torch.randn(3, 4)
    nothing = torch.full((3,), -torch.inf)
    torch.testing.assert_close(merge(o, torch.zeros(3), torch.zeros(3, 4), nothing), o)


def test_prefixes_take_no_gradient(model):
    context, query = tokens(5, 3)
    with torch.no_grad():
        prefix = prefix_of(model, context)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="no gradient"):
        run(model, [query], PackedSequences([3], prefixes=[(prefix, 1)]))


def test_errors_name_what_is_wrong(model):
    with pytest.raises(ValueError, match="lengths"):
        PackedSequences([3, 0])
    with pytest.raises(ValueError, match="do not cover 2 sequences"):
        PackedSequences([3, 1], prefixes=[(Prefix(), 1)])
    with pytest.raises(ValueError, match="for each of 2 sequences"):
        PackedSequences([3, 1], branches=[[2]])
    with pytest.raises(ValueError, match="positive lengths"):
        PackedSequences([3, 1], branches=[[2], [0]])
    with pytest.raises(ValueError, match="no cache"):
        PackedSequences([3], branches=[[2]], cache=DecodeCache(8))
    with pytest.raises(ValueError, match="packed=PackedSequences"):
        model.get_decoder()(torch.zeros(1, 3, dtype=torch.long), use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("device", [d for d in ("cpu", "cuda") if d == "cpu" or torch.cuda.is_available()])
def test_a_prefix_in_host_memory_changes_nothing(model, device):
    """Several forwards: the copy of the first layer is started at the end of the one before."""
    if device == "cuda":
        model = model.float().to(device)
    context, *queries = (t.to(device) for t in tokens(17, 5, 9))
    prefixes = []
    for placement in ("device", "host"):
        prefixes.append(Prefix(placement))
        run(model, [context], PackedSequences([17], capture=prefixes[-1], device=device))
    for _ in range(3):
        kept, copied = (
            run(model, queries, PackedSequences([5, 9], prefixes=[(p, 2)], device=device)) for p in prefixes
        )
        assert torch.equal(kept, copied)
    assert prefixes[0].nbytes == prefixes[1].nbytes > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_int8_prefix_is_within_half_a_step(dtype):
    generator = torch.Generator().manual_seed(3)
    k = torch.randn(1, 2, 33, 8, generator=generator).to(dtype)
    v = 100 * torch.randn(1, 2, 33, 8, generator=generator).to(dtype)
    k[0, 0, 5], v[0, 1, 7] = 0, 0  # a vector of zeros stays one
    k[0, 0, 6, 2] = 3e4
    prefix = Prefix("int8")
    prefix.put(0, k, v)
    for exact, kept in zip((k, v), prefix.fetch(0), strict=True):
        assert kept.dtype == dtype
        step = exact.double().abs().amax(-1, keepdim=True) / 127
        rounding = exact.double().abs() * (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps)
        assert bool(((kept.double() - exact.double()).abs() <= step / 2 * (1 + 1e-5) + rounding).all())
    assert torch.equal(prefix.fetch(0)[0][0, 0, 5], k[0, 0, 5]) and torch.equal(prefix.fetch(0)[1][0, 1, 7], v[0, 1, 7])
    assert prefix.length == 33 and prefix.nbytes == 2 * 2 * 33 * (8 + 4)


def test_a_placement_that_is_none_is_refused():
    with pytest.raises(ValueError, match="placement is 'disk', expected one of device, host, int8"):
        Prefix("disk")


def test_layers_in_host_memory_are_copied_one_ahead(monkeypatch):
    """The order of copies and waits that a GPU would see, with streams that only write down what happens."""
    events = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def record_event(self):
            return f"copy {events[-1][1]}"

        def wait_event(self, event):
            events.append(("wait", event))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: events.append(("keep", stream.name)))
    prefix = Prefix("host")
    for layer in (3, 4, 5):
        prefix.put(layer, torch.full((1, 1, 2, 4), float(layer)), torch.full((1, 1, 2, 4), -float(layer)))
    prefix._device = torch.device("cpu")
    start = prefix._start_copy
    monkeypatch.setattr(prefix, "_start_copy", lambda layer: (events.append(("copy", layer)), start(layer)))
    for layer in (3, 4, 5, 3):
        k, v = prefix.fetch(layer)
        assert k.unique().tolist() == [layer] and v.unique().tolist() == [-layer]
        assert len(prefix._copies) == 1  # with the one handed out, two layers are on the device
    kept = [("keep", "main")] * 2
    assert events == [
        *[("copy", 3), ("copy", 4), ("wait", "copy 3"), *kept],
        *[("copy", 5), ("wait", "copy 4"), *kept],
        *[("copy", 3), ("wait", "copy 5"), *kept],  # for the next forward
        *[("copy", 4), ("wait", "copy 3"), *kept],
    ]
