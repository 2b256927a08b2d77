"""Loading, reporting, and saying what is missing."""

import pytest
import torch
from op_checks import python

import fastft.ops

KEYS = {
    "built",
    "version",
    "cuda",
    "cuda_reason",
    "cuda_archs",
    "cpu_capability",
    "torch_built_with",
    "compiler",
    "ops",
}


def test_build_info():
    info = fastft.ops.build_info()
    assert info.keys() >= KEYS
    assert info["built"]
    assert info["version"] == fastft.__version__
    assert info["cuda"] == bool(info["cuda_archs"])
    assert "linear_topk_kl" in info["ops"]["cpu"]


def test_every_public_op_has_a_kernel_and_a_reference():
    from fastft.ops import reference

    for op in fastft.ops.build_info()["ops"]["cpu"]:
        assert hasattr(fastft.ops, op)
        assert hasattr(reference, op)


def test_schemas_have_no_defaults():
    """With a default that is left out, torch.library's backward sees fewer inputs than the schema has."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastft::")]
    assert len(schemas) >= 9
    for schema in schemas:
        assert not any(a.has_default_value() for a in schema.arguments), schema


MISSING = """
import sys
sys.modules["fastft._build"] = None
import fastft.ops, torch
info = fastft.ops.build_info()
assert not info["built"] and not fastft.ops.available()
try:
    fastft.ops.log_softmax_kl(torch.zeros(1, 2), torch.zeros(1, 2))
except RuntimeError as error:
    print(error)
"""


def test_import_brings_no_compiler():
    """torch._dynamo takes a second and 150 MB; it comes with the first torch.compile."""
    python("import sys, fastft.ops; assert 'torch._dynamo' not in sys.modules")


def test_missing_extension():
    """Importing succeeds; the first use says how to build."""
    done = python(MISSING)
    assert done.returncode == 0, done.stderr
    assert "not built" in done.stdout
    assert "python setup.py build_ext --inplace" in done.stdout


CAPABILITY = """
import torch, fastft.ops
try:
    fastft.ops.log_softmax_kl(torch.zeros(1, 2), torch.zeros(1, 2))
    print(fastft.ops.build_info()["cpu_capability"])
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("value", "expected"),
    [("scalar", "scalar"), ("avx3", "FASTFT_CPU_CAPABILITY=avx3, expected scalar, avx2, avx512 or avx512_bf16")],
)
def test_capability_from_the_environment(value, expected):
    done = python(CAPABILITY, FASTFT_CPU_CAPABILITY=value)
    assert done.stdout.strip() == expected, done.stderr


def test_cuda_tensor_without_cuda_in_the_build():
    if fastft.ops.build_info()["cuda"]:
        pytest.skip("this build has CUDA")
    op = torch.ops.fastft.row_reduce.default
    with pytest.raises(RuntimeError, match="fastft was built without CUDA; rebuild with FASTFT_CUDA=1"):
        op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.zeros(3), None, True)


def test_float64_on_cuda_is_refused(device):
    if device.type == "cpu":
        pytest.skip("float64 is a CPU dtype")
    x = torch.zeros(1, 2, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="float64 is a CPU dtype"):
        fastft.ops.log_softmax_kl(x, x)
