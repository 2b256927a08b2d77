"""rotary: halves of heads turned by their token's angles, as transformers does it, in one pass."""

import pytest
import torch

from fastft.ops import reference, rotary
from tests.ops.op_checks import DTYPES, assert_as_accurate, supported
from tests.ops.randomised import given, settings, st, strided

# batch, query heads, kv heads, tokens, head size, rotated: around vectors of 8 and 16, part of the head, nothing of it
SHAPES = [
    (1, 9, 3, 30, 64, 64),
    (2, 4, 2, 5, 20, 20),
    (2, 3, 1, 7, 66, 34),
    (1, 2, 2, 1, 5, 2),
    (3, 1, 1, 4, 7, 0),
    (2, 2, 0, 3, 8, 8),
    (1, 2, 1, 0, 8, 8),
]


def tensors(shape, dtype, device="cpu", *, angle_dtype=None, angle_batch=1):
    """q and k as a model has them, a token's heads side by side; cos and sin, whose halves differ."""
    batch, heads, kv_heads, tokens, size, rotated = shape
    q, k = (torch.randn(batch, tokens, n, size, device=device).to(dtype).transpose(1, 2) for n in (heads, kv_heads))
    angles = (torch.randn(angle_batch, tokens, rotated, device=device).to(angle_dtype or dtype) for _ in range(2))
    return q, k, *angles


def with_gradients(function, q, k, cos, sin, dy):
    q, k = (x.detach().requires_grad_() for x in (q, k))
    results = function(q, k, cos, sin)
    return [*(y.detach() for y in results), *torch.autograd.grad(results, (q, k), [d.to(q.dtype) for d in dy])]


# 1. against float64 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(device, capability, dtype, shape):
    if not supported(device, dtype):
        pytest.skip(f"{dtype} is a CPU dtype")
    angle_dtypes = [dtype] if dtype.itemsize > 2 else [dtype, torch.float32]
    for angle_dtype in angle_dtypes:
        x = tensors(shape, dtype, device, angle_dtype=angle_dtype, angle_batch=shape[0])
        dy = [torch.randn_like(t).to(dtype) for t in x[:2]]
        ours = with_gradients(rotary, *x, dy)
        truth = with_gradients(reference.rotary, *(t.double() for t in x), dy)
        plain = with_gradients(lambda *t: [y.to(dtype) for y in reference.rotary(*t)], *x, dy)
        for what, a, b, c in zip(("q", "k", "gradient of q", "gradient of k"), ours, plain, truth, strict=True):
            assert a.dtype == dtype
            assert_as_accurate(a, b, c, what, dtype)


def test_is_what_transformers_computes():
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as partial
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as whole

    for shape, theirs in ((SHAPES[0], whole), (SHAPES[2], partial)):
        x = tensors(shape, torch.float64)
        for ours, other in zip(rotary(*x), theirs(*x), strict=True):
            torch.testing.assert_close(ours, other)


# 2. gradcheck -----------------------------------------------------------------------------------------


def test_gradcheck():
    q, k, cos, sin = tensors((2, 2, 1, 3, 6, 4), torch.float64)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), leaves)
    assert torch.autograd.gradgradcheck(lambda q, k: rotary(q, k, cos, sin), leaves)


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which):
    """One that needs none, and one whose result is not used."""
    x = tensors((2, 4, 2, 3, 8, 8), torch.float32)
    x[which].requires_grad_()
    y = rotary(*x)
    assert y[which].requires_grad and not y[1 - which].requires_grad
    dy = torch.randn_like(y[which])
    expected = torch.autograd.grad(reference.rotary(*x)[which], x[which], dy)
    torch.testing.assert_close(torch.autograd.grad(y[which], x[which], dy), expected)
    x[1 - which].requires_grad_()
    found = torch.autograd.grad(rotary(*x)[which], x[:2], dy, allow_unused=True)
    torch.testing.assert_close(found[which], *expected)
    assert found[1 - which] is None


# 3. opcheck, torch.compile ----------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad, transposed):
    q, k, cos, sin = tensors(SHAPES[2], torch.float32, device)
    for order in (lambda x: x, torch.Tensor.contiguous):
        x = [order(t).detach().requires_grad_(requires_grad) for t in (q, k)]
        torch.library.opcheck(torch.ops.fastft.rotary.default, (*x, cos, sin, transposed))


def test_compiles_without_graph_breaks(device):
    q, k, cos, sin = tensors(SHAPES[1], torch.float32, device)
    q.requires_grad_()

    def function(rotary, q):
        return sum(y.square().sum() for y in rotary(2 * q, k, cos, sin))

    compiled = torch.compile(lambda q: function(rotary, q), fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(q), q)
    torch.testing.assert_close(ours, torch.autograd.grad(function(reference.rotary, q), q)[0])


def test_autocast_changes_nothing(device):
    q, k, cos, sin = tensors(SHAPES[1], torch.bfloat16, device, angle_dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        found = rotary(q, k, cos, sin)
    assert all(torch.equal(a, b) and a.dtype == q.dtype for a, b in zip(found, rotary(q, k, cos, sin), strict=True))


# 4. strides, threads ----------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_shape_and_strides(data):
    batch, heads, kv_heads, tokens, size = (data.draw(st.integers(1, n)) for n in (3, 4, 3, 9, 70))
    rotated = 2 * data.draw(st.integers(0, size // 2))
    dtype = data.draw(st.sampled_from(DTYPES))
    angle_batch = data.draw(st.sampled_from([1, batch]))
    x = tensors((batch, heads, kv_heads, tokens, size, rotated), dtype, angle_batch=angle_batch)
    dy = [torch.randn_like(t) for t in x[:2]]
    plain = with_gradients(rotary, *(t.contiguous() for t in x), [d.contiguous() for d in dy])
    found = with_gradients(rotary, *(strided(data, t) for t in x), [strided(data, d) for d in dy])
    for a, b in zip(found, plain, strict=True):
        assert torch.equal(a, b)


def test_memory_order_is_that_of_the_input():
    """What attention takes, and what the projections' gradients are, needs no copy."""
    q, k, cos, sin = tensors(SHAPES[0], torch.float32)
    for y, x in zip(rotary(q, k, cos, sin), (q, k), strict=True):
        assert y.stride() == x.stride() and y.transpose(1, 2).is_contiguous()
    for y in rotary(q.contiguous(), k.contiguous(), cos, sin):
        assert y.is_contiguous()
    wide = torch.randn(1, 30, 9, 3 * 64).transpose(1, 2).chunk(3, -1)  # GPT-NeoX: q, k and v of a head side by side
    for y in rotary(*wide[:2], cos, sin):
        assert y.transpose(1, 2).is_contiguous()


def test_threads_do_not_matter():
    x = tensors((2, 16, 4, 400, 64, 64), torch.bfloat16)
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(rotary(*x))
    assert all(torch.equal(a, b) for run in found for a, b in zip(run, found[0], strict=True))


# 5. errors, and what is kept --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q is \[2, 3, 4\], expected \[batch, heads, tokens, head_size\]"),
        ({"q": torch.zeros(1, 2, 3, 8, dtype=torch.int64)}, "q is torch.int64, expected one of torch.float64"),
        ({"k": torch.zeros(1, 2, 4, 8)}, r"k is \[1, 2, 4, 8\], expected \[1, kv_heads, 3, 8\] like q"),
        ({"k": torch.zeros(1, 2, 3, 8).double()}, "k is torch.float64, expected torch.float32 like q"),
        ({"cos": torch.zeros(1, 3, 10)}, r"cos is \[1, 3, 10\], expected \[1 or 1, 3, rotated\], rotated even"),
        ({"sin": torch.zeros(1, 3, 5)}, "sin is .*, rotated even"),
        ({"sin": torch.zeros(1, 3, 6)}, "sin is torch.float32 .*, expected torch.float32 and 8 columns like cos"),
        ({"sin": torch.zeros(1, 3, 8).half()}, "sin is torch.float16, expected torch.float32 like q"),
        ({"cos": torch.zeros(1, 3, 8, requires_grad=True)}, "cos requires grad, expected constants"),
        ({"cos": torch.zeros(1, 3, 8, device="meta")}, "cos is on meta, expected cpu like q"),
        ({"k": None}, "k is NoneType, expected a tensor"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(changes, message):
    q, k, cos, sin = tensors((1, 2, 2, 3, 8, 8), torch.float32)
    with pytest.raises(ValueError, match=f"rotary: {message}"):
        rotary(**{"q": q, "k": k, "cos": cos, "sin": sin, **changes})
    with pytest.raises(RuntimeError, match="rotary: cos must be"):
        torch.ops.fastft.rotary(q, k, cos[..., :5], sin, False)


def test_cos_and_sin_alone_are_kept():
    q, k, cos, sin = tensors(SHAPES[0], torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        rotary(q.requires_grad_(), k, cos, sin)
    assert kept == [cos.data_ptr(), sin.data_ptr()]
