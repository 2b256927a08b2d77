"""Sequences that lie end to end in one row of tokens, and the keys and values that come before them.

A *pack* is one row of tokens [1, T] in which several sequences lie end to end, so that every linear layer
sees T real tokens and no padding. Attention alone has to know where one sequence ends and the next begins;
`PackedSequences` says so. It also carries the keys and values that come before the packed tokens:

- a **shared prefix** (`Prefix`): the context's keys and values, computed once and held once. All queries that follow it
  are one long query block against that one copy; nothing is expanded per sequence or per query head;
- a **decode cache** (`DecodeCache`): each sequence's own keys and values, for generation.

A sequence may end in several **branches**, alternative continuations of it (the choices of a question): it is computed
once for all of them, and a branch sees it and itself, but not its siblings.

Shapes: T packed tokens, B sequences, L the longest of them, G key/value heads, D head size, C prefix length.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from fastft.models.ulysses import Exchange

PLACEMENTS = ("device", "host", "int8")

KeyValue = tuple[torch.Tensor, torch.Tensor]


class Prefix:
    """Keys and values of one context, positions 0..C-1: per layer k, v [1, G, C, D].

    placement: where they live between uses.
        device  as they are
        host    in the CPU's memory, pinned; the next layer is copied while this one computes, so at most two are on the
                device. Without a GPU the same as device
        int8    on the device with one float32 scale per key and value vector, x ~ round(x / s) * s, s = max|x| / 127:
                an error of at most s / 2 an element, (D + 4) bytes a vector
    """

    is_shared_out = False  # whether `exchange` is more than None

    def __init__(self, placement: str = "device"):
        if placement not in PLACEMENTS:
            raise ValueError(f"Prefix: placement is {placement!r}, expected one of {', '.join(PLACEMENTS)}")
        self.placement = placement
        self.length = 0
        self.begin, self.end = 0, None  # the positions that a pack captures this from: all
        self.peak_nbytes = 0  # the most that was kept at one time
        self._layers: dict[int, tuple[torch.Tensor, ...]] = {}
        self._dtype: torch.dtype | None = None  # int8: what to give back
        self._device: torch.device | None = None  # host: where to copy to; None where they need no copy
        self._stream: torch.cuda.Stream | None = None
        self._copies: dict[int, tuple[KeyValue, torch.cuda.Event]] = {}  # host: layers on their way to the device

    def put(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keep the keys and values of a layer, [1, G, C, D] each; layers come in the order of the forward."""
        self.length = k.shape[2]
        if self.placement == "int8":
            self._dtype = k.dtype
            self._layers[layer] = (*_quantize(k), *_quantize(v))
        elif self.placement == "host" and k.is_cuda:
            self._device = k.device
            self._layers[layer] = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x) for x in (k, v))
        else:
            self._layers[layer] = (k.contiguous(), v.contiguous())
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def drop(self, layer: int) -> None:
        """Forget the keys and values of a layer that nothing reads any more."""
        self._layers.pop(layer, None)

    def exchange(self, packed: PackedSequences) -> Exchange | None:
        """How the attention of a pack with this prefix is shared out to ranks; None: it is not (see `ulysses`)."""
        return None

    def fetch(self, layer: int) -> KeyValue:
        """Keys and values of a layer on the device, in the model's dtype."""
        kept = self._layers[layer]
        if self.placement == "int8":
            k, k_scale, v, v_scale = kept
            return _dequantize(k, k_scale, self._dtype), _dequantize(v, v_scale, self._dtype)
        if self._device:
            return self._fetch_from_host(layer)
        return kept

    def _fetch_from_host(self, layer: int) -> KeyValue:
        if layer not in self._copies:
            self._start_copy(layer)
        copied, done = self._copies.pop(layer)
        order = list(self._layers)
        self._start_copy(order[(order.index(layer) + 1) % len(order)])
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for x in copied:
            x.record_stream(current)  # allocated on the other stream, whose next copy must not take its memory
        return copied

    def _start_copy(self, layer: int) -> None:
        self._stream = self._stream or torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):
            copied = tuple(x.to(self._device, non_blocking=True) for x in self._layers[layer])
            self._copies[layer] = (copied, self._stream.record_event())

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, wherever they are."""
        return sum(x.nbytes for kept in self._layers.values() for x in kept)


def _quantize(x: torch.Tensor) -> KeyValue:
    """x [..., D] -> int8 [..., D] and float32 scales [..., 1], symmetric by the largest magnitude of each vector."""
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return torch.round(x / scale.clamp_min(torch.finfo(torch.float32).tiny)).to(torch.int8), scale


def _dequantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x * scale).to(dtype)


class DecodeCache:
    """Own keys and values of B sequences during generation: per layer k, v [B, capacity, G, D]."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.layers: dict[int, KeyValue] = {}
        self.lengths: torch.Tensor | None = None  # [B] tokens written so far
        self.rows: list[Hashable] = []  # [B] which of the sequences that it began with these are
        self.of_all: DecodeCache | None = None  # of all ranks' sequences, where attention is shared out (`ulysses`)

    def begin(self, count: int, device: torch.device) -> None:
        """For so many sequences, of which nothing is written yet."""
        self.lengths = torch.zeros(count, dtype=torch.long, device=device)
        self.rows = list(range(count))

    def buffers(self, layer: int, batch: int, like: torch.Tensor) -> KeyValue:
        """Those of a layer; like: new keys [T, G, D]."""
        if layer not in self.layers:
            shape = (batch, self.capacity, *like.shape[1:])
            # Zeros, not empty: masked positions are multiplied by probability zero, and 0 * nan is nan.
            self.layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[layer]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all sequences but `rows` [n] (those that are not finished)."""
        for i, (k, v) in self.layers.items():  # layer by layer: not all of them twice
            self.layers[i] = (k[rows], v[rows])
        self.lengths = self.lengths[rows]
        self.rows = [self.rows[i] for i in rows.tolist()]


class Branching:
    """Rows of a pack whose sequences are trunks with branches, in the CPU's memory.

    parts: how many a sequence has, the trunk included; cu_parts int32 [P + 1]: where they begin and end.
    number, positions [T]: of each token its branch, 0 before branches; its place in a sequence that has that one alone.
    trunk_rows, branch_rows: rows of the sequences that have branches; cu_trunks, cu_branches: where each one's end.
    """

    def __init__(self, trunks: list[int], branches: list[list[int]]):
        by_sequence = [(trunk, *ends) for trunk, ends in zip(trunks, branches, strict=True)]
        self.parts = [len(own) for own in by_sequence]
        lengths = [n for own in by_sequence for n in own]
        self.cu_parts = _offsets(lengths)
        of_part = [(i, own[0] if i else 0) for own in by_sequence for i in range(len(own))]
        size = torch.tensor(lengths)
        number, first = torch.tensor(of_part).t()
        self.number = torch.repeat_interleave(number, size)
        begin = torch.repeat_interleave(self.cu_parts[:-1] - first, size)
        self.positions = torch.arange(int(size.sum())) - begin
        trunk_rows, branch_rows, sizes, start = [], [], [], 0
        for trunk, ends in zip(trunks, branches, strict=True):
            middle, stop = start + trunk, start + trunk + sum(ends)
            if ends:
                trunk_rows.append(torch.arange(start, middle))
                branch_rows.append(torch.arange(middle, stop))
                sizes.append((trunk, sum(ends)))
            start = stop
        none = torch.zeros(0, dtype=torch.long)
        self.trunk_rows, self.branch_rows = (torch.cat(rows) if rows else none for rows in (trunk_rows, branch_rows))
        self.cu_trunks, self.cu_branches = (_offsets([size[i] for size in sizes]) for i in (0, 1))


def _offsets(lengths: list[int]) -> torch.Tensor:
    """[0, l_0, l_0 + l_1, ...], int32."""
    return F.pad(torch.tensor(lengths, dtype=torch.long).cumsum(0), (1, 0)).int()


class PackedSequences:
    """Where each sequence of a pack lies, and what comes before it.

    lengths: tokens of each of the B sequences, in packed order.
    branches: for each sequence the lengths of its alternative continuations, which follow it in the pack one after the
        other; each has the positions that it would have alone. An empty list is a sequence without branches.
    prefixes: what the sequences share, as (prefix, number of consecutive sequences) groups that cover all B;
        None when nothing precedes them.
    cache: per-sequence keys and values to extend (generation); None otherwise.
    capture: a `Prefix` to fill with the keys and values of this pack (one sequence only).
    """

    def __init__(
        self,
        lengths: list[int],
        *,
        branches: list[list[int]] | None = None,
        prefixes: list[tuple[Prefix, int]] | None = None,
        cache: DecodeCache | None = None,
        capture: Prefix | None = None,
        device: torch.device | str = "cpu",
    ):
        if not lengths or min(lengths) < 1:
            raise ValueError(f"PackedSequences: lengths must be positive and not empty, got {lengths}")
        if prefixes is not None and sum(n for _, n in prefixes) != len(lengths):
            groups = [n for _, n in prefixes]
            raise ValueError(f"PackedSequences: prefix groups {groups} do not cover {len(lengths)} sequences")
        if capture is not None and len(lengths) != 1:
            raise ValueError(f"PackedSequences: capture takes one sequence, got {len(lengths)}")
        trunks = lengths
        if branches is not None:
            if cache is not None or capture is not None:
                raise ValueError("PackedSequences: sequences with branches take no cache and no capture")
            if len(branches) != len(lengths) or any(n < 1 for ends in branches for n in ends):
                raise ValueError(
                    f"PackedSequences: branches must be a list of positive lengths for each of {len(lengths)} "
                    f"sequences, got {branches}"
                )
            lengths = [trunk + sum(ends) for trunk, ends in zip(trunks, branches, strict=True)]
        self._given = {"lengths": trunks, "branches": branches, "prefixes": prefixes, "device": device}
        self.trunks = trunks
        self.branches = branches
        self.lengths = lengths
        self.prefixes = prefixes
        self.cache = cache
        self.capture = capture
        self.device = torch.device(device)
        length = torch.tensor(lengths)
        self.longest = int(length.max())
        self.is_uniform = min(lengths) == self.longest
        bounds = _offsets(lengths)
        self.cu_seqlens = bounds.to(device)  # [B + 1]: sequence i is tokens cu_seqlens[i] to [i + 1]
        # Of each packed token: its sequence, and its place there.
        self._row = torch.repeat_interleave(torch.arange(len(lengths)), length)
        self._column = torch.arange(int(length.sum())) - bounds[:-1][self._row]
        self.branching = None if branches is None else Branching(trunks, branches)
        positions = self._column if branches is None else self.branching.positions
        if prefixes is not None:
            before = [p.length for p, n in prefixes for _ in range(n)]
            positions = positions + torch.tensor(before)[self._row]
        if capture is not None:
            positions = positions + capture.begin
        # Positions, of one sequence and what is before it, that attention reaches over; with a cache at most so many.
        self.reach = int(positions.max()) + 1 + (cache.capacity if cache is not None else 0)
        positions = positions.to(device)
        if cache is not None:
            if cache.lengths is None:
                cache.begin(len(lengths), self.device)
            row, column = self._row.to(device), self._column.to(device)
            positions = positions + cache.lengths[row]  # `advance` moves it once the forward is done
            self.cache_slots = (row, cache.lengths[row] + column)
            # Keys of each sequence in the cache, the new ones included.
            self.seqused = (cache.lengths + length.to(device)).int()
        self.position_ids = positions[None]

    @property
    def is_extensible(self) -> bool:
        # Not by asking for the exchange: its first use is a collective, and here not every rank may ask.
        shared_out = any(prefix.is_shared_out for prefix, _ in self.prefixes or ())
        return self.cache is None and self.capture is None and not shared_out

    def extended(self, count: int) -> PackedSequences:
        """The same with so many tokens more, which the last sequence ends in: nothing sees them but they themselves.

        They have the position of the last token. Not of a pack whose keys are for others to read: of a cache, of a
        context, or shared out to ranks.
        """
        if not self.is_extensible:
            raise ValueError("PackedSequences: a pack with a cache, a capture or a shared prefix cannot be extended")
        given = dict(self._given)
        if self.branches and self.branches[-1]:
            *ends, last = self.branches[-1]
            given["branches"] = [*self.branches[:-1], [*ends, last + count]]
        else:
            *trunks, last = self.trunks
            given["lengths"] = [*trunks, last + count]
        longer = PackedSequences(**given)
        longer.position_ids[:, -count:] = self.position_ids[:, -1:]
        longer.reach = self.reach
        return longer

    # What padded attention needs: each sequence in a row of `longest` slots.

    @cached_property
    def to_padded(self) -> torch.Tensor:
        """Packed index of each padded slot [B * L]; past a sequence's end its last token again, which is never read."""
        return self._padded.flatten().to(self.device)

    @cached_property
    def to_packed(self) -> torch.Tensor:
        """Padded slot of each packed token [T]."""
        return (self._row * self.longest + self._column).to(self.device)

    @cached_property
    def _padded(self) -> torch.Tensor:
        length = torch.tensor(self.lengths)[:, None]
        return (length.cumsum(0) - length) + torch.minimum(torch.arange(self.longest), length - 1)

    @cached_property
    def tree(self) -> torch.Tensor:
        """[B, 1, L, L], true where a query may see a key: what comes before it, but no other branch."""
        number = self.branching.number[self._padded]
        same = (number[:, None, :] == 0) | (number[:, None, :] == number[:, :, None])
        offset = torch.arange(self.longest)
        return (same & (offset <= offset[:, None]))[:, None].to(self.device)

    @cached_property
    def visible(self) -> torch.Tensor:
        """[B, 1, L, seen], true where a query may see a slot of the cache: its own sequence's, up to its own."""
        last = self.seqused[:, None] - torch.tensor(self.lengths, device=self.device)[:, None]
        last = last + torch.arange(self.longest, device=self.device)  # slot of each padded query
        return (torch.arange(self.seen, device=self.device) <= last[:, :, None])[:, None]

    @cached_property
    def seen(self) -> int:
        """Slots of the cache that any query sees."""
        return int((self.seqused - torch.tensor(self.lengths, device=self.device)).max()) + self.longest

    @cached_property
    def exchange(self) -> Exchange | None:
        """How its attention is shared out to ranks; None: it is not. Where it is, the first use is a collective."""
        shared = self.capture if self.prefixes is None else self.prefixes[0][0]
        return None if shared is None else shared.exchange(self)

    @property
    def takes_gradient(self) -> bool:
        is_alone = self.prefixes is None and self.cache is None and self.branching is None
        return is_alone and self.exchange is None

    def extend_cache(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> KeyValue:
        """Write this pack's keys and values [T, G, D] behind those of their sequences; returns [B, capacity, G, D]."""
        k_cache, v_cache = self.cache.buffers(layer, len(self.lengths), k)
        k_cache[self.cache_slots] = k
        v_cache[self.cache_slots] = v
        return k_cache, v_cache

    def advance(self) -> None:
        """After a forward with a cache: count the new tokens as written."""
        self.cache.lengths = self.cache.lengths + torch.tensor(self.lengths, device=self.cache.lengths.device)
