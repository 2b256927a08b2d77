"""Activation offloading: what checkpointed layers keep waits in host memory between forward and backward."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@dataclass(eq=False)
class _Kept:
    """A tensor in host memory, and on the device again from when its copy was begun until it is used."""

    host: Tensor
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class ActivationOffloading:
    """Copies of the layers' inputs [1, T, H] on their way to host memory and back, on a stream of their own.

    In forward an input leaves when its layer has begun, in backward it is fetched while the layer behind it computes:
    two are on the device at a time. Nothing waits for the whole device: streams wait for events, and a tensor's memory
    is not used again before its copy is done. On a CPU the same copies are made, which saves nothing.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._forward: list[_Kept] = []  # the inputs of one forward, in order

    def keeping(self, hidden: Tensor, *, is_first: bool) -> saved_tensors_hooks:
        """Within it autograd keeps `hidden`, and it alone, in host memory. is_first: a forward begins here."""
        if is_first:
            self._forward = []
        forward = self._forward
        place, shape = hidden.data_ptr(), hidden.shape  # not the tensor: autograd keeps `pack` as long as its result

        def pack(x: Tensor) -> Tensor | tuple[list[_Kept], int]:
            if x.data_ptr() != place or x.shape != shape:
                return x
            forward.append(self._send(x))
            return forward, len(forward) - 1

        def unpack(x: Tensor | tuple[list[_Kept], int]) -> Tensor:
            return x if isinstance(x, Tensor) else self._fetch(*x)

        return saved_tensors_hooks(pack, unpack)

    def _beside(self):
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def _send(self, x: Tensor) -> _Kept:
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # which is still computing x
            x.record_stream(self._stream)
        with self._beside():
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._stream is not None)
            return _Kept(host.copy_(x, non_blocking=True))

    def _begin_fetch(self, kept: _Kept) -> None:
        if kept.back is None:
            with self._beside():
                kept.back = kept.host.to(self.device, non_blocking=True, copy=True)
                kept.arrived = self._stream.record_event() if self._stream else None

    def _fetch(self, forward: list[_Kept], i: int) -> Tensor:
        """Input i of a forward; the one before it, which backward needs next, sets out."""
        kept = forward[i]
        self._begin_fetch(kept)
        if i > 0:
            self._begin_fetch(forward[i - 1])
        found, kept.back = kept.back, None
        if kept.arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(kept.arrived)
            found.record_stream(current)  # allocated on the other stream, whose next copy must not take its memory
        del forward[i + 1 :]  # backward has passed them
        return found
