"""The host-device headers: row_math.h as both devices' kernels run it, row_launch.h, and vec.h's exp2 and log."""

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
    small = torch.logspace(-30, 2, 50_001).clamp_max(126)
    x = torch.cat([torch.linspace(-126, 126, 400_001), small, -small])
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


def kl_by_blocks(p, q, blocks, threads, temperature=1.0):
    return build.kl_by_blocks(p.data_ptr(), q.data_ptr(), p.numel(), blocks, threads, temperature)


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("threads", [32, 256, 512])
@pytest.mark.parametrize("vocab", [1, 7, 8, 9, 255, 256, 257, 5003, 50272, 200_003])
def test_states_of_a_cluster(blocks, threads, vocab):
    """Threads with their own elements, merged by warps, blocks and cluster, give the divergence of the whole row."""
    p, q = torch.randn(vocab) * 4, torch.randn(vocab) * 4
    for scale, temperature in ((1.0, 1.0), (1.0, 2.5), (2500.0, 1.0)):
        a, b = p * scale, q * scale
        ours = kl_by_blocks(a, b, blocks, threads, temperature)
        truth = reference.log_softmax_kl(b.double(), a.double(), temperature=temperature).item() / temperature**2
        assert ours == pytest.approx(truth, rel=2e-6, abs=2e-6 * scale)


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_states_with_minus_infinity(blocks):
    p, q = torch.randn(300), torch.randn(300)
    p[:200] = -torch.inf  # whole threads, warps and blocks see nothing but -inf
    q[100:250] = -torch.inf
    assert kl_by_blocks(p, q, blocks, 32) == float("inf")
    q[:] = torch.randn(300)
    q[:100] = -torch.inf
    truth = reference.log_softmax_kl(q.double(), p.double()).item()
    assert kl_by_blocks(p, q, blocks, 32) == pytest.approx(truth, rel=1e-6)
    p[:] = -torch.inf
    assert np.isnan(kl_by_blocks(p, q, blocks, 32))


@pytest.mark.parametrize("blocks", [1, 4, 8])
def test_states_of_a_student_close_to_its_teacher(blocks):
    """Merging loses nothing: a KL of 5e-5 keeps three digits."""
    errors = []
    for _ in range(8):
        p = torch.randn(50272) * 3
        q = p + torch.randn(50272) * 1e-2
        truth = reference.log_softmax_kl(q.double(), p.double()).item()
        errors.append(abs(kl_by_blocks(p, q, blocks, 256) / truth - 1))
    assert sum(errors) / len(errors) < 6e-4


# (major, shared memory of a block, of a multiprocessor), from NVIDIA's table of compute capabilities
A100, RTX_4090, H200, RTX_5090 = (
    (8, 166_912, 167_936), (8, 101_376, 102_400), (9, 232_448, 233_472), (12, 101_376, 102_400)
)  # fmt: skip


@pytest.mark.parametrize("limits", [A100, RTX_4090, H200, RTX_5090], ids=["a100", "rtx4090", "h200", "rtx5090"])
@pytest.mark.parametrize("element_bytes", [2, 4, 8])
def test_launch_of_a_row(limits, element_bytes):
    """Every element has one block, what is kept fits, and it is read back at 16-byte boundaries."""
    major, per_block, per_multiprocessor = limits
    for vocab in (1, 7, 8, 9, 255, 4096, 32_000, 50_257, 50_272, 128_256, 200_003, 262_144, 1_000_003):
        plan = build.plan_cached_row(vocab, element_bytes, *limits)
        assert plan["blocks"] in ((1, 2, 4, 8) if major >= 9 else (1,))
        assert plan["blocks"] * plan["slice"] >= vocab > (plan["blocks"] - 1) * plan["slice"]
        assert plan["slice"] % 8 == plan["cached"] % 8 == plan["threads"] % 32 == 0
        assert 32 <= plan["threads"] <= 512
        assert 8 <= plan["cached"] <= plan["slice"]
        assert plan["shared_bytes"] == plan["cached"] * element_bytes
        assert plan["shared_bytes"] + 2048 <= per_block
        # All is kept unless the largest launch cannot.
        assert plan["cached"] == plan["slice"] or plan["shared_bytes"] + 8 * element_bytes + 2048 > per_block
        resident = per_multiprocessor // (plan["shared_bytes"] + 3072)
        assert resident >= 3 or plan["blocks"] == (8 if major >= 9 else 1)


def test_launch_of_the_headline_row():
    """OPT's student and teacher rows in bfloat16: on an H200 four blocks share them, and nothing is read twice."""
    plan = build.plan_cached_row(50272, 4, *H200)
    assert plan == {"blocks": 4, "threads": 256, "slice": 12568, "cached": 12568, "shared_bytes": 50272}
    assert build.plan_cached_row(128_256, 4, *H200)["cached"] * 8 == 128_256


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
