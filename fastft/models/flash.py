"""Flash attention on a GPU, over ragged sequences as they lie and grouped heads as they are, and who computes it.

This is the one place that decides between the libraries that have it: the flash-attn packages 2, 3 and 4, as far as
they are installed and have kernels for the GPU, and the flash-attn 2 kernel inside of torch. What they share: float16
and bfloat16, a softmax in float32, head sizes that are a multiple of 8, and a backward whose atomic additions come in
any order unless torch.use_deterministic_algorithms is set.

Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691 (2); Shah et al. 2024, arXiv 2407.08608 (3).

Shapes: T packed tokens, B sequences, L queries, S keys, H query heads, G key/value heads (H / G neighbouring query
heads share one), D head size.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from types import ModuleType

import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from fastft.errors import ModelError

OutputAndLSE = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Backend:
    """A library's flash attention.

    block_causal(q, k, v, cu_seqlens, longest, *, scale) -> out [T, H, D], lse [H, T]
        Causal attention inside of each sequence; `out` has a gradient. q [T, H, D]; k, v [T, G, D]; cu_seqlens int32
        [B + 1], sequence i being rows cu_seqlens[i] to cu_seqlens[i + 1]; longest: tokens of the longest one.
    full(q, k, v, *, scale) -> out [B, H, L, D], lse [B, H, L]
        Every query sees every key; no gradient. q [B, H, L, D]; k, v [B, H, S, D].

    lse is float32, the natural log-sum-exp of a query's scaled scores.
    """

    name: str  # the value of model.attention
    title: str
    oldest: int  # compute capability (its major number) that has kernels
    newest: int | None
    largest_head: int

    def obstacle(self, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
        """Why it cannot be used for such tensors, or None."""
        if device.type != "cuda":
            return f"needs a GPU, got device {device}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"computes in float16 and bfloat16, got {str(dtype).removeprefix('torch.')}"
        major, minor = torch.cuda.get_device_capability(device)
        if major < self.oldest or (self.newest is not None and major > self.newest):
            return f"has no kernels for compute capability {major}.{minor}"
        if head_size % 8 or head_size > self.largest_head:
            return f"takes head sizes that are a multiple of 8, at most {self.largest_head}, got {head_size}"
        return self._import_problem()

    def _import_problem(self) -> str | None:
        return None


@dataclass(frozen=True)
class FlashAttn(Backend):
    """One of the flash-attn packages (https://github.com/Dao-AILab/flash-attention)."""

    module: str
    returns_lse: str  # the keyword that asks for the log-sum-exp
    # Of `full`: into how many parts a long prefix is split when there are few queries, 0: as many as fill the GPU.
    # None where the package decides that unasked (2), or cannot do it everywhere (4).
    num_splits: int | None = None

    def block_causal(self, q, k, v, cu_seqlens, longest: int, *, scale: float) -> OutputAndLSE:
        out, lse = self._import().flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **{self.returns_lse: True},
        )[:2]
        expected = (q.shape[1], q.shape[0])
        if lse.shape != expected:  # flash-attn 2 before 2.7 pads it to [B, H, longest]
            raise ModelError(
                f"{self.title}: the log-sum-exp has shape {tuple(lse.shape)}, expected (heads, tokens) = {expected}; "
                "install a newer version, or use model.attention=varlen"
            )
        return out, lse

    def full(self, q, k, v, *, scale: float) -> OutputAndLSE:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options = {} if self.num_splits is None else {"num_splits": self.num_splits}
        options[self.returns_lse] = True
        out, lse = self._import().flash_attn_func(q, k, v, softmax_scale=scale, **options)[:2]
        return out.transpose(1, 2), lse

    def _import(self) -> ModuleType:
        return importlib.import_module(self.module)

    def _import_problem(self) -> str | None:
        try:
            arguments = inspect.signature(self._import().flash_attn_varlen_func).parameters
        except Exception as error:  # a package that was built for another torch fails with anything
            return f"cannot be imported: {error}".splitlines()[0]
        if self.returns_lse not in arguments:
            return f"is too old: {self.module}.flash_attn_varlen_func has no argument {self.returns_lse}"
        return None


# Versions of torch without this argument take grouped heads as they come.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass(frozen=True)
class TorchFlash(Backend):
    """The flash-attn 2 kernel inside of torch."""

    def block_causal(self, q, k, v, cu_seqlens, longest: int, *, scale: float) -> OutputAndLSE:
        return varlen_attn(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            return_aux=AuxRequest(lse=True),
            scale=scale,
            window_size=(-1, 0),  # causal: any number of keys before the query, none behind it
            **_GROUPED,
        )

    def full(self, q, k, v, *, scale: float) -> OutputAndLSE:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


# In order of preference. Kernels of 3 are for Hopper (9.0), of 4 for Hopper and Blackwell (10.0; heads larger than 128
# there only in single sizes), of 2 for Ampere and newer.
BACKENDS: tuple[Backend, ...] = (
    FlashAttn("fa3", "flash-attn 3", 9, 9, 256, "flash_attn_interface", "return_attn_probs", num_splits=0),
    FlashAttn("fa4", "flash-attn 4", 9, 10, 128, "flash_attn.cute", "return_lse"),
    FlashAttn("fa2", "flash-attn 2", 8, None, 256, "flash_attn.flash_attn_interface", "return_attn_probs"),
    TorchFlash("varlen", "torch.nn.attention.varlen", 8, None, 256),
)

CHOICES = ("auto", *(b.name for b in BACKENDS), "sdpa")


@functools.cache
def select(choice: str, device: torch.device, dtype: torch.dtype, head_size: int) -> Backend | None:
    """The back end for such tensors; None: sequences are padded and go through torch's own kernels.

    choice: auto, the first that can be used, if any; sdpa, none; or the name of one.
    Raises ModelError where the one that is named cannot be used.
    """
    if choice == "sdpa":
        return None
    if choice == "auto":
        return next((b for b in BACKENDS if b.obstacle(device, dtype, head_size) is None), None)
    named = next(b for b in BACKENDS if b.name == choice)
    if problem := named.obstacle(device, dtype, head_size):
        raise ModelError(f"model.attention={choice}: {named.title} {problem}; use auto, or sdpa to pad")
    return named
