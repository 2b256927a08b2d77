"""The flash attention libraries as plain products on the CPU, in any dtype: their signatures, and what they return."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from fastft.models import attention, flash


def block_mask(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """[T, T], true where a query may see a key: in its own sequence, not behind it."""
    sequence = torch.searchsorted(cu_seqlens[1:].long(), torch.arange(tokens, device=cu_seqlens.device), right=True)
    return (sequence[:, None] == sequence).tril()


def plain_attention(q, k, v, scale, mask=None):
    """q [..., H, L, D]; k, v [..., G, S, D]; mask [L, S] -> out [..., H, L, D], lse [..., H, L]."""
    k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for x in (k, v))
    scores = q @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def plain_attention_backward(grad, q, k, v, scale, mask):
    """Gradients of q, k and v by hand: torch calls a library's backward where it records nothing."""
    groups = (k.shape[0], q.shape[0] // k.shape[0], *q.shape[1:])
    keys, values = (x.repeat_interleave(groups[1], 0) for x in (k, v))
    weights = (q @ keys.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1)
    by_weight = grad @ values.mT
    by_score = weights * (by_weight - (weights * by_weight).sum(-1, keepdim=True)) * scale
    return by_score @ keys, (by_score.mT @ q).view(groups).sum(1), (weights.mT @ grad).view(groups).sum(1)


def _varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, scale, causal):
    assert cu_q.dtype == cu_k.dtype == torch.int32 and torch.equal(cu_q, cu_k) and causal
    assert longest_q == longest_k == int(cu_q.diff().max()) and int(cu_q[-1]) == len(q) == len(k) == len(v)
    out, lse = plain_attention(*(x.transpose(0, 1) for x in (q, k, v)), scale, block_mask(cu_q, len(q)))
    return out.transpose(0, 1), lse


def _dense(q, k, v, scale, causal):
    assert not causal
    out, lse = plain_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale)
    return out.transpose(1, 2), lse


# The arguments that this project uses, in the order of flash-attn 2.8.4 and of 3 and 4 as of August 2026.


def _flash_attn_2():
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, *, deterministic=False, return_attn_probs=False
    ):
        found = _dense(q, k, v, softmax_scale, causal)
        return (*found, None) if return_attn_probs else found[0]

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        *,
        deterministic=False,
        return_attn_probs=False,
    ):
        cu_and_longest = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        found = _varlen(q, k, v, *cu_and_longest, softmax_scale, causal)
        return (*found, None) if return_attn_probs else found[0]

    return flash_attn_func, flash_attn_varlen_func


def _flash_attn_3():
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, *, num_splits=1, deterministic=False, return_attn_probs=False
    ):
        found = _dense(q, k, v, softmax_scale, causal)
        return found if return_attn_probs else found[0]

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        *,
        num_splits=1,
        deterministic=False,
        return_attn_probs=False,
    ):
        cu_and_longest = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        found = _varlen(q, k, v, *cu_and_longest, softmax_scale, causal)
        return found if return_attn_probs else found[0]

    return flash_attn_func, flash_attn_varlen_func


def _flash_attn_4():
    def flash_attn_func(
        q, k, v, qv=None, *, softmax_scale=None, causal=False, num_splits=1, deterministic=False, return_lse=False
    ):
        out, lse = _dense(q, k, v, softmax_scale, causal)
        return out, lse if return_lse else None

    def flash_attn_varlen_func(
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        *,
        softmax_scale=None,
        causal=False,
        num_splits=1,
        deterministic=False,
        return_lse=False,
    ):
        cu_and_longest = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = _varlen(q, k, v, *cu_and_longest, softmax_scale, causal)
        return out, lse if return_lse else None

    return flash_attn_func, flash_attn_varlen_func


PACKAGES = {"fa2": _flash_attn_2, "fa3": _flash_attn_3, "fa4": _flash_attn_4}


def _torch_kernels(library: torch.library.Library) -> None:
    """CPU kernels for the operators under torch.nn.attention.varlen and under `TorchFlash.full`."""

    def forward(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, causal, debug, *, scale, **window):
        assert (window["window_size_left"], window["window_size_right"]) == (-1, 0)
        out, lse = _varlen(q, k, v, cu_q, cu_k, longest_q, longest_k, scale, causal)
        unused = q.new_empty(0)
        return out, lse, unused, unused, unused

    def backward(grad, q, k, v, out, lse, cu_q, cu_k, longest_q, longest_k, *_, scale, **window):
        by_head = (x.transpose(0, 1) for x in (grad, q, k, v))
        found = plain_attention_backward(*by_head, scale, block_mask(cu_q, len(q)))
        return tuple(x.transpose(0, 1) for x in found)

    def dense(q, k, v, dropout=0.0, causal=False, debug=False, *, scale):
        out, lse = _dense(*(x.transpose(1, 2) for x in (q, k, v)), scale, causal)
        unused = q.new_empty(0)
        return out.transpose(1, 2), lse, unused, unused, q.shape[2], k.shape[2], unused, unused, unused

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    library.impl("_scaled_dot_product_flash_attention", dense, "CPU")


@pytest.fixture
def install(monkeypatch):
    """install("fa2"): that package is there, on the CPU."""

    def put(name: str) -> SimpleNamespace:
        backend = next(b for b in flash.BACKENDS if b.name == name)
        package = SimpleNamespace(**{f.__name__: f for f in PACKAGES[name]()})
        monkeypatch.setitem(sys.modules, backend.module, package)
        if "." in backend.module:
            monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
        return package

    return put


@pytest.fixture
def flash_on_cpu(monkeypatch, install):
    """flash_on_cpu(name): attention on the CPU goes through that back end, and its library is the plain one above."""
    select = flash.select
    with torch.library._scoped_library("aten", "IMPL") as library:

        def use(name: str) -> flash.Backend:
            backend = next(b for b in flash.BACKENDS if b.name == name)
            if name in PACKAGES:
                install(name)
            else:
                _torch_kernels(library)

            def chosen(choice, device, *case):
                return backend if device.type == "cpu" else select(choice, device, *case)

            monkeypatch.setattr(flash, "select", chosen)
            monkeypatch.setattr(attention, "_has_kernel", lambda q: False)
            return backend

        yield use
