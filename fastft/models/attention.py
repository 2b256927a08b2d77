"""Attention over packed sequences (`packing`), with an optional prefix that many of them share.

The rest of the project imports packs and prefixes from here too: `packing` and `flash` are this module's parts.

What comes before a query is attended to in parts, which are merged exactly by their log-sum-exp: with parts i, outputs
o_i and lse_i = log sum_j exp(q . k_j * scale), the whole is sum_i exp(lse_i - lse) o_i, lse = logaddexp_i lse_i
(the identity behind FlashAttention, Dao et al. 2022, arXiv 2205.14135, and Hydragen, Juravsky et al. 2024,
arXiv 2402.05099).

On a GPU the sequences' own part is one call over their ragged rows (`flash`), where a library for that takes the dtype.
On a CPU the project's kernel (`fastft.ops.attention`) takes ragged rows and prefix in one softmax, with nothing to
merge. What neither takes is padded to [B, L]: float32 on a GPU, attention dropout, model.attention=sdpa.

The function is registered with transformers and is reached through the attention interface with a `packed` keyword, so
no model code is copied. There is one name for each choice of `model.attention`: `implementation(choice)`.

Shapes: T packed tokens, B sequences, L the longest of them, H query heads, G key/value heads, D head size,
C prefix length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from fastft import ops
from fastft.errors import ModelError
from fastft.models import flash
from fastft.models.flash import OutputAndLSE
from fastft.models.packing import DecodeCache, PackedSequences, Prefix
from fastft.ops.attention import LARGEST_HEAD

__all__ = [
    "IMPLEMENTATION",
    "DecodeCache",
    "PackedSequences",
    "Prefix",
    "attention_with_lse",
    "causal_attention",
    "implementation",
    "merge",
    "packed_attention",
]

IMPLEMENTATION = "fastft"


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
    memory-efficient one where there is a mask or a dtype that flash does not take, or plain products for what neither
    takes: float64, and head sizes that are no multiple of 8.
    """
    B, H, L, S = *q.shape[:3], k.shape[2]
    on_cpu = q.device.type == "cpu"
    if (on_cpu and mask is not None and B * H * L * S <= MATERIALISED_SCORES) or (
        not on_cpu and (q.dtype == torch.float64 or q.shape[3] % 8)
    ):
        return _materialised_attention(q, k, v, scale, is_causal, mask)
    aten = torch.ops.aten
    bias = None
    if mask is not None:
        # Rows begin at multiples of 8 elements: the memory-efficient kernel loads them so.
        bias = q.new_zeros(*mask.shape[:3], S + -S % 8)[..., :S].masked_fill_(~mask, -torch.inf)
    if on_cpu:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)
    if mask is None and q.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[:2]
    bias = None if bias is None else bias.expand(B, H, L, S)
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal, scale=scale)[:2]
    return out, lse[..., :L]


def _materialised_attention(q, k, v, scale: float, is_causal: bool, mask: torch.Tensor | None) -> OutputAndLSE:
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


def _has_kernel(q: torch.Tensor) -> bool:
    """Whether the project's CPU kernel takes such queries: it wants vectors."""
    return q.device.type == "cpu" and q.shape[-1] <= LARGEST_HEAD and ops.cpu_capability() not in (None, "scalar")


def _attend_ragged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences, layer: int, scale: float
) -> torch.Tensor:
    """Every sequence's attention to its prefix, its cache and itself, by the CPU kernel: [1, T, H, D]."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    if packed.cache is not None:
        ends_k = torch.arange(len(packed.lengths) + 1, dtype=torch.int32) * packed.cache.capacity
        k, v = (x.flatten(0, 1) for x in packed.extend_cache(layer, k, v))
        return _attend_groups(q, k, v, packed, layer, scale, packed.cu_seqlens, ends_k, packed.seqused)[0][None]
    if packed.branching is None:
        return _attend_groups(q, k, v, packed, layer, scale, packed.cu_seqlens, packed.cu_seqlens)[0][None]
    # Each part of a tree behind the prefix alone; then the branches also see the trunk that they grow from.
    tree = packed.branching
    out, lse = _attend_groups(q, k, v, packed, layer, scale, tree.cu_parts, tree.cu_parts, parts=tree.parts)
    if len(tree.branch_rows):
        ends = (tree.cu_branches, tree.cu_trunks)
        trunks = (x[tree.trunk_rows] for x in (k, v))
        more, more_lse = ops.attention(q[tree.branch_rows], *trunks, *ends, scale=scale, is_causal=False)
        own, own_lse = out[tree.branch_rows], lse[:, tree.branch_rows]
        out[tree.branch_rows] = merge(own, own_lse.t(), more, more_lse.t())
    return out[None]


def _attend_groups(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: PackedSequences,
    layer: int,
    scale: float,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    used: torch.Tensor | None = None,
    parts: list[int] | None = None,
) -> OutputAndLSE:
    """`fastft.ops.attention` for each prefix and those behind it: out [T, H, D], lse [H, T].

    parts: how many stretches of ends_q each sequence has; None: one.
    """
    if packed.prefixes is None:
        return ops.attention(q, k, v, ends_q, ends_k, seqused_k=used, scale=scale)
    outs, lses, first, sequence = [], [], 0, 0
    for prefix, count in packed.prefixes:
        last = first + (count if parts is None else sum(parts[sequence : sequence + count]))
        group_q, group_k = ends_q[first : last + 1], ends_k[first : last + 1]
        rows_q, rows_k = (slice(int(ends[0]), int(ends[-1])) for ends in (group_q, group_k))
        k_prefix, v_prefix = (x[0].transpose(0, 1) for x in prefix.fetch(layer))
        out, lse = ops.attention(
            q[rows_q],
            k[rows_k],
            v[rows_k],
            group_q - rows_q.start,
            group_k - rows_k.start,
            seqused_k=None if used is None else used[first:last],
            prefix_k=k_prefix,
            prefix_v=v_prefix,
            scale=scale,
        )
        outs.append(out)
        lses.append(lse)
        first, sequence = last, sequence + count
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(lses, 1))


def _attend_prefix(
    q: torch.Tensor,
    packed: PackedSequences,
    layer: int,
    scale: float,
    attend: Callable[..., OutputAndLSE],
) -> OutputAndLSE:
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
        out, lse = attend(rows, k, v, scale=scale)
        outs.append(out.reshape(1, heads, tokens, dim))
        lses.append(lse.reshape(1, heads, tokens))
        start, sequence = stop, sequence + count
    if len(outs) == 1:
        return outs[0], lses[0]
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _attend_cached(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences, layer: int, scale: float
) -> OutputAndLSE:
    """Append k, v to the decode cache, then attend to it: out [B, H, L, D], lse [B, H, L]."""
    batch = len(packed.lengths)
    written = packed.extend_cache(layer, *(x[0].transpose(0, 1) for x in (k, v)))
    k_seen, v_seen = (x[:, : packed.seen].transpose(1, 2) for x in written)
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


def _attend_own(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed: PackedSequences,
    layer: int,
    scale: float,
    dropout: float,
    backend: flash.Backend | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every sequence's attention to itself: out [1, T, H, D], lse [1, T, H], or None where no prefix needs it."""
    if backend is not None and packed.cache is None and packed.branching is None:
        ragged = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
        out, lse = backend.block_causal(*ragged, packed.cu_seqlens, packed.longest, scale=scale)
        return out[None], lse.t()[None]
    # Padding is on the right, so the causal mask hides it from every real token.
    if packed.cache is not None:
        out, lse = _attend_cached(q, k, v, packed, layer, scale)
    elif packed.prefixes is None and packed.branching is None:
        q, k, v = (_pad(x, packed) for x in (q, k, v))
        return _unpad(causal_attention(q, k, v, scale=scale, dropout=dropout), packed), None
    else:
        repeats = q.shape[1] // k.shape[1]
        k, v = (_pad(x, packed).repeat_interleave(repeats, 1) for x in (k, v))
        out, lse = attention_with_lse(
            _pad(q, packed),
            k,
            v,
            scale=scale,
            is_causal=packed.branching is None,
            mask=None if packed.branching is None else packed.tree,
        )
    return _unpad(out, packed), _unpad(lse[..., None], packed).squeeze(-1)


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
    choice: str = "auto",
    **others,
) -> tuple[torch.Tensor, None]:
    """transformers attention interface: query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    choice: who computes it, see `flash.select`; on a CPU, auto is the project's kernel, and sdpa torch's. On a GPU
    branches and decode caches go through torch's masked kernels in any case. Attention dropout needs padding: auto does
    that, a back end that is named refuses it.
    """
    if packed is None:
        raise ValueError('attention "fastft" needs packed=PackedSequences(...) in the model call')
    _refuse(others, packed)
    gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if gradient and not packed.takes_gradient:
        raise RuntimeError("packed_attention: prefixes, branches, decode caches take no gradient; use torch.no_grad()")
    if packed.exchange is not None:

        def attend(*heads: torch.Tensor) -> torch.Tensor:
            options = {"scaling": scaling, "dropout": dropout, "packed": packed.exchange.whole, "choice": choice}
            return packed_attention(module, *heads, None, **options)[0]

        return packed.exchange.attend(attend, query, key, value), None
    if dropout and choice not in ("auto", "sdpa"):
        raise ModelError(f"model.attention={choice} has no attention dropout, and the model's is {dropout}; use sdpa")
    backend = None if dropout else flash.select(choice, query.device, query.dtype, query.shape[-1])
    layer = module.layer_idx
    if packed.capture is not None:
        packed.capture.put(layer, key.detach(), value.detach())
    kernel = choice == "auto" and not dropout and _has_kernel(query)
    if kernel:
        return _attend_ragged(query, key, value, packed, layer, scaling), None
    own, own_lse = _attend_own(query, key, value, packed, layer, scaling, dropout, backend)
    if packed.prefixes is None:
        return own, None
    attend = backend.full if backend else attention_with_lse
    shared, shared_lse = _attend_prefix(query, packed, layer, scaling, attend)
    return merge(shared.transpose(1, 2), shared_lse.transpose(1, 2), own, own_lse), None


# What decoder layers hand to their attention that says nothing about the scores: `packed` has the positions.
WITHOUT_MEANING = {"position_ids", "use_cache", "cache_position", "past_key_values", "output_attentions"}


def _refuse(others: dict[str, object], packed: PackedSequences) -> None:
    """Raise ModelError for what a model asks of its attention and this one does not compute."""
    for name, value in others.items():
        if value is None or name in WITHOUT_MEANING or (name == "is_causal" and value):
            continue
        if name == "sliding_window":
            if packed.reach > value:
                raise ModelError(
                    f"the model's attention sees {value} positions (sliding_window), but a sequence and what is before "
                    f"it have {packed.reach}, of which fastft would see all; shorten them: data.window.tokens for "
                    "documents, icl.num_shots for demonstrations"
                )
        else:
            given = "" if isinstance(value, torch.Tensor) else f"={value}"
            raise ModelError(
                f"the model's attention has {name}{given}, which fastft does not compute; use a model without it"
            )


def implementation(choice: str) -> str:
    """What `set_attn_implementation` takes for a value of `model.attention`."""
    return IMPLEMENTATION if choice == "auto" else f"{IMPLEMENTATION}_{choice}"


for _choice in flash.CHOICES:
    AttentionInterface.register(implementation(_choice), functools.partial(packed_attention, choice=_choice))
