"""The frozen base and the adapted model in one pass through the decoder.

The teacher is the same model as the student, with the adapter off, so a layer's weights can serve both while they are
there: ZeRO-3 gathers them once, parameter offload copies them once, a GPU dequantises them once. All rows of a
pass lie end to end, [1, T1 + T2 + ...], and go through the decoder's own code together; only where the two differ
are they taken apart. Each decoder layer, and what is adapted or drops out besides, runs its parts one after the other

    contexts     no gradient, adapter off, no dropout; their keys and values are captured
    teacher      the same, behind the contexts (which this layer has captured a moment ago, or an earlier pass has)
    student      with gradient, adapter on, dropout as the model is set

and joins the results. Backward reaches the student's rows alone; only a final norm that is the same for both goes over
the others too, whose gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from fastft.errors import ModelError
from fastft.models.attention import PackedSequences
from fastft.models.causal import PackedCausalLM
from fastft.models.quantized import DequantisedOnce, quantised_weights
from fastft.peft import adapter_off

R = TypeVar("R")
Pack = tuple[torch.Tensor, PackedSequences]  # input_ids [1, T] and where the sequences lie in them


class _Parts:
    """What stands in the decoder call for the one `PackedSequences` of an ordinary pass."""

    is_extensible = False  # its members are, each by itself

    def __init__(self, packs: list[PackedSequences]):
        self.packs = packs
        self.sizes = [sum(p.lengths) for p in packs]
        self.position_ids = torch.cat([p.position_ids for p in packs], 1)


class Lockstep:
    """Passes of `lm` in which frozen packs and a trained one share every layer's weights.

    Made after the adapter is injected. Passes that do not go through `run` are as they were.
    """

    def __init__(self, lm: PackedCausalLM):
        if not lm.layers:
            raise ModelError(f"{type(lm.model).__name__} does not name its decoder layers; use distill.teacher=stored")
        self.lm = lm
        self._parts: _Parts | None = None
        self.dequantised = DequantisedOnce()
        self._training = False
        inside = {module for layer in lm.layers for module in layer.modules()}
        outside = [m for m in lm.model.modules() if m not in inside]
        differing = [m for m in outside if isinstance(m, nn.Dropout) or _is_trained(m)]
        for module in (*lm.layers, *differing):
            self._take_apart(module)

    def run(self, call: Callable[..., R], frozen: list[Pack], trained: Pack, head_fn: Callable[..., R]) -> R:
        """head_fn(hidden of the last frozen pack [T, H], hidden of the trained pack [T, H], head weight [V, H]).

        call: the model, or the engine around it. Only the trained pack's hidden states have a gradient.
        Dropout that a decoder applies outside of its layers without a module for it, and layerdrop, are off.
        """
        own = [ids.shape[1] for ids, _ in (*frozen, trained)]
        packs = [self.lm.rounded(*pack) for pack in (*frozen, trained)]
        self._parts = parts = _Parts([packed for _, packed in packs])

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> R:
            *_, teacher, student = (rows[:tokens] for rows, tokens in zip(hidden.split(parts.sizes), own, strict=True))
            return head_fn(teacher.detach(), student, weight)

        self._training = self.lm.training
        self.lm.eval()
        try:
            return call(torch.cat([ids for ids, _ in packs], 1), parts, head)
        finally:
            self._parts = None
            self.lm.train(self._training)

    def _take_apart(self, module: nn.Module) -> None:
        whole, weights = module.forward, quantised_weights(module)

        def forward(*args, **kwargs):
            parts = self._parts
            if parts is None:
                return whole(*args, **kwargs)
            *frozen, trained = parts.packs
            *arguments, last = _split((args, kwargs), parts.sizes)
            self._parts = None  # what is inside of `module` sees one part
            with self.dequantised.of(weights):
                with torch.no_grad(), adapter_off():
                    outputs = [_call(whole, part, packed) for part, packed in zip(arguments, frozen, strict=True)]
                module.train(self._training)
                outputs.append(_call(whole, last, trained))
                module.eval()
            self._parts = parts
            return _join(outputs)

        module.forward = forward


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def _call(forward: Callable, arguments: tuple[tuple, dict], packed: PackedSequences) -> Any:
    args, kwargs = arguments
    return forward(*args, **({**kwargs, "packed": packed} if "packed" in kwargs else kwargs))


def _split(value: Any, sizes: list[int]) -> list[Any]:
    """Each part's share of an argument: tensors [1, T, ...] by rows, tuples and dicts by their members, the rest whole.

    The last share is a copy where it has a gradient: saved for backward, it does not keep the others' rows alive.
    """
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == (1, sum(sizes)):
        *frozen, trained = value.split(sizes, 1)
        return [*frozen, trained.clone() if trained.requires_grad else trained]
    if isinstance(value, tuple):
        return list(zip(*(_split(v, sizes) for v in value), strict=True)) or [()] * len(sizes)
    if isinstance(value, dict):
        shares = {k: _split(v, sizes) for k, v in value.items()}
        return [{k: share[i] for k, share in shares.items()} for i in range(len(sizes))]
    return [value] * len(sizes)


def _join(outputs: list[Any]) -> Any:
    """The parts' outputs end to end, as the module alone would have returned them."""
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs, 1)
    if isinstance(outputs[0], tuple):
        return tuple(_join(list(members)) for members in zip(*outputs, strict=True))
    return outputs[-1]
