"""The host-device headers: row_math.h as the CPU kernels and as a CUDA block would run it, and vec.h's exp2, log."""

import numpy as np
import pytest
import torch

from fastft.ops import _extension, reference

build = _extension.load() if _extension.available() else None


def apply(function, x):
    y = torch.empty_like(x)
    function(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def test_exp2_error_bound(capability):
    """At most 3 * 2^-24, relative, over all results that are normal numbers; 0 below."""
    x = torch.cat([torch.linspace(-126, 0, 200_001), -torch.logspace(-30, 2, 50_001).clamp_max(126)])
    truth = np.exp2(x.numpy().astype(np.longdouble))
    error = np.abs(apply(build.exp2_array, x).numpy().astype(np.longdouble) / truth - 1).max()
    assert error < 3 * 2.0**-24
    special = torch.tensor([0.0, -0.0, -torch.inf, torch.nan, -1.0, -126.0, -1000.0])
    result = apply(build.exp2_array, special)
    assert torch.equal(result[[0, 1, 2, 4, 5, 6]], torch.tensor([1.0, 1.0, 0.0, 0.5, 2.0**-126, 0.0]))
    assert result[3].isnan()


def test_log_error_bound(capability):
    """At most 4 * 2^-24 relative over the normal numbers, and 2^-24 absolute near 1."""
    x = torch.cat([torch.logspace(-37.9, 38.5, 200_001), torch.linspace(0.5, 2, 200_001)])
    x = x[x.isfinite() & (x > 2.0**-126)]
    truth = np.log(x.numpy().astype(np.longdouble))
    result = apply(build.log_array, x).numpy().astype(np.longdouble)
    assert (np.abs(result - truth) <= np.maximum(4 * 2.0**-24 * np.abs(truth), 2.0**-24)).all()
    special = apply(build.log_array, torch.tensor([1.0, torch.inf, torch.nan]))
    assert special[0] == 0
    assert special[1] == torch.inf
    assert special[2].isnan()


@pytest.mark.parametrize("threads", [32, 256, 1024])
@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 255, 256, 257, 5003, 50272])
def test_states_of_a_cuda_block(threads, vocab):
    """Threads with their own elements, merged pairwise, give the divergence of the whole row."""
    p, q = torch.randn(vocab) * 4, torch.randn(vocab) * 4
    for scale, temperature in ((1.0, 1.0), (1.0, 2.5), (1000.0, 1.0)):
        a, b = p * scale, q * scale
        ours = build.kl_by_threads(a.data_ptr(), b.data_ptr(), vocab, threads, temperature)
        truth = reference.log_softmax_kl(b.double(), a.double(), temperature=temperature).item() / temperature**2
        assert ours == pytest.approx(truth, rel=2e-6, abs=2e-6 * scale)


def test_states_with_minus_infinity():
    p, q = torch.randn(300), torch.randn(300)
    p[:200] = -torch.inf  # whole threads see nothing but -inf
    q[100:250] = -torch.inf
    assert build.kl_by_threads(p.data_ptr(), q.data_ptr(), 300, 32, 1.0) == float("inf")
    q[:] = torch.randn(300)
    q[:100] = -torch.inf
    truth = reference.log_softmax_kl(q.double(), p.double()).item()
    assert build.kl_by_threads(p.data_ptr(), q.data_ptr(), 300, 32, 1.0) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_conversions(capability, dtype):
    """Every 16-bit number is read as what it is, and a softmax is rounded as torch rounds it."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()]
    kl = torch.ops.fastft.log_softmax_kl(every[None], every[None], None, 1.0, "forward", 0.5)[0]
    assert abs(kl.item()) < 1e-6
    logits = torch.randn(1, 4099).to(dtype)
    labels = torch.tensor([0])
    grad = logits.clone()
    torch.ops.fastft.cross_entropy_rows(grad, labels, torch.empty(1), -100, True)
    truth = torch.softmax(logits.float(), -1)
    truth[0, 0] -= 1
    # one unit in the last place where float32 differs in its own last place, nothing elsewhere
    difference = (grad.view(torch.int16).int() - truth.to(dtype).view(torch.int16).int()).abs()
    assert difference.max() <= 1
    assert (difference != 0).float().mean() < 2e-3
