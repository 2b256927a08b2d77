"""What the optimizer updates on this rank, which elements of the trained parameters that is, and its state of them.

DeepSpeed hands the optimizer other tensors than the model's parameters: float32 masters, and under ZeRO flat ones of
which each rank has a part. A `Shard` says what such a tensor holds, so that state written by one number of ranks can be
read by another. State is read and written as the optimizer keeps it, 8-bit codes included; from one layout to another
it goes through float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from torch import nn

from fastft.distributed import Ranks
from fastft.errors import FastftError
from fastft.ops.reference import adamw_decode, adamw_encode
from fastft.optim import BiasAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
CODE_BLOCK = 256  # elements that share a scale in 8-bit state, BiasAdamW's and bitsandbytes'


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a trained parameter, from `offset` on in a shard."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass
class Shard:
    """A tensor that the optimizer updates; group: the index of its parameter group."""

    master: torch.Tensor
    group: int
    pieces: list[Piece] = field(default_factory=list)


def own_shards(engine: deepspeed.DeepSpeedEngine, trained: Mapping[str, nn.Parameter], ranks: Ranks) -> list[Shard]:
    """This rank's shards; without ZeRO every rank has the same ones.

    Raises FastftError where DeepSpeed keeps them on NVMe.
    """
    found: dict[int, Shard] = {}
    for name, master, group, start, numel, offset in _places(engine, trained, ranks):
        shard = found.setdefault(id(master), Shard(master, group))
        if numel > 0:  # of a small parameter ZeRO-3's last ranks hold padding alone
            shard.pieces.append(Piece(name, start, numel, offset))
        if shard.master.numel() < offset + numel:
            raise FastftError(
                "checkpoints need optimizer state in memory, and DeepSpeed has it on NVMe; set offload_optimizer to cpu"
            )
    return list(found.values())


def _places(engine, trained, ranks) -> Iterator[tuple[str, torch.Tensor, int, int, int, int]]:
    """(name, master, group, start, numel, offset) of each trained parameter's part on this rank."""
    zero, groups = engine.optimizer, engine.basic_optimizer.param_groups
    # Without ZeRO, 16-bit parameters have masters one by one, in the same order.
    pairs = zip(getattr(zero, "fp16_groups", ()), getattr(zero, "fp32_groups", ()), strict=False)
    masters = {id(p): master for group in pairs for p, master in zip(*group, strict=True)}
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    for name, p in trained.items():
        if hasattr(p, "ds_id"):  # ZeRO-3: equal parts of each parameter, the last ones padded
            shard, offset, part = zero.grad_position[zero.get_param_id(p)]
            start, master = ranks.rank * part, zero.fp32_partitioned_groups_flat[shard]
            yield name, master, zero.sub_group_to_group_id[shard], start, min(part, p.ds_numel - start), offset
        elif hasattr(p, "_hp_mapping"):  # ZeRO-1 and 2: equal parts of all parameters of a group end to end
            if mapping := p._hp_mapping:
                whole, part = mapping.lp_fragment_address, mapping.hp_fragment_address
                group = mapping.param_group_index
                yield name, groups[group]["params"][0], group, whole.start, part.numel, part.start
        else:
            master = masters.get(id(p), p)
            yield name, master, group_of[id(master)], 0, p.numel(), 0


def set_state(optimizer: torch.optim.Optimizer, shard: Shard, state: Mapping[str, Any]) -> None:
    """Give the optimizer this state of a shard, into the tensors that it has or as new ones; tensors may be flat."""
    master = shard.master
    if not state:  # it has not been updated yet
        optimizer.state.pop(master, None)
        return
    if hasattr(optimizer, "init_state") and not optimizer.state.get(master):
        _initialise(optimizer, shard)
    there = optimizer.state[master]
    for key in there.keys() - state.keys():
        del there[key]
    for key, value in state.items():
        if torch.is_tensor(value):
            value = value.view(master.shape) if value.numel() == master.numel() and value.ndim else value
            old = there.get(key)
            if torch.is_tensor(old) and (old.shape, old.dtype) == (value.shape, value.dtype):
                old.copy_(value)
                continue
            value = value.to(master.device, copy=True)
        there[key] = value


def _initialise(optimizer: Any, shard: Shard) -> None:
    """Empty state of a shard in bitsandbytes' own memory, which may be paged."""
    group = optimizer.param_groups[shard.group]
    params, group["params"] = group["params"], [shard.master]  # ZeRO-3 puts its shards there one by one, in each step
    try:
        optimizer.init_state(group, shard.master, shard.group, 0)
    finally:
        group["params"] = params


def encode(
    optimizer: torch.optim.Optimizer, shard: Shard, step: float, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor
) -> dict[str, Any]:
    """The optimizer's own state of a shard for these moments (float32, in the shape of its master)."""
    if not isinstance(optimizer, torch.optim.AdamW | BiasAdamW):
        return _encode_bitsandbytes(optimizer, shard, int(step), exp_avg, exp_avg_sq)
    state = {"step": torch.tensor(float(step), device=shard.master.device)}
    if getattr(optimizer, "state_bits", 32) == 8:
        return state | adamw_encode(exp_avg, exp_avg_sq)
    return state | {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def _encode_bitsandbytes(optimizer, shard, step, exp_avg, exp_avg_sq) -> dict[str, Any]:
    from bitsandbytes.functional import quantize_blockwise

    optimizer.state.pop(shard.master, None)
    _initialise(optimizer, shard)
    state = optimizer.state[shard.master]
    state["step"] = step
    for i, moment in ((1, exp_avg), (2, exp_avg_sq)):
        if state[f"state{i}"].dtype == torch.uint8:
            codes, scales = quantize_blockwise(moment, code=state[f"qmap{i}"], blocksize=CODE_BLOCK)
            state[f"absmax{i}"].copy_(scales.absmax)
            moment = codes
        state[f"state{i}"].copy_(moment)
    return state


def decode(state: Mapping[str, torch.Tensor], begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements [begin, end) of (exp_avg, exp_avg_sq) in float32, whichever optimizer's state it is.

    state: by key; the tensors may be slices of a file, read on indexing.
    """
    blocks = slice(begin // CODE_BLOCK, -(-end // CODE_BLOCK))
    aligned = blocks.start * CODE_BLOCK
    own = slice(begin - aligned, end - aligned)
    if "exp_avg_scale" in state:
        parts = {key: state[key][aligned:end] for key in MOMENTS}
        scales = {f"{key}_scale": state[f"{key}_scale"][blocks] for key in MOMENTS}
        exp_avg, exp_avg_sq = adamw_decode(parts | scales)
        return exp_avg[own], exp_avg_sq[own]
    if "absmax1" in state:
        moments = []
        for i in (1, 2):
            codes, qmap = state[f"state{i}"][aligned:end], state[f"qmap{i}"][:]
            scales = state[f"absmax{i}"][blocks].repeat_interleave(CODE_BLOCK)[: codes.numel()]
            moments.append((qmap[codes.long()] * scales)[own])
        return moments[0], moments[1]
    names = ("state1", "state2") if "state1" in state else MOMENTS
    return state[names[0]][begin:end], state[names[1]][begin:end]
