"""rms_norm: root mean square normalisation, one pass forward and one backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastft.ops import _extension
from fastft.ops._common import accumulate_dtype, check_hidden, check_like, shape_of


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x**2, -1) + eps) * weight

    x [..., H] of float64, float32, bfloat16 or float16 (float64 on the CPU alone), H >= 1; weight [H] of x's dtype, or
    float32 beside an x of 16 bits -> [..., H] of weight's dtype, which is what type promotion gives transformers' form.
    Autocast changes none of these.
    All arithmetic is float32 (float64 for float64) and rounded once, at the end; transformers rounds x * rsqrt(...) to
    x's dtype first and the product with weight again.

    With r = rsqrt(mean(x**2) + eps) of a row and n = x * r, backward is
        dx = r * (dy * weight - n * mean(dy * weight * n)),  dweight = sum over rows of dy * n,
    the latter only where weight requires a gradient, in an order that depends on the shape alone. Keeps x, weight
    itself (so ZeRO-3 can release a gathered one) and r [...] in float32. Not twice differentiable: a second
    derivative raises RuntimeError.
    Raises ValueError for a shape, dtype, device or eps that does not fit, naming the argument.
    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    _check(x, weight, eps)
    _extension.load()
    return torch.ops.fastft.rms_norm(x.contiguous(), weight.contiguous(), eps)[0]


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    op = "rms_norm"
    check_hidden(op, "x", x)
    check_like(op, "weight", weight, "x", x, dtype=False)
    allowed = [x.dtype] if x.dtype.itemsize > 2 else [x.dtype, torch.float32]
    if weight.dtype not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ValueError(f"{op}: weight is {weight.dtype}, expected {expected} beside {x.dtype} x")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x is {shape_of(x)}, expected [..., H] with H of at least 1")
    if weight.dim() != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"{op}: weight is {shape_of(weight)}, expected [{x.shape[-1]}] like the last dimension of x")
    if not (isinstance(eps, int | float) and 0 <= eps < math.inf):
        raise ValueError(f"{op}: eps is {eps!r}, expected a finite number of at least 0")


def register() -> None:
    """Completes the compiled ops: shapes without data, and their gradients."""
    op, backward_op = torch.ops.fastft.rms_norm.default, torch.ops.fastft.rms_norm_backward.default

    def fake(x, weight, eps):
        return weight.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x.dtype))

    def fake_backward(grad, x, weight, rstd, weight_grad):
        return torch.empty_like(x), weight.new_empty(weight.shape if weight_grad else (0,))

    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:2], output[1])

    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None
        dx, dweight = backward_op(dy.contiguous(), *ctx.saved_tensors, ctx.needs_input_grad[1])
        return dx, dweight if ctx.needs_input_grad[1] else None, None

    def setup_context_of_backward(ctx, inputs, output):
        pass

    def backward_of_backward(ctx, *_):
        raise RuntimeError(
            "rms_norm is not twice differentiable; use fastft.ops.reference.rms_norm for second derivatives"
        )

    torch.library.register_fake(op)(fake)
    torch.library.register_fake(backward_op)(fake_backward)
    torch.library.register_autograd(op, backward, setup_context=setup_context)
    torch.library.register_autograd(backward_op, backward_of_backward, setup_context=setup_context_of_backward)
