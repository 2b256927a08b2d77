"""rms_norm: root mean square normalisation with one rounding, and its gradients."""

import pytest
import torch

from fastft.ops import reference, rms_norm
from tests.ops.op_checks import DTYPES, assert_as_accurate, run, supported, to_float64
from tests.ops.randomised import assert_strides_do_not_matter, given, settings, st

# (x, weight)
PAIRS = [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
# Around vectors (8, 16), blocks of four of them, runs of 1024; heads, SmolLM2, a long row.
WIDTHS = [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 576, 1023, 1025, 2048, 9001]


def inputs(rows, width, dtype, weight_dtype=None, device="cpu"):
    x = torch.randn(rows, width, device=device).to(dtype)
    return {"x": x, "weight": (0.5 + torch.rand(width, device=device)).to(weight_dtype or dtype)}


def assert_accurate(tensors, dy, eps=1e-5, grad_of=("x", "weight")):
    """Ours against plain PyTorch's form, beside float64."""
    (ours, our_grads), (plain, plain_grads) = (
        run(lambda f=f, **t: f(**t, eps=eps), tensors, grad_of, dy) for f in (rms_norm, reference.rms_norm)
    )
    truth, true_grads = run(lambda **t: reference.rms_norm(**t, eps=eps), to_float64(tensors), grad_of, dy.double())
    assert ours.dtype == plain.dtype == tensors["weight"].dtype
    assert_as_accurate(ours, plain, truth, "y", ours.dtype)
    for name in grad_of:
        assert our_grads[name].dtype == tensors[name].dtype
        # dx is a difference of numbers of the size of dy * weight * rstd
        terms = (dy.double().abs().max() * tensors["weight"].double().abs().max()).item() if dy.numel() else 0.0
        if name == "x" and dy.numel():
            terms *= (tensors["x"].double().square().mean(-1) + eps).rsqrt().max().item()
        dtype = tensors[name].dtype
        assert_as_accurate(our_grads[name], plain_grads[name], true_grads[name], f"d{name}", dtype, terms)


# 1. against float64 -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS, ids=str)
def test_against_float64(device, capability, dtype, weight_dtype):
    if not supported(device, dtype):
        pytest.skip(f"{dtype} is a CPU dtype")
    tensors = inputs(65, 576, dtype, weight_dtype, device)
    assert_accurate(tensors, torch.randn(65, 576, device=device))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_eps_and_large_values(device, scale):
    tensors = inputs(9, 129, torch.float32, device=device)
    tensors["x"] *= scale
    assert_accurate(tensors, torch.randn(9, 129, device=device), eps=1e-6)


# 2. gradcheck -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 5, 70])
def test_gradcheck(capability, width):
    tensors = inputs(20, width, torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), leaves)
    leaves[1].requires_grad_(False)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 0.0), leaves)


def test_a_second_derivative_is_refused():
    x = torch.randn(3, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x, torch.ones(5), 1e-5).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm is not twice differentiable"):
        dx.sum().backward()


# 3. opcheck, torch.compile, autocast --------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_opcheck(device, requires_grad, weight_dtype):
    x, weight = (t.requires_grad_(requires_grad) for t in inputs(3, 7, torch.bfloat16, weight_dtype, device).values())
    torch.library.opcheck(torch.ops.fastft.rms_norm.default, (x[None], weight, 1e-5))
    x, weight = x.detach(), weight.detach()
    y, rstd = torch.ops.fastft.rms_norm(x, weight, 1e-5)
    for weight_grad in (False, True):
        torch.library.opcheck(torch.ops.fastft.rms_norm_backward.default, (y, x, weight, rstd, weight_grad))


def test_compiles_without_graph_breaks(device):
    x, weight = (t.requires_grad_() for t in inputs(5, 9, torch.float32, device=device).values())

    def function(f):
        return lambda x, w: f(2 * x, w, 1e-5).square()

    compiled = torch.compile(function(rms_norm), fullgraph=True, backend="aot_eager")
    ours, plain = (
        torch.autograd.grad(f(x, weight).sum(), (x, weight)) for f in (compiled, function(reference.rms_norm))
    )
    torch.testing.assert_close(ours, plain)


def test_autocast_leaves_the_dtypes_alone(device):
    tensors = inputs(3, 8, torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        found = rms_norm(**tensors, eps=1e-5)
    assert torch.equal(found, rms_norm(**tensors, eps=1e-5)) and found.dtype == torch.float32


# 4. hard shapes and values ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(device, capability, width, dtype):
    if not supported(device, dtype):
        pytest.skip(f"{dtype} is a CPU dtype")
    assert_accurate(inputs(18, width, dtype, device=device), torch.randn(18, width, device=device))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5,), (1, 5), (2, 3, 17, 5)])
def test_shapes(device, shape):
    x, weight = torch.randn(shape, device=device, requires_grad=True), torch.rand(5, device=device, requires_grad=True)
    y = rms_norm(x, weight, 1e-5)
    assert y.shape == x.shape
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    true_dx, true_dweight = torch.autograd.grad(reference.rms_norm(x, weight, 1e-5).sum(), (x, weight))
    torch.testing.assert_close(dx, true_dx)
    torch.testing.assert_close(dweight, true_dweight)


def test_values_that_are_not_finite_stay_in_their_rows(device, capability):
    tensors = inputs(4, 70, torch.float32, device=device)
    tensors["x"][0, 3], tensors["x"][1, 69], tensors["x"][2] = torch.nan, torch.inf, 0
    ours, plain = (f(**tensors, eps=1e-5) for f in (rms_norm, reference.rms_norm))
    torch.testing.assert_close(ours, plain, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape_and_strides(data):
    shape = [*data.draw(st.lists(st.integers(0, 40), max_size=2)), data.draw(st.integers(1, 300))]
    dtype, weight_dtype = data.draw(st.sampled_from(PAIRS))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(weight_dtype)
    assert_accurate({"x": x, "weight": weight}, torch.randn(shape))
    if x.numel():
        assert_strides_do_not_matter(
            data, lambda x, weight: rms_norm(x, weight, 1e-5), {"x": x, "weight": weight}, ["x", "weight"]
        )


@pytest.mark.parametrize("shape", [(37, 576), (3000, 257), (700, 2048)])
def test_runs_and_numbers_of_threads_give_the_same_bits(shape):
    tensors, dy = inputs(*shape, torch.bfloat16), torch.randn(shape)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        y, grads = run(lambda **t: rms_norm(**t, eps=1e-5), tensors, ["x", "weight"], dy)
        results.append(torch.cat([y.flatten(), grads["x"].flatten(), grads["weight"]]))
    assert all(torch.equal(results[0], other) for other in results[1:])


# 5. errors, and what is kept --------------------------------------------------------------------------


def test_errors_name_the_argument():
    x, weight = torch.randn(3, 5), torch.ones(5)
    for arguments, message in [
        ((x.long(), weight, 1e-5), "rms_norm: x is torch.int64, expected one of torch.float64"),
        (([1.0], weight, 1e-5), "rms_norm: x is list, expected a tensor"),
        ((torch.randn(()), weight, 1e-5), r"rms_norm: x is \[\], expected \[..., hidden\]"),
        ((torch.randn(3, 0), torch.ones(0), 1e-5), r"x is \[3, 0\], expected \[..., H\] with H of at least 1"),
        ((x, 1.0, 1e-5), "rms_norm: weight is float, expected a tensor"),
        ((x, torch.ones(4), 1e-5), r"weight is \[4\], expected \[5\] like the last dimension of x"),
        ((x, torch.ones(1, 5), 1e-5), r"weight is \[1, 5\], expected \[5\]"),
        ((x, weight.bfloat16(), 1e-5), "weight is torch.bfloat16, expected torch.float32 beside torch.float32 x"),
        ((x.half(), weight.double(), 1e-5), "weight is torch.float64, expected torch.float16 or torch.float32 beside"),
        ((x, weight.to("meta"), 1e-5), "weight is on meta, expected cpu like x"),
        ((x, weight, -1.0), "eps is -1.0, expected a finite number of at least 0"),
        ((x, weight, None), "eps is None, expected a finite number"),
    ]:
        with pytest.raises(ValueError, match=message):
            rms_norm(*arguments)
    with pytest.raises(RuntimeError, match="rms_norm: weight must be \\[width\\] like x"):
        torch.ops.fastft.rms_norm(x, torch.ones(4), 1e-5)
    with pytest.raises(RuntimeError, match="rstd must be as rms_norm returns it"):
        torch.ops.fastft.rms_norm_backward(x, x, weight, torch.ones(2), False)


def test_the_input_the_weight_and_a_number_a_row_are_kept():
    kept = []
    x, weight = torch.randn(10, 100, requires_grad=True), torch.ones(100)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, 1e-5)
        with torch.no_grad():
            rms_norm(x, weight, 1e-5)
    assert [t.shape for t in kept] == [x.shape, weight.shape, (10,)]
    assert kept[0].data_ptr() == x.data_ptr() and kept[1].data_ptr() == weight.data_ptr()


def test_nothing_is_allocated_for_a_frozen_weight():
    x = torch.randn(40, 100)
    y, rstd = torch.ops.fastft.rms_norm(x, torch.ones(100), 1e-5)
    _, dweight = torch.ops.fastft.rms_norm_backward(y, x, torch.ones(100), rstd, False)
    assert dweight.numel() == 0 and dweight.untyped_storage().nbytes() == 0
