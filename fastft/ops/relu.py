"""relu: keeps one bit an element for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.ops import _extension
from fastft.ops._common import FLOAT_DTYPES, check_float, wants_grad


def relu(x: Tensor) -> Tensor:
    """max(x, 0), like torch.relu, and instead of the result keeps where x is not below or at 0, one bit an element.

    x [...] of float64, float32, bfloat16 or float16 (float64 on the CPU alone) -> [...], contiguous.
    Backward: dx = dy where the bit is set, else 0. NaN stays NaN and passes its gradient on, as in torch.relu.
    It saves memory where nothing else keeps the result: in front of a linear layer whose weight is frozen. Where no
    gradient is needed it is torch.relu.
    Raises ValueError for another dtype.
    """
    if isinstance(x, Tensor) and x.dtype in FLOAT_DTYPES and not wants_grad(x):
        return torch.relu(x)
    check_float("relu", "x", x)
    _extension.load()
    return torch.ops.fastft.relu(x.contiguous())[0]


def register() -> None:
    """Completes the compiled ops: shapes without data, and their gradients."""
    op, backward_op = torch.ops.fastft.relu.default, torch.ops.fastft.relu_backward.default

    def fake(x):
        return torch.empty_like(x), x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)

    def fake_backward(grad, mask):
        return torch.empty_like(grad)

    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    def backward(ctx, dy, _):
        return None if dy is None else backward_op(dy.contiguous(), *ctx.saved_tensors)

    def setup_context_of_backward(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    def backward_of_backward(ctx, ddx):
        return backward_op(ddx.contiguous(), *ctx.saved_tensors), None

    torch.library.register_fake(op)(fake)
    torch.library.register_fake(backward_op)(fake_backward)
    torch.library.register_autograd(op, backward, setup_context=setup_context)
    torch.library.register_autograd(backward_op, backward_of_backward, setup_context=setup_context_of_backward)
