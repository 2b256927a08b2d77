"""Ids that must lie in a vocabulary: refused on every device, without waiting for any."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

# (op, argument) of every index that is checked; in a record it is known by its place here.
CHECKED = (("linear_cross_entropy", "labels"), ("linear_topk_kl", "topk_ids"))

# IndexRecord of csrc/include/fastft/index_check.h.
RECORD_FIELDS = ("state", "source", "row", "id", "vocab", "ignore")
WRITTEN = 2

# One a CUDA device, kept for good: a kernel or a captured graph that writes into it may run at any later time.
_records: dict[torch.device, Tensor] = {}
_lock = threading.Lock()


def check_index_range(op: str, name: str, index: Tensor, vocab: int, ignore: int | None = None) -> None:
    """Raises ValueError on an id outside [0, vocab) that is not ``ignore``. index: [rows] or [rows, k], int64.

    A CUDA kernel writes what it finds into pinned memory. Here that is read without waiting for the kernel, so it
    is mostly a later call, or `raise_deferred_errors`, that raises.
    """
    record = _record_of(index.device)
    source = CHECKED.index((op, name))
    # Without an id to ignore, one of the range stands for it.
    torch.ops.fastft.index_check(index, vocab, 0 if ignore is None else ignore, source, record)
    _raise_written(record, index.device)


def raise_deferred_errors(*, synchronize: bool = True) -> None:
    """Raises the ValueError for an id that an op on a CUDA device was given and that its vocabulary does not have.

    On CUDA an op that finds such an id makes its row NaN; the next call of one of these ops raises the error. This
    function is for where there is no next call: behind a replayed CUDA graph, or when a loss is not finite.
    synchronize: wait for the devices first; without, what they have found so far is reported, and nothing waits.
    """
    for device, record in list(_records.items()):
        if synchronize:
            torch.cuda.synchronize(device)
        _raise_written(record, device)


def _record_of(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.zeros(len(RECORD_FIELDS), dtype=torch.int64)
    with _lock:
        if device not in _records:
            _records[device] = torch.zeros(len(RECORD_FIELDS), dtype=torch.int64, pin_memory=True)
        return _records[device]


def _raise_written(record: Tensor, device: torch.device) -> None:
    if record[0].item() != WRITTEN:
        return
    with _lock:  # or a second thread would empty what a kernel has begun to write behind the first one's back
        state, source, row, found, vocab, ignore = record.tolist()
        if state != WRITTEN:
            return
        record.zero_()
    op, name = CHECKED[source]
    allowed = f"0 <= id < {vocab}" + ("" if 0 <= ignore < vocab else f" or ignore_index={ignore}")
    where = "" if device.type == "cpu" else f" (found by this call or an earlier one on {device})"
    raise ValueError(f"{op}: {name} contains {found} in row {row}, expected {allowed}{where}")


def register() -> None:
    torch.library.register_fake("fastft::index_check")(lambda index, vocab, ignore, source, record: None)
