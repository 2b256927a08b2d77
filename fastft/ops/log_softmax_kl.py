"""log_softmax_kl: a divergence between two softmax distributions, without storing either."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.ops import _extension
from fastft.ops._common import (
    REDUCTIONS,
    accumulate_dtype,
    check_choice,
    check_direction,
    check_float,
    check_like,
    check_temperature,
    flat_weights,
    shape_of,
)


def log_softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Divergence between teacher and student distributions in nats, one pass over the logits.

    ``direction="forward"`` equals, in float32 and without its six tensors of [..., V]::

        kl = F.kl_div(log_softmax(s / t), log_softmax(u / t), reduction="none", log_target=True).sum(-1)
        loss = (weights * kl).sum() / weights.sum() * t**2

    for student logits s, teacher logits u, temperature t. "reverse" is KL(student || teacher); "jsd" is
    beta KL(P_t || M) + (1 - beta) KL(P_s || M) with M = beta P_t + (1 - beta) P_s, 0 < beta < 1.
    Where the first distribution of a KL is 0 an element adds 0 (also 0 log 0), so -inf logits may mask.

    student_logits, teacher_logits: [..., V], same shape, dtype (float64, float32, bfloat16, float16) and
    device, last dimension contiguous. weights: [...] per row, constants; a row of weight 0 is not read.
    reduction: "mean" = sum(w kl) / sum(w) (0 where sum(w) is 0), "sum" = sum(w kl), "none" = w kl, [...].
    Returns float32, or float64 for float64 logits. Sums are kept in that dtype. Two runs agree bit for bit,
    with any number of threads.

    Backward (P = softmax(logits / t), per row, times t, weight and reduction): forward P_s - P_t; reverse
    P_s (log P_s - log P_t - KL); jsd (1 - beta) P_s (log(P_s / M) - KL(P_s || M)). The teacher gets none.
    Saves both logits and five numbers a row; not twice differentiable.

    Raises ValueError on a shape, dtype, device or option that does not fit, RuntimeError without the
    extension.
    Hinton et al. 2015, https://arxiv.org/abs/1503.02531; jsd: Agarwal et al. 2024 (GKD),
    https://arxiv.org/abs/2306.13649.
    """
    op = "log_softmax_kl"
    _extension.load()
    check_float(op, "student_logits", student_logits)
    check_like(op, "teacher_logits", teacher_logits, "student_logits", student_logits)
    if student_logits.dim() < 1 or student_logits.shape[-1] == 0:
        raise ValueError(f"{op}: student_logits is {shape_of(student_logits)}, expected [..., V] with V >= 1")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"{op}: teacher_logits is {shape_of(teacher_logits)}, "
            f"expected {shape_of(student_logits)} like student_logits"
        )
    for name, x in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"{op}: {name} has stride {x.stride(-1)} in its last dimension, expected 1")
    check_temperature(op, temperature)
    check_direction(op, direction, beta)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    flat = flat_weights(op, weights, "student_logits", student_logits)

    vocab = student_logits.shape[-1]
    kl, _stats = torch.ops.fastft.log_softmax_kl(
        student_logits.reshape(-1, vocab),
        teacher_logits.detach().reshape(-1, vocab),
        flat,
        float(temperature),
        direction,
        float(beta),
    )
    if reduction != "none":
        return torch.ops.fastft.row_reduce(kl, flat, reduction == "mean")[0]
    kl = kl if flat is None else kl * flat
    return kl.reshape(student_logits.shape[:-1])


def _fake(student_logits, teacher_logits, weights, temperature, direction, beta):
    acc = accumulate_dtype(student_logits.dtype)
    rows = student_logits.shape[0]
    return student_logits.new_empty((rows,), dtype=acc), student_logits.new_empty((rows, 5), dtype=acc)


def _setup_context(ctx, inputs, output):
    student_logits, teacher_logits, _weights, ctx.temperature, ctx.direction, ctx.beta = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(student_logits, teacher_logits, output[1])


def _backward(ctx, grad_kl, _grad_stats):
    if grad_kl is None:
        return (None,) * 6
    student_logits, teacher_logits, stats = ctx.saved_tensors
    grad = torch.ops.fastft.log_softmax_kl_backward(
        grad_kl.contiguous(), student_logits, teacher_logits, stats, ctx.temperature, ctx.direction, ctx.beta
    )
    return grad, None, None, None, None, None


def _backward_fake(grad_kl, student_logits, teacher_logits, stats, temperature, direction, beta):
    return student_logits.new_empty(student_logits.shape)


def _backward_setup_context(ctx, inputs, output):
    pass


def _backward_backward(ctx, grad):
    raise RuntimeError("log_softmax_kl is not twice differentiable")


def _row_reduce_fake(values, weights, mean):
    return values.new_empty(()), torch.empty_like(values)


def _row_reduce_setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _row_reduce_backward(ctx, grad_out, _grad_row_scale):
    (row_scale,) = ctx.saved_tensors
    return None if grad_out is None else grad_out * row_scale, None, None


def register() -> None:
    """Completes the C++ ops with fakes and gradients; called once, when the extension is loaded."""
    library = torch.library
    library.register_fake("fastft::log_softmax_kl")(_fake)
    library.register_autograd("fastft::log_softmax_kl", _backward, setup_context=_setup_context)
    library.register_fake("fastft::log_softmax_kl_backward")(_backward_fake)
    library.register_autograd(
        "fastft::log_softmax_kl_backward", _backward_backward, setup_context=_backward_setup_context
    )
    library.register_fake("fastft::row_reduce")(_row_reduce_fake)
    library.register_autograd("fastft::row_reduce", _row_reduce_backward, setup_context=_row_reduce_setup_context)
    for rows_op in ("log_softmax_kl_rows", "topk_kl_rows", "cross_entropy_rows"):
        library.register_fake(f"fastft::{rows_op}")(lambda *args: None)
