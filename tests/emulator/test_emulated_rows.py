"""The row kernels of csrc/cuda on the emulator, against fastft.ops.reference in float64."""

import itertools
import os

import pytest
import torch

from fastft.ops import reference
from tests.emulator.conftest import A100, H200
from tests.emulator.launchers import DIRECTIONS, DTYPES, Read, Write

FULL = bool(os.environ.get("FASTFT_EMULATE_ALL"))
# Devices whose shared memory holds so little that a vocabulary of 3000 needs everything a real one does for
# 200,000: clusters of 8 with whole slices, clusters whose slices are cached in part, one block with a part of its
# row, and nothing cached at all.
SMALL = [(9, 2048 + 2400, 3 * (2400 + 3072)), (9, 2048 + 512, 9000), (8, 2048 + 1024, 6000), (9, 2048, 3000)]
DEVICES = [H200, A100, *SMALL] if FULL else [H200, *SMALL]
VOCABS = [1, 7, 8, 9, 100, 257, 1001, 2056, 3000] if FULL else [1, 9, 257, 3000]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Of numbers of size 1 that are rounded once to dtype; gradients are differences of numbers of that size, in float32.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
GRADIENT_FLOOR = {torch.float32: 0.5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def close(ours, truth, dtype, floor):
    """Equal to a rounding of the largest element, or of `floor`; inf and NaN at the same places."""
    ours, truth = ours.double(), truth.double()
    assert torch.equal(ours.isnan(), truth.isnan()) and torch.equal(ours.isinf(), truth.isinf())
    finite = truth.isfinite()
    scale = max(floor, truth[finite].abs().max().item() if finite.any() else 0)
    error = (ours - truth)[finite].abs().max().item() if finite.any() else 0
    assert error <= TOLERANCE[dtype] * scale, f"error {error:.2e}, scale {scale:.2e}"


def rows(count, vocab, dtype, offset, scale=3.0):
    """[count, vocab] in memory of its own, from element `offset` of wider rows on: 3 is not aligned."""
    return (torch.randn(count, vocab + 16 - offset) * scale).to(dtype)[:, offset : offset + vocab]


def spread(*sizes):
    """All dtypes with each (device, vocabulary); which offset and order goes with which is left to their place."""
    for i, (device, vocab, dtype) in enumerate(itertools.product(DEVICES, VOCABS, FLOATS)):
        if vocab == 1 and device is not H200 and not FULL:
            continue
        for offset in (0, 3) if FULL or device is H200 else ((0, 3)[i % 2],):
            label = f"{device[0]}-{device[1]}-{vocab}-{str(dtype)[6:]}-{offset}"
            yield pytest.param(device, vocab, dtype, offset, i % 4, id=label)


@pytest.fixture
def on(emulator):
    def choose(device, order):
        emulator.device(*device)
        emulator.order(order)
        return emulator

    return choose


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("device", "vocab", "dtype", "offset", "order"), list(spread()))
def test_log_softmax_kl(on, device, vocab, dtype, offset, order, direction):
    """Value and gradient, in place and not, then the backward from saved statistics."""
    emulator = on(device, order)
    count, temperature, beta = 3, 1.7, 0.3
    student, teacher = rows(count, vocab, dtype, offset), rows(count, vocab, dtype, offset)
    if vocab > 100:  # impossible tokens: more of them where the reverse or forward divergence stays finite
        wide, narrow = (teacher, student) if direction == "forward" else (student, teacher)
        wide[0, 5:20] = -torch.inf
        if direction == "jsd":
            narrow[0, 2:9] = -torch.inf
        else:
            narrow[0, 5:9] = -torch.inf
    weights = torch.tensor([1.0, 0.0, 2.0])
    exact = student.double().requires_grad_()
    truth = reference.log_softmax_kl(exact, teacher.double(), temperature=temperature, direction=direction, beta=beta,
                                     reduction="none")  # fmt: skip
    (grad,) = torch.autograd.grad(truth.sum(), exact)
    truth, grad = truth.detach() * (weights != 0), grad * (weights != 0)[:, None]

    kl, stats = torch.empty(count), torch.empty(count, 5)
    out = torch.empty(count, vocab, dtype=dtype)
    common = {
        "teacher": Read(teacher), "rows": count, "vocab": vocab, "student_stride": student.stride(0),
        "teacher_stride": teacher.stride(0), "temperature": temperature, "beta": beta,
        "direction": DIRECTIONS[direction], "dtype": DTYPES[dtype],
    }  # fmt: skip
    emulator.launch("log_softmax_kl", student=Read(student), weights=Read(weights), kl=Write(kl), stats=Write(stats),
                    grad=Write(out), grad_stride=vocab, **common)  # fmt: skip
    close(kl, truth, torch.float32, 1.0)
    close(out, grad, dtype, GRADIENT_FLOOR[dtype])

    from_stats, grad_kl = torch.empty(count, vocab, dtype=dtype), torch.tensor([2.0, 0.0, -1.0])
    emulator.launch("log_softmax_kl_backward", student=Read(student), stats=Read(stats), grad_kl=Read(grad_kl),
                    grad=Write(from_stats), **common)  # fmt: skip
    close(from_stats, grad * grad_kl[:, None], dtype, GRADIENT_FLOOR[dtype])

    emulator.launch("log_softmax_kl", student=student, weights=Read(weights), kl=Write(kl), grad=student,
                    grad_stride=student.stride(0), **common)  # fmt: skip
    assert torch.equal(student, out)


@pytest.mark.parametrize(("device", "vocab", "dtype", "offset", "order"), list(spread()))
def test_cross_entropy(on, device, vocab, dtype, offset, order):
    """In place; an ignored label, and one that does not exist."""
    emulator = on(device, order)
    logits = rows(4, vocab, dtype, offset)
    labels = torch.tensor([0, -100, vocab - 1, vocab])
    exact = logits.double().requires_grad_()
    truth = torch.cat([reference.linear_cross_entropy(x[None], torch.eye(vocab, dtype=torch.float64), label[None],
                                                      reduction="none")
                       for x, label in zip(exact[:3], labels[:3], strict=True)])  # fmt: skip
    (grad,) = torch.autograd.grad(truth.sum(), exact)
    common = {"labels": Read(labels), "rows": 4, "vocab": vocab, "logits_stride": logits.stride(0),
              "ignore_index": -100, "dtype": DTYPES[dtype]}  # fmt: skip
    alone, nll = torch.empty(4), torch.empty(4)
    emulator.launch("cross_entropy", logits=Read(logits), nll=Write(alone), write_grad=False, **common)
    emulator.launch("cross_entropy", logits=logits, nll=Write(nll), write_grad=True, **common)
    close(nll[:3], truth.detach(), torch.float32, 1.0)
    close(logits[:3], grad[:3], dtype, GRADIENT_FLOOR[dtype])
    assert nll[3].isnan() and logits[3].isnan().all()
    assert torch.equal(alone, nll) or torch.equal(alone[:3], nll[:3])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(("device", "vocab", "dtype", "offset", "order"), list(spread()))
def test_topk_kl(on, device, vocab, dtype, offset, order, tail, direction):
    """A row of weight 0, one whose teacher leaves no tail, one with a token that does not exist; few or all listed."""
    emulator = on(device, order)
    for k in {1, min(5, vocab), vocab if vocab < 300 else 40}:
        logits = rows(4, vocab, dtype, offset)
        log_probs, ids = torch.log_softmax(torch.randn(4, vocab, dtype=torch.float64), -1).topk(k, -1)
        log_probs, ids = log_probs.float().contiguous(), ids[:, torch.randperm(k)].contiguous()
        log_probs[2] = torch.log_softmax(log_probs[2], -1)  # of mass 1, as far as float32 can tell
        ids[3, k // 2] = (vocab, -1)[k % 2]
        weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
        exact = logits.double().requires_grad_()
        options = {"tail": tail, "temperature": 1.3, "direction": direction, "beta": 0.3}
        truth = reference.linear_topk_kl(exact[:3], torch.eye(vocab, dtype=torch.float64), ids[:3],
                                         log_probs[:3].double(), weights=weights[:3].double(), reduction="none",
                                         **options)  # fmt: skip
        (grad,) = torch.autograd.grad(truth.sum(), exact)
        kl, scratch = torch.empty(4), torch.empty(4, k)
        emulator.launch("topk_kl", logits=logits, ids=Read(ids), log_probs=Read(log_probs), weights=Read(weights),
                        scratch=Write(scratch), kl=Write(kl), rows=4, vocab=vocab, k=k,
                        logits_stride=logits.stride(0), write_grad=True, dtype=DTYPES[dtype],
                        **{**options, "direction": DIRECTIONS[direction]})  # fmt: skip
        close(kl[:3], truth.detach(), torch.float32, 1.0)
        close(logits[:3], grad[:3], dtype, GRADIENT_FLOOR[dtype])
        assert kl[3].isnan() and logits[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("count", [0, 1, 511, 1300])
def test_row_reduce(emulator, count, mean, dtype):
    """Weighted, with an inf of weight 0; without weights; of no weight at all."""
    values = torch.randn(count, dtype=dtype)
    weights = torch.rand(count, dtype=dtype)
    if count > 1:
        values[1], weights[1] = torch.inf, 0
    for w in (weights, torch.zeros_like(weights), None):
        ours, scale = torch.empty((), dtype=dtype), torch.empty(count, dtype=dtype)
        x = (values if w is not None else values.nan_to_num(posinf=0)).contiguous()
        emulator.launch("row_reduce", values=Read(x), weights=None if w is None else Read(w), out=Write(ours),
                        row_scale=Write(scale), rows=count, mean=mean, is_double=dtype == torch.float64)  # fmt: skip
        exact = x.double().requires_grad_()
        mass = torch.ones(count).double() if w is None else w.double()
        truth = (torch.where(mass == 0, 0, exact) * mass).sum()
        divisor = mass.sum() if mean else 1
        truth = truth / divisor if divisor != 0 else truth * 0
        torch.testing.assert_close(ours.double(), truth.detach(), rtol=1e-6, atol=1e-6)
        expected = mass / divisor if divisor != 0 else mass * 0
        torch.testing.assert_close(scale.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("count", "columns"), [(1, 1), (700, 1), (5000, 5)])
def test_index_check(emulator, count, columns, order):
    """Several blocks; no bad id, one, and many of which one is written down and stays."""
    emulator.order(order)
    ids = torch.randint(0, 50, (count,))
    ids[count // 2] = -100
    record = torch.zeros(6, dtype=torch.int64)
    sizes = {"index": Read(ids), "count": count, "columns": columns, "vocab": 50, "record": record}
    emulator.launch("index_check", ignore=-100, source=1, **sizes)
    assert not record.any()
    emulator.launch("index_check", ignore=7, source=1, **sizes)
    assert record.tolist() == [2, 1, count // 2 // columns, -100, 50, 7]
    record.zero_()
    ids[::2] = 50 + torch.arange((count + 1) // 2)
    emulator.launch("index_check", ignore=0, source=0, **sizes)
    state, source, row, found, vocab, ignore = first = record.tolist()
    assert (state, source, vocab, ignore) == (2, 0, 50, 0) and found in (-100, *ids[ids >= 50].tolist())
    assert row == (ids == found).nonzero().item() // columns
    emulator.launch("index_check", ignore=0, source=1, **sizes)
    assert record.tolist() == first


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_any_order_of_threads_gives_the_same_bits(on, direction):
    """With a cluster of 8, and slices that are cached in part."""
    results = []
    student, teacher = rows(2, 3000, torch.float32, 0), rows(2, 3000, torch.float32, 0)
    for order in (0, 1, 2, 3):
        kl, grad = torch.empty(2), torch.empty(2, 3000)
        on(SMALL[1], order).launch(
            "log_softmax_kl", student=Read(student), teacher=Read(teacher), kl=Write(kl), grad=Write(grad), rows=2,
            vocab=3000, student_stride=student.stride(0), teacher_stride=teacher.stride(0), grad_stride=3000,
            temperature=1.0, beta=0.5, direction=DIRECTIONS[direction], dtype=DTYPES[torch.float32],
        )  # fmt: skip
        results.append(torch.cat([kl, grad.flatten()]))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_any_order_of_threads_gives_the_same_bits_of_topk_kl(on, direction):
    results = []
    before, ids = rows(2, 3000, torch.float32, 0).contiguous(), torch.stack([torch.randperm(3000)[:300]] * 2)
    log_probs = torch.log_softmax(torch.randn(2, 3000), -1)[:, :300].contiguous()
    for order in (0, 1, 2, 3):
        logits, kl, scratch = before.clone(), torch.empty(2), torch.empty(2, 300)
        on(SMALL[1], order).launch(
            "topk_kl", logits=logits, ids=Read(ids), log_probs=Read(log_probs), scratch=Write(scratch), kl=Write(kl),
            rows=2, vocab=3000, k=300, logits_stride=3000, temperature=1.0, beta=0.5, tail=True, write_grad=True,
            direction=DIRECTIONS[direction], dtype=DTYPES[torch.float32],
        )  # fmt: skip
        results.append(torch.cat([kl, logits.flatten()]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_launch_that_fails_names_the_kernel_and_its_sizes(emulator):
    x, kl = rows(2, 64, torch.float32, 0), torch.empty(2)
    with pytest.raises(RuntimeError, match=r"log_softmax_kl_kernel with rows=2 vocab=64: thread .* end of teacher"):
        emulator.launch("log_softmax_kl", student=Read(x), teacher=Read(torch.randn(1, 64)), kl=Write(kl), rows=2,
                        vocab=64, student_stride=x.stride(0), teacher_stride=64, temperature=1.0,
                        dtype=DTYPES[torch.float32])  # fmt: skip
