"""The ranks of a run: who does what, and sums over all of them. Works without torch.distributed for one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
GATHER_BYTES = 2**26  # of whole parameters that ZeRO-3 brings to every rank at a time
REDUCE_BUCKET = 500_000_000  # elements of DeepSpeed's bucket for gradients, at most: its own setting


class Ranks:
    """rank of world_size processes; `device` is where tensors of a collective must lie."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"):
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def lockstep(self, items: Sequence[T], together: Callable[[T], Any] | None = None) -> Iterator[tuple[T, bool]]:
        """Deal items out so that every rank takes the same number of turns: (item, whether its result counts).

        ZeRO-3 gathers parameters in every forward, so all ranks must make the same number of them; a rank without an
        item of its own repeats the first one for nothing.
        together: the items of a turn, one of each rank, are neighbours for which it is equal; None: any.
        """
        for _, group in itertools.groupby(items, together or (lambda item: None)):
            own = list(group)
            for start in range(0, len(own), self.world_size):
                mine = start + self.rank
                yield (own[mine], True) if mine < len(own) else (own[0], False)

    def all(self, value: bool) -> bool:
        """Whether `value` is true on every rank."""
        if self.world_size == 1:
            return value
        flag = torch.tensor(int(value), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over the ranks, in float64."""
        total = values.to(self.device, torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank (any picklable value; between processes of one run only)."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """Elements of x [sum(sent)]: the next sent[r] go to rank r; of its own, received[r] come from it, in order."""
        found = x.new_empty(sum(received))
        dist.all_to_all_single(found, x, received, sent)
        return found

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
