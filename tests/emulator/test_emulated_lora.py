"""The LoRA products of csrc/cuda on the emulator, against float64."""

import itertools

import pytest
import torch

from fastft.ops import _extension
from tests.emulator.launchers import DTYPES, Read, Write

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# No columns, few and many, ranks below, at and above a group of 16 and 64, several splits of the summed dimension.
SHAPES = [(1, 1, 1), (5, 0, 3), (5, 40, 3), (67, 130, 17), (40, 1100, 65)]
CASES = list(itertools.product(SHAPES, FLOATS, [0, 3]))


def matrix(rows, columns, dtype, offset):
    """Rows of their own in wider memory; with an offset they are aligned to one element only."""
    return torch.randn(rows, columns + 16).to(dtype)[:, offset : offset + columns]


def small(rows, columns, dtype, offset):
    """Stored by rows, or with an offset by columns: (matrix, what is stored)."""
    stored = torch.randn(columns, rows).to(dtype) if offset else torch.randn(rows, columns).to(dtype)
    return (stored.t() if offset else stored), stored


def strides(name, x):
    return {f"{name}_stride_0": x.stride(0), f"{name}_stride_1": x.stride(1)}


def scratch(length, depth, r, dtype):
    return Write(torch.empty(max(1, _extension.load().lora_splits(length, depth, r, dtype.itemsize)[3])))


def close(ours, truth, dtype):
    bound = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    scale = truth.abs().max().item() if truth.numel() else 0
    torch.testing.assert_close(ours.double(), truth, rtol=bound, atol=bound * scale)


@pytest.fixture(autouse=True)
def _extension_built():
    if not _extension.available():
        pytest.skip("the size of scratch is asked of the built extension")


@pytest.mark.parametrize(("shape", "dtype", "offset"), CASES, ids=str)
def test_down(emulator, shape, dtype, offset):
    M, K, r = shape
    emulator.order(M % 4)
    x, u = matrix(M, K, dtype, offset), matrix(M, r, dtype, 0)
    a, stored = small(r, K, dtype, offset)
    emulator.launch("lora_down", x=Read(x), a=Read(stored), **strides("a", a), u=Write(u), M=M, K=K, r=r,
                    scratch=scratch(M, K, r, dtype), x_stride=x.stride(0), u_stride=u.stride(0), scaling=0.5,
                    dtype=DTYPES[dtype])  # fmt: skip
    close(u, 0.5 * x.double() @ a.double().t(), dtype)


@pytest.mark.parametrize(("shape", "dtype", "offset"), CASES, ids=str)
def test_up(emulator, shape, dtype, offset):
    M, N, r = shape
    emulator.order(M % 4)
    y, u = matrix(M, N, dtype, offset), matrix(M, r, dtype, offset)
    b, stored = small(N, r, dtype, offset)
    truth = y.double() + u.double() @ b.double().t()
    emulator.launch("lora_up", y=y, u=Read(u), b=Read(stored), **strides("b", b), M=M, N=N, r=r,
                    y_stride=y.stride(0), u_stride=u.stride(0), dtype=DTYPES[dtype])  # fmt: skip
    close(y, truth, dtype)


@pytest.mark.parametrize(("shape", "dtype", "offset"), CASES, ids=str)
def test_outer(emulator, shape, dtype, offset):
    N, M, r = shape
    emulator.order(M % 4)
    y, u = matrix(M, N, dtype, offset), matrix(M, r, dtype, offset)
    g, stored = small(r, N, dtype, offset)
    emulator.launch("lora_outer", u=Read(u), y=Read(y), g=Write(stored), **strides("g", g), M=M, N=N, r=r,
                    scratch=scratch(N, M, r, dtype), y_stride=y.stride(0), u_stride=u.stride(0),
                    dtype=DTYPES[dtype])  # fmt: skip
    close(g, u.double().t() @ y.double(), dtype)


# Columns and rows of one split and of several, the last of them with one tile, of one step or less.
PAIRS = [(1, 1, 1), (5, 0, 3), (0, 5, 3), (67, 130, 17), (130, 520, 16), (300, 1100, 5), (260, 64, 16), (514, 577, 9)]


@pytest.mark.parametrize(("shape", "dtype", "offset"), list(itertools.product(PAIRS, FLOATS, [0, 3])), ids=str)
def test_down_outer(emulator, shape, dtype, offset):
    M, N, r = shape
    emulator.order(M % 4)
    y, u, du = matrix(M, N, dtype, offset), matrix(M, r, dtype, offset), matrix(M, r, dtype, 0)
    a, stored = small(r, N, dtype, offset)
    g = torch.empty(N, r, dtype=dtype)
    floats = _extension.load().lora_pair_splits(M, N, r, dtype.itemsize == 2)[-1]
    emulator.launch("lora_down_outer", y=Read(y), a=Read(stored), **strides("a", a), du=Write(du), u=Read(u),
                    g=Write(g), scratch=Write(torch.empty(max(1, floats))), M=M, N=N, r=r, y_stride=y.stride(0),
                    du_stride=du.stride(0), u_stride=u.stride(0), scaling=0.5, dtype=DTYPES[dtype])  # fmt: skip
    close(du, 0.5 * y.double() @ a.double().t(), dtype)
    close(g, y.double().t() @ u.double(), dtype)
