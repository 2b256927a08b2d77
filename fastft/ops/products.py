"""Matrix products of 16-bit tensors on the CPU: where the processor has no instructions for them, and where it has.

On a CPU torch has fast 16-bit products only where oneDNN has: bfloat16 needs AVX-512, float16 AVX-512 FP16 or AMX.
Elsewhere its own loops take over, which on AVX2 are 5 (x @ w.T) to 100 times (x @ w) slower than float32. There the
products of this file convert one operand a block at a time, the other a block of rows at a time, multiply in float32
and round once: the speed of float32 at the memory of 16 bits, and results that are rounded as oneDNN's are.

Where oneDNN has them it compiles code for every number of rows that it meets, 0.3 to 1.5 MB for each shape of a weight,
and keeps most of it for ever: a training run of ragged batches grew by 5 MB a step. Passes therefore round their number
of rows up (`rounded_rows`), so that few numbers occur.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FEW_ROWS = 4  # of x, for which torch's dot products with rows of w wait for memory
BLOCK = 2**19  # elements that are converted at a time: 2 MiB of float32, a core's share of the last cache


def _has_products(dtype: torch.dtype) -> bool:
    """Whether torch multiplies CPU matrices of this dtype at the speed that the processor has for it."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in supported or getattr(torch.ops.mkldnn, supported[dtype], lambda: False)()


WIDENED = tuple(dtype for dtype in (torch.bfloat16, torch.float16) if not _has_products(dtype))


def widens(x: Tensor) -> bool:
    """Whether products of x are computed in float32, block by block; those of tensors without data never are."""
    return x.dtype in WIDENED and x.is_cpu and not isinstance(x, FakeTensor)


def rounded_rows(rows: int, like: Tensor) -> int:
    """How many rows to multiply in place of `rows`: as many, or up to a sixteenth more where oneDNN compiles.

    One of sixteen numbers in each octave.
    """
    compiles = like.is_cpu and like.dtype in (torch.bfloat16, torch.float16) and like.dtype not in WIDENED
    if not compiles or isinstance(like, FakeTensor):
        return rows
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step


def mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N] in their dtype, as torch.mm."""
    if not _takes(a, b):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    return _widened(out, a, b, accumulate=False)


def addmm(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y [M, N] or [N] + a [M, K] @ b [K, N], rounded once (a single row may be twice), as torch.addmm."""
    if not _takes(a, b, y):
        return torch.addmm(y, a, b)
    return _widened(y.expand(a.shape[0], b.shape[1]).clone(), a, b, accumulate=True)


def addmm_(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y [M, N] += a [M, K] @ b [K, N], rounded as in `addmm`, as Tensor.addmm_."""
    if not _takes(a, b, y):
        return y.addmm_(a, b)
    return _widened(y, a, b, accumulate=True)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K].T + bias [N] -> [..., N], with gradients, as torch.nn.functional.linear.

    Where products are widened it is not twice differentiable: RuntimeError in a backward with create_graph.
    """
    if not widens(x) or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def _takes(a: Tensor, b: Tensor, *added: Tensor) -> bool:
    """Whether a @ b is to be widened.

    Torch has what does not fit together, for its message; what is to be differentiated, for its gradient; what is being
    compiled; and a few rows of x @ w.T, whose dot products it takes at the speed at which w comes from memory.
    """
    tensors = (a, b, *added)
    return (
        widens(a)
        and all(t.dtype == a.dtype and t.is_cpu for t in tensors)
        and a.shape[1] == b.shape[0]
        and not (a.shape[0] <= FEW_ROWS and b.stride(0) == 1)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and not torch.compiler.is_compiling()
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        # The parameter itself: under ZeRO-3 its data come and go.
        ctx.weight = weight
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None)
        rows = x.reshape(-1, x.shape[-1])
        y = mm(rows, weight.t()) if bias is None else addmm(bias, rows, weight.t())
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            raise RuntimeError("products.linear is not twice differentiable where products are widened: use float32")
        rows, (x,) = dy.reshape(-1, dy.shape[-1]), ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = mm(rows, ctx.weight).view(*dy.shape[:-1], ctx.weight.shape[1]) if need_x else None
        dw = mm(rows.t(), x.reshape(-1, x.shape[-1])) if need_weight else None
        return dx, dw, rows.sum(0) if need_bias else None


def _widened(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> Tensor:
    (M, K), N = a.shape, b.shape[1]
    if M == 1:  # torch.mv has loops for either layout
        out[0] = torch.addmv(out[0], b.t(), a[0]) if accumulate else torch.mv(b.t(), a[0])
        return out
    narrow, wide = max(1, min(K, N)), max(1, K, N)
    step = min(wide, max(1, BLOCK // narrow))
    rows = max(1, 2 * BLOCK // max(narrow, step))  # of what is converted or summed beside a block, twice a block
    # Each buffer is used again for every block: fresh pages would cost as much as the conversion.
    block, sums = torch.empty(step * narrow), torch.empty(min(rows, M) * (step if K <= N else narrow))
    for begin in range(0, M, rows):
        top, y = a[begin : begin + rows], out[begin : begin + rows]
        if K <= N:  # a block of columns: their sums are complete
            top = top.float()
            for n in range(0, N, step):
                part = y[:, n : n + step]
                total = sums[: part.numel()].view(part.shape)
                torch.mm(top, _float(b[:, n : n + step], block), out=total)
                part.copy_(total.add_(part) if accumulate else total)
        else:  # a block of terms: their sums go on in float32
            total = sums[: y.numel()].view(y.shape)
            total.copy_(y) if accumulate else total.zero_()
            for k in range(0, K, step):
                total.addmm_(top[:, k : k + step].float(), _float(b[k : k + step], block))
            y.copy_(total)
    return out


def _float(x: Tensor, buffer: Tensor) -> Tensor:
    """x in float32, in the buffer's memory, in the order of its own."""
    if x.stride(0) < x.stride(1):
        return _float(x.t(), buffer).t()
    return buffer[: x.numel()].view(x.shape).copy_(x)
