"""summed_products, lora_linear's form "main_loop": its formula, when it can be used, and on a GPU its kernel."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fastft.ops import _extension, lora_linear, lora_linears, reference
from fastft.ops.lora_linear import PICKED, pick_form
from fastft.ops.summed_products import obstacle, summed_products
from tests.ops.op_checks import assert_as_accurate

module = sys.modules[obstacle.__module__]  # in the package's namespace its name may be the function's
GPU = torch.device("cuda", 0)
SIZES = {"out features": [16, 24], "rank": [8]}


@pytest.fixture
def kernel():
    """The GPU, where it has the kernel."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if why := obstacle(GPU, torch.bfloat16, 2, SIZES):
        pytest.skip(why)
    return GPU


@pytest.fixture
def hopper(monkeypatch):
    """As if there were the GPU and the build that the kernel is for; nothing can be launched."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9, minor=0))
    monkeypatch.setattr(module, "_not_built", "")


def operands(M, N, depths, dtype, device, by_depth=False):
    torch.manual_seed(M + N)
    a = [torch.randn(M, d, device=device).to(dtype) for d in depths]
    b = [torch.randn(N, d, device=device).to(dtype) for d in depths]
    return a, [x.t().contiguous().t() for x in b] if by_depth else b


def check(a, b, bias=None):
    ours = summed_products(a, b, bias)
    shift = 0 if bias is None else bias
    plain = sum(x @ y.t() for x, y in zip(a, b, strict=True)) + shift
    truth = sum(x.double() @ y.double().t() for x, y in zip(a, b, strict=True)) + (0 if bias is None else bias.double())
    assert_as_accurate(ours, plain, truth, "y", ours.dtype)
    return ours


@pytest.mark.parametrize("by_depth", [False, True])
def test_formula(by_depth):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(*operands(5, 6, [3, 4, 1], dtype, "cpu", by_depth), torch.randn(6).to(dtype))
        check(*operands(5, 6, [3], dtype, "cpu", by_depth))
    check(*operands(0, 6, [3, 4], torch.float32, "cpu", by_depth))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by_depth", [False, True])
def test_kernel(kernel, dtype, by_depth):
    # One row, tiles cut in each direction, both widths of tile, more tiles than multiprocessors, depths below a tile's.
    for M, N, depths in (
        (1, 8, [8]),
        (127, 136, [64, 8]),
        (300, 520, [200, 16, 8, 72]),
        (4096, 1024, [128, 48]),
        (9000, 2048, [1024, 16]),
    ):
        a, b = operands(M, N, depths, dtype, kernel, by_depth)
        check(a, b, torch.randn(N, device=kernel).to(dtype))
        assert torch.equal(check(a, b), summed_products(a, b))  # the same bits
    assert summed_products(*operands(0, 8, [8], dtype, kernel, by_depth)).shape == (0, 8)


def test_kernel_on_slices_of_larger_matrices(kernel):
    wide, b = operands(65, 136, [99, 24], torch.bfloat16, kernel)
    for first in (0, 1, 8):  # of 99 columns: rows begin anywhere; from 1 on also the address
        a = [wide[0][:, first : first + 72], wide[1]]
        weight = torch.randn(136, 83, device=kernel).bfloat16()[:, first : first + 72]
        check(a, [weight, b[1]], torch.randn(137, device=kernel).bfloat16()[1:])
    by_depth = [torch.randn(72, 139, device=kernel).bfloat16()[:, 2:138].t(), b[1].t().contiguous().t()]
    check([wide[0][:, :72], wide[1]], by_depth)


def test_kernel_in_a_cuda_graph_and_on_a_side_stream(kernel):
    a, b = operands(256, 512, [128, 16], torch.bfloat16, kernel)
    expected = summed_products(a, b)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(summed_products(a, b), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = summed_products(a, b)
    a[0].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, summed_products(a, b)) and not torch.equal(y, expected)


def test_kernel_refuses_what_does_not_fit(kernel):
    op = torch.ops.fastft.summed_products.default
    a, b = operands(16, 16, [16, 8], torch.bfloat16, kernel)
    y = a[0].new_empty(16, 16)
    for message, arguments in {
        "one to four": (a, b[:1], None, y),
        "bfloat16 or float16": ([x.float() for x in a], [x.float() for x in b], None, y.float()),
        "dtype of y": ([a[0].half()], b[:1], None, y),
        "multiple of 8 columns": (a, [x[:15] for x in b], None, y[:, :15]),
        "multiples of 8": ([a[0][:, :4]], [b[0][:, :4]], None, y),
        "along the same dimension": (a, [b[0], b[1].t().contiguous().t()], None, y),
        r"a must be \[M, depth\]": (a, b[::-1], None, y),
        r"bias must be \[N\]": (a, b, y[0, :8], y),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_of_one_input(kernel, layers):
    torch.manual_seed(0)
    x = torch.randn(2, 150, 64, device=kernel).bfloat16().requires_grad_()
    weights = [torch.randn(n, 64, device=kernel).bfloat16() for n in (64, 16, 136)[:layers]]
    As = [torch.randn(r, 64, device=kernel).bfloat16().requires_grad_() for r in (8, 16, 8)[:layers]]
    shapes = [(len(w), len(A)) for w, A in zip(weights, As, strict=True)]
    Bs = [torch.randn(shape, device=kernel).bfloat16().requires_grad_() for shape in shapes]
    leaves = [x, *As, *Bs]

    def gradients(layer_outputs, leaves):
        y = torch.cat([y.double() for y in layer_outputs], -1)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    ours = gradients(lora_linears(x, weights, As, Bs, 0.5, form="main_loop"), leaves)
    plain = gradients([reference.lora_linear(x, *t, 0.5) for t in zip(weights, As, Bs, strict=True)], leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    of_layer = zip([w.double() for w in weights], wide[1 : 1 + layers], wide[1 + layers :], strict=True)
    truth = gradients([reference.lora_linear(wide[0], *t, 0.5) for t in of_layer], wide)
    for name, of_ours, of_plain, of_truth in zip(("y", "x", *"AAABBB"), ours, plain, truth, strict=False):
        assert_as_accurate(of_ours, of_plain, of_truth, name, torch.bfloat16)


@pytest.mark.parametrize(
    "why, change",
    [
        ("built without CUTLASS", {"not_built": "fastft was built without CUTLASS (FASTFT_CUTLASS=0)"}),
        ("compute capability 8.9, its kernel is built for 9.0", {"capability": (8, 9)}),
        ("torch.float32, its kernel is for bfloat16 and float16", {"dtype": torch.float32}),
        ("5 products to sum, its kernel takes 4", {"count": 5}),
        ("out features: 20 is not a multiple of 8", {"sizes": {"out features": [16, 20]}}),
        ("rank: 0 is not a multiple of 8", {"sizes": {"rank": [0]}}),
        (None, {}),
    ],
)
def test_obstacles(hopper, monkeypatch, why, change):
    if "not_built" in change:
        monkeypatch.setattr(module, "_not_built", change["not_built"])
    if "capability" in change:
        major, minor = change["capability"]
        found = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    found = obstacle(GPU, change.get("dtype", torch.bfloat16), change.get("count", 2), change.get("sizes", SIZES))
    assert (found is None) if why is None else (why in found)


def test_form_that_cannot_be_is_refused_and_not_picked(hopper, monkeypatch):
    monkeypatch.setitem(PICKED, "cuda", (("main_loop", 64), ("epilogue", 128)))
    sizes = [torch.empty(16, 32, device="meta")], [torch.empty(8, 32, device="meta")]
    assert pick_form(None, GPU, torch.bfloat16, *sizes) == "main_loop"
    assert pick_form(None, GPU, torch.float32, *sizes) == "epilogue"
    assert pick_form(None, GPU, torch.bfloat16, sizes[0], [torch.empty(96, 32, device="meta")]) == "epilogue"
    assert pick_form(None, GPU, torch.bfloat16, sizes[0], [torch.empty(256, 32, device="meta")]) == "products"
    with pytest.raises(
        ValueError, match=r"form is 'main_loop', but x is torch.float32.*; expected another form, or None"
    ):
        pick_form("main_loop", GPU, torch.float32, *sizes)


def test_quantised_weights_have_other_forms():
    from fastft.ops import Weight8bit

    weight = Weight8bit(torch.ones(8, 16, dtype=torch.int8), torch.ones(8))
    x, A, B = torch.ones(2, 16), torch.ones(2, 16), torch.ones(8, 2)
    with pytest.raises(ValueError, match="form is 'main_loop', but a weight is quantised"):
        lora_linear(x, weight, A, B, 1.0, form="main_loop")


def test_tiles_fill_an_h200():
    columns_of = _extension.load().summed_products_columns
    for M, N, columns in ((64, 7168, 128), (256, 7168, 128), (2048, 7168, 256), (8192, 7168, 256), (8192, 28672, 256)):
        assert columns_of(M, N, 132) == columns
