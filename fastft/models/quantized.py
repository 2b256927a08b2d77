"""Linear layers whose frozen weight is nf4 or int8.

All parts of a quantised weight lie in one flat uint8 parameter: ZeRO-3 partitions and gathers it in one piece, a file
holds it under one name, and no cast of a module to another dtype touches its scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastft.ops import FrozenWeight, Weight4bit, Weight8bit, frozen_linear, quantise_4bit

KINDS = ("nf4", "int8")
BLOCK, ABSMAX_BLOCK = 64, 256  # weights with one scale; scales with one scale of theirs
ALIGNMENT = 16  # bytes
CHUNK_ELEMENTS = 2**22  # int8: so much of a weight is quantised at a time


class Packing:
    """Where the parts of a quantised weight [N, K] lie in a flat uint8 tensor of `nbytes`.

    nf4   code float32 [16], absmax_code float32 [256], absmax_offset float32 [1], absmax_scale float32
          [ceil(blocks / 256)], absmax uint8 [blocks], packed uint8 [ceil(N K / 2)], with blocks = ceil(N K / 64):
          bitsandbytes' nf4 with double quantisation, 0.516 bytes a weight
    int8  scale float32 [N], values int8 [N, K]: one scale a row
    """

    def __init__(self, kind: str, shape: tuple[int, int]):
        N, K = self.shape = shape
        self.kind = kind
        blocks = math.ceil(N * K / BLOCK)
        if kind == "nf4":
            parts = {
                "code": (torch.float32, 16),
                "absmax_code": (torch.float32, 256),
                "absmax_offset": (torch.float32, 1),
                "absmax_scale": (torch.float32, math.ceil(blocks / ABSMAX_BLOCK)),
                "absmax": (torch.uint8, blocks),
                "packed": (torch.uint8, math.ceil(N * K / 2)),
            }
        elif kind == "int8":
            parts = {"scale": (torch.float32, N), "values": (torch.int8, N * K)}
        else:
            raise ValueError(f"Packing: kind is {kind!r}, expected one of {', '.join(KINDS)}")
        self.parts: dict[str, tuple[torch.dtype, slice]] = {}
        end = 0
        for name, (dtype, count) in parts.items():
            begin = math.ceil(end / ALIGNMENT) * ALIGNMENT
            end = begin + count * dtype.itemsize
            self.parts[name] = dtype, slice(begin, end)
        self.nbytes = end

    def views(self, storage: Tensor) -> dict[str, Tensor]:
        """The parts, in the memory of `storage` uint8 [nbytes]."""
        return {name: storage[where].view(dtype) for name, (dtype, where) in self.parts.items()}


class QuantizedWeight(FrozenWeight):
    """What `lora_linear` and `frozen_linear` take for a weight, on a parameter that ZeRO-3 may gather and release.

    The parts are looked up in the parameter at every use: a view kept for backward would keep what was gathered alive.
    dtype: of the products, and of what is trained beside the weight.
    """

    def __init__(self, storage: nn.Parameter, packing: Packing, dtype: torch.dtype):
        self.storage, self.packing, self.shape, self.dtype = storage, packing, packing.shape, dtype
        # Read once, where the weight is loaded: on a GPU each look would wait for the device.
        is_nf4 = packing.kind == "nf4" and storage.device.type != "meta"
        self.absmax_offset = float(packing.views(storage)["absmax_offset"]) if is_nf4 else 0.0
        self._once: DequantisedOnce | None = None
        self._whole: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.storage.device

    def numel(self) -> int:
        """Zero while ZeRO-3 has released the parameter, N K otherwise."""
        return math.prod(self.shape) if self.storage.numel() else 0

    def _unpacked(self) -> FrozenWeight:
        parts = self.packing.views(self.storage.detach())
        if self.packing.kind == "int8":
            return Weight8bit(parts["values"].view(self.shape), parts["scale"])
        double = {name: parts[name] for name in ("absmax_code", "absmax_scale")}
        return Weight4bit(
            self.shape,
            parts["packed"],
            parts["code"],
            parts["absmax"],
            BLOCK,
            absmax_offset=self.absmax_offset,
            absmax_block=ABSMAX_BLOCK,
            **double,
        )

    def dequantise(self, begin: int, end: int, out: Tensor) -> None:
        self._unpacked().dequantise(begin, end, out)

    def tiles(self, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        if self._once is None:
            return self._unpacked().tiles(like)
        if self._whole is None:
            self._whole = self._once.room(self.shape, like)
            self.dequantise(0, self.shape[0], self._whole)
        return iter([(0, self.shape[0], self._whole)])


class DequantisedOnce:
    """Lets several passes through a layer share what the first of them has dequantised.

    All layers use the same memory, as large as one of them. devices: where it is done. A CPU wins nothing by it: a tile
    is still in the cache when it is multiplied, a whole layer is not (four layers of OPT-1.3B's shape, 256 tokens,
    forward twice and backward: 876 and 880 ms, tile by tile 874 and 898).
    """

    def __init__(self, devices: tuple[str, ...] = ("cuda",)):
        self.devices = devices
        self._buffer: Tensor | None = None
        self._needed = self._taken = 0

    @contextmanager
    def of(self, weights: list[QuantizedWeight]) -> Iterator[None]:
        """Within, a weight's first product dequantises it, and the others find it whole, [N, K] in that one's dtype."""
        weights = [weight for weight in weights if weight.device.type in self.devices]
        self._needed, self._taken = sum(math.prod(weight.shape) for weight in weights), 0
        for weight in weights:
            weight._once = self
        try:
            yield
        finally:
            for weight in weights:
                weight._once = weight._whole = None

    def room(self, shape: tuple[int, int], like: Tensor) -> Tensor:
        if self._buffer is None or self._buffer.numel() < self._needed or self._buffer.dtype != like.dtype:
            self._buffer = like.new_empty(self._needed)
        begin, self._taken = self._taken, self._taken + math.prod(shape)
        return self._buffer[begin : self._taken].view(shape)


def quantised_weights(model: nn.Module) -> list[QuantizedWeight]:
    """Those of its linear layers, adapted or not, each once."""
    found = (getattr(module, "weight", None) for module in model.modules())
    return list(dict.fromkeys(w for w in found if isinstance(w, QuantizedWeight)))


class QuantizedLinear(nn.Linear):
    """x @ weight.T + bias with a frozen quantised weight; the bias is as any other and may be trained.

    storage: uint8, as `quantize` makes it. Its name in the module is `packed`; `weight` is no parameter.
    Keeps nothing of x for backward.
    """

    def __init__(self, storage: Tensor, shape: tuple[int, int], kind: str, bias: Tensor | None, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.packed = nn.Parameter(storage, requires_grad=False)
        self.weight = QuantizedWeight(self.packed, Packing(kind, shape), dtype)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.weight.packing.kind}"


def quantize(weight: Tensor, kind: str) -> Tensor:
    """weight [N, K] (float32, bfloat16 or float16) -> uint8 [Packing(kind, [N, K]).nbytes].

    nf4: codes and twice quantised scales are bit for bit those of bitsandbytes with compress_statistics.
    int8: values = round(weight / scale), scale = max|row| / 127.
    Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314; 2022 (LLM.int8()), https://arxiv.org/abs/2208.07339.
    """
    packing = Packing(kind, tuple(weight.shape))
    storage = torch.zeros(packing.nbytes, dtype=torch.uint8, device=weight.device)
    (_quantize_4bit if kind == "nf4" else _quantize_8bit)(weight, packing.views(storage))
    return storage


def _quantize_4bit(weight: Tensor, parts: dict[str, Tensor]) -> None:
    from bitsandbytes import functional  # slow to import

    code = functional.get_4bit_type("nf4", device=weight.device)
    if weight.device.type == "cpu":  # bitsandbytes' own takes many passes and 20 bytes a weight there
        packed, absmax = quantise_4bit(weight, code, BLOCK)
    else:
        packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        absmax = state.absmax
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=ABSMAX_BLOCK)
    parts["packed"].copy_(packed.flatten())
    parts["code"].copy_(code)
    parts["absmax"].copy_(codes)
    parts["absmax_code"].copy_(state.code)
    parts["absmax_scale"].copy_(state.absmax)
    parts["absmax_offset"].fill_(offset)


def _quantize_8bit(weight: Tensor, parts: dict[str, Tensor]) -> None:
    values = parts["values"].view(weight.shape)
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for begin in range(0, weight.shape[0], rows):
        chunk = weight[begin : begin + rows].float()
        scale = chunk.abs().amax(1) / 127
        parts["scale"][begin : begin + rows] = scale
        values[begin : begin + rows] = torch.round(chunk / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None])


def dequantise(model: nn.Module) -> None:
    """Put ordinary linear layers, with the values that the quantised weights stand for, in their place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            weight = torch.empty(module.weight.shape, dtype=module.weight.dtype, device=module.weight.device)
            module.weight.dequantise(0, len(weight), weight)
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
            model.set_submodule(name, plain)


def parameter_count(model: nn.Module) -> int:
    """Weights of the model, each quantised one counted once, whatever it is held in."""
    packed = {weight.storage: math.prod(weight.shape) for weight in quantised_weights(model)}
    return sum(packed.get(p, p.numel()) for p in model.parameters())
