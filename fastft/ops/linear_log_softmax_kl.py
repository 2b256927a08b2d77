"""linear_log_softmax_kl: distillation through a language-model head, a chunk of rows at a time."""

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
    check_like,
    check_temperature,
    check_weight,
    chunk_size,
    chunks,
    flat_weights,
    logits_buffer,
    reduce_rows,
    register_linear_op,
    shape_of,
    wants_grad,
)


def linear_log_softmax_kl(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    chunk_rows: int | None = None,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Divergence between the distributions of two hidden states behind a head. Equals::

        log_softmax_kl(student_hidden @ weight.T, teacher_hidden @ (teacher_weight or weight).T, ...)

    without ever holding [rows, V] beyond one chunk. With one head for both, a chunk's student and teacher
    rows go through it in one matrix product, so the head is read once. Logits are kept in the inputs' dtype,
    as ``nn.Linear`` would return them; everything after them is float32 (float64 for float64).

    student_hidden: [..., H]; teacher_hidden: [..., H_t], same rows, H_t = H without teacher_weight;
    weight: [V, H]; teacher_weight: [V, H_t] or None; all of one dtype (float64, float32, bfloat16,
    float16) and device.
    chunk_rows: rows at a time; None keeps a chunk's logits within 56 MiB. The other arguments, the result
    and the errors are those of ``log_softmax_kl``.

    Backward: with G the gradient of log_softmax_kl with respect to the student's logits, student_hidden gets
    G @ weight and weight gets G.T @ student_hidden (as the student's head: teacher logits are constants).
    Both are computed in forward, and only where asked for, since G overwrites the chunk's logits; backward
    multiplies. So weight is not saved for backward (except for its own gradient with reduction="none",
    where the chunks are recomputed). The teacher's inputs get no gradient. Not twice differentiable.

    Bit-equal over runs; over numbers of threads too, where torch's matrix product is.
    """
    op = "linear_log_softmax_kl"
    _extension.load()
    check_hidden(op, "student_hidden", student_hidden)
    check_like(op, "teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    check_weight(op, "weight", weight, "student_hidden", student_hidden)
    if teacher_hidden.dim() < 1 or teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"{op}: teacher_hidden is {shape_of(teacher_hidden)}, "
            f"expected the rows of student_hidden, {shape_of(student_hidden)}"
        )
    if teacher_weight is not None:
        check_weight(op, "teacher_weight", teacher_weight, "teacher_hidden", teacher_hidden)
        if teacher_weight.shape[0] != weight.shape[0]:
            raise ValueError(
                f"{op}: teacher_weight is {shape_of(teacher_weight)}, "
                f"expected a vocabulary of {weight.shape[0]} like weight"
            )
    elif teacher_hidden.shape[-1] != student_hidden.shape[-1]:
        raise ValueError(
            f"{op}: teacher_hidden is {shape_of(teacher_hidden)}, expected "
            f"{shape_of(student_hidden)} like student_hidden, or a teacher_weight of its own"
        )
    if teacher_weight is weight:
        teacher_weight = None
    check_temperature(op, temperature)
    check_direction(op, direction, beta)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    rows = check_chunk_rows(op, chunk_rows)
    flat = flat_weights(op, weights, "student_hidden", student_hidden)

    loss = torch.ops.fastft.linear_log_softmax_kl(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        weight,
        None if teacher_weight is None else teacher_weight.detach(),
        flat,
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
    student_hidden, teacher_hidden, weight, teacher_weight, weights, temperature, direction, beta,
    reduction, chunk_rows, hidden_grad, weight_grad,
):  # fmt: skip
    rows, vocab = student_hidden.shape[0], weight.shape[0]
    size = chunk_size(rows, 2 * vocab * weight.element_size(), chunk_rows)
    # Student rows of a chunk come first, teacher rows right behind them.
    logits = logits_buffer(student_hidden, 2 * min(size, rows), vocab)
    if teacher_weight is None:
        pair = student_hidden.new_zeros((logits.shape[0], student_hidden.shape[1]))
    kl = student_hidden.new_empty(rows, dtype=accumulate_dtype(student_hidden.dtype))
    grads = HeadGradients(student_hidden, weight, weights, reduction, hidden_grad, weight_grad)
    for part in chunks(rows, size):
        n = part.stop - part.start
        student_logits, teacher_logits = logits[:n], logits[n : 2 * n]
        if teacher_weight is None:
            pair[:n] = student_hidden[part]
            pair[n : 2 * n] = teacher_hidden[part]
            both = products.rounded_rows(2 * n, pair)
            products.mm(pair[:both], weight.t(), out=logits[:both])
        else:
            products.mm(student_hidden[part], weight.t(), out=student_logits)
            products.mm(teacher_hidden[part], teacher_weight.t(), out=teacher_logits)
        torch.ops.fastft.log_softmax_kl_rows(
            student_logits,
            teacher_logits,
            None if weights is None else weights[part],
            kl[part],
            temperature,
            direction,
            beta,
            grads.wanted,
        )
        grads.add(logits, part)
    return *reduce_rows(kl, weights, reduction), *grads.results()


def register() -> None:
    register_linear_op("linear_log_softmax_kl", _kernel)
