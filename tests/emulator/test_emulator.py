"""The emulator finds mistakes, and finds none where there are none."""

import ctypes

import pytest
import torch

from tests.emulator.launchers import STRUCTURES

FAULTS = {
    "no_barrier": "nothing has written|wrote with no barrier",
    "no_barrier_before_reuse": "(wrote|read) with no barrier",
    "no_warp_barrier": "wrote with no barrier",
    "divergent_barrier": "waits at __syncthreads for 24 threads that never come",
    "divergent_shuffle": "waits at __shfl_xor_sync for 24 threads that never come",
    "beyond_the_end": "writes 4 bytes .* 4 bytes beyond the end of buffer",
    "before_the_begin": "reads 4 bytes .* before all buffers",
    "beyond_shared": "at 64, outside the 64 that the launch asked for",
    "unwritten_shared": "shared memory that nothing has written",
    "misaligned": "not aligned",
    "copy_not_waited_for": "waited for",
    "copy_of_another_thread": "with no barrier",
    "blocks_that_meet": "which thread .* of block .* wrote",
    "no_fence": "which thread .* of block .* wrote",
    "product": "nothing has written|wrote with no barrier",
    "no_cluster_barrier_before": "nothing has written|wrote with no barrier",
    "no_cluster_barrier_after": "block that has ended",
}


def buffer():
    x = torch.arange(256.0)
    x[-1] = 0
    return x


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_found(emulator, fault, order):
    if fault == "no_cluster_barrier_after" and order == 2:
        pytest.skip("found only where one block ends before the other reads")
    emulator.order(order)
    x = buffer()[:16] if fault in ("beyond_the_end", "before_the_begin") else buffer()
    with pytest.raises(RuntimeError, match=FAULTS[fault]):
        emulator.faulty(fault, x)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("fault", [f for f in FAULTS if "cluster" not in f] + ["cluster_barrier"])
def test_nothing_is_found_without_it(emulator, fault, order):
    emulator.order(order)
    x, before = buffer(), buffer()
    emulator.faulty(f"right {fault}", x)
    if fault == "no_barrier":
        assert torch.equal(x[:64], before[:64].flip(0))
    elif fault == "copy_of_another_thread":
        assert torch.equal(x[4:8], before[:4])
    elif fault == "no_fence":
        assert x[-2] == 4
    elif fault == "cluster_barrier":
        assert x[:4].tolist() == [1, 0, 3, 2]
    elif fault == "product":
        a = before.bfloat16().float().view(16, 16)
        torch.testing.assert_close(x.view(16, 16), (a @ a.t()).t(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", STRUCTURES)
def test_structures_are_those_of_the_headers(emulator, op):
    size = getattr(emulator.library, f"sizeof_{op}")
    size.restype = ctypes.c_size_t
    assert size() == ctypes.sizeof(STRUCTURES[op])
