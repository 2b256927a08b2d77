"""Devices that a run can be planned for: memory, bandwidth, arithmetic, and the link to the host.

The numbers are ceilings, dense and without sparsity: a measured time can only be larger. NVIDIA's architecture white
papers (GA102, AD102, GB202, A100, H100) and datasheets (A10, L4); memory is what `nvidia-smi` reports, which is what a
process can have at most. H200: large matrix products and copies as measured on one, below its datasheet (989, 4800).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch

from fastft.errors import FastftError

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Device:
    """A GPU, or the processor with its memory.

    memory: bytes. bandwidth, link: bytes/s of its memory, and to and from the host in one direction. flops_16:
    operations/s of a bfloat16 or float16 matrix product that accumulates in float32; flops_32: of a float32 product
    without TF32, which is what torch computes unless told otherwise.
    """

    name: str
    title: str
    memory: int
    bandwidth: float
    flops_16: float
    flops_32: float
    link: float

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def flops(self, dtype: str) -> float:
        return self.flops_32 if dtype == "float32" else self.flops_16


PCIE4, PCIE5 = 25e9, 50e9  # bytes/s that copies from pinned memory reach over 16 lanes


def _gpu(name: str, title: str, mib: int, bandwidth: float, flops_16: float, flops_32: float, link: float) -> Device:
    return Device(name, title, mib * MIB, bandwidth * 1e9, flops_16 * 1e12, flops_32 * 1e12, link)


#       name         title                     MiB    GB/s  TFLOP/s: 16, 32   link
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("rtx3090", "NVIDIA RTX 3090", 24_576, 936, 71.0, 35.6, PCIE4),
        _gpu("rtx4090", "NVIDIA RTX 4090", 24_564, 1008, 165.2, 82.6, PCIE4),
        _gpu("rtx5090", "NVIDIA RTX 5090", 32_607, 1792, 209.5, 104.8, PCIE5),
        _gpu("a10", "NVIDIA A10", 23_028, 600, 125.0, 31.2, PCIE4),
        _gpu("l4", "NVIDIA L4", 23_034, 300, 121.0, 30.3, PCIE4),
        _gpu("a100-40gb", "NVIDIA A100 40 GB", 40_960, 1555, 312.0, 19.5, PCIE4),
        _gpu("a100-80gb", "NVIDIA A100 80 GB", 81_920, 2039, 312.0, 19.5, PCIE4),
        _gpu("h100", "NVIDIA H100 SXM", 81_559, 3350, 989.0, 66.9, PCIE5),
        _gpu("h200", "NVIDIA H200", 143_771, 4300, 790.0, 66.9, PCIE5),
    )
}
NAMES = (*GPUS, "cpu")


def device(name: str, *, memory: int | None = None, dtype: str = "bfloat16") -> Device:
    """The device of that name, with `memory` bytes in place of its own. The processor's rates are measured now.

    Raises FastftError for a name that is not in the table.
    """
    if name == "auto":
        found = this_device(dtype) or unknown_gpu()
        return found if memory is None else replace(found, memory=memory)
    if name != "cpu" and name not in GPUS:
        raise FastftError(f"--gpu {name}: not in the table of devices; expected one of {', '.join(NAMES)}, or auto")
    found = _cpu(dtype) if name == "cpu" else GPUS[name]
    return found if memory is None else replace(found, memory=memory)


def this_device(dtype: str) -> Device | None:
    """The device that this process computes on; None for a GPU that is not in the table."""
    if not torch.cuda.is_available():
        return _cpu(dtype)
    memory = torch.cuda.get_device_properties(0).total_memory
    found = known_gpu(torch.cuda.get_device_name(), memory)
    return found and replace(found, memory=memory)


def known_gpu(name: str, memory: int) -> Device | None:
    """The GPU of the table that torch calls `name` and that has about `memory` bytes; an A10G is not an A10."""
    words = _words(name)
    fitting = (g for g in GPUS.values() if _words(g.title) == words and abs(g.memory - memory) < 0.1 * memory)
    return next(fitting, None)


def unknown_gpu() -> Device:
    """This machine's GPU, of which the table knows no rates: bytes can be planned for it, seconds cannot."""
    memory = torch.cuda.get_device_properties(0).total_memory
    return Device("gpu", torch.cuda.get_device_name(), memory, *(float("nan"),) * 4)


def _words(title: str) -> set[str]:
    """What tells cards apart in a title, however it is spelled; their memory is compared apart."""
    ignored = {"nvidia", "geforce", "gb", "40", "80", "40gb", "80gb", "hbm3", "sxm", "sxm4", "sxm5"}
    return set(title.lower().replace("-", " ").split()) - ignored


@functools.lru_cache
def _cpu(dtype: str) -> Device:
    """This machine's processor, by its own products [512, 2048] @ [2048, 2048] and copies of 64 MiB, best of five."""
    from fastft.ops.products import mm

    a = torch.ones(512, 2048, dtype=getattr(torch, dtype))
    b = torch.ones(2048, 2048, dtype=a.dtype)
    x = torch.zeros(64 * MIB, dtype=torch.uint8)
    y = torch.zeros_like(x)
    flops = 2 * 512 * 2048 * 2048 / _best_seconds(lambda: mm(a, b))
    bandwidth = 2 * x.numel() / _best_seconds(lambda: y.copy_(x))
    threads = torch.get_num_threads()
    return Device(
        "cpu",
        f"CPU, {threads} thread{'s' if threads > 1 else ''}",
        psutil.virtual_memory().total,
        bandwidth,
        flops,
        flops,
        bandwidth / 2,
    )


def _best_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - begin)
    return best


UNITS = {"kib": 2**10, "mib": MIB, "gib": GIB, "tib": 2**40, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "b": 1}


def parse_bytes(text: str, option: str) -> int:
    """ "64GiB" or "24 GB" as bytes; raises FastftError naming the option."""
    lowered = text.strip().lower()
    unit = next((u for u in UNITS if lowered.endswith(u)), None)
    try:
        number = float(lowered.removesuffix(unit)) if unit else float("nan")
    except ValueError:
        number = float("nan")
    if not 0 < number < float("inf"):
        raise FastftError(f"{option} {text}: expected a number with a unit, like 64GiB or 24GB")
    return int(number * UNITS[unit])
