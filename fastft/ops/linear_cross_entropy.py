"""linear_cross_entropy: cross entropy through a language-model head, a chunk of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from fastft.ops import _extension, products
from fastft.ops._common import (
    REDUCTIONS,
    HeadGradients,
    accumulate_dtype,
    check_choice,
    check_chunk_rows,
    check_hidden,
    check_index,
    check_weight,
    chunk_size,
    chunks,
    logits_buffer,
    reduce_rows,
    register_linear_op,
    rows_of,
    shape_of,
    wants_grad,
)
from fastft.ops.index_check import check_index_range


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_rows: int | None = None,
) -> Tensor:
    """Negative log-likelihood of labels behind a head, in nats. Equals::

        F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=ignore_index, reduction=reduction)

    without ever holding [rows, V] beyond one chunk, except that the mean over no label at all (every label
    ignored, or no rows) is 0 with a zero gradient, not NaN: a rank whose part of a batch has no answer tokens
    must not spoil the others.

    hidden: [..., H]; weight: [V, H], same dtype (float64, float32, bfloat16, float16) and device; labels:
    [...] int32 or int64 in [0, V), or ignore_index. chunk_rows: None keeps a chunk's logits within 56 MiB.
    reduction: "mean" over the labels that are not ignored, "sum", or "none", [...] with 0 at ignored labels.
    Returns float32, or float64 for float64 inputs.

    Backward: with G = softmax(logits) - onehot(labels), hidden gets G @ weight, weight gets G.T @ hidden. As
    in linear_log_softmax_kl both are computed in forward where asked for. Not twice differentiable.

    Raises ValueError on a shape, dtype, device or option that does not fit, and on a label outside [0, V), naming it
    and its row (leading dimensions flattened). On CUDA looking would wait for the device: there the row becomes NaN,
    and a later call, or `raise_deferred_errors`, raises.
    Chunking as in Wijmans et al. 2024, https://arxiv.org/abs/2411.09009, and Liger-Kernel.
    """
    op = "linear_cross_entropy"
    _extension.load()
    check_hidden(op, "hidden", hidden)
    check_weight(op, "weight", weight, "hidden", hidden)
    check_index(op, "labels", labels, "hidden", hidden)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: labels is {shape_of(labels)}, expected {list(hidden.shape[:-1])} like the rows of hidden"
        )
    check_choice(op, "reduction", reduction, REDUCTIONS)
    rows = check_chunk_rows(op, chunk_rows)

    loss = torch.ops.fastft.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        None,
        int(ignore_index),
        reduction,
        rows,
        wants_grad(hidden),
        wants_grad(weight),
    )[0]
    return loss.reshape(hidden.shape[:-1]) if reduction == "none" else loss


def _kernel(
    hidden, weight, labels, weights, ignore_index, reduction, chunk_rows, hidden_grad, weight_grad,
):  # fmt: skip
    rows, vocab = hidden.shape[0], weight.shape[0]
    acc = accumulate_dtype(hidden.dtype)
    labels = labels.to(torch.int64).contiguous()
    counted = labels != ignore_index
    check_index_range("linear_cross_entropy", "labels", labels, vocab, ignore_index)
    row_weights = counted.to(acc) if weights is None else torch.where(counted, weights, 0)
    size = chunk_size(rows, vocab * weight.element_size(), chunk_rows)
    logits = logits_buffer(hidden, min(size, rows), vocab)
    nll = hidden.new_empty(rows, dtype=acc)
    grads = HeadGradients(hidden, weight, row_weights, reduction, hidden_grad, weight_grad)
    for part in chunks(rows, size):
        chunk = logits[: part.stop - part.start]
        padded = rows_of(hidden, part)
        products.mm(padded, weight.t(), out=logits[: len(padded)])
        torch.ops.fastft.cross_entropy_rows(chunk, labels[part], nll[part], ignore_index, grads.wanted)
        grads.add(logits, part)
    return *reduce_rows(nll, row_weights, reduction), *grads.results()


def register() -> None:
    register_linear_op("linear_cross_entropy", _kernel)
