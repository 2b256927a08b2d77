"""The least that an operator has to compute and to move, counted from the inputs of a call in a trace.

    floor = max(operations / rate, bytes / bandwidth)

Operations: each addition, product, comparison, division, root and exponential that the operator's formula needs is one,
so a fused multiply-add is two. Bytes: every input read once, every output written once. A kernel that streams a weight
in several chunks, or reads a row twice, is above that, and so is whatever finds its inputs in a cache below it: a small
product can be quicker than its floor.
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
        """Elements of a tensor, or of all tensors in a list; 0 of what is no tensor."""
        shape = self.shapes[i]
        if shape and isinstance(shape[0], list):
            return sum(map(math.prod, shape))
        return math.prod(shape) if shape else 0

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


def _product_into(inputs: Inputs) -> Count:
    """y [M, N] += [M, K] @ [K, N]: what `_product` counts, and y once more, which is read too."""
    operations, nbytes = _product(inputs, 1, 2)
    return operations, nbytes + inputs.nbytes(0)


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


def _lora_down_outer(inputs: Inputs) -> Count:
    """y [T, N], a [r, N], u [T, r] -> du [T, r], [N, r]."""
    rank, width = inputs.shapes[1]
    return 4.0 * inputs.numel(0) * rank, inputs.nbytes(0, 1, 3, 4) + rank * width * inputs.itemsize(0)


def _summed_products(inputs: Inputs) -> Count:
    """Lists of a_n [T, K_n] and b_n [N, K_n], bias [N] -> y [T, N], written and not read. The lists' dtype is y's."""
    listed = (inputs.numel(0) + inputs.numel(1)) * inputs.itemsize(3)
    return 2.0 * inputs.numel(0) * inputs.shapes[3][1], listed + inputs.nbytes(2, 3)


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


def _least_pairs(queries: int, keys: int, sequences: int, is_causal: bool) -> float:
    """The fewest (query, own key) pairs of ragged sequences whose lengths add up to these.

    Causal: n queries that stand at the last n of m keys see n m - n (n - 1) / 2 of them. With m >= n >= 1 the sum over
    sequences is least where the n are equal, for the sum of n (n + 1) / 2 is convex, and where the keys in front of the
    queries belong to sequences with one query. Otherwise n m, least where all but one query and all but one key are
    alone.
    """
    if not (queries and keys and sequences):
        return 0.0
    if is_causal:
        return queries * (queries / sequences + 1) / 2 + max(0, keys - queries)
    return max(queries * keys if sequences == 1 else queries + keys - sequences, 0)


def _attention(inputs: Inputs) -> Count:
    """q [T, H, D]; k, v [S, G, D]; cu_seqlens_q [B + 1]; seqused_k [B]; prefix_k, prefix_v [C, G, D] -> out, lse.

    Two products of D for each pair and query head: 4 H D operations. Every query sees the whole prefix; how long each
    sequence is, or how much of its cache is in use, is not in a trace: the least that the totals allow is counted.
    """
    tokens, heads, width = inputs.shapes[0]
    keys, kv_heads, _ = inputs.shapes[1]
    if inputs.shapes[5]:
        keys = tokens
    prefix = inputs.shapes[6][0] if inputs.shapes[6] else 0
    pairs = _least_pairs(tokens, keys, inputs.shapes[3][0] - 1, inputs.is_true(9)) + tokens * prefix
    rows = 2 * tokens * heads + 2 * (keys + prefix) * kv_heads  # q and out, k and v
    lse = tokens * heads * max(inputs.itemsize(0), 4)
    return 4.0 * heads * width * pairs, rows * width * inputs.itemsize(0) + lse


def _attention_backward(inputs: Inputs) -> Count:
    """Reads grad, q, k, v, out and lse, writes dq, dk and dv: scores again, and four products for the gradients."""
    tokens, heads, width = inputs.shapes[1]
    pairs = _least_pairs(tokens, inputs.shapes[2][0], inputs.shapes[6][0] - 1, inputs.is_true(9))
    return 10.0 * heads * width * pairs, inputs.nbytes(0, 1, 2, 3, 4, 5) + inputs.nbytes(1, 2, 3)


def _elements(
    operations: int, reads: tuple[int, ...], writes: tuple[int, ...] = (), *, of: int = 0
) -> Callable[[Inputs], Count]:
    """`operations` for each element of the input `of`; writes: the inputs that have the outputs' sizes."""
    return lambda inputs: (operations * inputs.numel(of), inputs.nbytes(*reads, *writes))


# Operations for each logit.
SOFTMAX = 5  # maximum, difference, temperature, exponential, sum
KL = 2 * SOFTMAX + 3  # of both; a difference, and its product into a sum
KL_GRADIENT = 3  # both probabilities, and their difference
ADAMW = 14  # 3 and 4 for the moments, a root, 4 for the step, 2 for the parameter
SWIGLU = 5  # exponential, sum, quotient, two products
SWIGLU_GRADIENT = 10  # the same three; 1 - s; dy s and its product with gate; three products and a sum for dgate
QUANTISE = 7  # size, maximum, division; four comparisons find the nearest of 16 codes


def _loss_rows(operations: int, gradient: int, reads: tuple[int, ...], is_asked: int) -> Callable[[Inputs], Count]:
    """A loss over rows of logits, the first input, which takes the gradient in its place where that is asked for."""

    def count(inputs: Inputs) -> Count:
        asked = inputs.is_true(is_asked)
        return (operations + gradient * asked) * inputs.numel(0), inputs.nbytes(*reads) + asked * inputs.nbytes(0)

    return count


def _relu(inputs: Inputs) -> Count:
    """x -> y, and a bit an element."""
    return inputs.numel(0), 2 * inputs.nbytes(0) + -(-inputs.numel(0) // 8)


def _rms_norm(inputs: Inputs) -> Count:
    """x [..., H], weight [H] -> y of weight's dtype, and a number a row: a square into a sum, two products."""
    rows = inputs.numel(0) // inputs.numel(1)
    y = inputs.numel(0) * inputs.itemsize(1)
    return 4 * inputs.numel(0), inputs.nbytes(0, 1) + y + rows * max(inputs.itemsize(0), 4)


def _rms_norm_backward(inputs: Inputs) -> Count:
    """dy and x [..., H], weight [H], a number a row -> dx, and dweight where asked for."""
    asked = inputs.is_true(4)
    return (8 + 2 * asked) * inputs.numel(1), inputs.nbytes(0, 1, 2, 3) + inputs.nbytes(1) + asked * inputs.nbytes(2)


def _rotary(inputs: Inputs) -> Count:
    """q [B, H, S, D], k [B, G, S, D], cos and sin [B or 1, S, R]: two products and a sum for each of R elements."""
    rotated, size = inputs.shapes[2][-1], inputs.shapes[0][-1]
    operations = 3 * rotated / size * (inputs.numel(0) + inputs.numel(1)) if size else 0
    return operations, 2 * inputs.nbytes(0, 1) + inputs.nbytes(2, 3)


def _dequantise_4bit(inputs: Inputs) -> Count:
    """A tile of a packed weight, half a byte an element with a scale for each block of them."""
    count, block = inputs.numel(9), int(inputs.scalars[6])
    return count, count / 2 + count / block * inputs.itemsize(2) + inputs.nbytes(9)


def _bias_adamw(inputs: Inputs) -> Count:
    """Lists of parameters and gradients; moments, 8-bit or not; scales; master weights.

    A trace does not have the dtype of tensors in lists. It is the moments', or 16 bits where they have masters: the
    engine's parameters are DeepSpeed's own masters otherwise.
    """
    count, master = inputs.numel(0), bool(inputs.shapes[5])
    accumulated = inputs.itemsize(6) if inputs.types[6] == "double" else 4
    parameter = 2 if master else accumulated
    state = inputs.itemsize(2) + inputs.itemsize(3) + accumulated * master
    return ADAMW * count, count * (3 * parameter + 2 * state) + 2 * inputs.nbytes(4)


# All compiled operators but row_reduce and index_check: those look at one number a row, no more than a call takes.
COUNTS: dict[str, Callable[[Inputs], Count]] = {
    "aten::mm": lambda inputs: _product(inputs, 0, 1),
    "aten::addmm": lambda inputs: _product(inputs, 1, 2),
    "aten::addmm_": _product_into,
    "aten::bmm": lambda inputs: _product(inputs, 0, 1),
    "fastft::lora_down": _lora_down,
    "fastft::lora_up": _lora_up,
    "fastft::lora_outer": _lora_outer,
    "fastft::lora_down_outer": _lora_down_outer,
    "fastft::summed_products": _summed_products,
    "fastft::linear_log_softmax_kl": _head(2, weight=2, gradients=(10, 11)),
    "fastft::linear_topk_kl": _head(1, weight=1, gradients=(11, 12)),
    "fastft::linear_cross_entropy": _head(1, weight=1, gradients=(7, 8)),
    "fastft::log_softmax_kl": _elements(KL, (0, 1)),
    "fastft::log_softmax_kl_backward": _elements(2 * (SOFTMAX - 2) + KL_GRADIENT, (1, 2), (1,), of=1),
    "fastft::log_softmax_kl_rows": _loss_rows(KL, KL_GRADIENT, (0, 1), is_asked=7),
    "fastft::topk_kl_rows": _loss_rows(SOFTMAX, 1, (0, 1, 2), is_asked=9),
    "fastft::cross_entropy_rows": _loss_rows(SOFTMAX - 1, 1, (0, 1), is_asked=4),
    "fastft::attention": _attention,
    "fastft::attention_backward": _attention_backward,
    "fastft::relu": _relu,
    "fastft::relu_backward": _elements(1, (0, 1), (0,)),
    "fastft::rms_norm": _rms_norm,
    "fastft::rms_norm_backward": _rms_norm_backward,
    "fastft::rotary": _rotary,
    "fastft::swiglu": _elements(SWIGLU, (0, 1), (0,)),
    "fastft::swiglu_backward": _elements(SWIGLU_GRADIENT, (0, 1, 2), (1, 2)),
    "fastft::quantise_4bit": _elements(QUANTISE, (0,), (3, 4)),
    "fastft::dequantise_4bit": _dequantise_4bit,
    "fastft::dequantise_8bit": _elements(1, (0, 1), (2,)),
    "fastft::bias_adamw": _bias_adamw,
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
