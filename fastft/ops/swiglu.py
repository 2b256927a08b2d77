"""swiglu: the gated product of an MLP, which keeps its two inputs alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.ops import _extension
from fastft.ops._common import accumulate_dtype, check_float, check_like, shape_of


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, silu(g) = g s with s = 1 / (1 + exp(-g)), without ever writing silu(gate).

    gate, up [...] of one shape and dtype (float64, float32, bfloat16 or float16; float64 on the CPU alone) -> [...],
    contiguous. Arithmetic in float32 (float64), one rounding. The dtype is that of the inputs also under autocast.
    In float32 exp(-|g|) is 0 where |g| > 87.3 (AVX-512: 103.9), and silu of a negative g is -0 there, in torch at most
    1e-36 in size; inf and NaN are as in torch.

    Backward computes s again from gate, and keeps gate and up alone, where torch keeps silu(gate) as well:
        dgate = dy up s (1 + gate (1 - s)),   dup = dy gate s.
    It is differentiable in turn, by plain PyTorch in float32 (float64).
    Raises ValueError for a shape, dtype or device that does not fit.
    Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """
    check_float("swiglu", "gate", gate)
    check_like("swiglu", "up", up, "gate", gate)
    if up.shape != gate.shape:
        raise ValueError(f"swiglu: up is {shape_of(up)}, expected {shape_of(gate)} like gate")
    _extension.load()
    return torch.ops.fastft.swiglu(gate.contiguous(), up.contiguous())


def register() -> None:
    """Completes the compiled ops: shapes without data, and their gradients."""
    op, backward_op = torch.ops.fastft.swiglu.default, torch.ops.fastft.swiglu_backward.default

    def fake(gate, up):
        return torch.empty_like(gate)

    def fake_backward(grad, gate, up):
        return torch.empty_like(gate), torch.empty_like(up)

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    def backward(ctx, dy):
        if dy is None:
            return None, None
        dgate, dup = backward_op(dy.contiguous(), *ctx.saved_tensors)
        return dgate if ctx.needs_input_grad[0] else None, dup if ctx.needs_input_grad[1] else None

    def setup_context_of_backward(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward_of_backward(ctx, a, b):
        """Of a dgate + b dup = dy (a up f' + b f) with f = gate s, f' = s (1 + gate r), r = 1 - s."""
        dtype = ctx.saved_tensors[0].dtype
        dy, gate, up, a, b = (x.to(accumulate_dtype(dtype)) for x in (*ctx.saved_tensors, a, b))
        s, r = gate.sigmoid(), (-gate).sigmoid()
        first = s * (1 + gate * r)
        second = s * r * (2 + gate * (r - s))
        return (
            (a * up * first + b * gate * s).to(dtype),
            (dy * (a * up * second + b * first)).to(dtype),
            (dy * a * first).to(dtype),
        )

    torch.library.register_fake(op)(fake)
    torch.library.register_fake(backward_op)(fake_backward)
    torch.library.register_autograd(op, backward, setup_context=setup_context)
    torch.library.register_autograd(backward_op, backward_of_backward, setup_context=setup_context_of_backward)
