"""The relu kernels of csrc/cuda on the emulator, against torch.relu."""

import pytest
import torch

from tests.emulator.launchers import DTYPES, Read, Write

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def part(x, offset):
    """x in memory of its own that begins `offset` elements behind an aligned address."""
    whole = torch.empty(x.numel() + offset, dtype=x.dtype)
    whole[offset:] = x
    return whole[offset:]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("count", "offset"), [(1, 0), (7, 0), (8, 0), (9, 1), (2048, 0), (2049, 3), (5000, 0)])
def test_forward_and_backward(emulator, count, offset, dtype):
    """Sizes around a thread's eight and a block's 2048, aligned or not; NaN, infinities and both zeros among them."""
    emulator.order(offset)
    x = torch.randn(count)
    x[: min(count, 5)] = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0])[:count]
    x, dy = part(x.to(dtype), offset), part(torch.randn(count).to(dtype), offset)
    y, dx = (part(torch.empty(count, dtype=dtype), offset) for _ in range(2))
    mask = torch.empty(-(-count // 8), dtype=torch.uint8)
    emulator.launch("relu", x=Read(x), y=Write(y), mask=Write(mask), count=count, dtype=DTYPES[dtype])
    emulator.launch("relu_backward", dy=Read(dy), mask=Read(mask), dx=Write(dx), count=count, dtype=DTYPES[dtype])
    leaf = x.clone().requires_grad_()
    truth = torch.relu(leaf)
    truth.backward(dy)
    torch.testing.assert_close(y, truth.detach(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(dx, leaf.grad)
    bits = (mask[:, None] >> torch.arange(8) & 1).flatten()
    assert torch.equal(bits[:count].bool(), ~(x <= 0)) and not bits[count:].any()
