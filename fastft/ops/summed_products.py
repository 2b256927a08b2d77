"""Several matrix products with one result, which is written once."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastft.ops import products


def summed_products(a: Sequence[Tensor], b: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """sum over n of a[n] @ b[n].T, + bias

    a[n] [M, K_n] with contiguous rows, b[n] [N, K_n], all contiguous along the same dimension, bias [N] -> [M, N]; one
    dtype and device, for a GPU one that `obstacle` has nothing against. On a GPU this is one product whose depth is the
    sum of theirs, rounded once; on a CPU torch's products, one after the other. Without gradients.
    """
    if a[0].is_cuda:
        y = a[0].new_empty(a[0].shape[0], b[0].shape[0])
        torch.ops.fastft.summed_products.default(a, b, bias, y)
        return y
    y = products.linear(a[-1], b[-1], bias)
    for rows, matrix in zip(a[:-1], b[:-1], strict=True):
        products.addmm_(y, rows, matrix.t())
    return y


def obstacle(device: torch.device, dtype: torch.dtype, count: int, sizes: Mapping[str, Sequence[int]]) -> str | None:
    """Why there is no kernel for `count` products with these depths and numbers of columns; None where there is one."""
    if device.type != "cuda":
        return None
    if _not_built:
        return _not_built
    found = torch.cuda.get_device_properties(device)  # which torch.compile takes for a constant
    if (found.major, found.minor) != (9, 0):
        return f"the GPU has compute capability {found.major}.{found.minor}, its kernel is built for 9.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"x is {dtype}, its kernel is for bfloat16 and float16"
    if count > _most:
        return f"there are {count} products to sum, its kernel takes {_most}"
    for name, numbers in sizes.items():
        for n in numbers:
            if n <= 0 or n % _multiple:
                return f"{name}: {n} is not a multiple of {_multiple}"
    return None


# Of the build, as plain values: a call of the extension would end a trace.
_not_built, _most, _multiple = "fastft's extension is not built", 0, 1


def register() -> None:
    global _not_built, _most, _multiple
    torch.library.register_fake("fastft::summed_products")(lambda a, b, bias, y: None)
    build = importlib.import_module("fastft._build")
    _not_built = "" if build.CUTLASS else f"fastft was built without CUTLASS ({build.CUTLASS_REASON})"
    _most, _multiple = build.SUMMED_PRODUCTS, build.SUMMED_PRODUCTS_ALIGNMENT
