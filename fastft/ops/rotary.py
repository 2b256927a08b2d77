"""rotary: position embedding of queries and keys in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.ops import _extension
from fastft.ops._common import check_float, check_like, shape_of


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both x * cos + rotate_half(x) * sin, as in transformers. With x1, x2 the halves of a head's first R elements:

        y1 = x1 c1 - x2 s1,   y2 = x2 c2 + x1 s2,   and the other D - R elements as they are.

    q [B, heads, S, D] and k [B, kv_heads, S, D] of one dtype (float64, float32, bfloat16, float16; float64 on the CPU
    alone); cos and sin [B or 1, S, R], R even and at most D, of that dtype, or float32 beside 16 bits. Any strides;
    where the last dimension is not contiguous, a copy is made. Returns both in their shapes and dtype, without gaps,
    and in their inputs' memory order: a token's heads side by side where they are so in x. Arithmetic in float32
    (float64), one rounding. The dtype is that of q also under autocast.

    Backward: dx1 = dy1 c1 + dy2 s2, dx2 = dy2 c2 - dy1 s1, for any cos and sin, and any number of times; cos and sin
    are all that is kept.
    Raises ValueError for a shape, dtype or device that does not fit, and where cos or sin requires grad.
    Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    _check(q, k, cos, sin)
    _extension.load()
    return torch.ops.fastft.rotary(_with_rows(q), _with_rows(k), _with_rows(cos), _with_rows(sin), False)


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_float("rotary", "q", q)
    if q.dim() != 4:
        raise ValueError(f"rotary: q is {shape_of(q)}, expected [batch, heads, tokens, head_size]")
    check_like("rotary", "k", k, "q", q)
    batch, _, tokens, size = q.shape
    if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, tokens, size):
        raise ValueError(f"rotary: k is {shape_of(k)}, expected [{batch}, kv_heads, {tokens}, {size}] like q")
    for name, x in (("cos", cos), ("sin", sin)):
        check_like("rotary", name, x, "q", q, dtype=False)
        if x.dtype != q.dtype and not (x.dtype == torch.float32 and q.dtype in (torch.bfloat16, torch.float16)):
            wider = "" if q.dtype.itemsize > 2 else " or float32"
            raise ValueError(f"rotary: {name} is {x.dtype}, expected {q.dtype} like q{wider}")
        if x.dim() != 3 or x.shape[0] not in (1, batch) or x.shape[1] != tokens or x.shape[2] > size or x.shape[2] % 2:
            raise ValueError(
                f"rotary: {name} is {shape_of(x)}, expected [{batch} or 1, {tokens}, rotated], rotated even and at "
                f"most {size}, q's head size"
            )
        if x.requires_grad:
            raise ValueError(f"rotary: {name} requires grad, expected constants; detach them")
    if sin.shape[2] != cos.shape[2] or sin.dtype != cos.dtype:
        raise ValueError(
            f"rotary: sin is {sin.dtype} {shape_of(sin)}, expected {cos.dtype} and {cos.shape[2]} columns like cos"
        )


def register() -> None:
    """Completes the compiled op: shapes without data, and its gradient, which is the op itself transposed."""
    op = torch.ops.fastft.rotary.default

    def empty(x):
        batch, heads, tokens, size = x.shape
        if x.stride(1) < x.stride(2):
            return x.new_empty((batch, tokens, heads, size)).transpose(1, 2)
        return x.new_empty((batch, heads, tokens, size))

    def fake(q, k, cos, sin, transposed):
        return empty(q), empty(k)

    def setup_context(ctx, inputs, output):
        q, k, cos, sin, ctx.transposed = inputs
        ctx.mark_non_differentiable(*(y for x, y in zip((q, k), output, strict=True) if not x.requires_grad))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)

    def backward(ctx, *grads):
        given = next((dy for dy in grads if dy is not None), None)
        if given is None:
            return (None,) * 5
        batch, _, tokens, size = given.shape
        # Of one that nothing is asked of, no heads.
        dy_q, dy_k = (given.new_empty((batch, 0, tokens, size)) if dy is None else _with_rows(dy) for dy in grads)
        results = op(dy_q, dy_k, *ctx.saved_tensors, not ctx.transposed)
        dq, dk = (None if dy is None else dx for dx, dy in zip(results, grads, strict=True))
        return dq, dk, None, None, None

    torch.library.register_fake(op)(fake)
    torch.library.register_autograd(op, backward, setup_context=setup_context)
