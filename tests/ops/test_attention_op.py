"""attention: values and gradients against float64, schema and shapes, hard shapes, what it refuses."""

from itertools import accumulate

import pytest
import torch
from op_checks import DTYPES, accumulate_dtype, assert_as_accurate, name, to_float64

from fastft.ops import attention, reference
from tests.ops.randomised import given, settings, st, strided

LENGTHS = [5, 1, 130, 64, 2]


def offsets(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def inputs(heads, kv_heads, size, prefix, dtype, lengths=LENGTHS, key_lengths=None):
    """A sharp softmax (scores of several units), so that a key too many or too few shows."""

    def randn(tokens, count):
        return (2 * torch.randn(tokens, count, size)).to(dtype)

    keys = lengths if key_lengths is None else key_lengths
    tensors = {
        "q": randn(sum(lengths), heads),
        "k": randn(sum(keys), kv_heads),
        "v": randn(sum(keys), kv_heads),
        "cu_seqlens_q": offsets(lengths),
        "cu_seqlens_k": offsets(keys),
    }
    if prefix:
        tensors |= {"prefix_k": randn(prefix, kv_heads), "prefix_v": randn(prefix, kv_heads)}
    return tensors


def check(tensors, dtype, terms=16.0, **options):
    options = {"scale": tensors["q"].shape[2] ** -0.5} | options
    ours = attention(**tensors, **options)
    plain = reference.attention(**tensors, **options)
    truth = reference.attention(**to_float64(tensors), **options)
    for x, y, z, what in zip(ours, plain, truth, ("out", "lse"), strict=True):
        of = dtype if what == "out" else accumulate_dtype(dtype)
        assert x.dtype == of
        # Sums of up to some hundred products of size 1, in another order than theirs.
        assert_as_accurate(x, y, z, what, of, terms=terms)


def check_gradients(tensors, dtype, **options):
    options = {"scale": tensors["q"].shape[2] ** -0.5} | options
    seed = torch.randn(tensors["q"].shape, dtype=torch.float64).to(dtype)
    names = ("q", "k", "v")
    found = []
    for function, inputs in (
        (attention, tensors),
        (reference.attention, tensors),
        (reference.attention, to_float64(tensors)),
    ):
        leaves = inputs | {n: inputs[n].detach().requires_grad_() for n in names}
        out, _ = function(**leaves, **options)
        found.append(torch.autograd.grad(out, [leaves[n] for n in names], seed.to(out.dtype)))
    for n, x, y, z in zip(names, *found, strict=True):
        assert x.dtype == dtype
        # A probability is as wrong as its score, which is tens of units; it multiplies sums of size 10. In float64
        # the truth is as wrong as ours.
        assert_as_accurate(x, y, z, f"gradient of {n}", dtype, terms=1024.0 if dtype == torch.float64 else 256.0)


# 1. Against float64 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 128, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (9, 3, 64), (2, 1, 80), (3, 3, 7), (2, 2, 256)])
def test_against_float64(dtype, is_causal, prefix, heads, kv_heads, size):
    check(inputs(heads, kv_heads, size, prefix, dtype), dtype, is_causal=is_causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (9, 3, 64), (2, 1, 80), (3, 3, 7), (2, 2, 256)])
@pytest.mark.parametrize("more_keys", [0, 3])
def test_gradients_against_float64(dtype, is_causal, heads, kv_heads, size, more_keys):
    keys = [n + more_keys for n in LENGTHS]
    check_gradients(inputs(heads, kv_heads, size, 0, dtype, key_lengths=keys), dtype, is_causal=is_causal)


def test_every_capability(capability):
    for dtype in DTYPES:
        for heads, size in ((6, 64), (2, 33)):
            check(inputs(heads, 2, size, 150, dtype), dtype)
            check_gradients(inputs(heads, 2, size, 0, dtype), dtype)


def test_gradcheck():
    tensors = inputs(4, 2, 6, 0, torch.float64, [3, 5], [4, 5])
    leaves = [tensors[n].requires_grad_() for n in ("q", "k", "v")]

    def function(q, k, v):
        return attention(**tensors | {"q": q, "k": k, "v": v}, scale=0.4)[0]

    assert torch.autograd.gradcheck(function, leaves)


def test_the_softmax_of_transformers_models():
    """A pack of one sequence is what torch's own attention computes."""
    q, k, v = (torch.randn(200, heads, 64, dtype=torch.float64) for heads in (6, 2, 2))
    out, _ = attention(q, k, v, offsets([200]), scale=0.125)
    by_head = (x.transpose(0, 1)[None] for x in (q, k, v))
    truth = torch.nn.functional.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, truth[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


# 2. opcheck -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 9])
def test_opcheck(prefix):
    tensors = inputs(4, 2, 16, prefix, torch.bfloat16)
    args = [
        tensors.get(n) for n in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "prefix_k", "prefix_v")
    ]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastft.attention.default, (*args, 0.25, True), test_utils=tests)
    if not prefix:
        for x in args[:3]:
            x.requires_grad_()
        torch.library.opcheck(torch.ops.fastft.attention.default, (*args, 0.25, True))
        out, lse = attention(**tensors, scale=0.25)
        args = [x.detach() for x in (torch.ones_like(out), *args[:3], out, lse, *args[3:5])]
        torch.library.opcheck(torch.ops.fastft.attention_backward.default, (*args, 0.25, True), test_utils=tests)


def test_compiles_without_graph_breaks():
    tensors = inputs(4, 2, 16, 9, torch.float32)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(tensors):
        return attention(**tensors, scale=0.25)[0] * 2

    torch.testing.assert_close(compiled(tensors), attention(**tensors, scale=0.25)[0] * 2)


def test_compiles_with_its_gradient():
    tensors = inputs(4, 2, 16, 0, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q):
        return (attention(**tensors | {"q": q}, scale=0.25)[0] ** 2).sum()

    q = tensors["q"].requires_grad_()
    (found,) = torch.autograd.grad(compiled(q), q)
    (expected,) = torch.autograd.grad((attention(**tensors, scale=0.25)[0] ** 2).sum(), q)
    torch.testing.assert_close(found, expected)


# 3. Hard shapes and values ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sizes_and_strides(data):
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    size, prefix = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 140))
    lengths = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=4))
    keys = [n + data.draw(st.integers(0, 20)) for n in lengths]
    tensors = inputs(group * kv_heads, kv_heads, size, prefix, torch.float64, lengths, keys)
    for x in ("q", "k", "v", "prefix_k", "prefix_v"):
        if x in tensors:  # the last dimension stays contiguous
            tensors[x] = strided(data, tensors[x].permute(2, 0, 1)).permute(1, 2, 0)
            if tensors[x].stride(2) != 1:
                tensors[x] = tensors[x].contiguous()
    if data.draw(st.booleans(), label="room to grow"):
        used = [data.draw(st.integers(n, m)) for n, m in zip(lengths, keys, strict=True)]
        tensors["seqused_k"] = torch.tensor(used, dtype=torch.int32)
    check(tensors, torch.float64, is_causal=data.draw(st.booleans()))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_gradients_of_any_sizes_and_strides(data):
    kv_heads, group, size = (data.draw(st.integers(1, n)) for n in (3, 5, 70))
    lengths = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=4))
    keys = [n + data.draw(st.integers(0, 20)) for n in lengths]
    tensors = inputs(group * kv_heads, kv_heads, size, 0, torch.float64, lengths, keys)
    for x in ("q", "k", "v"):
        tensors[x] = strided(data, tensors[x].permute(2, 0, 1)).permute(1, 2, 0)
        if tensors[x].stride(2) != 1:
            tensors[x] = tensors[x].contiguous()
    check_gradients(tensors, torch.float64, is_causal=data.draw(st.booleans()))


def test_gradients_in_several_rounds_of_heads():
    check_gradients(inputs(3, 3, 256, 0, torch.float32, [3], [20_000]), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_decode_step(dtype):
    """One new token each, behind a prefix and a cache that is not full; what lies beyond must not be read."""
    sequences, capacity = 50, 12
    tensors = inputs(9, 3, 64, 140, dtype, [1] * sequences, [capacity] * sequences)
    used = torch.randint(1, capacity + 1, (sequences,), dtype=torch.int32)
    beyond = torch.arange(capacity) >= used[:, None]
    for x in ("k", "v"):
        tensors[x].view(sequences, capacity, 3, 64)[beyond] = torch.nan
    check(tensors | {"seqused_k": used}, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_long_keys_in_several_rounds_of_heads(dtype):
    """Packed keys and values are held for as many heads as 64 MiB take; here for one of three."""
    tensors = inputs(3, 3, 256, 33_000, dtype, [3])
    check(tensors, dtype)


def test_large_scores():
    """Scores of +-10,000 neither overflow nor lose the row; they are as wrong as numbers of their size."""
    tensors = inputs(2, 2, 16, 20, torch.float64)
    tensors["q"] *= 100
    tensors["k"] *= 25
    largest = reference.attention(**tensors, scale=0.25)[1].abs().max().item()
    assert largest > 1e4
    for dtype in (torch.float64, torch.float32):
        rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
        check(rounded, dtype, terms=16 * largest)


def test_nan_stays_in_its_row_and_a_query_without_keys_gives_zero():
    tensors = inputs(2, 2, 16, 0, torch.float32, [4, 3], [4, 0])
    tensors["q"][1, 0] = torch.nan
    out, lse = attention(**tensors, scale=0.25)
    assert out[1, 0].isnan().all() and lse[0, 1].isnan()
    assert out[4:].eq(0).all() and lse[:, 4:].isneginf().all()
    assert out[[0, 2, 3]].isfinite().all() and out[1, 1].isfinite().all()


def test_no_tokens_and_no_sequences():
    for lengths in ([], [0, 0]):
        out, lse = attention(**inputs(4, 2, 8, 5, torch.float32, lengths), scale=1.0)
        assert out.shape == (0, 4, 8) and lse.shape == (4, 0)


def test_threads_do_not_change_results():
    tensors = inputs(9, 3, 64, 300, torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attention(**tensors, scale=0.125))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])

    tensors = inputs(9, 3, 64, 0, torch.bfloat16)
    leaves = [tensors[n].requires_grad_() for n in ("q", "k", "v")]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.autograd.grad(attention(**tensors, scale=0.125)[0].float().square().sum(), leaves))
    for gradients in results[1:]:
        assert all(map(torch.equal, gradients, results[0]))


# 4. Refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(202, 4)}, r"q is \[202, 4\], expected \[tokens, heads, head_size <= 256\]"),
        ({"q": torch.zeros(202, 4, 16, dtype=torch.int64)}, "q is torch.int64"),
        ({"k": torch.zeros(202, 2, 16).double()}, "k is torch.float64, expected torch.float32 like q"),
        ({"k": torch.zeros(202, 3, 16), "v": torch.zeros(202, 3, 16)}, "q has 4 heads, expected a multiple of k's 3"),
        ({"v": torch.zeros(201, 2, 16)}, r"v is \[201, 2, 16\], expected \[202, 2, 16\] like k"),
        ({"v": torch.zeros(202, 16, 2).transpose(1, 2)}, "v has strides .*, expected the last dimension contiguous"),
        ({"prefix_v": None}, "prefix_k and prefix_v must both be given"),
        ({"prefix_v": torch.zeros(8, 2, 16)}, r"prefix_v is \[8, 2, 16\], expected \[9, 2, 16\] like prefix_k"),
        ({"prefix_k": torch.zeros(9, 1, 16), "prefix_v": torch.zeros(9, 1, 16)}, "prefix_k has 1 heads, expected 2"),
        ({"cu_seqlens_q": offsets(LENGTHS).long()}, "cu_seqlens_q is torch.int64 .*, expected contiguous int32"),
        ({"cu_seqlens_k": offsets([202])}, r"cu_seqlens_k is \[2\], expected \[6\] like cu_seqlens_q"),
        ({"seqused_k": torch.ones(4).int()}, r"seqused_k is torch.int32 \[4\], expected int32 \[sequences\], \[5\]"),
        ({"scale": 0.0}, "scale is 0.0, expected a positive number"),
    ],
)
def test_refusals_name_the_argument(change, message):
    tensors = inputs(4, 2, 16, 9, torch.float32) | {"scale": 0.25}
    with pytest.raises(ValueError, match=f"attention: {message}"):
        attention(**tensors | change)


def test_offsets_that_do_not_fit_are_refused():
    tensors = inputs(4, 2, 16, 9, torch.float32)
    for wrong in (offsets([5, 1, 130, 64, 3]), offsets([5, 1, 130, 64, 1]), torch.tensor([0, 9, 3, 10, 20, 202]).int()):
        with pytest.raises(RuntimeError, match="cu_seqlens_q must rise from 0 to q's tokens"):
            attention(**tensors | {"cu_seqlens_q": wrong}, scale=0.25)


def test_the_compiled_backward_checks_what_it_is_called_with():
    """By hand: autograd calls it with what the forward has checked."""
    tensors = inputs(4, 2, 16, 0, torch.float32)
    out, lse = attention(**tensors, scale=0.25)
    given = {"grad": out, **{n: tensors[n] for n in ("q", "k", "v")}, "out": out, "lse": lse}
    ends = tensors["cu_seqlens_q"]
    given |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "scale": 0.25, "is_causal": True}
    backward = torch.ops.fastft.attention_backward.default
    assert len(backward(*given.values())) == 3
    for change, message in (
        ({"v": given["v"][1:]}, "v must have as many tokens as k"),
        ({"cu_seqlens_k": offsets([5, 1])}, "cu_seqlens_k must rise from 0"),
        ({"grad": out[1:]}, "grad and out must have q's tokens"),
        ({"lse": lse.double()}, "lse must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*(given | change).values())


def test_more_keys_in_use_than_there_are_is_refused():
    tensors = inputs(4, 2, 16, 9, torch.float32, [3, 2])
    for wrong in ([3, 3], [-1, 2]):
        with pytest.raises(RuntimeError, match="seqused_k must be between 0 and the keys"):
            attention(**tensors | {"seqused_k": torch.tensor(wrong).int()}, scale=0.25)


def test_a_gradient_with_a_prefix_is_refused():
    tensors = inputs(4, 2, 16, 9, torch.float32)
    tensors["k"].requires_grad_()
    with pytest.raises(RuntimeError, match="has no gradient with prefix_k or seqused_k"):
        attention(**tensors, scale=0.25)
    with torch.no_grad():
        attention(**tensors, scale=0.25)


def test_a_second_derivative_is_refused():
    tensors = inputs(4, 2, 16, 0, torch.float32)
    q = tensors["q"].requires_grad_()
    out, _ = attention(**tensors, scale=0.25)
    with pytest.raises(RuntimeError, match="attention is not twice differentiable"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
