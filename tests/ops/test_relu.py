"""relu: torch.relu bit for bit, from one bit an element that is kept."""

import pytest
import torch

from fastft.ops import reference, relu
from tests.ops.op_checks import DTYPES, run, supported, to_float64

# Around a byte of the mask, a run of 64, a thread's 4096.
COUNTS = [0, 1, 7, 8, 9, 63, 64, 65, 127, 4095, 4097, 3 * 4096 + 5]
SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), -float("nan"), 1e-40, -1e-40, 6e-8, -6e-8, 1.0, -1.0]


def both(x, dy):
    """(y, dx) of relu and of torch.relu."""
    return [(*run(f, {"x": x}, ["x"], dy),) for f in (relu, torch.relu)]


# 1. against float64 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(device, capability, dtype):
    if not supported(device, dtype):
        pytest.skip(f"{dtype} is a CPU dtype")
    x, dy = torch.randn(33, 129, device=device).to(dtype), torch.randn(33, 129, device=device).to(dtype)
    y, grads = run(relu, {"x": x}, ["x"], dy)
    true_y, true_grads = run(reference.relu, to_float64({"x": x}), ["x"], dy.double())
    assert y.dtype == dtype and torch.equal(y.double(), true_y)
    assert torch.equal(grads["x"].double(), true_grads["x"])


# 2. gradcheck -----------------------------------------------------------------------------------------


def test_gradcheck():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu, x) and torch.autograd.gradgradcheck(relu, x)


# 3. opcheck, torch.compile ----------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    x = torch.randn(3, 7, device=device, requires_grad=requires_grad)
    torch.library.opcheck(torch.ops.fastft.relu.default, (x,))
    _, mask = torch.ops.fastft.relu(x.detach())
    torch.library.opcheck(torch.ops.fastft.relu_backward.default, (x, mask))


def test_compiles_without_graph_breaks(device):
    x = torch.randn(5, 9, device=device, requires_grad=True)
    compiled = torch.compile(lambda x: relu(2 * x).square(), fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(ours, 8 * x.detach().relu())


# 4. hard shapes and values ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_sizes(device, capability, count, dtype):
    if not supported(device, dtype):
        pytest.skip(f"{dtype} is a CPU dtype")
    x, dy = (torch.randn(count + 1, device=device).to(dtype)[1:] for _ in range(2))  # not aligned
    (y, grads), (plain_y, plain_grads) = both(x, dy)
    assert torch.equal(y, plain_y) and torch.equal(grads["x"], plain_grads["x"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_are_those_of_torch(device, capability, dtype):
    if not supported(device, dtype):
        pytest.skip(f"{dtype} is a CPU dtype")
    x = torch.tensor(SPECIAL * 12, device=device).to(dtype)
    dy = torch.arange(1, len(x) + 1, device=device).to(dtype)
    (y, grads), (plain_y, plain_grads) = both(x, dy)
    torch.testing.assert_close(y, plain_y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(grads["x"], plain_grads["x"])


def test_strides_and_threads():
    torch.set_num_threads(2)
    x, dy = torch.randn(300, 70).t(), torch.randn(70, 300)
    (y, grads), (plain_y, plain_grads) = both(x, dy)
    assert y.is_contiguous() and torch.equal(y, plain_y) and torch.equal(grads["x"], plain_grads["x"])
    leaf = x.detach().requires_grad_()
    relu(leaf).backward(dy.t().contiguous().t())
    assert torch.equal(leaf.grad, plain_grads["x"])


# 5. errors, and what is kept --------------------------------------------------------------------------


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"relu: x is torch.int64, expected one of torch.float64"):
        relu(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="relu: x is list, expected a tensor"):
        relu([1.0])
    with pytest.raises(RuntimeError, match="mask must be uint8 with a bit for each element of grad"):
        torch.ops.fastft.relu_backward(torch.zeros(9), torch.zeros(1, dtype=torch.uint8))


def test_one_bit_an_element_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        relu(torch.randn(10, 100, requires_grad=True))
        relu(torch.randn(10, 100))
        with torch.no_grad():
            relu(torch.randn(10, 100, requires_grad=True))
    assert kept == [125]
