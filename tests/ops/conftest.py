"""Fixtures of the op tests: devices, CPU capabilities, the extension."""

import pytest
import torch

import fastft.ops
from fastft.ops import _extension

CAPABILITIES = ["scalar", "avx2", "avx512", "avx512_bf16"]


def pytest_collection_modifyitems(items):
    # Without the extension every test here would fail with the same sentence; say it once per test instead.
    if not fastft.ops.available():
        reason = fastft.ops.build_info()["reason"]
        for item in items:
            if "tests/ops" in str(item.path) and "needs_no_extension" not in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def _cuda_missing():
    if not torch.cuda.is_available():
        return "no CUDA device"
    if not fastft.ops.build_info()["cuda"]:
        return "fastft was built without CUDA"
    return None


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """CPU always, CUDA where there is a device and the build has it."""
    if request.param == "cuda" and (reason := _cuda_missing()):
        pytest.skip(reason)
    return torch.device(request.param)


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    """Every CPU capability that this machine has, the one in use before restored afterwards."""
    build = _extension.load()
    before = build.cpu_capability()
    try:
        build.set_cpu_capability(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    build.set_cpu_capability(before)


@pytest.fixture(autouse=True)
def _seed_and_threads():
    """One thread: the tensors are tiny, and on a busy machine threads would spend minutes waiting for each other.

    Tests in which threads matter set their own number.
    """
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
