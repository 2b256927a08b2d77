"""Low-rank adapted linear layer with a frozen base weight."""

from __future__ import annotations

import torch


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias + scaling * (x @ lora_A.T) @ lora_B.T

    x [..., K], weight [N, K], lora_A [r, K], lora_B [N, r], bias [N] or None -> [..., N]; one floating dtype.
    The low-rank product is added in the second product's epilogue (`addmm`), so nothing of size [..., N] is written
    besides the result.

    Backward, with u = x @ lora_A.T and du = scaling * dy @ lora_B:
        dx = dy @ weight + du @ lora_A,  d_lora_A = du.T @ x,  d_lora_B = scaling * dy.T @ u,  d_bias = sum(dy);
        d_weight = dy.T @ x only if weight requires a gradient.
    Saves x, u and the parameters themselves (not views of them), so ZeRO-3 can release a gathered weight.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    r, N, K = lora_A.shape[0], weight.shape[0], weight.shape[1]
    for name, tensor, expected in (("lora_A", lora_A, (r, K)), ("lora_B", lora_B, (N, r))):
        if tuple(tensor.shape) != expected:
            raise ValueError(f"lora_linear: {name} is {list(tensor.shape)}, expected {list(expected)}")
    if x.shape[-1] != K:
        raise ValueError(f"lora_linear: x is {list(x.shape)}, expected [..., {K}] like weight {list(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"lora_linear: bias is {list(bias.shape)}, expected [{N}]")
    return _LoraLinear.apply(x, weight, lora_A, lora_B, scaling, bias)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, bias):
        rows = x.reshape(-1, x.shape[-1])
        u = rows @ lora_A.t()
        y = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        y.addmm_(u, lora_B.t(), alpha=scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(x, weight, lora_A, lora_B, u)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, u = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        need_x, need_weight, need_A, need_B, _, need_bias = ctx.needs_input_grad
        du = (dy @ lora_B).mul_(ctx.scaling) if need_x or need_A else None
        return (
            torch.mm(dy, weight).addmm_(du, lora_A).view_as(x) if need_x else None,
            dy.t() @ rows if need_weight else None,
            du.t() @ rows if need_A else None,
            (dy.t() @ u).mul_(ctx.scaling) if need_B else None,
            None,
            dy.sum(0) if need_bias else None,
        )
