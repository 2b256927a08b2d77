"""The rotary kernel of csrc/cuda on the emulator, against plain PyTorch."""

import pytest
import torch

from fastft.ops import reference
from tests.emulator.launchers import DTYPES, Read, Write
from tests.emulator.test_emulated_relu import FLOATS, part


def heads(batch, tokens, count, size, dtype, *, offset=0, gap=0):
    """Memory of NaN, and [batch, count, tokens, size] in it: a token's heads side by side, `gap` between them."""
    rows = torch.full((batch, tokens, count, size + gap), torch.nan).to(dtype)
    rows[..., :size] = torch.randn(batch, tokens, count, size)
    memory = part(rows.flatten(), offset)
    return memory, memory.view(rows.shape)[..., :size].transpose(1, 2)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "angle_dtype"), [*zip(FLOATS, FLOATS, strict=True), (FLOATS[1], FLOATS[0])])
@pytest.mark.parametrize(
    ("shape", "rotated", "offset", "gap"),
    [
        ((1, 33, 4, 2, 64), 64, 0, 0),
        ((2, 3, 3, 1, 20), 12, 0, 0),  # part of the head, halves that are no multiple of eight
        ((2, 5, 2, 0, 32), 16, 1, 8),  # nothing aligned, gaps between the heads, no k
        ((1, 1, 1, 1, 7), 0, 3, 1),  # nothing rotated
    ],
)
def test_both_directions(emulator, shape, rotated, offset, gap, dtype, angle_dtype, transposed):
    emulator.order(offset)
    batch, tokens, query_heads, kv_heads, size = shape
    (memory_q, q), (memory_k, k) = (
        heads(batch, tokens, count, size, dtype, offset=offset, gap=gap) for count in (query_heads, kv_heads)
    )
    y_q, y_k = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    cos, sin = (part(torch.randn(tokens * rotated).to(angle_dtype), offset).view(1, tokens, rotated) for _ in range(2))
    strides = {
        f"{name}_{dimension}": x.stride(i)
        for name, x in (("q", q), ("y_q", y_q), ("k", k), ("y_k", y_k))
        for i, dimension in enumerate(("batch", "head", "token"))
    }
    emulator.launch(
        "rotary", q=Read(memory_q), y_q=Write(y_q), heads=query_heads, k=Read(memory_k), y_k=Write(y_k),
        kv_heads=kv_heads, cos=Read(cos), sin=Read(sin), cos_batch=0, cos_token=rotated, sin_batch=0, sin_token=rotated,
        batch=batch, tokens=tokens, size=size, rotated=rotated, transposed=transposed, dtype=DTYPES[dtype],
        angle_dtype=DTYPES[angle_dtype], **strides,
    )  # fmt: skip
    leaves = [x.double().requires_grad_() for x in (q, k)]
    truth = reference.rotary(*leaves, cos.double(), sin.double())
    if transposed:
        truth = torch.autograd.grad(truth, leaves, leaves)
    for ours, x in zip((y_q, y_k), truth, strict=True):
        torch.testing.assert_close(ours, x.detach().to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
