"""swiglu: silu(gate) * up without silu(gate) in memory."""

import pytest
import torch

from fastft.ops import reference, swiglu
from tests.ops.op_checks import DTYPES, assert_as_accurate, supported
from tests.ops.randomised import assert_strides_do_not_matter, given, settings, st

# Around a block of four vectors, a thread's 4096.
COUNTS = [0, 1, 7, 8, 9, 31, 63, 64, 65, 127, 4095, 4097, 3 * 4096 + 5]
# Where exp(-|g|) stops being normal and then above 0, in float32; past each dtype's range to inf.
SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 87.0, -87.0, 89.0, -89.0, 104.0, -104.0, 6e4, -6e4, 3e38, -3e38]
SPECIAL += [torch.inf, -torch.inf, torch.nan]


def with_gradients(function, gate, up, dy):
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def draw(*shape, dtype, device="cpu", scale=3.0):
    return [(s * torch.randn(*shape, device=device)).to(dtype) for s in (scale, 1.0, 1.0)]


def assert_accurate(gate, up, dy):
    ours, plain = with_gradients(swiglu, gate, up, dy), with_gradients(reference.swiglu, gate, up, dy)
    truth = with_gradients(reference.swiglu, gate.double(), up.double(), dy)
    for what, a, b, c in zip(("y", "gradient of gate", "gradient of up"), ours, plain, truth, strict=True):
        assert a.dtype == gate.dtype
        assert_as_accurate(a, b, c, what, gate.dtype)


# 1. against float64 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(device, capability, dtype, scale):
    if not supported(device, dtype):
        pytest.skip(f"{dtype} is a CPU dtype")
    assert_accurate(*draw(33, 129, dtype=dtype, device=device, scale=scale))


def test_relative_error_over_the_range(capability):
    """Of silu itself, element by element: what rounding |g| log2(e) costs where exp(-|g|) is the result."""
    gate = torch.linspace(-87, 87, 200_001)
    truth = torch.nn.functional.silu(gate.double())
    error = ((swiglu(gate, torch.ones_like(gate)) - truth) / truth).abs().nan_to_num(0)
    assert (error <= 2**-24 * (8 + 1.5 * gate.abs())).all()


# 2. gradcheck -----------------------------------------------------------------------------------------


def test_gradcheck():
    leaves = [x.requires_grad_() for x in draw(3, 7, dtype=torch.float64)[:2]]
    assert torch.autograd.gradcheck(swiglu, leaves) and torch.autograd.gradgradcheck(swiglu, leaves)


def test_one_gradient_alone():
    gate, up, dy = draw(3, 7, dtype=torch.float32)
    for leaf in (gate, up):
        leaf.requires_grad_()
        (ours,), (plain,) = (torch.autograd.grad(f(gate, up), leaf, dy) for f in (swiglu, reference.swiglu))
        torch.testing.assert_close(ours, plain)
        leaf.requires_grad_(False)


# 3. opcheck, torch.compile ----------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    gate, up, dy = draw(3, 7, dtype=torch.float32, device=device)
    gate.requires_grad_(requires_grad)
    torch.library.opcheck(torch.ops.fastft.swiglu.default, (gate, up))
    torch.library.opcheck(torch.ops.fastft.swiglu_backward.default, (dy, gate, up))


def test_compiles_without_graph_breaks(device):
    gate, up, _ = draw(5, 9, dtype=torch.float32, device=device)
    gate.requires_grad_()
    compiled = torch.compile(lambda g: swiglu(2 * g, up).square(), fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(gate).sum(), gate)
    (plain,) = torch.autograd.grad(reference.swiglu(2 * gate, up).square().sum(), gate)
    torch.testing.assert_close(ours, plain)


def test_autocast_changes_nothing(device):
    gate, up, _ = draw(5, 9, dtype=torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        found = swiglu(gate, up)
    assert found.dtype == torch.float32 and torch.equal(found, swiglu(gate, up))


# 4. hard shapes and values, threads -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_sizes(device, capability, count, dtype):
    if not supported(device, dtype):
        pytest.skip(f"{dtype} is a CPU dtype")
    assert_accurate(*(x[1:] for x in draw(count + 1, dtype=dtype, device=device)))  # not aligned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_those_of_torch(device, capability, dtype):
    if not supported(device, dtype):
        pytest.skip(f"{dtype} is a CPU dtype")
    gate = torch.tensor(SPECIAL * 5, device=device).to(dtype)
    up, dy = torch.full_like(gate, 0.75), torch.full_like(gate, -1.5)
    for ours, plain in zip(*(with_gradients(f, gate, up, dy) for f in (swiglu, reference.swiglu)), strict=True):
        torch.testing.assert_close(ours, plain, equal_nan=True)


@given(data=st.data(), shape=st.lists(st.integers(0, 20), min_size=1, max_size=3), dtype=st.sampled_from(DTYPES))
@settings(max_examples=30, deadline=None)
def test_any_shape_and_strides(data, shape, dtype):
    gate, up, _ = draw(*shape, dtype=dtype)
    assert_strides_do_not_matter(data, swiglu, {"gate": gate, "up": up}, ["gate", "up"])


def test_threads_do_not_matter():
    gate, up, dy = draw(70, 4099, dtype=torch.bfloat16)
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(with_gradients(swiglu, gate, up, dy))
    assert all(torch.equal(a, b) for run in found for a, b in zip(run, found[0], strict=True))


# 5. errors, and what is kept --------------------------------------------------------------------------


def test_errors_name_the_argument():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"swiglu: gate is torch.int64, expected one of torch.float64"):
        swiglu(x.long(), x)
    with pytest.raises(ValueError, match=r"swiglu: up is torch.float64, expected torch.float32 like gate"):
        swiglu(x, x.double())
    with pytest.raises(ValueError, match=r"swiglu: up is \[3, 2\], expected \[2, 3\] like gate"):
        swiglu(x, x.t())
    with pytest.raises(ValueError, match="swiglu: up is on meta, expected cpu like gate"):
        swiglu(x, x.to("meta"))
    with pytest.raises(RuntimeError, match="swiglu_backward: grad must be contiguous and of gate's shape"):
        torch.ops.fastft.swiglu_backward(x[:1], x, x)


def test_gate_and_up_alone_are_kept():
    gate, up, _ = draw(10, 100, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        swiglu(gate.requires_grad_(), up)
    assert kept == [gate.data_ptr(), up.data_ptr()]
