"""Attention over packed sequences, with an optional prefix that many of them share.

A *pack* is one row of tokens [1, T] in which several sequences lie end to end, so that every linear layer
sees T real tokens and no padding. Attention alone has to know where one sequence ends and the next begins;
`PackedSequences` says so. It also carries the keys and values that come before the packed tokens:

- a **shared prefix**: the context's keys and values, computed once and held once. All queries that follow it are
  one long query block against that one copy; nothing is expanded per sequence or per query head;
- a **decode cache**: each sequence's own keys and values, for generation.

A sequence may end in several **branches**, alternative continuations of it (the choices of a question): it is computed
once for all of them, and a branch sees it and itself, but not its siblings.

The parts are attended to apart and merged exactly by their log-sum-exp: with parts i, outputs o_i and
lse_i = log sum_j exp(q . k_j * scale), the whole is sum_i exp(lse_i - lse) o_i, lse = logaddexp_i lse_i
(the identity behind FlashAttention, Dao et al. 2022, arXiv 2205.14135, and Hydragen, Juravsky et al. 2024,
arXiv 2402.05099).

The function is registered with transformers under the name "fastft" and is reached through the attention
interface with a `packed` keyword, so no model code is copied.

Shapes: T packed tokens, B sequences, L the longest of them, H query heads, G key/value heads, D head size,
C prefix length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

IMPLEMENTATION = "fastft"

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

    def __init__(self, placement: str = "device"):
        if placement not in PLACEMENTS:
            raise ValueError(f"Prefix: placement is {placement!r}, expected one of {', '.join(PLACEMENTS)}")
        self.placement = placement
        self.length = 0
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
    """Own keys and values of B sequences during generation: per layer k, v [B, G, capacity, D]."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.layers: dict[int, KeyValue] = {}
        self.lengths: torch.Tensor | None = None  # [B] tokens written so far

    def buffers(self, layer: int, batch: int, like: torch.Tensor) -> KeyValue:
        if layer not in self.layers:
            shape = (batch, like.shape[1], self.capacity, like.shape[3])
            # Zeros, not empty: masked positions are multiplied by probability zero, and 0 * nan is nan.
            self.layers[layer] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[layer]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all sequences but `rows` [n] (those that are not finished)."""
        self.layers = {i: (k[rows], v[rows]) for i, (k, v) in self.layers.items()}
        self.lengths = self.lengths[rows]


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
        self.lengths = lengths
        self.prefixes = prefixes
        self.cache = cache
        self.capture = capture
        length = torch.tensor(lengths)
        self.longest = int(length.max())
        starts = torch.cumsum(length, 0) - length
        offset = torch.arange(self.longest)
        row = torch.repeat_interleave(torch.arange(len(lengths)), length)
        column = torch.arange(int(length.sum())) - starts[row]
        # to_padded: packed index of each padded slot (a slot past a sequence's end repeats its last token, whose
        # result is never read); to_packed: padded slot of each packed token.
        to_padded = starts[:, None] + torch.minimum(offset, length[:, None] - 1)
        self.to_padded = to_padded.flatten().to(device)
        self.to_packed = (row * self.longest + column).to(device)
        self.is_uniform = min(lengths) == self.longest
        positions = column
        self.tree: torch.Tensor | None = None  # [B, 1, L, L]: a query sees what comes before it, but no other branch
        if branches is not None:
            parts = [(trunk, *ends) for trunk, ends in zip(trunks, branches, strict=True)]
            first = [0 if i == 0 else trunk for trunk, *ends in parts for i in range(len(ends) + 1)]
            sizes = [n for part in parts for n in part]
            positions = torch.cat([torch.arange(n) + at for at, n in zip(first, sizes, strict=True)])
            number = torch.cat([torch.repeat_interleave(torch.tensor(part)) for part in parts])  # 0: before branches
            number = number[to_padded]
            same = (number[:, None, :] == 0) | (number[:, None, :] == number[:, :, None])
            self.tree = (same & (offset <= offset[:, None]))[:, None].to(device)
        if prefixes is not None:
            before = [p.length for p, n in prefixes for _ in range(n)]
            positions = positions + torch.tensor(before)[row]
        positions = positions.to(device)
        if cache is not None:
            if cache.lengths is None:
                cache.lengths = torch.zeros(len(lengths), dtype=torch.long, device=device)
            positions = positions + cache.lengths[row.to(device)]  # `advance` moves it once the forward is done
        self.position_ids = positions[None]
        if cache is not None:
            row, column = row.to(device), column.to(device)
            self.cache_slots = (row, slice(None), cache.lengths[row] + column)
            last = cache.lengths[:, None] + torch.arange(self.longest, device=device)  # slot of each padded query
            self.seen = int(cache.lengths.max()) + self.longest
            # [B, 1, L, seen]: a query sees its own sequence's slots up to its own.
            self.visible = (torch.arange(self.seen, device=device) <= last[:, :, None])[:, None]

    def advance(self) -> None:
        """After a forward with a cache: count the new tokens as written."""
        self.cache.lengths = self.cache.lengths + torch.tensor(self.lengths, device=self.cache.lengths.device)


class _Pad(torch.autograd.Function):
    """[1, T, ...] -> [1, B * L, ...]. Slots past a sequence's end repeat its last token; they get no gradient
    (`_Unpad` sends none), so the backward is a plain gather instead of index_select's scatter-add.
    """

    @staticmethod
    def forward(ctx, x, to_padded, to_packed):
        ctx.save_for_backward(to_packed)
        return x.index_select(1, to_padded)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(1, *ctx.saved_tensors), None, None


class _Unpad(torch.autograd.Function):
    """[1, B * L, ...] -> [1, T, ...]; in backward the padding slots get zeros."""

    @staticmethod
    def forward(ctx, x, to_packed):
        ctx.save_for_backward(to_packed)
        ctx.slots = x.shape[1]
        return x.index_select(1, to_packed)

    @staticmethod
    def backward(ctx, grad):
        padded = grad.new_zeros(1, ctx.slots, *grad.shape[2:])
        return padded.index_copy_(1, *ctx.saved_tensors, grad), None


def _pad(x_BHTD: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    """[1, H, T, D] -> [B, H, L, D], each sequence padded on the right."""
    x_BTHD = x_BHTD.transpose(1, 2)
    if not packed.is_uniform:
        x_BTHD = _Pad.apply(x_BTHD, packed.to_padded, packed.to_packed)
    return x_BTHD.reshape(len(packed.lengths), packed.longest, *x_BTHD.shape[2:]).transpose(1, 2)


def _unpad(x_BHLD: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    """[B, H, L, D] -> [1, T, H, D]."""
    x_BTHD = x_BHLD.transpose(1, 2).reshape(1, -1, x_BHLD.shape[1], x_BHLD.shape[3])
    if packed.is_uniform:
        return x_BTHD
    return _Unpad.apply(x_BTHD, packed.to_packed)


# Up to this many scores the CPU materialises them: torch's flash kernel there spends its time on the small products of
# its blocks (bfloat16, 8 sequences of 64 tokens, 9 heads, 2 cores: 6.6 ms forward and backward against 1.2 ms).
MATERIALISED_SCORES = 2**22


def attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scale) v and its log-sum-exp: [B, H, L, D] and float32 (float64 for float64) [B, H, L].

    q [B, H, L, D]; k, v [B, H, S, D]; mask [B, 1, 1 or L, S] bool, true where a key may be seen. No gradient.
    torch's flash kernel on the CPU, or plain products for few scores with a mask; on a GPU its flash kernel, or its
    memory-efficient one where there is a mask or a dtype that flash does not take.
    """
    B, H, L, S = *q.shape[:3], k.shape[2]
    on_cpu = q.device.type == "cpu"
    if (on_cpu and mask is not None and B * H * L * S <= MATERIALISED_SCORES) or (
        not on_cpu and q.dtype == torch.float64
    ):
        return _materialised_attention(q, k, v, scale, is_causal, mask)
    bias = None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    aten = torch.ops.aten
    if on_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)
    if mask is None and q.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[:2]
    bias = None if bias is None else bias.expand(B, H, L, S)
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal, scale=scale)[:2]
    return out, lse[..., :L]


def _materialised_attention(q, k, v, scale: float, is_causal: bool, mask: torch.Tensor | None) -> KeyValue:
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.exp(scores - lse[..., None]).to(v.dtype) @ v, lse


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, dropout: float = 0.0):
    """Causal softmax(q k^T * scale) v with gradient: q [B, H, L, D]; k, v [B, G, L, D], G divides H -> [B, H, L, D].

    Softmax in float32 (float64 for float64).
    """
    B, H, L, D = q.shape
    G = k.shape[1]
    if q.device.type != "cpu" or dropout or B * H * L * L > MATERIALISED_SCORES:
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=G != H
        )
    # The query heads of one key/value head fold into rows: keys and values are not expanded.
    rows = q.reshape(B * G, H // G * L, D)
    scores = torch.bmm(rows, k.reshape(B * G, L, D).transpose(1, 2))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).view(B, H, L, L) * scale
    future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu_(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1).to(q.dtype)
    return torch.bmm(weights.view(B * G, H // G * L, L), v.reshape(B * G, L, D)).view(B, H, L, D)


def merge(o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor) -> torch.Tensor:
    """Attention over the union of two key sets from the attention over each: o [..., D], lse [...]."""
    share = torch.sigmoid(lse1 - lse2)[..., None]  # exp(lse1) / (exp(lse1) + exp(lse2))
    return torch.lerp(o2.to(share.dtype), o1.to(share.dtype), share).to(o1.dtype)


def _attend_prefix(q: torch.Tensor, packed: PackedSequences, layer: int, scale: float) -> KeyValue:
    """All packed queries q [1, H, T, D] against the prefixes of their groups: out [1, H, T, D], lse [1, H, T].

    The query heads of one key/value head stand next to each other, so [H, T] folds into [G, H/G * T] query rows:
    each key and value is read once for all heads and all sequences that share it.
    """
    outs, lses = [], []
    start = sequence = 0
    for prefix, count in packed.prefixes:
        stop = start + sum(packed.lengths[sequence : sequence + count])
        q_group = q[:, :, start:stop]
        k, v = prefix.fetch(layer)
        heads, tokens, dim = q_group.shape[1:]
        rows = q_group.reshape(1, k.shape[1], heads // k.shape[1] * tokens, dim)
        out, lse = attention_with_lse(rows, k, v, scale=scale)
        outs.append(out.reshape(1, heads, tokens, dim))
        lses.append(lse.reshape(1, heads, tokens))
        start, sequence = stop, sequence + count
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _attend_cached(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences, layer: int, scale: float
) -> KeyValue:
    """Append k, v to the decode cache, then attend to it: out [B, H, L, D], lse [B, H, L]."""
    batch = len(packed.lengths)
    k_cache, v_cache = packed.cache.buffers(layer, batch, k)
    k_cache[packed.cache_slots] = k[0].transpose(0, 1)
    v_cache[packed.cache_slots] = v[0].transpose(0, 1)
    k_seen, v_seen = k_cache[:, :, : packed.seen], v_cache[:, :, : packed.seen]
    q_BHLD = _pad(q, packed)
    heads, kv_heads, longest = q.shape[1], k.shape[1], packed.longest
    if longest == 1:
        # One new token each: fold the heads of a group into query rows, as for the prefix.
        rows = q_BHLD.reshape(batch, kv_heads, heads // kv_heads, -1)
        out, lse = attention_with_lse(rows, k_seen, v_seen, scale=scale, mask=packed.visible)
        return out.reshape(batch, heads, 1, -1), lse.reshape(batch, heads, 1)
    repeats = heads // kv_heads
    return attention_with_lse(
        q_BHLD,
        k_seen.repeat_interleave(repeats, 1),
        v_seen.repeat_interleave(repeats, 1),
        scale=scale,
        mask=packed.visible,
    )


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    packed: PackedSequences | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """transformers attention interface: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    if packed is None:
        raise ValueError('attention "fastft" needs packed=PackedSequences(...) in the model call')
    layer = module.layer_idx
    if packed.capture is not None:
        packed.capture.put(layer, key.detach(), value.detach())
    if packed.prefixes is None and packed.cache is None and packed.tree is None:
        # Padding is on the right, so the causal mask hides it from every real token.
        out = causal_attention(
            _pad(query, packed), _pad(key, packed), _pad(value, packed), scale=scaling, dropout=dropout
        )
        return _unpad(out, packed), None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        raise RuntimeError("packed_attention: prefixes, branches, decode caches take no gradient; use torch.no_grad()")
    if packed.cache is not None:
        own, own_lse = _attend_cached(query, key, value, packed, layer, scaling)
    else:
        repeats = query.shape[1] // key.shape[1]
        own, own_lse = attention_with_lse(
            _pad(query, packed),
            _pad(key, packed).repeat_interleave(repeats, 1),
            _pad(value, packed).repeat_interleave(repeats, 1),
            scale=scaling,
            is_causal=packed.tree is None,
            mask=packed.tree,
        )
    own = _unpad(own, packed)
    if packed.prefixes is None:
        return own, None
    own_lse = _unpad(own_lse[..., None], packed).squeeze(-1)
    shared, shared_lse = _attend_prefix(query, packed, layer, scaling)
    return merge(shared.transpose(1, 2), shared_lse.transpose(1, 2), own, own_lse), None


AttentionInterface.register(IMPLEMENTATION, packed_attention)
