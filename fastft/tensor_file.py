"""Safetensors files written a tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> str:
    """A safetensors file of the tensors in `layout`, name -> (dtype, shape); returns its SHA-256.

    Each tensor is asked for by read(name) when it is its turn and let go behind it, so that one at a time is in memory.
    The file is on the disk on return; its name is not yet (`files.sync` of its folder).
    Format: https://github.com/huggingface/safetensors#format
    """
    # Wide elements first: every tensor is then aligned to its own.
    names = sorted(layout, key=lambda name: -layout[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        dtype, shape = layout[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(data: Any) -> None:
            digest.update(data)
            file.write(data)

        write(struct.pack("<Q", len(head)) + head)
        for name in names:
            tensor = read(name).detach()
            if (tensor.dtype, tuple(tensor.shape)) != layout[name]:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {layout[name]}")
            write(tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
