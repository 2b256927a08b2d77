"""Products of 16-bit matrices in float32, block by block, as on a processor without instructions for them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft.models.linears import fuse_linears
from fastft.ops import frozen_linear, linear_log_softmax_kl, products, reference

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Every 16-bit product is widened, in several blocks of rows, columns and terms."""
    monkeypatch.setattr(products, "WIDENED", tuple(DTYPES))
    monkeypatch.setattr(products, "BLOCK", 256)


def matrix(rows: int, columns: int, dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2 * rows, 2 * columns, generator=generator).to(dtype)
    made = {
        "rows": lambda: values[:rows, :columns].contiguous(),
        "columns": lambda: values[:rows, :columns].t().contiguous().t(),
        "strided": lambda: values[::2, ::2],
    }
    return made[layout]()


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """Half a unit in the last place of the result, and float32's own error of so many terms."""
    unit = torch.finfo(found.dtype).eps / 2
    # A single row is added to by torch's own loop, which rounds the product as well.
    twice = unit * max(1.0, exact.abs().max().item()) if found.shape[:1] == (1,) and exact.numel() else 0
    torch.testing.assert_close(found.double(), exact, rtol=unit * 1.01, atol=2 * twice + 1e-6 * max(terms, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize(
    ("M", "K", "N"),
    [
        (40, 24, 70),
        (40, 70, 24),
        (1, 40, 30),
        (3, 1, 1),
        (90, 2, 80),
        (90, 80, 2),
        (0, 4, 5),
        (5, 0, 4),
        (1, 0, 4),
        (4, 5, 0),
    ],
)
def test_products_are_rounded_once(dtype, layout, M, K, N):
    a, b, y = (matrix(*shape, dtype, layout, i) for i, shape in enumerate([(M, K), (K, N), (M, N)]))
    exact = a.double() @ b.double()
    assert_rounded_once(products.mm(a, b), exact, K)
    out = matrix(M, N, dtype, layout, 3)
    assert products.mm(a, b, out=out) is out
    assert_rounded_once(out, exact, K)
    assert_rounded_once(products.addmm(y, a, b), y.double() + exact, K)
    bias = matrix(1, N, dtype, layout, 4)[0]
    assert_rounded_once(products.addmm(bias, a, b), bias.double() + exact, K)
    before = y.double()
    assert products.addmm_(y, a, b) is y
    assert_rounded_once(y, before + exact, K)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_and_its_gradients(dtype, bias):
    x = matrix(6, 20, dtype, "rows", 0).view(2, 3, 20).requires_grad_()
    weight = matrix(50, 20, dtype, "rows", 1).requires_grad_()
    b = matrix(1, 50, dtype, "rows", 2)[0].requires_grad_() if bias else None
    inputs = [x, weight, *([b] if bias else [])]
    dy = matrix(6, 50, dtype, "rows", 3).view(2, 3, 50)
    y = products.linear(x, weight, b)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.linear(*exact)
    assert_rounded_once(y, expected, 20)
    grads, expected_grads = torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, exact, dy.double())
    for found, wanted in zip(grads[:2], expected_grads[:2], strict=True):
        assert_rounded_once(found, wanted, 50)
    if bias:
        torch.testing.assert_close(grads[2].double(), expected_grads[2], rtol=0.02, atol=0.02)
    with pytest.raises(RuntimeError, match="not twice differentiable"):
        torch.autograd.grad(products.linear(x, weight, b).float().pow(2).sum(), inputs, create_graph=True)


@pytest.mark.parametrize(("M", "K", "N"), [(500, 2, 500), (500, 500, 2), (2, 500, 500), (50, 60, 70)])
def test_no_more_than_a_few_blocks_are_in_float32(M, K, N, monkeypatch):
    sizes = []
    for name in ("empty", "mm"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, **k: sizes.append(result := real(*a, **k)) or result)
    products.mm(matrix(M, K, torch.bfloat16, "rows", 0), matrix(K, N, torch.bfloat16, "rows", 1))
    assert sizes and all(t.numel() <= 2 * products.BLOCK for t in sizes if t.dtype == torch.float32)


def test_what_is_to_be_differentiated_is_torchs():
    a, b = matrix(4, 8, torch.bfloat16, "rows", 0).requires_grad_(), matrix(8, 5, torch.bfloat16, "rows", 1)
    torch.testing.assert_close(torch.autograd.grad(products.mm(a, b).sum(), a)[0], b.sum(1).expand(4, 8))
    assert products.mm(a.double(), b.double()).grad_fn is not None


def test_float32_other_devices_and_tensors_without_data_are_torchs(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(products, "_widened", refuse)
    a = torch.randn(4, 4)
    torch.testing.assert_close(products.mm(a, a), a @ a)
    meta = torch.empty(4, 4, dtype=torch.bfloat16, device="meta")
    assert products.mm(meta, meta).shape == (4, 4)
    with FakeTensorMode():  # the planner's
        fake = torch.empty(4, 4, dtype=torch.bfloat16)
        assert products.linear(fake, fake).shape == products.addmm(fake, fake, fake).shape == (4, 4)


def test_ops_use_them():
    """The error of a whole op stays within twice that of PyTorch's own form."""
    hidden, teacher, head = (matrix(n, 32, torch.bfloat16, "rows", i) for i, n in enumerate([12, 12, 300]))
    hidden.requires_grad_()
    exact = reference.linear_log_softmax_kl(hidden.double(), teacher.double(), head.double())
    found = linear_log_softmax_kl(hidden, teacher, head)
    assert abs(found - exact) < 0.02 * exact
    (grad,), (wanted,) = torch.autograd.grad(found, hidden), torch.autograd.grad(exact, hidden)
    assert (grad.double() - wanted.double()).norm() < 0.02 * wanted.double().norm()


@pytest.mark.parametrize("trained", [True, False])
def test_layers_of_a_model(trained):
    model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 8)).bfloat16().requires_grad_(trained)
    plain = copy.deepcopy(model).double()
    fuse_linears(model)
    x = matrix(9, 16, torch.bfloat16, "rows", 0).requires_grad_()
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), model):
        y = again(x)
        torch.testing.assert_close(y.double(), plain(x.double()), rtol=0.02, atol=0.02)
    assert "_Linear" in type(y.grad_fn).__name__
    y.sum().backward()
    if trained:
        plain(x.detach().double()).sum().backward()
        assert (again[0].weight.grad.double() - plain[0].weight.grad).norm() < 0.02 * plain[0].weight.grad.norm()


def test_a_frozen_linear_keeps_no_input():
    x = matrix(9, 16, torch.bfloat16, "rows", 0).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = frozen_linear(x, matrix(5, 16, torch.bfloat16, "rows", 1))
    assert kept == [] and y.requires_grad
