"""linear_topk_kl: the five tests of every op, then what is particular to it."""

import itertools

import pytest
import torch
from op_checks import DTYPES, compare, name, run, supported, to_float64

from fastft.ops import linear_log_softmax_kl, linear_topk_kl, raise_deferred_errors, reference
from tests.ops.randomised import VOCABS, assert_strides_do_not_matter, given, settings, st

DIRECTIONS = ["forward", "reverse", "jsd"]


def inputs(rows, hidden, vocab, k, dtype, device="cpu"):
    def randn(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype).to(device)

    student, weight = randn(rows, hidden), randn(vocab, hidden, scale=0.3)
    teacher = torch.log_softmax(torch.randn(rows, vocab, dtype=torch.float64) * 2, -1)
    log_probs, ids = teacher.topk(k, -1)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "student_hidden": student,
        "weight": weight,
        "topk_ids": ids.to(device),
        "topk_log_probs": log_probs.to(accumulate).to(device),
    }


def check(tensors, dtype, grad_of=("student_hidden", "weight"), terms=1.0, **options):
    compare(linear_topk_kl, reference.linear_topk_kl, tensors, grad_of, dtype, terms, **options)


# 1. Against float64 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_float64(device, dtype, tail, direction, reduction):
    if not supported(device, dtype):
        pytest.skip(f"{name(dtype)} is a CPU dtype")
    weights = torch.rand(19, device=device)
    weights[5] = 0
    for options in ({}, {"temperature": 2.5, "beta": 0.2, "weights": weights, "chunk_rows": 7}):
        options |= {"tail": tail, "direction": direction, "reduction": reduction}
        check(inputs(19, 32, 251, 10, dtype, device), dtype, **options)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_capability(capability, direction):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for tail in (True, False):
            check(inputs(9, 32, 251, 10, dtype), dtype, tail=tail, direction=direction, chunk_rows=4)


# 2. gradcheck -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(tail, direction, reduction):
    t = inputs(3, 4, 9, 3, torch.float64)
    weights = torch.tensor([0.5, 0.0, 2.0])
    torch.autograd.gradcheck(
        lambda h, w: linear_topk_kl(
            h,
            w,
            t["topk_ids"],
            t["topk_log_probs"],
            tail=tail,
            temperature=1.7,
            direction=direction,
            beta=0.3,
            weights=weights,
            reduction=reduction,
            chunk_rows=2,
        ),
        (t["student_hidden"].requires_grad_(), t["weight"].requires_grad_()),
    )


# 3. opcheck -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(device, requires_grad, reduction):
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    t = inputs(3, 4, 9, 3, dtype, device)
    student, weight = (t[k].requires_grad_(requires_grad) for k in ("student_hidden", "weight"))
    args = (student, weight, t["topk_ids"], t["topk_log_probs"], None, True, 1.5, "jsd", 0.3, reduction, 2)
    torch.library.opcheck(torch.ops.fastft.linear_topk_kl.default, (*args, requires_grad, requires_grad))


def test_row_op_schema(device):
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    t = inputs(3, 4, 9, 3, dtype, device)
    kl = torch.empty(3, dtype=dtype, device=device)
    logits = torch.randn(3, 9, dtype=dtype, device=device)
    args = (logits, t["topk_ids"], t["topk_log_probs"], None, kl, True, 1.5, "reverse", 0.5, True)
    torch.library.opcheck(torch.ops.fastft.topk_kl_rows.default, args, test_utils=("test_schema", "test_faketensor"))


# 4. Hard shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 63, 64, 65, 127])
def test_sizes(device, rows, vocab, direction):
    for k in {1, min(5, vocab), vocab}:
        for tail in (True, False):
            t = inputs(rows, 8, vocab, k, torch.float32, device)
            check(t, torch.float32, tail=tail, direction=direction, chunk_rows=2)


def test_leading_dimensions_strides_and_int32(device):
    t = inputs(12, 32, 65, 6, torch.float32, device)
    t["topk_ids"] = t["topk_ids"].int()
    wide = {k: t[k].reshape(3, 4, -1).transpose(0, 1) for k in ("student_hidden", "topk_ids", "topk_log_probs")}
    check({**t, **wide}, torch.float32, reduction="none", weights=torch.rand(3, 4, device=device).t())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_few_tokens_of_a_large_head(device, dtype, direction):
    """Without the tail only the listed rows of the head are used, unless the head needs a gradient."""
    if not supported(device, dtype):
        pytest.skip(f"{name(dtype)} is a CPU dtype")
    t = inputs(7, 32, 2003, 5, dtype, device)
    weights = torch.rand(7, device=device)
    weights[3] = 0
    for options in ({}, {"temperature": 2.5, "beta": 0.2, "weights": weights, "chunk_rows": 3, "reduction": "none"}):
        for grad_of in (("student_hidden",), ("student_hidden", "weight"), ()):
            check(t, dtype, grad_of=grad_of, tail=False, direction=direction, **options)
    check({**t, **{k: t[k][:0] for k in t if k != "weight"}}, dtype, grad_of=("student_hidden",), tail=False)


def test_few_tokens_gather_no_logits_beyond_theirs(device):
    t = inputs(3, 8, 2003, 5, torch.float32, device)
    others = torch.ones(2003, dtype=torch.bool, device=device)
    others[t["topk_ids"].flatten()] = False
    t["weight"][others] = torch.nan
    value, grads = run(lambda **t: linear_topk_kl(**t, tail=False), t, ["student_hidden"])
    assert value.isfinite()
    assert grads["student_hidden"].isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", [1e-9, 1e-4])
def test_tiny_tail_keeps_its_digits(device, scale, direction):
    """A tail of 1e-9 in the student would be 0 as one minus the rest."""
    hidden = torch.eye(1, 4, device=device)
    weight = torch.zeros(50, 4, device=device)
    weight[0, 0] = -torch.tensor(scale).log()
    ids, log_probs = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.tensor([[-0.1]], device=device)
    ours = linear_topk_kl(hidden, weight, ids, log_probs, direction=direction)
    truth = reference.linear_topk_kl(hidden.double(), weight.double(), ids, log_probs.double(), direction=direction)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("scale", [1e4, 1e-3])
def test_scale_of_logits(device, tail, scale, direction):
    for dtype in (torch.float32, torch.bfloat16):
        t = inputs(5, 8, 33, 4, dtype, device)
        t["weight"] = t["weight"] * scale
        options = {"tail": tail, "direction": direction}
        check(t, dtype, grad_of=("student_hidden",), terms=max(1.0, scale), **options)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [1, 300])
def test_large_vocabulary(device, k, direction):
    """No multiple of anything; on a GPU rows that a cluster of blocks shares, with listed tokens in every part."""
    for dtype in (torch.float32, torch.bfloat16):
        check(inputs(3, 16, 200_003, k, dtype, device), dtype, direction=direction)


@pytest.mark.parametrize("vocab", [9, 2003])
def test_id_out_of_range_on_cuda_is_nan(device, vocab):
    """And the error is raised later; tests/ops/test_index_check.py."""
    if device.type == "cpu":
        pytest.skip("a ValueError on the CPU")
    t = inputs(4, 8, vocab, 3, torch.float32, device)
    t["topk_ids"][1, 0], t["topk_ids"][2, 2] = vocab, -1
    for tail, direction in itertools.product((True, False), DIRECTIONS):
        options = {"tail": tail, "direction": direction, "reduction": "none"}
        value, grads = run(lambda **t: linear_topk_kl(**t), {**t, **options}, ["student_hidden"])
        assert value.isnan().tolist() == [False, True, True, False]
        assert grads["student_hidden"].isnan().all(-1).tolist() == [False, True, True, False]
        with pytest.raises(ValueError, match="linear_topk_kl: topk_ids contains"):
            raise_deferred_errors()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_teacher_mass_above_one(device, direction):
    """16-bit log-probabilities may sum to more than 1: then there is no tail, and the k are renormalised."""
    t = inputs(3, 8, 33, 4, torch.float32, device)
    t["topk_log_probs"] = torch.full((3, 4), -1.3, device=device)
    check(t, torch.float32, direction=direction)


@pytest.mark.parametrize("left", [-1e-7, 0.0, 1e-9])
def test_reverse_kl_of_a_certain_teacher_is_finite(device, left):
    """Its float32 log-probabilities leave the tail nothing, or less than they can tell from nothing: 2^-24."""
    t = {
        "student_hidden": torch.ones(1, 1, device=device),
        "weight": torch.randn(9, 1, device=device),
        "topk_ids": torch.tensor([[4]], device=device),
        "topk_log_probs": torch.tensor([[-left]], device=device),
    }
    check(t, torch.float32, direction="reverse")
    p = torch.softmax(t["weight"][:, 0].double(), 0)[4]
    expected = p * p.log() + (1 - p) * ((1 - p) / 2**-24).log()
    torch.testing.assert_close(linear_topk_kl(**t, direction="reverse").double(), expected)


@pytest.mark.parametrize("direction", ["forward", "jsd"])
def test_teacher_without_some_token(device, direction):
    t = inputs(3, 8, 33, 4, torch.float32, device)
    t["topk_log_probs"][:, 3] = -torch.inf
    check(t, torch.float32, direction=direction)


@pytest.mark.parametrize("tail", [True, False])
def test_infinite_divergence(device, tail):
    """Where the first distribution of a KL is positive and the second 0; jsd has none."""
    t = inputs(2, 8, 33, 4, torch.float32, device)
    t["topk_log_probs"][0, 3] = -torch.inf
    assert linear_topk_kl(**t, tail=tail, direction="reverse", reduction="none").isinf().tolist() == [True, False]
    t = {
        "student_hidden": torch.ones(1, 1, device=device),
        "weight": torch.randn(33, 1, device=device),
        "topk_ids": t["topk_ids"][1:],
        "topk_log_probs": t["topk_log_probs"][1:],
    }
    t["weight"][t["topk_ids"][0, 1]] = -torch.inf
    assert linear_topk_kl(**t, tail=tail) == torch.inf
    assert linear_topk_kl(**t, tail=tail, direction="jsd").isfinite()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_student_logits_of_minus_infinity(device, capability, direction, tail):
    """In the tail, of a listed token where the divergence stays finite, and of the whole tail."""
    for dtype in (torch.float32, torch.bfloat16):
        t = inputs(1, 1, 33, 4, dtype, device)
        t["student_hidden"] = torch.ones_like(t["student_hidden"])  # so that the logits are the head's column
        listed = t["topk_ids"][0]
        others = [i for i in range(33) if i not in listed]
        t["weight"][others[:20]] = -torch.inf
        check(t, dtype, grad_of=("weight",), tail=tail, direction=direction)
        if direction == "forward":
            continue
        t["weight"][listed[2]] = -torch.inf
        check(t, dtype, grad_of=("weight",), tail=tail, direction=direction)
        t["weight"][others] = -torch.inf
        value, grads = run(lambda **t: linear_topk_kl(**t, tail=tail, direction=direction), t, ["weight"])
        truth, true_grads = run(
            lambda **t: reference.linear_topk_kl(**t, tail=tail, direction=direction), to_float64(t), ["weight"]
        )
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
        # log-sum-exp of an empty tail has no gradient in PyTorch
        torch.testing.assert_close(grads["weight"][listed].double(), true_grads["weight"][listed], rtol=8e-3, atol=1e-6)
        assert (grads["weight"][others] == 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gap", [80.0, 95.0, 700.0, 720.0, 740.0, 800.0, 1e4])
def test_tokens_that_one_side_all_but_excludes(device, capability, direction, gap):
    """Probabilities from normal numbers over subnormal ones to 0, in float32 and in float64."""
    for dtype in (torch.float32, torch.float64):
        if not supported(device, dtype):
            continue
        column = torch.tensor([0.0, -gap, -1.0, -gap, -2.0], dtype=dtype, device=device)[:, None]
        t = {
            "student_hidden": torch.ones(1, 1, dtype=dtype, device=device),
            "weight": column,
            "topk_ids": torch.tensor([[0, 1, 2]], device=device),
            "topk_log_probs": torch.tensor([[-gap, -0.5, -2.0]], dtype=dtype, device=device),
        }
        for tail in (True, False):
            check(t, dtype, grad_of=("weight",), terms=gap, direction=direction, tail=tail)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_weights_zero_and_garbage(device, direction):
    """Padding rows carry weight 0 and need no valid teacher."""
    t = inputs(5, 8, 33, 4, torch.float32, device)
    t["topk_ids"][1] = 0
    t["topk_log_probs"][1] = torch.nan
    weights = torch.ones(5, device=device)
    weights[1] = 0
    value, grads = run(
        lambda **t: linear_topk_kl(**t, direction=direction, weights=weights), t, ["student_hidden", "weight"]
    )
    assert value.isfinite()
    assert all(g.isfinite().all() for g in grads.values())
    assert linear_topk_kl(**t, direction=direction, weights=torch.zeros(5, device=device)) == 0


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    vocab=st.integers(1, 90),
    tail=st.booleans(),
    temperature=st.floats(0.5, 4.0),
    direction=st.sampled_from(DIRECTIONS),
    beta=st.floats(0.01, 0.99),
)
def test_any_shape(data, vocab, tail, temperature, direction, beta):
    k = data.draw(st.integers(1, vocab))
    rows = data.draw(st.integers(0, 6))
    t = inputs(rows, 6, vocab, k, torch.float64)
    options = {
        "tail": tail, "temperature": temperature, "direction": direction, "beta": beta, "reduction": "none"
    }  # fmt: skip
    chunk_rows = data.draw(st.one_of(st.none(), st.integers(1, 8)))
    ours, grads = run(
        lambda **t: linear_topk_kl(**t, chunk_rows=chunk_rows, **options), t, ["student_hidden", "weight"]
    )
    truth, true_grads = run(lambda **t: reference.linear_topk_kl(**t, **options), t, ["student_hidden", "weight"])
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(grads, true_grads)


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    reduction=st.sampled_from(["mean", "none"]),
    tail=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
    vocab=st.sampled_from([11, 801]),
)
def test_any_strides(data, reduction, tail, direction, vocab):
    """Of 801 tokens two are few enough to be gathered, where the head needs no gradient."""
    t = inputs(6, 5, vocab, 2, torch.float64)
    t |= {k: t[k].view(2, 3, -1) for k in t if k != "weight"}
    t["weights"] = torch.rand(2, 3)
    for grad_of in (["student_hidden"], ["student_hidden", "weight"]):
        assert_strides_do_not_matter(
            data,
            lambda **t: linear_topk_kl(**t, tail=tail, direction=direction, reduction=reduction, chunk_rows=4),
            t,
            grad_of,
        )


@settings(max_examples=12, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 3),
    vocab=VOCABS,
    dtype=st.sampled_from(DTYPES),
    tail=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
)
def test_any_vocabulary(data, rows, vocab, dtype, tail, direction):
    k = data.draw(st.one_of(st.just(1), st.integers(1, min(vocab, 300))))
    check(inputs(rows, 6, vocab, k, dtype), dtype, tail=tail, direction=direction)


# 5. Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_ids": torch.zeros(2, 2).long()}, r"topk_ids is \[2, 2\], expected \[..., k\] with the rows"),
        ({"topk_ids": torch.zeros(3, 2)}, "topk_ids is torch.float32, expected int32 or int64"),
        ({"topk_ids": torch.zeros(3, 0).long()}, r"topk_ids is \[3, 0\], expected 1 <= k <= 7"),
        ({"topk_ids": torch.full((3, 2), 7)}, "topk_ids contains 7 in row 0, expected 0 <= id < 7"),
        ({"topk_ids": torch.full((3, 2), -1)}, "topk_ids contains -1 in row 0, expected 0 <= id < 7"),
        ({"topk_log_probs": torch.zeros(3, 3)}, r"topk_log_probs is \[3, 3\], expected \[3, 2\] like topk_ids"),
        ({"topk_log_probs": torch.zeros(3, 2).long()}, "topk_log_probs is torch.int64, expected a floating"),
        ({"weight": torch.zeros(7, 5)}, r"weight is \[7, 5\], expected \[vocab, 4\]"),
        ({"chunk_rows": -1}, "chunk_rows is -1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"direction": "backward"}, "direction is 'backward', expected 'forward', 'reverse', 'jsd'"),
        ({"direction": "jsd", "beta": 1.0}, "beta is 1.0, expected 0 < beta < 1"),
        ({"reduction": "max"}, "reduction is 'max'"),
    ],
)
def test_errors(change, message):
    arguments = {
        "student_hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "topk_ids": torch.tensor([[0, 1]] * 3),
        "topk_log_probs": torch.full((3, 2), -1.0),
        **change,
    }
    with pytest.raises(ValueError, match=f"linear_topk_kl: {message}"):
        linear_topk_kl(**arguments)


# And ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_whole_vocabulary_is_the_full_divergence(device, direction):
    t = inputs(5, 16, 65, 65, torch.float32, device)
    teacher_hidden = torch.randn(5, 16, device=device)
    log_probs = torch.log_softmax(teacher_hidden @ t["weight"].t(), -1)
    log_probs, ids = log_probs.topk(65, -1)
    options = {"temperature": 2.0, "direction": direction, "beta": 0.3}
    full, full_grads = run(
        lambda **t: linear_log_softmax_kl(t["student_hidden"], teacher_hidden, t["weight"], **options),
        t,
        ["student_hidden"],
    )
    t |= {"topk_ids": ids, "topk_log_probs": log_probs}
    for tail in (True, False):
        ours, grads = run(lambda tail=tail, **t: linear_topk_kl(**t, tail=tail, **options), t, ["student_hidden"])
        torch.testing.assert_close(ours, full)
        torch.testing.assert_close(grads, full_grads)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lower_bound_of_the_full_divergence(direction):
    """Lumping tokens together never increases it, and more tokens never decrease it."""
    t = inputs(5, 16, 65, 65, torch.float64)
    teacher_hidden = torch.randn(5, 16, dtype=torch.float64)
    log_probs = torch.log_softmax(teacher_hidden @ t["weight"].t(), -1)
    values = []
    for k in (1, 4, 16, 64, 65):
        some, ids = log_probs.topk(k, -1)
        values.append(linear_topk_kl(t["student_hidden"], t["weight"], ids, some, direction=direction).item())
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_deterministic(device, direction):
    torch.set_num_threads(2)
    t = inputs(67, 64, 5003, 64, torch.bfloat16, device)
    first, second = (run(linear_topk_kl, {**t, "direction": direction}, ["student_hidden", "weight"]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])


def test_not_twice_differentiable():
    t = inputs(3, 4, 9, 3, torch.float64)
    student = t["student_hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="linear_topk_kl is not twice differentiable"):
        torch.autograd.grad(linear_topk_kl(**t), student, create_graph=True)


def test_compiles(device):
    t = inputs(5, 8, 33, 4, torch.float32, device)
    compiled = torch.compile(linear_topk_kl, backend="aot_eager", fullgraph=True)
    ours, grads = run(compiled, t, ["student_hidden", "weight"])
    eager, eager_grads = run(linear_topk_kl, t, ["student_hidden", "weight"])
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(grads, eager_grads)


def test_autocast_leaves_the_dtype_alone(device):
    t = inputs(5, 8, 33, 4, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        inside = linear_topk_kl(**t)
    assert torch.equal(inside, linear_topk_kl(**t))
