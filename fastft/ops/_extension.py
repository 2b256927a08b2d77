"""Finds and loads the compiled extension once; says what to do where it is missing."""

from __future__ import annotations

import importlib

_REBUILD = (
    "build it with `pip install .` or, in a source tree, `python setup.py build_ext --inplace` "
    "(cmake, ninja and pybind11 must be installed)"
)

# Set once, by import_extension(): the module, or why there is none.
_module = None
_error = "fastft's extension was not loaded: import fastft.ops"


def import_extension(op_modules) -> None:
    """Loads the extension and lets each op's module complete its ops with fakes and gradients.

    Called when ``fastft.ops`` is imported, not at an op's first call, which torch.compile may be tracing.
    A missing or unfit extension is remembered for ``load`` to report.
    """
    global _module, _error
    try:
        # torch first: the extension's libraries are torch's, and are found because they are already loaded.
        importlib.import_module("torch")
        module = importlib.import_module("fastft._build")
    except ModuleNotFoundError as error:
        if error.name != "fastft._build":
            raise
        _error = f"fastft's extension is not built: {_REBUILD}"
        return
    except ImportError as error:
        _error = f"fastft's extension does not load ({error}): {_REBUILD}"
        return
    try:
        for op_module in op_modules:
            op_module.register()
    except (AttributeError, RuntimeError) as error:
        _error = f"fastft's extension is not that of these sources ({str(error).splitlines()[0]}): {_REBUILD}"
        return
    _module, _error = module, ""


def load():
    """The module ``fastft._build``. Raises RuntimeError where it is missing or does not fit this torch."""
    if _module is None:
        raise RuntimeError(_error)
    return _module


def available() -> bool:
    """Whether the extension is there; ``build_info()["reason"]`` says why not."""
    return _module is not None


def cpu_capability() -> str | None:
    """Which copy of the CPU kernels is used: scalar, avx2, avx512 or avx512_bf16; None without the extension."""
    return None if _module is None else _module.cpu_capability()


def build_info() -> dict:
    """What this build is and what it found here; never raises.

    Keys: built, reason, version, cuda, cuda_reason, cuda_archs (list), cuda_compiler, cutlass (its version, or empty),
    cutlass_reason, cpu_capability, cpu_capability_best, torch_built_with, torch_has_cuda_stream, compiler, ops
    (device -> list of public ops that have kernels), devices (limits of each CUDA device), launch_configurations.
    """
    from fastft import __version__

    public = [
        "bias_adamw",
        "linear_cross_entropy",
        "linear_log_softmax_kl",
        "linear_topk_kl",
        "log_softmax_kl",
        "lora_linear",
        "relu",
        "rms_norm",
        "rotary",
        "swiglu",
    ]
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
            "cutlass": "",
            "cutlass_reason": "not built",
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
        "cutlass": module.CUTLASS,
        "cutlass_reason": module.CUTLASS_REASON,
        "cuda_archs": info["cuda_archs"].split(),
        "ops": {"cpu": ["attention", *public], "cuda": public if info["cuda"] else []},
        "devices": module.devices(),
        "launch_configurations": module.launch_configurations(),
    }
