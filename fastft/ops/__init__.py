"""Tensors in, tensors out: the project's own kernels behind torch ops, and ``reference`` beside them.

Importing this package never fails for want of the compiled extension; the first call of an op does, with a
RuntimeError that says how to build it.
"""

from fastft.ops import _extension, frozen_weight, index_check
from fastft.ops import attention as _attention
from fastft.ops import bias_adamw as _bias_adamw
from fastft.ops import linear_cross_entropy as _linear_cross_entropy
from fastft.ops import linear_log_softmax_kl as _linear_log_softmax_kl
from fastft.ops import linear_topk_kl as _linear_topk_kl
from fastft.ops import log_softmax_kl as _log_softmax_kl
from fastft.ops import lora_linear as _lora_linear
from fastft.ops import relu as _relu
from fastft.ops import rms_norm as _rms_norm
from fastft.ops import rotary as _rotary
from fastft.ops import summed_products as _summed_products
from fastft.ops import swiglu as _swiglu
from fastft.ops._extension import available, build_info, cpu_capability
from fastft.ops.frozen_weight import FrozenWeight, Weight4bit, Weight8bit, frozen_linear, quantise_4bit
from fastft.ops.index_check import raise_deferred_errors

# Modules and functions share their names; the functions are what this package exports.
_extension.import_extension(
    [
        _attention,
        _log_softmax_kl,
        _linear_log_softmax_kl,
        _linear_topk_kl,
        _linear_cross_entropy,
        _lora_linear,
        _bias_adamw,
        _relu,
        _rms_norm,
        _rotary,
        _summed_products,
        _swiglu,
        frozen_weight,
        index_check,
    ]
)

attention = _attention.attention
bias_adamw = _bias_adamw.bias_adamw
linear_cross_entropy = _linear_cross_entropy.linear_cross_entropy
linear_log_softmax_kl = _linear_log_softmax_kl.linear_log_softmax_kl
linear_topk_kl = _linear_topk_kl.linear_topk_kl
log_softmax_kl = _log_softmax_kl.log_softmax_kl
lora_linear = _lora_linear.lora_linear
lora_linears = _lora_linear.lora_linears
relu = _relu.relu
rms_norm = _rms_norm.rms_norm
rotary = _rotary.rotary
swiglu = _swiglu.swiglu

__all__ = [
    "FrozenWeight",
    "Weight4bit",
    "Weight8bit",
    "attention",
    "available",
    "bias_adamw",
    "build_info",
    "cpu_capability",
    "frozen_linear",
    "linear_cross_entropy",
    "linear_log_softmax_kl",
    "linear_topk_kl",
    "log_softmax_kl",
    "lora_linear",
    "lora_linears",
    "quantise_4bit",
    "raise_deferred_errors",
    "relu",
    "rms_norm",
    "rotary",
    "swiglu",
]
