"""The rms_norm kernels of csrc/cuda on the emulator, against plain PyTorch in float64."""

import pytest
import torch

from fastft.ops import reference
from tests.emulator.launchers import DTYPES, Read, Write
from tests.emulator.test_emulated_relu import part

PAIRS = [(torch.float32, torch.float32)]
PAIRS += [(x, weight) for x in (torch.bfloat16, torch.float16) for weight in (x, torch.float32)]
# Parts of a warp (several rows a block, rows that do not exist), a block, two groups a thread, rows read twice.
SIZES = [(0, 5), (1, 1), (3, 7), (40, 8), (19, 64), (35, 250), (18, 257), (3, 576), (17, 4100), (2, 8200), (18, 8209)]


def run(emulator, rows, width, dtype, weight_dtype, weight_grad, offset=0):
    """y, rstd, dx, dweight; x, weight and dy behind them."""
    x = part(torch.randn(rows * width).to(dtype), offset)
    dy = part(torch.randn(rows * width).to(weight_dtype), offset)
    weight = part((0.5 + torch.rand(width)).to(weight_dtype), offset)
    y, dx = (part(torch.empty(rows * width, dtype=d), offset) for d in (weight_dtype, dtype))
    rstd = torch.empty(rows)
    sizes = {"rows": rows, "width": width, "dtype": DTYPES[dtype], "weight_dtype": DTYPES[weight_dtype]}
    emulator.launch("rms_norm", x=Read(x), weight=Read(weight), y=Write(y), rstd=Write(rstd), eps=1e-5, **sizes)
    chunk = 16  # of rms_norm_chunk_rows for so few rows
    partials = torch.empty(-(-rows // chunk), width)
    dweight = torch.empty(width, dtype=weight_dtype)
    asked = {"partials": Write(partials), "dweight": Write(dweight)} if weight_grad else {}
    emulator.launch("rms_norm_backward", dy=Read(dy), x=Read(x), weight=Read(weight), rstd=Read(rstd), dx=Write(dx),
                    **asked, **sizes)  # fmt: skip
    return (y, rstd, dx, dweight), (x.view(rows, width), weight, dy.view(rows, width))


@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_forward_and_backward(emulator, rows, width, dtype, weight_dtype):
    offset = (rows + width) % 3
    emulator.order(offset)
    (y, rstd, dx, dweight), (x, weight, dy) = run(emulator, rows, width, dtype, weight_dtype, rows % 2 == 1, offset)
    exact, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    truth = reference.rms_norm(exact, exact_weight, 1e-5)
    true_dx, true_dweight = torch.autograd.grad(truth, (exact, exact_weight), dy.double())
    for ours, true in ((y, truth), (dx, true_dx), *([(dweight, true_dweight)] if rows % 2 else [])):
        scale = true.detach().abs().max().item() if true.numel() else 0
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), true.detach().flatten(), rtol=eps, atol=4e-6 * scale + 1e-6)
    true_rstd = (x.double().square().mean(-1) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=1e-6, atol=0)


def test_any_order_of_threads_gives_the_same_bits(emulator):
    results = []
    for order in (0, 1, 2, 3):
        emulator.order(order)
        torch.manual_seed(0)
        found, _ = run(emulator, 37, 300, torch.float32, torch.float32, True)
        results.append(torch.cat([x.flatten() for x in found]))
    assert all(torch.equal(results[0], other) for other in results[1:])
