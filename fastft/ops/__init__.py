"""Tensors in, tensors out: the project's own kernels behind torch ops, and ``reference`` beside them.

Importing this package never fails for want of the compiled extension; the first call of an op does, with a
RuntimeError that says how to build it.
"""

from fastft.ops._extension import available, build_info
from fastft.ops.linear_cross_entropy import linear_cross_entropy
from fastft.ops.linear_log_softmax_kl import linear_log_softmax_kl
from fastft.ops.linear_topk_kl import linear_topk_kl
from fastft.ops.log_softmax_kl import log_softmax_kl

__all__ = [
    "available",
    "build_info",
    "linear_cross_entropy",
    "linear_log_softmax_kl",
    "linear_topk_kl",
    "log_softmax_kl",
]
