"""Passes layer by layer over many packs at once, and decoder layers whose weights wait in host memory.

Where the base does not fit the device, its layers visit it one at a time. Pack by pack every layer would cross the link
once for each pack; layer by layer it crosses once for all of them, and while one layer computes the next is on its way.
What each pack has of hidden states waits in host memory, a context's keys and values exist for one layer at a time.

The decoder's own code runs, twice for each pack: once with layers that do nothing but note what they are called with,
and once with layers that return what came out. Between the two, each layer runs over all packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fastft.models.packing import PackedSequences

Visit = Callable[[int], AbstractContextManager]  # a layer's weights are on the device within it

# Up to so many bytes, hidden states stay on a GPU.
HIDDEN_ON_DEVICE = 2**28


class HostLayers:
    """Decoder layers whose weights wait in host memory, pinned, and visit the device one at a time.

    A layer that is called from the decoder's own code visits by itself. On a CPU nothing is copied.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device, *, copies: bool | None = None):
        """copies: whether a visit copies; None: on a GPU."""
        self.layers, self.device = layers, device
        self.copies = device.type != "cpu" if copies is None else copies
        self.copied_bytes = 0
        self._guests: dict[int, int] = {}  # layer -> visits that have not ended
        self._arriving: dict[int, tuple[list[torch.Tensor], torch.cuda.Event | None]] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._at_home = [[self._pinned(p) for p in layer.parameters()] for layer in layers if self.copies]
        if self.copies:
            for i, layer in enumerate(layers):
                self._point(i, self._at_home[i])
                layer.forward = self._visiting(i, layer.forward)

    def _pinned(self, parameter: nn.Parameter) -> torch.Tensor:
        return parameter.data.pin_memory() if self._stream else parameter.data

    @contextmanager
    def visit(self, i: int) -> Iterator[None]:
        """Within it the weights of layer i are on the device, and those of the next are being copied."""
        self._enter(i)
        try:
            yield
        finally:
            self._leave(i)

    def release(self) -> None:
        """End the arrangement: the layers stay in host memory and no longer visit."""
        if self.copies:
            for layer in self.layers:
                del layer.forward  # the class's own is there again
        self._arriving.clear()
        self.copies = False

    def _visiting(self, i: int, whole: Callable) -> Callable:
        def forward(*args, **kwargs):
            with self.visit(i):
                return whole(*args, **kwargs)

        return forward

    def _enter(self, i: int) -> None:
        if not self.copies:
            return
        self._guests[i] = self._guests.get(i, 0) + 1
        if self._guests[i] > 1:
            return
        if i not in self._arriving:
            self._start_copy(i)
        copied, arrived = self._arriving.pop(i)
        if arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for x in copied:
                x.record_stream(current)  # allocated on the other stream, whose next copy must not take its memory
        self._point(i, copied)
        following = (i + 1) % len(self.layers)
        if not self._guests.get(following):
            self._start_copy(following)

    def _leave(self, i: int) -> None:
        if not self.copies:
            return
        self._guests[i] -= 1
        if not self._guests[i]:
            self._point(i, self._at_home[i])

    def _start_copy(self, i: int) -> None:
        if i in self._arriving:
            return
        self._arriving.clear()  # what was expected next did not come: a pass that was left in the middle
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            copied = [x.to(self.device, non_blocking=True, copy=True) for x in self._at_home[i]]
            self._arriving[i] = copied, self._stream.record_event() if self._stream else None
        self.copied_bytes += sum(x.nbytes for x in copied)

    def _point(self, i: int, tensors: list[torch.Tensor]) -> None:
        for parameter, tensor in zip(self.layers[i].parameters(), tensors, strict=True):
            parameter.data = tensor


class _Call:
    """A pack on its way through the layers."""

    def __init__(self, count: int):
        self.arguments: list[tuple[tuple, dict[str, Any]]] = [
            ((), {})
        ] * count  # of each layer, but for the hidden states
        self.hidden: torch.Tensor | None = None


class Layerwise:
    """Runs a decoder's layers over many packs, layer by layer. No gradient."""

    def __init__(self, decoder: nn.Module, layers: list[nn.Module], visit: Visit):
        self.decoder, self.layers, self.visit = decoder, layers, visit
        self._returned: tuple | None = None  # what a layer returns behind the hidden states; None: them alone
        self._probed = False

    @torch.no_grad()
    def run(
        self, packs: list[tuple[torch.Tensor, PackedSequences]], *, keep_prefixes: bool = False
    ) -> Iterator[torch.Tensor]:
        """The final hidden states [T, H] of each pack (input_ids [1, T], packed), in their order.

        A pack that captures a prefix comes before those that read it. keep_prefixes: for a later pass; else each
        layer's keys and values are dropped when all packs have passed it.
        """
        calls = [self._note(input_ids, packed) for input_ids, packed in packs]
        waits = sum(call.hidden.nbytes for call in calls) > HIDDEN_ON_DEVICE
        for i, layer in enumerate(self.layers):
            with self.visit(i):
                for call in calls:
                    args, kwargs = call.arguments[i]
                    device = packs[0][0].device
                    hidden = _first(layer(call.hidden.to(device, non_blocking=True), *args, **kwargs))
                    call.hidden = _to_host(hidden) if waits else hidden
            if not keep_prefixes:
                for _, packed in packs:
                    if packed.capture is not None:
                        packed.capture.drop(i)
        for (input_ids, packed), call in zip(packs, calls, strict=True):
            yield self._finish(input_ids, packed, call.hidden.to(input_ids.device))
            call.hidden = None

    def _note(self, input_ids: torch.Tensor, packed: PackedSequences) -> _Call:
        call = _Call(len(self.layers))

        def note(i: int, whole: Callable, hidden: torch.Tensor, *args, **kwargs):
            if i == 0:
                call.hidden = hidden
                if not self._probed:
                    with self.visit(0):
                        found = whole(hidden, *args, **kwargs)
                    self._returned, self._probed = (found[1:] if isinstance(found, tuple) else None), True
            call.arguments[i] = args, kwargs
            return self._as_returned(hidden)

        with self._replaced(note):
            self._decode(input_ids, packed)
        return call

    def _finish(self, input_ids: torch.Tensor, packed: PackedSequences, hidden: torch.Tensor) -> torch.Tensor:
        with self._replaced(lambda i, whole, _, *args, **kwargs: self._as_returned(hidden)):
            return self._decode(input_ids, packed)

    def _as_returned(self, hidden: torch.Tensor):
        return hidden if self._returned is None else (hidden, *self._returned)

    def _decode(self, input_ids: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
        return self.decoder(
            input_ids=input_ids, position_ids=packed.position_ids, packed=packed, use_cache=False
        ).last_hidden_state.squeeze(0)

    @contextmanager
    def _replaced(self, stand_in: Callable) -> Iterator[None]:
        """Let stand_in(i, the layer's own forward, ...) answer for each layer."""
        wholes = [layer.forward for layer in self.layers]
        own = ["forward" in vars(layer) for layer in self.layers]
        for i, (layer, whole) in enumerate(zip(self.layers, wholes, strict=True)):
            layer.forward = lambda *args, i=i, whole=whole, **kwargs: stand_in(i, whole, *args, **kwargs)
        try:
            yield
        finally:
            for layer, whole, was_own in zip(self.layers, wholes, own, strict=True):
                if was_own:
                    layer.forward = whole
                else:
                    del layer.forward


def _first(returned: torch.Tensor | tuple) -> torch.Tensor:
    return returned[0] if isinstance(returned, tuple) else returned


def _to_host(x: torch.Tensor) -> torch.Tensor:
    if x.device.type == "cpu":
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
