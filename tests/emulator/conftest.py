"""The emulator, built once; what it cannot be built with is a reason to skip."""

import pytest
import torch

from tests.emulator import launchers


@pytest.fixture(scope="session")
def _emulator():
    compiler = launchers.compiler()
    if compiler is None:
        pytest.skip("the CUDA emulator needs GCC (CXX or g++)")
    return launchers.Emulator(launchers.build(compiler))


# (compute capability, shared memory of a block, of a multiprocessor); an H200 and an A100.
H200, A100 = (9, 232448, 233472), (8, 166912, 167936)


@pytest.fixture
def emulator(_emulator):
    torch.manual_seed(0)
    _emulator.device(*H200)
    _emulator.order(0)
    return _emulator
