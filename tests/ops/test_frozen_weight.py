"""Quantised weights: against bitsandbytes' own dequantisation, and lora_linear on them against plain tensors."""

import pytest
import torch

from fastft.ops import Weight4bit, Weight8bit, frozen_weight, lora_linear
from tests.ops.op_checks import DTYPES

functional = pytest.importorskip("bitsandbytes.functional")
SHAPES = [(96, 128), (33, 70), (7, 9), (1, 1), (64, 2048)]


def four_bit(shape, quant_type="nf4", double=True):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float32)
    packed, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double)
    packed.quant_state = state
    return packed, state


def whole(weight, dtype):
    out = torch.empty(weight.shape, dtype=dtype)
    weight.dequantise(0, weight.shape[0], out)
    return out


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits_are_those_of_bitsandbytes(capability, shape, quant_type, double):
    packed, state = four_bit(shape, quant_type, double)
    truth = functional.dequantize_4bit(packed, state)
    weight = Weight4bit.from_bitsandbytes(packed)
    for dtype in DTYPES:
        ours = whole(weight, dtype)
        # bitsandbytes rounds the twice quantised scale once more.
        torch.testing.assert_close(ours, truth.to(dtype), rtol=2 * torch.finfo(dtype).eps + 3e-7, atol=1e-30)
    part = torch.empty(shape[0] - shape[0] // 4 * 2, shape[1])
    weight.dequantise(shape[0] // 4 * 2, shape[0], part)
    assert torch.equal(part, whole(weight, torch.float32)[shape[0] // 4 * 2 :])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bits_are_those_of_bitsandbytes(capability, shape):
    torch.manual_seed(0)
    values, absmax, _ = functional.int8_vectorwise_quant(torch.randn(shape, dtype=torch.float16))
    holder = type("Int8Params", (), {"CB": values, "SCB": absmax})
    weight = Weight8bit.from_bitsandbytes(holder)
    truth = functional.int8_vectorwise_dequant(values, absmax)
    for dtype in DTYPES:
        torch.testing.assert_close(whole(weight, dtype), truth.to(dtype), rtol=2e-7 + torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_lora_linear_on_a_quantised_weight(monkeypatch, kind, dtype):
    """As on the dequantised weight, forward and backward, with many tiles."""
    monkeypatch.setitem(frozen_weight.TILE_BYTES, "cpu", 10 * 48 * 8)
    torch.manual_seed(0)
    N, K, r = 37, 48, 4
    if kind == "4bit":
        weight = Weight4bit.from_bitsandbytes(four_bit((N, K))[0])
    else:
        weight = Weight8bit(torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N) / 100)
    plain = whole(weight, dtype)
    leaves = [torch.randn(s).to(dtype).requires_grad_() for s in ((2, 5, K), (r, K), (N, r), (N,))]
    dy = torch.randn(2, 5, N).to(dtype)
    results = []
    for w in (weight, plain):
        x, A, B, bias = leaves
        y = lora_linear(x, w, A, B, 0.5, bias)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    # Tiles of the weight are summed one after the other into dx, each sum rounded to its dtype.
    loose = {"rtol": 0.02, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(*results, **loose)


def test_nothing_of_the_weights_size_is_allocated(monkeypatch):
    monkeypatch.setitem(frozen_weight.TILE_BYTES, "cpu", 64 * 512 * 4)
    weight = Weight4bit.from_bitsandbytes(four_bit((1024, 512))[0])
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.untyped_storage().nbytes() for t in (out,) if isinstance(t, torch.Tensor))
            return out

    x = torch.randn(2, 512, requires_grad=True)
    A, B = torch.randn(4, 512, requires_grad=True), torch.randn(1024, 4, requires_grad=True)
    with Watch():
        lora_linear(x, weight, A, B, 0.5).sum().backward()
    assert max(sizes) <= 64 * 512 * 4


def test_opcheck(device):
    packed, state = four_bit((6, 20))
    weight = Weight4bit.from_bitsandbytes(packed)
    move = [t.to(device) for t in (weight.packed, weight.code, weight.absmax, weight.absmax_code, weight.absmax_scale)]
    out = torch.empty(6, 20, device=device)
    utils = ("test_schema", "test_faketensor")
    arguments = (*move, weight.absmax_offset, 64, 256, 0, out)
    torch.library.opcheck(torch.ops.fastft.dequantise_4bit.default, arguments, test_utils=utils)
    torch.ops.fastft.dequantise_4bit(*arguments)
    torch.testing.assert_close(out.cpu(), functional.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-30)
    values = torch.randint(-127, 128, (6, 20), dtype=torch.int8, device=device)
    scale = torch.rand(6, device=device)
    torch.library.opcheck(torch.ops.fastft.dequantise_8bit.default, (values, scale, out), test_utils=utils)
    torch.ops.fastft.dequantise_8bit(values, scale, out)
    torch.testing.assert_close(out, values * scale[:, None])


def test_errors_name_the_argument():
    packed, state = four_bit((6, 20), double=False)
    code, absmax = state.code, state.absmax
    with pytest.raises(ValueError, match=r"packed is torch.uint8 with 60 elements, expected torch.uint8 with 63"):
        Weight4bit((6, 21), packed, code, absmax)
    with pytest.raises(ValueError, match=r"the weight is \[6\], expected \[N, K\]"):
        Weight4bit((6,), packed, code, absmax)
    with pytest.raises(ValueError, match=r"absmax is torch.float64"):
        Weight4bit((6, 20), packed, code, absmax.double())
    with pytest.raises(ValueError, match="absmax_code and absmax_scale go together"):
        Weight4bit((6, 20), packed, code, absmax, absmax_scale=absmax)
    with pytest.raises(ValueError, match="block is 12"):
        Weight4bit((6, 20), packed, code, absmax, 12)
    with pytest.raises(ValueError, match="has no quant_state"):
        Weight4bit.from_bitsandbytes(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="has no CB and SCB"):
        Weight8bit.from_bitsandbytes(torch.zeros(2, 2))
    weight = Weight8bit(torch.zeros(4, 5, dtype=torch.int8), torch.zeros(4))
    with pytest.raises(ValueError, match=r"lora_linear: x is \[2, 6\], expected \[..., 5\] like weight \[4, 5\]"):
        lora_linear(torch.zeros(2, 6), weight, torch.zeros(2, 6), torch.zeros(4, 2), 1.0)
