"""linear_topk_kl: distillation from a teacher's k largest log-probabilities, a chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.ops import _extension, products
from fastft.ops._common import (
    REDUCTIONS,
    HeadGradients,
    accumulate_dtype,
    check_choice,
    check_chunk_rows,
    check_direction,
    check_hidden,
    check_index,
    check_like,
    check_temperature,
    check_weight,
    chunk_size,
    chunks,
    flat_weights,
    logits_buffer,
    reduce_rows,
    register_linear_op,
    rows_of,
    shape_of,
    wants_grad,
)
from fastft.ops.index_check import check_index_range

# Without the tail, a row needs k rows of the head, which are gathered where this many times k is at most V. By an
# H200's limits the gather (4 k H elements read or written at 4.3 TB/s) then takes no longer than two products with the
# whole head (4 V H operations at 790 TFLOP/s); a CPU gains up to about k = V / 60.
GATHER_RATIO = 400


def linear_topk_kl(
    student_hidden: Tensor,
    weight: Tensor,
    topk_ids: Tensor,
    topk_log_probs: Tensor,
    *,
    tail: bool = True,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    weights: Tensor | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> Tensor:
    """Divergence of teacher and student over k tokens and, with ``tail``, one bucket for all others. Equals::

        logits = student_hidden @ weight.T
        student = logits.gather(-1, topk_ids)
        teacher = topk_log_probs
        if tail:
            rest = logits.scatter(-1, topk_ids, -inf).logsumexp(-1)
            student = cat([student, rest]); teacher = cat([teacher, log(1 - teacher.exp().sum(-1))])
        log_softmax_kl(student, teacher, temperature=temperature, direction=direction, beta=beta, ...)

    without ever holding [rows, V] beyond one chunk. Without ``tail`` only k rows of the head matter to a row: where
    they are few (k <= V / 400) and weight needs no gradient, they are gathered, and the other logits are never
    computed. With it every logit is needed.

    topk_log_probs are the teacher's log-probabilities at temperature 1 over the whole vocabulary, so at
    temperature 1 with ``tail`` this is the divergence of the two distributions with all other tokens lumped
    together, a lower bound of the full one, and without ``tail`` that of both renormalised over the k tokens. At
    another temperature both (k + 1)-bucket distributions are tempered, the bucket as one event. That is a
    divergence (0 exactly where the buckets agree), but with ``tail`` it is not the full-vocabulary one at that
    temperature, lumped: the tempered mass of the tail cannot be known from its mass.

    Log-probabilities whose mass exceeds 1 by rounding are renormalised, the bucket empty; reverse KL, infinite
    there, takes its mass to be 2^-24 (what float32 cannot tell from 0 beside 1) where less is left. With k = V the
    bucket is empty.

    student_hidden: [..., H]; weight: [V, H], same dtype (float64, float32, bfloat16, float16) and device.
    topk_ids: [..., k] int32 or int64, distinct within a row. topk_log_probs: [..., k], any floating dtype;
    store float32 where the tail matters, since it is 1 minus their sum. chunk_rows: None keeps a chunk's
    logits within 56 MiB. direction, beta, weights, reduction, result: as in ``log_softmax_kl``.

    Backward: with g the gradient of log_softmax_kl above with respect to its k (+ 1) buckets, a listed token's
    logit gets its g_i, any other g_tail exp(logit - rest), its share of the bucket. As in linear_log_softmax_kl,
    the gradients of student_hidden and weight are computed in forward where asked for; the teacher gets none. Not
    twice differentiable.

    Raises ValueError on a shape, dtype, device or option that does not fit, and on an id outside [0, V), naming it
    and its row (leading dimensions flattened). On CUDA looking would wait for the device: there the row becomes NaN,
    and a later call, or `raise_deferred_errors`, raises.
    """
    op = "linear_topk_kl"
    _extension.load()
    check_hidden(op, "student_hidden", student_hidden)
    check_weight(op, "weight", weight, "student_hidden", student_hidden)
    check_index(op, "topk_ids", topk_ids, "student_hidden", student_hidden)
    check_like(op, "topk_log_probs", topk_log_probs, "student_hidden", student_hidden, dtype=False)
    if topk_ids.dim() < 1 or topk_ids.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"{op}: topk_ids is {shape_of(topk_ids)}, expected [..., k] with the rows of student_hidden, "
            f"{shape_of(student_hidden)}"
        )
    k, vocab = topk_ids.shape[-1], weight.shape[0]
    if not 1 <= k <= vocab:
        raise ValueError(f"{op}: topk_ids is {shape_of(topk_ids)}, expected 1 <= k <= {vocab}, weight's vocabulary")
    if not topk_log_probs.is_floating_point():
        raise ValueError(f"{op}: topk_log_probs is {topk_log_probs.dtype}, expected a floating dtype")
    if topk_log_probs.shape != topk_ids.shape:
        raise ValueError(
            f"{op}: topk_log_probs is {shape_of(topk_log_probs)}, expected {shape_of(topk_ids)} like topk_ids"
        )
    check_temperature(op, temperature)
    check_direction(op, direction, beta)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    rows = check_chunk_rows(op, chunk_rows)
    flat = flat_weights(op, weights, "student_hidden", student_hidden)

    loss = torch.ops.fastft.linear_topk_kl(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        weight,
        topk_ids.reshape(-1, k),
        topk_log_probs.detach().reshape(-1, k),
        flat,
        bool(tail),
        float(temperature),
        direction,
        float(beta),
        reduction,
        rows,
        wants_grad(student_hidden),
        wants_grad(weight),
    )[0]
    return loss.reshape(student_hidden.shape[:-1]) if reduction == "none" else loss


def _kernel(
    student_hidden, weight, topk_ids, topk_log_probs, weights, tail, temperature, direction, beta,
    reduction, chunk_rows, hidden_grad, weight_grad,
):  # fmt: skip
    rows, vocab = student_hidden.shape[0], weight.shape[0]
    divergence = temperature, direction, beta
    acc = accumulate_dtype(student_hidden.dtype)
    topk_ids = topk_ids.to(torch.int64).contiguous()
    check_index_range("linear_topk_kl", "topk_ids", topk_ids, vocab)
    topk_log_probs = topk_log_probs.to(acc).contiguous()
    kl = student_hidden.new_empty(rows, dtype=acc)
    if not tail and not weight_grad and GATHER_RATIO * topk_ids.shape[1] <= vocab:
        grad = _gathered(
            student_hidden, weight, topk_ids, topk_log_probs, weights, kl, divergence, chunk_rows, hidden_grad
        )
        return *reduce_rows(kl, weights, reduction), grad, weight.new_empty(0)
    size = chunk_size(rows, vocab * weight.element_size(), chunk_rows)
    logits = logits_buffer(student_hidden, min(size, rows), vocab)
    grads = HeadGradients(student_hidden, weight, weights, reduction, hidden_grad, weight_grad)
    for part in chunks(rows, size):
        chunk = logits[: part.stop - part.start]
        padded = rows_of(student_hidden, part)
        products.mm(padded, weight.t(), out=logits[: len(padded)])
        torch.ops.fastft.topk_kl_rows(
            chunk,
            topk_ids[part],
            topk_log_probs[part],
            None if weights is None else weights[part],
            kl[part],
            tail,
            *divergence,
            grads.wanted,
        )
        grads.add(logits, part)
    return *reduce_rows(kl, weights, reduction), *grads.results()


def _gathered(student_hidden, weight, ids, log_probs, weights, kl, divergence, chunk_rows, hidden_grad):
    """Writes each row's kl from its k logits alone; returns hidden_grad, empty unless asked for."""
    (rows, hidden), k = student_hidden.shape, ids.shape[1]
    # An id that is out of range makes its row NaN; clamped, it reads inside of the head.
    inside = ids.clamp(0, weight.shape[0] - 1)
    log_probs = log_probs.masked_fill(inside != ids, torch.nan)
    buckets = torch.arange(k, device=ids.device).expand(rows, k).contiguous()
    grad = student_hidden.new_empty(student_hidden.shape if hidden_grad else 0)
    size = chunk_size(rows, k * hidden * weight.element_size(), chunk_rows)
    head = weight.new_empty((min(size, rows) * k, hidden))
    for part in chunks(rows, size):
        n = part.stop - part.start
        torch.index_select(weight, 0, inside[part].reshape(-1), out=head[: n * k])
        listed = head[: n * k].view(n, k, hidden)
        logits = torch.bmm(listed, student_hidden[part, :, None])[..., 0]
        torch.ops.fastft.topk_kl_rows(
            logits,
            buckets[part],
            log_probs[part],
            None if weights is None else weights[part],
            kl[part],
            False,
            *divergence,
            hidden_grad,
        )
        if hidden_grad:
            torch.bmm(logits[:, None], listed, out=grad[part, None])
    return grad


def register() -> None:
    register_linear_op("linear_topk_kl", _kernel)
