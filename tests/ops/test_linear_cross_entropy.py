"""linear_cross_entropy: the five tests of every op, then what is particular to it."""

import pytest
import torch
import torch.nn.functional as F
from op_checks import DTYPES, compare, name, run, supported

from fastft.ops import linear_cross_entropy, raise_deferred_errors, reference
from tests.ops.randomised import VOCABS, assert_strides_do_not_matter, given, settings, st


def inputs(rows, hidden, vocab, dtype, device="cpu"):
    labels = torch.randint(0, vocab, (rows,))
    labels[1::4] = -100
    return {
        "hidden": torch.randn(rows, hidden).to(dtype).to(device),
        "weight": (torch.randn(vocab, hidden) * 0.3).to(dtype).to(device),
        "labels": labels.to(device),
    }


def check(tensors, dtype, grad_of=("hidden", "weight"), **options):
    compare(linear_cross_entropy, reference.linear_cross_entropy, tensors, grad_of, dtype, terms=1.0, **options)


# 1. Against float64 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_float64(device, dtype, reduction):
    if not supported(device, dtype):
        pytest.skip(f"{name(dtype)} is a CPU dtype")
    for chunk_rows in (None, 7):
        check(inputs(19, 32, 251, dtype, device), dtype, reduction=reduction, chunk_rows=chunk_rows)


def test_every_capability(capability):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(inputs(9, 32, 251, dtype), dtype, chunk_rows=4)


# 2. gradcheck -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    t = inputs(5, 4, 7, torch.float64)
    torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, t["labels"], reduction=reduction, chunk_rows=2),
        (t["hidden"].requires_grad_(), t["weight"].requires_grad_()),
    )


# 3. opcheck -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(device, requires_grad, reduction):
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    t = inputs(5, 4, 7, dtype, device)
    hidden, weight = (t[k].requires_grad_(requires_grad) for k in ("hidden", "weight"))
    args = (hidden, weight, t["labels"], None, -100, reduction, 2, requires_grad, requires_grad)
    torch.library.opcheck(torch.ops.fastft.linear_cross_entropy.default, args)


def test_row_op_schema(device):
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    nll = torch.empty(3, dtype=dtype, device=device)
    logits = torch.randn(3, 9, dtype=dtype, device=device)
    labels = torch.tensor([0, -100, 8], device=device)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fastft.cross_entropy_rows.default, (logits, labels, nll, -100, True), test_utils=utils
    )


# 4. Hard shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 63, 64, 65, 127])
def test_sizes(device, rows, vocab):
    for reduction in ("mean", "none"):
        check(inputs(rows, 8, vocab, torch.float32, device), torch.float32, reduction=reduction, chunk_rows=2)


def test_leading_dimensions_strides_and_int32(device):
    t = inputs(12, 32, 65, torch.float32, device)
    t["hidden"] = t["hidden"].reshape(3, 4, 32).transpose(0, 1)
    t["labels"] = t["labels"].int().reshape(3, 4).t()
    check(t, torch.float32, reduction="none")


def test_large_vocabulary(device):
    """No multiple of anything; on a GPU rows that a cluster of blocks shares."""
    for dtype in (torch.float32, torch.bfloat16):
        check(inputs(3, 16, 200_003, dtype, device), dtype)


def test_label_out_of_range_on_cuda_is_nan(device):
    """And the error is raised later; tests/ops/test_index_check.py."""
    if device.type == "cpu":
        pytest.skip("a ValueError on the CPU")
    t = inputs(4, 8, 9, torch.float32, device)
    t["labels"] = torch.tensor([0, 9, -1, 8], device=device)
    value, grads = run(lambda **t: linear_cross_entropy(**t, reduction="none"), t, ["hidden"])
    assert value.isnan().tolist() == [False, True, True, False]
    assert grads["hidden"].isnan().all(-1).tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="linear_cross_entropy: labels contains"):
        raise_deferred_errors()


def test_all_labels_ignored(device):
    t = inputs(5, 8, 33, torch.float32, device)
    t["labels"] = torch.full_like(t["labels"], 7)
    for reduction in ("mean", "sum", "none"):
        value, grads = run(
            lambda reduction=reduction, **t: linear_cross_entropy(**t, ignore_index=7, reduction=reduction),
            t,
            ["hidden", "weight"],
        )
        assert (value == 0).all()
        assert all((g == 0).all() for g in grads.values())


def test_ignored_rows_are_not_read(device):
    t = inputs(5, 8, 33, torch.float32, device)
    t["hidden"][1] = torch.nan
    value, grads = run(linear_cross_entropy, t, ["hidden"])
    assert value.isfinite()
    assert grads["hidden"][[0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("scale", [1e4, 1e-3])
def test_scale_of_logits(device, scale):
    for dtype in (torch.float32, torch.bfloat16):
        t = inputs(5, 8, 33, dtype, device)
        t["weight"] = t["weight"] * scale
        compare(
            linear_cross_entropy,
            reference.linear_cross_entropy,
            t,
            ["hidden"],
            dtype,
            terms=max(1.0, scale),
            chunk_rows=2,
        )


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 90),
    chunk_rows=st.one_of(st.none(), st.integers(1, 12)),
    reduction=st.sampled_from(["mean", "sum", "none"]),
)
def test_any_shape(rows, vocab, chunk_rows, reduction):
    t = inputs(rows, 6, vocab, torch.float64)
    ours, grads = run(
        lambda **t: linear_cross_entropy(**t, chunk_rows=chunk_rows, reduction=reduction), t, ["hidden", "weight"]
    )
    truth, true_grads = run(
        lambda **t: reference.linear_cross_entropy(**t, reduction=reduction), t, ["hidden", "weight"]
    )
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(grads, true_grads)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), reduction=st.sampled_from(["mean", "none"]))
def test_any_strides(data, reduction):
    t = inputs(6, 5, 11, torch.float64)
    t |= {"hidden": t["hidden"].view(2, 3, 5), "labels": t["labels"].view(2, 3)}
    assert_strides_do_not_matter(
        data, lambda **t: linear_cross_entropy(**t, reduction=reduction, chunk_rows=4), t, ["hidden", "weight"]
    )


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 3), vocab=VOCABS, dtype=st.sampled_from(DTYPES))
def test_any_vocabulary(rows, vocab, dtype):
    check(inputs(rows, 6, vocab, dtype), dtype)


# 5. Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2).long()}, r"labels is \[2\], expected \[3\] like the rows of hidden"),
        ({"labels": torch.zeros(3)}, "labels is torch.float32, expected int32 or int64"),
        ({"labels": torch.tensor([0, 7, 1])}, "labels contains 7 in row 1, expected 0 <= id < 7 or ignore_index=-100"),
        ({"labels": torch.tensor([0, -1, 1])}, "labels contains -1 in row 1, expected 0 <= id < 7 or"),
        ({"weight": torch.zeros(7, 5)}, r"weight is \[7, 5\], expected \[vocab, 4\]"),
        ({"hidden": torch.zeros(3, 4).long()}, "hidden is torch.int64, expected one of"),
        ({"weight": torch.zeros(7, 4).double()}, "weight is torch.float64, expected torch.float32 like hidden"),
        ({"chunk_rows": 0}, "chunk_rows is 0"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'"),
    ],
)
def test_errors(change, message):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "labels": torch.tensor([0, 1, 2]),
        **change,
    }
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**arguments)


# And ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch(device, reduction):
    t = inputs(9, 32, 251, torch.float32, device)
    truth = F.cross_entropy(t["hidden"] @ t["weight"].t(), t["labels"], reduction=reduction)
    torch.testing.assert_close(linear_cross_entropy(**t, reduction=reduction), truth)


def test_deterministic(device):
    torch.set_num_threads(2)
    t = inputs(67, 64, 5003, torch.bfloat16, device)
    first, second = (run(linear_cross_entropy, t, ["hidden", "weight"]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])


def test_not_twice_differentiable():
    t = inputs(3, 4, 9, torch.float64)
    t["hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="linear_cross_entropy is not twice differentiable"):
        torch.autograd.grad(linear_cross_entropy(**t), t["hidden"], create_graph=True)


def test_compiles(device):
    t = inputs(5, 8, 33, torch.float32, device)
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    ours, grads = run(compiled, t, ["hidden", "weight"])
    eager, eager_grads = run(linear_cross_entropy, t, ["hidden", "weight"])
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(grads, eager_grads)


def test_autocast_leaves_the_dtype_alone(device):
    t = inputs(5, 8, 33, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        inside = linear_cross_entropy(**t)
    assert torch.equal(inside, linear_cross_entropy(**t))
