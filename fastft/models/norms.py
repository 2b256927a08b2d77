"""RMSNorm by `fastft.ops.rms_norm`, in place of the modules that compute the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastft.ops import reference, rms_norm


class RMSNorm(nn.Module):
    """x * rsqrt(mean(x**2, -1) + eps) * weight in one pass, with one rounding: `fastft.ops.rms_norm`.

    weight: another module's own parameter [H]. keeps_dtype: the result has x's dtype, where type promotion would give
    weight's.
    """

    def __init__(self, weight: nn.Parameter, eps: float, keeps_dtype: bool):
        super().__init__()
        self.weight = weight
        self.eps, self.keeps_dtype = eps, keeps_dtype

    def forward(self, x: Tensor) -> Tensor:
        y = rms_norm(x, self.weight, self.eps)
        return y.to(x.dtype) if self.keeps_dtype else y

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def fuse_norms(model: nn.Module) -> None:
    """Replace the modules of transformers that compute x * rsqrt(mean(x**2, -1) + eps) * weight.

    Eager, such a norm writes four float32 copies of its input and reads them again: of a small model's training step
    that is a tenth. Which modules these are is found by what they compute (`_fused`), not by names of models: Gemma's
    multiplies by 1 + weight, and stays.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if fused := _fused(child):
                setattr(parent, name, fused)


def _fused(module: nn.Module) -> RMSNorm | None:
    """The module in its place, with the same parameter; None for one that computes something else."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        isinstance(module, RMSNorm)
        or not type(module).__name__.endswith("RMSNorm")
        or [name for name, _ in module.named_parameters()] != ["weight"]
        or module.weight.dim() != 1
        or next(module.buffers(), None) is not None
        or not isinstance(eps, float)
        or "forward" in vars(module)  # somebody else's has taken the class's place
    ):
        return None
    keeps_dtype = _probe(module, eps)
    return None if keeps_dtype is None else RMSNorm(module.weight, eps, keeps_dtype).train(module.training)


@torch.no_grad()
def _probe(module: nn.Module, eps: float) -> bool | None:
    """Whether a float32 weight leaves the dtype of an x of 16 bits; None where the module computes another formula.

    Its class computes with a small weight drawn here: that of the module may have no data, or be partitioned.
    """
    size = 48
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, size, generator=generator)
    x[1] *= 10
    x[2] *= eps**0.5  # a row in which eps counts as much as the squares
    weight = 0.5 + torch.rand(size, generator=generator)
    copy = type(module).__new__(type(module))
    vars(copy).update(vars(module), _parameters={"weight": nn.Parameter(weight, requires_grad=False)})
    try:
        found, narrow = (type(module).forward(copy, a) for a in (x, x.bfloat16()))
    except Exception:  # a forward of other arguments, or one that insists on the module's own size
        return None
    expected = reference.rms_norm(x, weight, eps)
    alike = isinstance(found, Tensor) and found.dtype == x.dtype and found.shape == x.shape
    if not alike or not torch.allclose(found, expected, rtol=1e-5, atol=1e-7):
        return None
    return narrow.dtype == torch.bfloat16
