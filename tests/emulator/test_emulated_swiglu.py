"""The swiglu kernels of csrc/cuda on the emulator, against plain PyTorch."""

import pytest
import torch

from fastft.ops import reference
from tests.emulator.launchers import DTYPES, Read, Write
from tests.emulator.test_emulated_relu import FLOATS, part


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("count", "offset"), [(1, 0), (7, 0), (8, 0), (9, 1), (2048, 0), (2049, 3), (5000, 0)])
def test_forward_and_backward(emulator, count, offset, dtype):
    """Sizes around a thread's eight and a block's 2048, aligned or not; NaN, infinities, large numbers."""
    emulator.order(offset)
    gate = 4 * torch.randn(count)
    gate[: min(count, 7)] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6e4, -6e4])[:count]
    gate, up, dy = (part(x.to(dtype), offset) for x in (gate, torch.randn(count), torch.randn(count)))
    y, dgate, dup = (part(torch.empty(count, dtype=dtype), offset) for _ in range(3))
    common = {"gate": Read(gate), "up": Read(up), "count": count, "dtype": DTYPES[dtype]}
    emulator.launch("swiglu", y=Write(y), **common)
    emulator.launch("swiglu_backward", dy=Read(dy), dgate=Write(dgate), dup=Write(dup), **common)
    leaves = [x.double().requires_grad_() for x in (gate, up)]
    truth = reference.swiglu(*leaves)
    truths = [truth.detach(), *torch.autograd.grad(truth, leaves, dy.double())]
    for ours, x in zip((y, dgate, dup), truths, strict=True):
        torch.testing.assert_close(ours, x.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5, equal_nan=True)
