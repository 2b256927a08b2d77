"""attention: ragged sequences behind a prefix that all of them share, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.ops import _extension
from fastft.ops._common import accumulate_dtype, check_float, check_like, refuse_create_graph, shape_of

LARGEST_HEAD = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    seqused_k: Tensor | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    scale: float,
    is_causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q @ K.T) @ V for each query, where K, V are the prefix's keys and values and, behind them, those
    of the query's own sequence: all of them, or with ``is_causal`` those up to its own place.

    q [T, H, D]; k, v [S, G, D], where H / G neighbouring query heads share a key/value head; prefix_k, prefix_v
    [C, G, D] or both None; cu_seqlens_q, cu_seqlens_k (None: the same) int32 [B + 1]: sequence i has the queries
    cu_seqlens_q[i] to cu_seqlens_q[i + 1] and the keys cu_seqlens_k[i] to cu_seqlens_k[i + 1], or with seqused_k int32
    [B] the first seqused_k[i] of them (a cache with room to grow); its last query is at its last key. One dtype
    (float64, float32, bfloat16, float16); D at most 256, contiguous; other strides are free.

    Returns out [T, H, D] and lse [H, T], the log-sum-exp of a query's scaled scores (float32; float64 for float64).
    A query that sees no key gives 0 and -inf. Scores and sums are float32 (float64); probabilities are rounded to the
    dtype. Nothing of size [T, S] exists. The number of threads does not change a result.

    out has a gradient with respect to q, k and v where there is neither a prefix nor seqused_k; lse has none. With
    p = exp(scale * q @ k.T - lse) and ds = scale * p * (grad @ v.T - sum(grad * out)):
        dq = ds @ k,  dk = ds.T @ q,  dv = p.T @ grad.
    CPU only. Raises ValueError for a shape, dtype or device that does not fit, naming the argument, and RuntimeError
    for a gradient that there is not.
    Dao et al. 2022, https://arxiv.org/abs/2205.14135; shared prefixes: Juravsky et al. 2024,
    https://arxiv.org/abs/2402.05099, here in one softmax with the sequence's own keys.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, prefix_k, prefix_v, scale)
    wants_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, prefix_k, prefix_v)
    )
    if wants_grad and (prefix_k is not None or seqused_k is not None):
        raise RuntimeError(
            "attention: has no gradient with prefix_k or seqused_k; call it under torch.no_grad(), or put the prefix "
            "in front of every sequence's keys"
        )
    _extension.load()
    return torch.ops.fastft.attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, prefix_k, prefix_v, scale, is_causal
    )


def _check(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, prefix_k, prefix_v, scale) -> None:
    check_float("attention", "q", q)
    if q.device.type not in ("cpu", "meta"):
        raise ValueError(f"attention: q is on {q.device}; the kernel is the CPU's, a GPU has flash-attn's")
    if q.dim() != 3 or not 0 < q.shape[2] <= LARGEST_HEAD:
        raise ValueError(f"attention: q is {shape_of(q)}, expected [tokens, heads, head_size <= {LARGEST_HEAD}]")
    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("attention: prefix_k and prefix_v must both be given, or neither")
    pairs = [("k", k), ("v", v)] + ([] if prefix_k is None else [("prefix_k", prefix_k), ("prefix_v", prefix_v)])
    for name, x in (("q", q), *pairs):
        check_like("attention", name, x, "q", q)
        if x.dim() != 3 or x.shape[2] != q.shape[2]:
            raise ValueError(f"attention: {name} is {shape_of(x)}, expected [tokens, heads, {q.shape[2]}] like q")
        if x.stride(2) != 1 and x.shape[2] > 1 and x.numel():
            raise ValueError(f"attention: {name} has strides {x.stride()}, expected the last dimension contiguous")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: q has {q.shape[1]} heads, expected a multiple of k's {k.shape[1]}")
    for (name, x), (other, y) in (((pairs[i]), (pairs[j])) for i, j in ((1, 0), (3, 2)) if i < len(pairs)):
        if x.shape != y.shape:
            raise ValueError(f"attention: {name} is {shape_of(x)}, expected {shape_of(y)} like {other}")
    if prefix_k is not None and prefix_k.shape[1] != k.shape[1]:
        raise ValueError(f"attention: prefix_k has {prefix_k.shape[1]} heads, expected {k.shape[1]} like k")
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_like("attention", name, x, "q", q, dtype=False)
        if x.dtype != torch.int32 or x.dim() != 1 or len(x) == 0 or not x.is_contiguous():
            raise ValueError(f"attention: {name} is {x.dtype} {shape_of(x)}, expected contiguous int32 [sequences + 1]")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"attention: cu_seqlens_k is {shape_of(cu_seqlens_k)}, expected {shape_of(cu_seqlens_q)} like cu_seqlens_q"
        )
    if seqused_k is not None:
        check_like("attention", "seqused_k", seqused_k, "q", q, dtype=False)
        if seqused_k.dtype != torch.int32 or seqused_k.shape != (len(cu_seqlens_k) - 1,):
            raise ValueError(
                f"attention: seqused_k is {seqused_k.dtype} {shape_of(seqused_k)}, expected int32 [sequences], "
                f"[{len(cu_seqlens_k) - 1}]"
            )
    if not scale > 0:
        raise ValueError(f"attention: scale is {scale}, expected a positive number")


def register() -> None:
    """Completes the compiled ops: shapes without data, and the gradient."""
    op, backward_op = torch.ops.fastft.attention.default, torch.ops.fastft.attention_backward.default

    def fake(q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, prefix_k, prefix_v, scale, is_causal):
        return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=accumulate_dtype(q.dtype))

    def fake_backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, is_causal):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def setup_context(ctx, inputs, output):
        q, k, v, cu_seqlens_q, cu_seqlens_k, _, _, _, ctx.scale, ctx.is_causal = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k)

    def backward(ctx, grad, _):
        refuse_create_graph("attention")
        if grad is None:
            return (None,) * 10
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        grad = grad if grad.stride(2) == 1 else grad.contiguous()
        gradients = backward_op(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, ctx.scale, ctx.is_causal)
        return (*gradients, *(None,) * 7)

    torch.library.register_fake(op)(fake)
    torch.library.register_fake(backward_op)(fake_backward)
    torch.library.register_autograd(op, backward, setup_context=setup_context)
