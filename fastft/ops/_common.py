"""What the ops share: argument checks, the chunk loop's buffers, and the gradient of every linear_* op."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastft.ops import _extension, products

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
DIRECTIONS = ("forward", "reverse", "jsd")

# Logits of one chunk. Large enough for the matrix product to run at full speed (two chunks at 512 rows and
# OPT's vocabulary), small enough to be no matter beside a model.
CHUNK_BYTES = 56 * 2**20


def shape_of(x: Tensor) -> str:
    return str(list(x.shape))


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses, weights and log-probabilities beside elements of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_tensor(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{op}: {name} is {type(x).__name__}, expected a tensor")
    # An op registered with torch.library would drop the tangent of a tensor that does not require grad.
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(
            f"{op}: {name} has a tangent, and {op} has no forward-mode derivative; use fastft.ops.reference.{op}"
        )


def check_float(op: str, name: str, x: Tensor) -> None:
    _check_tensor(op, name, x)
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: {name} is {x.dtype}, expected one of {', '.join(str(d) for d in FLOAT_DTYPES)}")


def check_like(op: str, name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Same device, and same dtype unless told otherwise."""
    _check_tensor(op, name, x)
    if dtype and x.dtype != other.dtype:
        raise ValueError(f"{op}: {name} is {x.dtype}, expected {other.dtype} like {other_name}")
    if x.device != other.device:
        raise ValueError(f"{op}: {name} is on {x.device}, expected {other.device} like {other_name}")


def check_hidden(op: str, name: str, hidden: Tensor) -> None:
    check_float(op, name, hidden)
    if hidden.dim() < 1:
        raise ValueError(f"{op}: {name} is {shape_of(hidden)}, expected [..., hidden]")


def check_index(op: str, name: str, index: Tensor, other_name: str, other: Tensor) -> None:
    check_like(op, name, index, other_name, other, dtype=False)
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: {name} is {index.dtype}, expected int32 or int64")


def check_weight(op: str, name: str, weight: Tensor, hidden_name: str, hidden: Tensor) -> None:
    check_like(op, name, weight, hidden_name, hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{op}: {name} is {shape_of(weight)}, expected [vocab, {hidden.shape[-1]}] like {hidden_name}")
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: {name} is {shape_of(weight)}, expected a vocabulary of at least 1")


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, expected {', '.join(repr(c) for c in choices)}")


def check_temperature(op: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:  # math.isfinite would end a trace in which it varies
        raise ValueError(f"{op}: temperature is {temperature}, expected a finite number above 0")


def check_direction(op: str, direction: str, beta: float) -> None:
    check_choice(op, "direction", direction, DIRECTIONS)
    if direction == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"{op}: beta is {beta}, expected 0 < beta < 1; at the ends use direction 'forward' or 'reverse'"
        )


def check_chunk_rows(op: str, chunk_rows: int | None) -> int:
    """The op's own argument: 0 stands for None."""
    if chunk_rows is None:
        return 0
    if chunk_rows < 1:
        raise ValueError(f"{op}: chunk_rows is {chunk_rows}, expected at least 1, or None")
    return int(chunk_rows)


def flat_weights(op: str, weights: Tensor | None, name: str, like: Tensor) -> Tensor | None:
    """Row weights as [rows] in the accumulation dtype; ``like`` is [..., features]."""
    if weights is None:
        return None
    check_like(op, "weights", weights, name, like, dtype=False)
    if weights.shape != like.shape[:-1]:
        raise ValueError(
            f"{op}: weights is {shape_of(weights)}, expected {list(like.shape[:-1])} like the rows of {name}"
        )
    if weights.is_complex():
        raise ValueError(f"{op}: weights is {weights.dtype}, expected a real dtype")
    if weights.requires_grad:
        raise ValueError(f"{op}: weights requires grad, expected constants; detach them")
    return weights.to(accumulate_dtype(like.dtype)).reshape(-1).contiguous()


def wants_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def chunk_size(rows: int, row_bytes: int, chunk_rows: int) -> int:
    """Rows per chunk: as asked for, or as many as CHUNK_BYTES hold; cut evenly, so no chunk is a sliver."""
    if chunk_rows == 0:
        chunk_rows = max(1, CHUNK_BYTES // max(row_bytes, 1))
    chunks = max(1, -(-rows // chunk_rows))
    return max(1, -(-rows // chunks))


def chunks(rows: int, size: int) -> Iterator[slice]:
    """[0, rows) in slices of ``size``; the last may be shorter."""
    return (slice(begin, min(begin + size, rows)) for begin in range(0, rows, size))


def rows_of(x: Tensor, part: slice) -> Tensor:
    """x[part], and where their number is rounded up (`products.rounded_rows`) zeros behind them."""
    more = products.rounded_rows(part.stop - part.start, x) - (part.stop - part.start)
    return F.pad(x[part], (0, 0, 0, more)) if more else x[part]


def logits_buffer(hidden: Tensor, rows: int, vocab: int) -> Tensor:
    """Uninitialised [rows, vocab] for one chunk's logits, on huge pages where the system offers them.

    Their number is rounded up as in `rows_of`. They start at multiples of 16 bytes, whatever the vocabulary: kernels
    and matrix products use vector accesses.
    """
    buffer = hidden.new_empty((products.rounded_rows(rows, hidden), -(-vocab // 8) * 8))
    if buffer.is_cpu:
        _extension.load().advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer[:, :vocab]


def reduce_rows(values: Tensor, weights: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """(loss, row_scale): the reduced loss, and what each row's value is multiplied with in it."""
    if reduction != "none":
        return torch.ops.fastft.row_reduce(values, weights, reduction == "mean")
    if weights is None:
        return values.clone(), torch.ones_like(values)
    return torch.where(weights == 0, torch.zeros_like(values), values * weights), weights.clone()


class HeadGradients:
    """Collects the gradients of a chunk loop over the rows of a head's logits.

    With G [rows, V] the gradient of each row's own divergence with respect to its logits:
    hidden_grad = G @ weight, [rows, H], not yet scaled: backward knows each row's scale;
    weight_grad = (row_scale * G).T @ hidden, [V, H]: here the rows are summed, so their scales in the loss
    must be known now. With reduction "none" they are not, and backward runs the loop again.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, weights: Tensor | None, reduction: str,
                 for_hidden: bool, for_weight: bool):  # fmt: skip
        self.hidden, self.weight = hidden, weight
        self.hidden_grad = hidden.new_empty(hidden.shape) if for_hidden else None
        self.weight_sum = self.row_scale = None
        if for_weight and reduction != "none":
            # Sums over chunks are kept in float32: 16-bit additions would round once a chunk.
            self.weight_sum = torch.zeros(weight.shape, dtype=accumulate_dtype(weight.dtype), device=weight.device)
            zeros = torch.zeros(hidden.shape[0], dtype=self.weight_sum.dtype, device=hidden.device)
            self.row_scale = reduce_rows(zeros, weights, reduction)[1]

    @property
    def wanted(self) -> bool:
        return self.hidden_grad is not None or self.weight_sum is not None

    def add(self, logits: Tensor, part: slice) -> None:
        """logits: the buffer, in whose first rows are the gradients of part's, and in the next any numbers."""
        n = part.stop - part.start
        if self.hidden_grad is not None:
            whole = logits[: products.rounded_rows(n, logits)]
            if len(whole) == n:
                products.mm(whole, self.weight, out=self.hidden_grad[part])
            else:
                self.hidden_grad[part] = products.mm(whole, self.weight)[:n]
        if self.weight_sum is not None:
            hidden = self.hidden[part]
            scaled = (hidden * self.row_scale[part, None]).to(hidden.dtype)
            self.weight_sum += products.mm(logits[:n].t(), scaled)

    def results(self) -> tuple[Tensor, Tensor]:
        hidden_grad = self.hidden.new_empty(0) if self.hidden_grad is None else self.hidden_grad
        weight_grad = self.weight.new_empty(0) if self.weight_sum is None else self.weight_sum.to(self.weight.dtype)
        return hidden_grad, weight_grad


def fake_outputs(hidden: Tensor, weight: Tensor, reduction: str, hidden_grad: bool, weight_grad: bool):
    """Shapes of a linear_* op's four outputs."""
    acc = accumulate_dtype(hidden.dtype)
    rows = hidden.shape[0]
    return (
        hidden.new_empty((rows,) if reduction == "none" else (), dtype=acc),
        hidden.new_empty((rows,), dtype=acc),
        hidden.new_empty(hidden.shape if hidden_grad else (0,)),
        weight.new_empty(weight.shape if weight_grad and reduction != "none" else (0,)),
    )


def refuse_create_graph(op: str, why: str = "its gradient is computed in forward") -> None:
    """Called in a backward whose result carries no graph: grad mode is on there under create_graph only."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} is not twice differentiable ({why}): no create_graph=True")


def register_linear_op(name: str, kernel) -> None:
    """Registers kernel, fake and gradient of ``fastft::linear_*``, whose schemas have in common:

    the first input is the hidden states [rows, H], ``weight`` [V, H] is the head, ``weights`` [rows] or None
    are constants, and the last two flags say which gradients forward computes. Outputs: see bindings.cpp.

    The loops are in Python because all their work is in torch's matrix products and the row kernels; they
    are registered below autograd, so nothing in them is recorded.
    """
    op = getattr(torch.ops.fastft, name).default
    arguments = [a.name for a in op._schema.arguments]
    weight_at, weights_at, reduction_at = (arguments.index(a) for a in ("weight", "weights", "reduction"))

    def implementation(*args):
        # Under autocast a matrix product would change its dtype; the op's dtype is that of its inputs.
        with torch.amp.autocast(args[0].device.type, enabled=False):
            return kernel(*args)

    def fake(*args):
        return fake_outputs(args[0], args[weight_at], args[reduction_at], args[-2], args[-1])

    def setup_context(ctx, inputs, output):
        # Nothing here keeps the head's weight alive (under ZeRO-3 it is a gathered buffer), except where its
        # own gradient is asked for without a reduction.
        ctx.set_materialize_grads(False)
        _loss, row_scale, hidden_grad, weight_grad = output
        ctx.mark_non_differentiable(row_scale, hidden_grad, weight_grad)
        *_, ctx.hidden_grad, ctx.weight_grad = inputs
        ctx.recompute = ctx.weight_grad and inputs[reduction_at] == "none"
        tensors = [x for x in inputs if isinstance(x, Tensor)] if ctx.recompute else []
        ctx.template = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.tensor_at = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
        ctx.save_for_backward(row_scale, hidden_grad, weight_grad, *tensors)

    def backward(ctx, grad_loss, *grads):
        refuse_create_graph(name)
        if grad_loss is None:
            return (None,) * len(arguments)
        row_scale, hidden_grad, weight_grad, *tensors = ctx.saved_tensors
        results = [None] * len(arguments)
        row_grad = grad_loss * row_scale
        if ctx.needs_input_grad[0]:
            if not ctx.hidden_grad:
                raise RuntimeError(f"{name}: called without hidden_grad, but its hidden states require grad")
            results[0] = (hidden_grad * row_grad[:, None]).to(hidden_grad.dtype)
        if ctx.needs_input_grad[weight_at]:
            if not ctx.weight_grad:
                raise RuntimeError(f"{name}: called without weight_grad, but weight requires grad")
            if ctx.recompute:
                inputs = list(ctx.template)
                for i, x in zip(ctx.tensor_at, tensors, strict=True):
                    inputs[i] = x
                inputs[weights_at], inputs[reduction_at], inputs[-2] = row_grad, "sum", False
                with torch.no_grad():
                    results[weight_at] = op(*inputs)[3]
            else:
                results[weight_at] = (weight_grad * grad_loss).to(weight_grad.dtype)
        return tuple(results)

    torch.library.impl(f"fastft::{name}", "default")(implementation)
    torch.library.register_fake(op)(fake)
    torch.library.register_autograd(op, backward, setup_context=setup_context)
