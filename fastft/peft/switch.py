"""The switch that turns the adapter off: the model is then its frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_off = False


@contextmanager
def adapter_off() -> Iterator[None]:
    """Within it, the layers that `peft.inject` adapted compute what the frozen base computes.

    LoRA leaves lora_B @ lora_A out; BitFit takes the base's biases, of which it keeps a copy. With all weights trained
    (peft.kind=full) there is no base to go back to.
    """
    global _off
    before, _off = _off, True
    try:
        yield
    finally:
        _off = before


def adapter_is_off() -> bool:
    return _off
