"""What the five tests of every op have in common.

Test 1 compares with float64: the kernel's error may be at most twice that of plain PyTorch (``reference``) in
the op's own dtype, plus a floor of a few roundings. The bound follows the dtype; nobody tunes it.
"""

import subprocess
import sys

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CUDA_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def supported(device, dtype):
    return device.type == "cpu" or dtype in CUDA_DTYPES


def name(dtype):
    return str(dtype).removeprefix("torch.")


def run(function, tensors, grad_of=(), grad_output=None):
    """function(**tensors), then its gradients with respect to the tensors named in grad_of."""
    leaves = {k: v.detach().clone().requires_grad_(k in grad_of) if torch.is_tensor(v) else v
              for k, v in tensors.items()}  # fmt: skip
    result = function(**leaves)
    if grad_of:
        result.backward(torch.ones_like(result) if grad_output is None else grad_output.to(result.dtype))
    return result.detach(), {k: leaves[k].grad for k in grad_of}


def to_float64(tensors):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in tensors.items()}


def accumulate_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_as_accurate(ours, plain, truth, what, dtype, terms=0.0):
    """|ours - truth| <= 2 |plain - truth| + floor, at the worst element.

    The floor is four roundings to dtype of the largest element, and four roundings in the accumulation dtype of
    numbers of size ``terms``, for results that are a small difference of such numbers.
    """
    assert ours.shape == truth.shape, f"{what}: shape {list(ours.shape)}, expected {list(truth.shape)}"
    same = (ours == truth) | (ours.isnan() & truth.isnan())
    if truth.numel() == 0 or same.all():
        return
    assert (ours.isfinite() == truth.isfinite()).all(), f"{what}: {ours} where float64 has {truth}"
    finite = truth.isfinite()
    truth, ours, plain = truth[finite], ours[finite].double(), plain[finite].double()
    # A plain result that is not finite is no yardstick; the floor alone then bounds ours.
    plain_error = (plain - truth).abs().nan_to_num(0, 0, 0).max()
    if dtype == torch.float64:
        terms = max(terms, 64.0)  # the truth has errors of its own there
    floor = 2 * torch.finfo(dtype).eps * truth.abs().max() + 2 * torch.finfo(accumulate_dtype(dtype)).eps * terms
    error = (ours - truth).abs().max()
    assert error <= 2 * plain_error + floor, (
        f"{what}: error {error:.3e}, plain PyTorch {plain_error:.3e}, floor {floor:.3e}"
    )


def compare(op, reference, tensors, grad_of, dtype, terms=0.0, **options):
    """Test 1 for a loss and its gradients."""
    ours, our_grads = run(lambda **t: op(**t, **options), tensors, grad_of)
    plain, plain_grads = run(lambda **t: reference(**t, **options), tensors, grad_of)
    exact = to_float64(tensors)
    options = to_float64(options)
    truth, true_grads = run(lambda **t: reference(**t, **options), exact, grad_of)
    accumulate = accumulate_dtype(dtype)
    assert ours.dtype == accumulate
    # 16-bit logits are rounded by the matrix product, for both sides alike; sums after that are float32.
    # A loss is a sum of logarithms of size 1 and more, whatever is left of them in the end.
    assert_as_accurate(ours, plain, truth, "loss", accumulate, max(terms, 1.0))
    for k in grad_of:
        assert our_grads[k].dtype == dtype
        assert_as_accurate(our_grads[k], plain_grads[k], true_grads[k], f"gradient of {k}", dtype, terms)


def python(code, **env):
    """Runs code in a fresh interpreter and returns the finished process."""
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **env}
    )
