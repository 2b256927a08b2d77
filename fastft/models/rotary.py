"""Rotary position embeddings in one pass: `fastft.ops.rotary` in the attention modules of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from fastft.ops import reference, rotary

NAME = "apply_rotary_pos_emb"


def fuse_rotary(model: nn.Module) -> None:
    """Let each attention module embed positions by `fastft.ops.rotary`.

    transformers' attention calls a function of its modeling file, `apply_rotary_pos_emb`. Each module gets, as its own
    `forward`, its class's function with other globals, in which that name is ours; transformers and other models of
    the process stay as they are. A module stays as it is where its function computes something else (other pairs of
    elements, other arguments), which a try in float64 shows, or where its forward is wrapped.
    """
    known: dict[Callable, Callable | None] = {}
    for module in model.modules():
        forward = type(module).forward
        if forward not in known:
            known[forward] = _with_our_function(forward)
        if known[forward] is not None and "forward" not in vars(module):
            module.forward = MethodType(known[forward], module)


def _with_our_function(forward: Callable) -> Callable | None:
    """The function with our embedding in place of its own; None where that would change what it computes."""
    if (
        not isinstance(forward, FunctionType)
        or hasattr(forward, "__wrapped__")
        or NAME not in forward.__code__.co_names
    ):
        return None
    theirs = forward.__globals__.get(NAME)
    if not callable(theirs) or not _is_rotary(theirs):
        return None
    # Without its name torch.compile would not look for our function in transformers' file.
    names = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
    ours = FunctionType(
        forward.__code__, {**names, NAME: apply_rotary_pos_emb}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    ours.__kwdefaults__, ours.__dict__ = forward.__kwdefaults__, dict(vars(forward))
    ours.__annotations__, ours.__doc__, ours.__module__ = forward.__annotations__, forward.__doc__, forward.__module__
    return ours


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """As in transformers: q, k [B, heads, S, D], or with unsqueeze_dim=2 [B, S, heads, D]."""
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"{NAME}: unsqueeze_dim is {unsqueeze_dim}, expected 1 or 2")
    if q.dtype == torch.float64:  # OLMo's angles are float32 whatever q is
        cos, sin = cos.double(), sin.double()
    if unsqueeze_dim == 1:
        return rotary(q, k, cos, sin)
    q, k = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def _is_rotary(function: Callable) -> bool:
    """Whether it computes what ours does, of the whole head and, where it takes that, of a part."""
    if list(inspect.signature(function).parameters) != list(inspect.signature(apply_rotary_pos_emb).parameters):
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    whole, part = (
        _agrees(function, random(2, 4, 3, 16), random(2, 2, 3, 16), random(2, 3, rotated), random(2, 3, rotated))
        for rotated in (16, 8)
    )
    return whole is True and part is not False


def _agrees(theirs: Callable, *tensors: Tensor) -> bool | None:
    """Whether it gives what ours does; None where it refuses the shapes."""
    try:
        expected = theirs(*tensors)
    except (RuntimeError, ValueError, IndexError):
        return None
    found = reference.rotary(*tensors)
    return (
        isinstance(expected, tuple)
        and len(expected) == len(found)
        and all(x.shape == y.shape and torch.allclose(x, y, rtol=1e-12) for x, y in zip(expected, found, strict=True))
    )
