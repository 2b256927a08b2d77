"""The least that an operator has to compute and to move, counted from the inputs of a call in a trace.

    floor = max(operations / rate, bytes / bandwidth)

Bytes: every input read once, every output written once. A kernel that streams a weight in several chunks, or reads a
row twice, is above that, and so is whatever finds its inputs in a cache below it: a small product can be quicker than
its floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ITEMSIZE = {
    "double": 8,
    "float": 4,
    "c10::BFloat16": 2,
    "c10::Half": 2,
    "long": 8,
    "long int": 8,
    "int": 4,
    "unsigned char": 1,
    "signed char": 1,
}


@dataclass(frozen=True)
class Inputs:
    """The arguments of a call: shapes of tensors, dtypes, and scalars as text."""

    shapes: list[list[int]]
    types: list[str]
    scalars: list[str]

    def numel(self, i: int) -> int:
        return math.prod(self.shapes[i]) if self.shapes[i] else 0

    def itemsize(self, i: int) -> int:
        return ITEMSIZE.get(self.types[i], 4)

    def nbytes(self, *which: int) -> int:
        return sum(self.numel(i) * self.itemsize(i) for i in which)

    def is_true(self, i: int) -> bool:
        return i < len(self.scalars) and self.scalars[i] == "True"


Count = tuple[float, float]  # operations, bytes


def _product(inputs: Inputs, a: int, b: int) -> Count:
    """[..., M, K] @ [..., K, N]."""
    *batch, m, k = inputs.shapes[a]
    n = inputs.shapes[b][-1]
    out = math.prod(batch) * m * n
    return 2.0 * out * k, inputs.nbytes(a, b) + out * inputs.itemsize(a)


def _lora_down(inputs: Inputs) -> Count:
    """x [T, K], a [r, K] -> u [T, r]."""
    return 2.0 * inputs.numel(0) * inputs.shapes[1][0], inputs.nbytes(0, 1, 3)


def _lora_up(inputs: Inputs) -> Count:
    """y [T, N] += u [T, r] b [N, r]^T."""
    return 2.0 * inputs.numel(0) * inputs.shapes[2][1], 2 * inputs.nbytes(0) + inputs.nbytes(1, 2)


def _lora_outer(inputs: Inputs) -> Count:
    """u [T, r], y [T, N] -> [r, N] or [N, r]."""
    rank, width = inputs.shapes[0][1], inputs.shapes[1][1]
    return 2.0 * inputs.numel(1) * rank, inputs.nbytes(0, 1) + rank * width * inputs.itemsize(1)


def _head(products: int, weight: int, gradients: tuple[int, int]) -> Callable[[Inputs], Count]:
    """A loss through the head [V, H]: `products` of hidden [T, H] with it, and one for each gradient asked for."""

    def count(inputs: Inputs) -> Count:
        vocabulary, hidden = inputs.shapes[weight]
        rows = inputs.shapes[0][0]
        asked = [inputs.is_true(i) for i in gradients]
        operations = 2.0 * rows * hidden * vocabulary * (products + sum(asked))
        written = asked[0] * inputs.nbytes(0) + asked[1] * inputs.nbytes(weight)
        return operations, products * inputs.nbytes(0) + inputs.nbytes(weight) + written

    return count


def _attention(inputs: Inputs) -> Count:
    """q, k, v and the output; the products depend on lengths that are not in a trace."""
    return 0.0, 2 * inputs.nbytes(0) + inputs.nbytes(1, 2)


def _attention_backward(inputs: Inputs) -> Count:
    """Reads grad, q, k, v, out, and writes dq, dk, dv."""
    return 0.0, inputs.nbytes(0, 1, 2, 3, 4) + inputs.nbytes(1, 2, 3)


def _rows(inputs: Inputs) -> Count:
    """A loss over rows of logits, of which the first take the gradient in place."""
    return 0.0, 2 * inputs.nbytes(0) + (inputs.nbytes(1) if inputs.shapes[1] == inputs.shapes[0] else 0)


COUNTS: dict[str, Callable[[Inputs], Count]] = {
    "aten::mm": lambda inputs: _product(inputs, 0, 1),
    "aten::addmm": lambda inputs: _product(inputs, 1, 2),
    "aten::bmm": lambda inputs: _product(inputs, 0, 1),
    "fastft::lora_down": _lora_down,
    "fastft::lora_up": _lora_up,
    "fastft::lora_outer": _lora_outer,
    "fastft::linear_log_softmax_kl": _head(2, weight=2, gradients=(10, 11)),
    "fastft::linear_topk_kl": _head(1, weight=1, gradients=(11, 12)),
    "fastft::linear_cross_entropy": _head(1, weight=1, gradients=(7, 8)),
    "fastft::log_softmax_kl_rows": _rows,
    "fastft::topk_kl_rows": _rows,
    "fastft::cross_entropy_rows": _rows,
    "fastft::attention": _attention,
    "fastft::attention_backward": _attention_backward,
}


def is_counted(name: str) -> bool:
    return name in COUNTS


def floor(call: dict[str, Any], device: dict[str, Any]) -> dict[str, float]:
    """Operations, bytes, and the least seconds of one call on a device (`flops`, `bandwidth`)."""
    operations, nbytes = COUNTS[call["name"]](Inputs(call["shapes"], call["types"], call["scalars"]))
    seconds = max(operations / device["flops"], nbytes / device["bandwidth"])
    return {"flops": operations, "bytes": nbytes, "floor_s": seconds}


def kernels(calls: list[dict[str, Any]], device: dict[str, Any]) -> list[dict[str, Any]]:
    """By operator: calls and seconds of a step, and the floor of these calls; the longest first."""
    found: dict[str, dict[str, Any]] = {}
    for call in calls:
        own = found.setdefault(call["name"], {"name": call["name"], "calls": 0.0, "seconds": 0.0, "floor_s": 0.0})
        own["calls"] += call["calls"]
        own["seconds"] += call["calls"] * call["seconds"]
        own["floor_s"] += call["calls"] * floor(call, device)["floor_s"]
    return sorted((row for row in found.values() if row["calls"] >= 1), key=lambda row: -row["seconds"])
