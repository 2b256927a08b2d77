"""linear_log_softmax_kl: the five tests of every op, then what is particular to it."""

import gc
import weakref

import pytest
import torch
from op_checks import DTYPES, compare, name, python, run, supported

from fastft.ops import linear_log_softmax_kl, log_softmax_kl, reference
from tests.ops.randomised import VOCABS, assert_strides_do_not_matter, given, settings, st

DIRECTIONS = ["forward", "reverse", "jsd"]


def inputs(rows, hidden, vocab, dtype, device="cpu"):
    def randn(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype).to(device)

    return {
        "student_hidden": randn(rows, hidden),
        "teacher_hidden": randn(rows, hidden),
        "weight": randn(vocab, hidden, scale=0.3),
    }


def check(tensors, dtype, grad_of=("student_hidden", "weight"), **options):
    compare(linear_log_softmax_kl, reference.linear_log_softmax_kl, tensors, grad_of, dtype, terms=1.0, **options)


# 1. Against float64 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_float64(device, dtype, direction, reduction):
    if not supported(device, dtype):
        pytest.skip(f"{name(dtype)} is a CPU dtype")
    weights = torch.rand(19, device=device)
    weights[5] = 0
    for options in ({}, {"temperature": 2.5, "weights": weights, "chunk_rows": 7}):
        check(inputs(19, 32, 251, dtype, device), dtype, direction=direction, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_teacher_with_its_own_head(device, dtype):
    if not supported(device, dtype):
        pytest.skip(f"{name(dtype)} is a CPU dtype")
    tensors = inputs(9, 32, 251, dtype, device)
    wider = inputs(9, 48, 251, dtype, device)
    tensors |= {"teacher_hidden": wider["teacher_hidden"], "teacher_weight": wider["weight"]}
    check(tensors, dtype, chunk_rows=4)


def test_every_capability(capability):
    for dtype in (torch.float32, torch.bfloat16):
        check(inputs(9, 32, 251, dtype), dtype, chunk_rows=4)


# 2. gradcheck -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(direction, reduction):
    tensors = inputs(3, 4, 7, torch.float64)
    # The head of the teacher is a constant of its own here: finite differences cannot hold one half of `weight` still.
    teacher_weight = tensors["weight"].clone()
    weights = torch.tensor([0.5, 0.0, 2.0])
    torch.autograd.gradcheck(
        lambda h, w: linear_log_softmax_kl(
            h,
            tensors["teacher_hidden"],
            w,
            teacher_weight=teacher_weight,
            direction=direction,
            temperature=1.7,
            beta=0.3,
            weights=weights,
            reduction=reduction,
            chunk_rows=2,
        ),
        (tensors["student_hidden"].requires_grad_(), tensors["weight"].requires_grad_()),
    )


# 3. opcheck -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(device, requires_grad, reduction):
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    t = inputs(3, 4, 7, dtype, device)
    student, weight = (t[k].requires_grad_(requires_grad) for k in ("student_hidden", "weight"))
    row_weights = torch.rand(3, dtype=dtype, device=device)
    args = (student, t["teacher_hidden"], weight, None, row_weights, 1.5, "jsd", 0.3, reduction, 2)
    torch.library.opcheck(torch.ops.fastft.linear_log_softmax_kl.default, (*args, requires_grad, requires_grad))


# 4. Hard shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9])
@pytest.mark.parametrize("chunk_rows", [1, 4, 8, 100, None])
def test_rows_around_the_chunk(device, rows, chunk_rows):
    for reduction in ("mean", "none"):
        check(inputs(rows, 8, 33, torch.float32, device), torch.float32, chunk_rows=chunk_rows, reduction=reduction)


@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 63, 64, 65])
def test_vocabularies_around_the_vector_width(device, vocab):
    for dtype in (torch.float32, torch.bfloat16):
        check(inputs(3, 8, vocab, dtype, device), dtype)


def test_leading_dimensions_and_strides(device):
    t = inputs(12, 32, 65, torch.float32, device)
    tensors = {k: t[k].reshape(3, 4, 32).transpose(0, 1) for k in ("student_hidden", "teacher_hidden")}
    weights = torch.rand(3, 4, device=device).t()
    check({**tensors, "weight": t["weight"]}, torch.float32, reduction="none", weights=weights)
    check({**tensors, "weight": t["weight"].t().contiguous().t()}, torch.float32, weights=weights)


def test_all_weights_zero(device):
    t = inputs(5, 8, 33, torch.float32, device)
    value, grads = run(
        lambda **t: linear_log_softmax_kl(**t, weights=torch.zeros(5, device=device)),
        t,
        ["student_hidden", "weight"],
    )
    assert value == 0
    assert all((g == 0).all() for g in grads.values())


def test_large_logits(device):
    for dtype in (torch.float32, torch.bfloat16):
        t = inputs(5, 8, 33, dtype, device)
        t["weight"] = t["weight"] * 1e4
        value, grads = run(linear_log_softmax_kl, t, ["student_hidden"])
        assert value.isfinite()
        assert grads["student_hidden"].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 9),
    hidden=st.integers(1, 20),
    vocab=st.integers(1, 90),
    chunk_rows=st.one_of(st.none(), st.integers(1, 12)),
    direction=st.sampled_from(DIRECTIONS),
    temperature=st.floats(0.5, 4.0),
)
def test_any_shape(rows, hidden, vocab, chunk_rows, direction, temperature):
    t = inputs(rows, hidden, vocab, torch.float64)
    options = {"direction": direction, "temperature": temperature, "reduction": "none"}
    ours, grads = run(
        lambda **t: linear_log_softmax_kl(**t, chunk_rows=chunk_rows, **options), t, ["student_hidden", "weight"]
    )
    truth, true_grads = run(
        lambda **t: reference.linear_log_softmax_kl(**t, **options), t, ["student_hidden", "weight"]
    )
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(grads, true_grads)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), reduction=st.sampled_from(["mean", "none"]), own_head=st.booleans())
def test_any_strides(data, reduction, own_head):
    t = inputs(6, 5, 11, torch.float64)
    t |= {k: t[k].view(2, 3, 5) for k in ("student_hidden", "teacher_hidden")}
    t["weights"] = torch.rand(2, 3)
    if own_head:
        t["teacher_weight"] = torch.randn(11, 5, dtype=torch.float64)
    assert_strides_do_not_matter(
        data,
        lambda **t: linear_log_softmax_kl(**t, reduction=reduction, chunk_rows=4),
        t,
        ["student_hidden", "weight"],
    )


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 3), vocab=VOCABS, dtype=st.sampled_from(DTYPES), direction=st.sampled_from(DIRECTIONS))
def test_any_vocabulary(rows, vocab, dtype, direction):
    check(inputs(rows, 6, vocab, dtype), dtype, direction=direction)


# 5. Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_hidden": torch.zeros(2, 4)}, r"teacher_hidden is \[2, 4\], expected the rows of student_hidden"),
        ({"teacher_hidden": torch.zeros(3, 5)}, r"teacher_hidden is \[3, 5\], expected \[3, 4\]"),
        ({"teacher_hidden": torch.zeros(3, 4).half()}, "teacher_hidden is torch.float16, expected torch.float32"),
        ({"weight": torch.zeros(7, 5)}, r"weight is \[7, 5\], expected \[vocab, 4\]"),
        ({"weight": torch.zeros(0, 4)}, r"weight is \[0, 4\], expected a vocabulary of at least 1"),
        ({"teacher_weight": torch.zeros(8, 4)}, r"teacher_weight is \[8, 4\], expected a vocabulary of 7"),
        ({"teacher_weight": torch.zeros(7, 3)}, r"teacher_weight is \[7, 3\], expected \[vocab, 4\]"),
        ({"chunk_rows": 0}, "chunk_rows is 0, expected at least 1"),
        ({"weights": torch.zeros(2)}, r"weights is \[2\], expected \[3\]"),
        ({"direction": "up"}, "direction is 'up'"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"reduction": None}, "reduction is None"),
    ],
)
def test_errors(change, message):
    arguments = {
        "student_hidden": torch.zeros(3, 4),
        "teacher_hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        **change,
    }
    with pytest.raises(ValueError, match=f"linear_log_softmax_kl: {message}"):
        linear_log_softmax_kl(**arguments)


# And ---------------------------------------------------------------------------------------------------


def test_equals_log_softmax_kl_on_logits(device):
    t = inputs(9, 32, 251, torch.float32, device)
    direct = log_softmax_kl(t["student_hidden"] @ t["weight"].t(), t["teacher_hidden"] @ t["weight"].t())
    torch.testing.assert_close(linear_log_softmax_kl(**t), direct)


def test_frozen_head_is_not_kept(device):
    """Under ZeRO-3 the head is a gathered buffer: after forward nothing may hold on to it."""
    t = inputs(9, 32, 251, torch.float32, device)
    head = torch.nn.Parameter(t.pop("weight"), requires_grad=False)
    alive = weakref.ref(head)
    storage = weakref.ref(head.untyped_storage())
    student = t["student_hidden"].requires_grad_()
    loss = linear_log_softmax_kl(student, t["teacher_hidden"], head)
    del head
    gc.collect()
    assert alive() is None
    assert storage() is None or device.type == "cuda"
    loss.backward()
    assert student.grad.isfinite().all()


def test_only_the_gradients_asked_for(device):
    t = inputs(9, 32, 251, torch.float32, device)
    _, grads = run(linear_log_softmax_kl, t, ["student_hidden"])
    _, both = run(linear_log_softmax_kl, t, ["student_hidden", "weight"])
    _, head = run(linear_log_softmax_kl, t, ["weight"])
    assert torch.equal(grads["student_hidden"], both["student_hidden"])
    assert torch.equal(head["weight"], both["weight"])
    with torch.no_grad():
        t["student_hidden"].requires_grad_()
        assert not linear_log_softmax_kl(**t).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_upstream_gradient(device, reduction):
    t = inputs(5, 8, 33, torch.float32, device)
    student, weight = t["student_hidden"].requires_grad_(), t["weight"].requires_grad_()
    value = linear_log_softmax_kl(**t, reduction=reduction, chunk_rows=2)
    upstream = torch.rand_like(value)
    first = torch.autograd.grad(value, (student, weight), upstream, retain_graph=True)
    again = torch.autograd.grad(value, (student, weight), upstream * 3)
    truth = reference.linear_log_softmax_kl(**t, reduction=reduction)
    true = torch.autograd.grad(truth, (student, weight), upstream)
    for one, two, expected in zip(first, again, true, strict=True):
        torch.testing.assert_close(two, one * 3)
        torch.testing.assert_close(one, expected)


def test_used_twice_in_one_graph(device):
    t = inputs(5, 8, 33, torch.float32, device)

    def loss(op, **t):
        hidden = t["student_hidden"] * 1.5
        return op(hidden, t["teacher_hidden"], t["weight"]) + 2 * op(hidden + 1, t["teacher_hidden"], t["weight"])

    _, ours = run(lambda **t: loss(linear_log_softmax_kl, **t), t, ["student_hidden", "weight"])
    _, truth = run(lambda **t: loss(reference.linear_log_softmax_kl, **t), t, ["student_hidden", "weight"])
    torch.testing.assert_close(ours, truth)


def test_not_twice_differentiable():
    t = inputs(3, 4, 7, torch.float64)
    student = t["student_hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="linear_log_softmax_kl is not twice differentiable"):
        torch.autograd.grad(linear_log_softmax_kl(**t), student, create_graph=True)


def test_autocast_leaves_the_dtype_alone(device):
    t = inputs(5, 8, 33, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        inside = linear_log_softmax_kl(**t)
    assert torch.equal(inside, linear_log_softmax_kl(**t))


def test_deterministic(device):
    torch.set_num_threads(2)
    t = inputs(67, 64, 5003, torch.bfloat16, device)
    first = run(lambda **t: linear_log_softmax_kl(**t, chunk_rows=20), t, ["student_hidden", "weight"])
    second = run(lambda **t: linear_log_softmax_kl(**t, chunk_rows=20), t, ["student_hidden", "weight"])
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][k], second[1][k]) for k in first[1])


def test_compiles(device):
    t = inputs(5, 8, 33, torch.float32, device)
    compiled = torch.compile(linear_log_softmax_kl, backend="aot_eager", fullgraph=True)
    ours, grads = run(compiled, t, ["student_hidden", "weight"])
    eager, eager_grads = run(linear_log_softmax_kl, t, ["student_hidden", "weight"])
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(grads, eager_grads)


def test_graph_capture(device):
    """Nothing waits for the device, and a replay sees new inputs."""
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a CUDA device")
    t = inputs(9, 64, 50272, torch.bfloat16, device)
    student = t["student_hidden"].requires_grad_()

    def step():
        return torch.autograd.grad(linear_log_softmax_kl(**t, chunk_rows=4), student)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        grad = step()
    with torch.no_grad():
        student.mul_(0.5)
    graph.replay()
    assert torch.equal(grad, step())


def test_second_device():
    """Each device is told once that a kernel needs much shared memory."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    t = inputs(3, 16, 50272, torch.bfloat16)
    losses = [linear_log_softmax_kl(**{k: v.to(f"cuda:{i}") for k, v in t.items()}).item() for i in (0, 1)]
    assert losses[0] == losses[1]


MEMORY = """
import torch
from fastft.ops import linear_log_softmax_kl, linear_topk_kl, linear_cross_entropy

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

torch.manual_seed(0)
rows, hidden, vocab = 2048, 16, 50272
def step(rows):
    x, y, w = torch.randn(rows, hidden, requires_grad=True), torch.randn(rows, hidden), torch.randn(vocab, hidden)
    ids = torch.randint(0, vocab, (rows, 1))
    yield lambda: linear_log_softmax_kl(x, y, w).backward()
    yield lambda: linear_cross_entropy(x, w, ids[:, 0]).backward()
    yield lambda: linear_topk_kl(x, w, ids, torch.full((rows, 1), -1.0)).backward()
for f in step(2): f()
steps = list(step(rows))
for f in steps:
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    f()
    print(peak() - before)
"""


def test_memory_is_one_chunk():
    """2048 rows of float32 logits would be 412 MB a copy; the chunk loops stay within 64 MiB."""
    import os

    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs")
    done = python(MEMORY)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.split():
        assert int(line) < 64 * 2**20, f"peak grew by {int(line) / 2**20:.0f} MiB"
