"""Quantised weights: against bitsandbytes' own dequantisation, and lora_linear on them against plain tensors."""

import pytest
import torch

from fastft.ops import Weight4bit, Weight8bit, frozen_linear, frozen_weight, lora_linear, quantise_4bit
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (3, 4099)], ids=str)
def test_codes_are_those_of_bitsandbytes(capability, shape, block, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    x.view(-1)[:200] = 0  # whole blocks of zeros
    code = functional.get_4bit_type("nf4", device="cpu")
    packed, absmax = quantise_4bit(x, code, block)
    if not x.numel():
        assert packed.numel() == absmax.numel() == 0
        return
    theirs, state = functional.quantize_4bit(x, blocksize=block, quant_type="nf4")
    assert torch.equal(packed, theirs.flatten())
    assert torch.equal(absmax, state.absmax)


def test_codes_at_the_bounds_and_of_strided_weights(capability):
    code = functional.get_4bit_type("nf4", device="cpu")
    bounds = (code[:-1] + code[1:]) / 2
    near = torch.stack(
        [bounds, torch.nextafter(bounds, torch.tensor(2.0)), torch.nextafter(bounds, torch.tensor(-2.0))]
    )
    x = torch.cat([near.flatten(), torch.ones(64 - near.numel() % 64)])
    packed, _ = quantise_4bit(x, code)
    assert torch.equal(packed, functional.quantize_4bit(x, blocksize=64, quant_type="nf4")[0].flatten())
    strided = torch.randn(128, 96).t()
    assert all(map(torch.equal, quantise_4bit(strided, code), quantise_4bit(strided.contiguous(), code)))


def test_what_quantise_4bit_refuses():
    code = functional.get_4bit_type("nf4", device="cpu")
    with pytest.raises(ValueError, match="block is 32, expected a multiple of 64"):
        quantise_4bit(torch.randn(64), code, 32)
    with pytest.raises(ValueError, match=r"code is torch.float32 \[16\], expected float32 \[16\], sorted"):
        quantise_4bit(torch.randn(64), code.flip(0))
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        quantise_4bit(torch.arange(64), code)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_linear_keeps_no_input(dtype, bias):
    """As F.linear on the dequantised weight, forward and backward; between them only what the weight holds is alive."""
    packed, _ = four_bit((40, 64))
    weight = Weight4bit.from_bitsandbytes(packed)
    plain = whole(weight, dtype)
    torch.manual_seed(0)
    x, dy = torch.randn(2, 5, 64, dtype=dtype), torch.randn(2, 5, 40, dtype=dtype)
    b = torch.randn(40, dtype=dtype) if bias else None
    found = []
    for linear, w in ((frozen_linear, weight), (torch.nn.functional.linear, plain)):
        own_x = x.clone().requires_grad_(True)
        own_b = None if b is None else b.clone().requires_grad_(True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = linear(own_x, w, own_b)
        if w is weight:
            assert not kept
        y.backward(dy)
        found.append((y.detach(), own_x.grad, *([] if b is None else [own_b.grad])))
    for ours, theirs in zip(*found, strict=True):
        # Sums of 64 products of which the largest are near 10, rounded in another order.
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)


def test_frozen_linear_refuses_what_does_not_fit():
    weight = Weight4bit.from_bitsandbytes(four_bit((40, 64))[0])
    with pytest.raises(ValueError, match=r"x is \[3, 60\], expected \[..., 64\] like weight \[40, 64\]"):
        frozen_linear(torch.randn(3, 60), weight)
    with pytest.raises(ValueError, match=r"bias is \[64\], expected \[40\]"):
        frozen_linear(torch.randn(3, 64), weight, torch.randn(64))


def test_twice_differentiable_with_a_plain_weight_alone():
    x, values = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.randint(-127, 128, (5, 6))
    assert torch.autograd.gradgradcheck(lambda x: frozen_linear(x.sin(), values.double()).sin(), x)
    quantised = Weight8bit(values.to(torch.int8), torch.rand(5))
    with pytest.raises(RuntimeError, match="frozen_linear is not twice differentiable"):
        torch.autograd.grad(frozen_linear(x, quantised).sum(), x, create_graph=True)
