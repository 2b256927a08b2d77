"""Finds and loads the compiled extension once; says what to do where it is missing."""

from __future__ import annotations

import functools
import importlib
import warnings

_REBUILD = (
    "build it with `pip install .` or, in a source tree, `python setup.py build_ext --inplace` (cmake, ninja and "
    "pybind11 must be installed)"
)


@functools.cache
def load():
    """The module ``fastft._build``; importing it registers the C++ ops, and what they have in Python follows.

    Raises RuntimeError where the extension is missing or does not fit the installed torch.
    """
    try:
        # torch first: the extension's libraries are torch's, and are found because they are already loaded.
        importlib.import_module("torch")
        module = importlib.import_module("fastft._build")
    except ModuleNotFoundError as error:
        if error.name != "fastft._build":
            raise
        raise RuntimeError(f"fastft's extension is not built: {_REBUILD}") from error
    except ImportError as error:
        raise RuntimeError(f"fastft's extension does not load ({error}): {_REBUILD}") from error
    for name in ("log_softmax_kl", "linear_log_softmax_kl", "linear_topk_kl", "linear_cross_entropy"):
        importlib.import_module(f"fastft.ops.{name}").register()
    return module


def available() -> bool:
    """Whether the extension loads. A broken one (as opposed to a missing one) is reported as a warning."""
    try:
        load()
    except RuntimeError as error:
        if "does not load" in str(error):
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)
        return False
    return True


def build_info() -> dict:
    """What this build is and what it found here; never raises.

    Keys: built, reason, version, cuda, cuda_reason, cuda_archs (list), cuda_compiler, cpu_capability,
    cpu_capability_best, torch_built_with, torch_has_cuda_stream, compiler, ops (device -> list of public ops
    that have kernels), devices (limits of each CUDA device), launch_configurations.
    """
    from fastft import __version__

    public = ["linear_cross_entropy", "linear_log_softmax_kl", "linear_topk_kl", "log_softmax_kl"]
    try:
        module = load()
        info = module.info()
    except RuntimeError as error:
        return {
            "built": False,
            "reason": str(error),
            "version": __version__,
            "cuda": False,
            "cuda_reason": "not built",
            "cuda_archs": [],
            "cuda_compiler": "",
            "cpu_capability": None,
            "cpu_capability_best": None,
            "torch_built_with": None,
            "torch_has_cuda_stream": False,
            "compiler": None,
            "ops": {"cpu": [], "cuda": []},
            "devices": [],
            "launch_configurations": [],
        }
    return {
        "built": True,
        "reason": "",
        **info,
        "cuda_archs": info["cuda_archs"].split(),
        "ops": {"cpu": public, "cuda": public if info["cuda"] else []},
        "devices": module.devices(),
        "launch_configurations": module.launch_configurations(),
    }
