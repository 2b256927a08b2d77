"""The product with a frozen weight, plain or quantised: vendor matrix products, a quantised weight tile by tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastft.ops import _extension, products
from fastft.ops._common import check_float, refuse_create_graph

# Of a quantised weight, so much is dequantised at a time: large enough for the product to run at full speed, small
# enough to be no matter beside the quantised model, and on a CPU to be multiplied while it is still in the cache.
TILE_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}


class FrozenWeight:
    """A weight [N, K] in a compressed form that takes no gradient.

    `lora_linear` takes one in place of a weight. A tile of rows is dequantised for each matrix product that needs it
    and thrown away: nothing of the whole weight's size exists.
    """

    shape: tuple[int, int]

    def dequantise(self, begin: int, end: int, out: Tensor) -> None:
        """Writes rows [begin, end) into out [end - begin, K], of any floating dtype."""
        raise NotImplementedError

    def tiles(self, like: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(begin, end, rows [begin, end) in the dtype of `like`), all in one buffer that is used again and again."""
        _extension.load()
        N, K = self.shape
        count = TILE_BYTES.get(like.device.type, TILE_BYTES["cpu"]) // max(1, K * like.element_size())
        count = max(2, count // 2 * 2)  # an even number of elements: two of them may share a byte
        buffer = like.new_empty(min(count, N), K)
        for begin in range(0, N, count):
            end = min(begin + count, N)
            self.dequantise(begin, end, buffer[: end - begin])
            yield begin, end, buffer[: end - begin]


class Weight4bit(FrozenWeight):
    """Two codes a byte with a scale for each block of elements: nf4, fp4, or any code book of 16.

    w[e] = code[c[e]] * absmax[e // block] for element e counted through the rows; the even elements' codes are the
    high halves of the bytes. packed: uint8, ceil(N K / 2). code: float32 [16]. absmax: float32 [blocks], or, doubly
    quantised, uint8 with absmax[i] = absmax_code[absmax8[i]] * absmax_scale[i // absmax_block] + absmax_offset.
    Raises ValueError for a shape or dtype that does not fit.
    Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        packed: Tensor,
        code: Tensor,
        absmax: Tensor,
        block: int = 64,
        *,
        absmax_code: Tensor | None = None,
        absmax_scale: Tensor | None = None,
        absmax_offset: float = 0.0,
        absmax_block: int = 256,
    ):
        N, K = self.shape = _check_shape("Weight4bit", shape)
        if block < 8 or block % 8:
            raise ValueError(f"Weight4bit: block is {block}, expected a multiple of 8")
        blocks = -(-N * K // block)
        doubly = absmax_code is not None
        _check("Weight4bit", "packed", packed, torch.uint8, -(-N * K // 2), packed)
        _check("Weight4bit", "code", code, torch.float32, 16, packed)
        _check("Weight4bit", "absmax", absmax, torch.uint8 if doubly else torch.float32, blocks, packed)
        if doubly != (absmax_scale is not None):
            raise ValueError("Weight4bit: absmax_code and absmax_scale go together, expected both or neither")
        if doubly:
            _check("Weight4bit", "absmax_code", absmax_code, torch.float32, 256, packed)
            _check("Weight4bit", "absmax_scale", absmax_scale, torch.float32, -(-blocks // absmax_block), packed)
        self.packed, self.code, self.absmax, self.block = packed, code, absmax, block
        self.absmax_code, self.absmax_scale = absmax_code, absmax_scale
        self.absmax_offset, self.absmax_block = float(absmax_offset), absmax_block

    @classmethod
    def from_bitsandbytes(cls, weight: Tensor) -> Weight4bit:
        """From a quantised bitsandbytes Params4bit, whose storage is shared."""
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise ValueError("Weight4bit: weight has no quant_state, expected a quantised bitsandbytes Params4bit")
        double = {}
        if state.nested:
            double = {
                "absmax_code": state.state2.code.float(),
                "absmax_scale": state.state2.absmax.float(),
                "absmax_offset": float(state.offset),
                "absmax_block": state.state2.blocksize,
            }
        packed = weight.detach().view(torch.uint8)
        return cls(tuple(state.shape), packed, state.code.float(), state.absmax, state.blocksize, **double)

    def dequantise(self, begin: int, end: int, out: Tensor) -> None:
        torch.ops.fastft.dequantise_4bit(
            self.packed, self.code, self.absmax, self.absmax_code, self.absmax_scale, self.absmax_offset,
            self.block, self.absmax_block, begin * self.shape[1], out,
        )  # fmt: skip


class Weight8bit(FrozenWeight):
    """w[n, k] = values[n, k] * scale[n], values int8 [N, K], scale float32 [N].

    Dettmers et al. 2022 (LLM.int8()), https://arxiv.org/abs/2208.07339, without its 16-bit outlier columns: the
    weight alone is quantised, activations are not.
    """

    def __init__(self, values: Tensor, scale: Tensor):
        N, K = self.shape = _check_shape("Weight8bit", tuple(values.shape))
        _check("Weight8bit", "values", values, torch.int8, N * K, values)
        _check("Weight8bit", "scale", scale, torch.float32, N, values)
        self.values, self.scale = values, scale

    @classmethod
    def from_bitsandbytes(cls, weight: Tensor) -> Weight8bit:
        """From a quantised bitsandbytes Int8Params, whose values are shared; its scale is each row's absmax."""
        values, absmax = getattr(weight, "CB", None), getattr(weight, "SCB", None)
        if values is None or absmax is None:
            raise ValueError("Weight8bit: weight has no CB and SCB, expected a quantised bitsandbytes Int8Params")
        return cls(values, absmax.float() / 127)

    def dequantise(self, begin: int, end: int, out: Tensor) -> None:
        torch.ops.fastft.dequantise_8bit(self.values[begin:end], self.scale[begin:end], out)


def _check_shape(kind: str, shape) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"{kind}: the weight is {list(shape)}, expected [N, K]")
    return int(shape[0]), int(shape[1])


def _check(kind: str, name: str, x: Tensor, dtype: torch.dtype, numel: int, like: Tensor) -> None:
    if x.dtype != dtype or x.numel() != numel:
        raise ValueError(f"{kind}: {name} is {x.dtype} with {x.numel()} elements, expected {dtype} with {numel}")
    if not x.is_contiguous():
        raise ValueError(f"{kind}: {name} is strided, expected contiguous")
    if x.device != like.device:
        raise ValueError(f"{kind}: {name} is on {x.device}, expected {like.device}")


def quantise_4bit(x: Tensor, code: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """x -> (packed uint8 [ceil(n / 2)], absmax float32 [ceil(n / block)]), as `Weight4bit` takes them; on the CPU.

    absmax = max |x| over each `block` (a multiple of 64) of the n elements of x, taken row after row; the code of an
    element is that of the nearest of `code` float32 [16], sorted, to x / absmax. One pass over x. On a GPU
    bitsandbytes.functional.quantize_4bit does it; the bits are the same.
    Raises ValueError for another device, dtype or shape.
    """
    check_float("quantise_4bit", "x", x)
    for name, t in (("x", x), ("code", code)):
        if t.device.type != "cpu":
            raise ValueError(f"quantise_4bit: {name} is on {t.device}, expected cpu")
    if code.dtype != torch.float32 or code.shape != (16,) or bool((code.diff() <= 0).any()):
        raise ValueError(f"quantise_4bit: code is {code.dtype} {list(code.shape)}, expected float32 [16], sorted")
    if block < 64 or block % 64:
        raise ValueError(f"quantise_4bit: block is {block}, expected a multiple of 64")
    _extension.load()
    n = x.numel()
    packed, absmax = torch.empty(-(-n // 2), dtype=torch.uint8), torch.empty(-(-n // block))
    torch.ops.fastft.quantise_4bit(x.contiguous(), (code[:-1] + code[1:]) / 2, block, packed, absmax)
    return packed, absmax


def linear(x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] @ weight.T [K, N] + bias [N]"""
    if not isinstance(weight, FrozenWeight):
        return products.mm(x, weight.t()) if bias is None else products.addmm(bias, x, weight.t())
    y = x.new_empty(x.shape[0], weight.shape[0])
    for begin, end, tile in weight.tiles(x):
        y[:, begin:end] = linear(x, tile, None if bias is None else bias[begin:end])
    return y


def add_linear(y: Tensor, x: Tensor, weight: Tensor | FrozenWeight) -> None:
    """y [M, N] += x [M, K] @ weight.T, in the product's own epilogue."""
    if not isinstance(weight, FrozenWeight):
        products.addmm_(y, x, weight.t())
        return
    for begin, end, tile in weight.tiles(x):
        add_linear(y[:, begin:end], x, tile)


def add_input_grad(dx: Tensor | None, dy: Tensor, weight: Tensor | FrozenWeight) -> Tensor:
    """dx + dy [M, N] @ weight [N, K], in place where there is a dx."""
    if not isinstance(weight, FrozenWeight):
        return products.mm(dy, weight) if dx is None else products.addmm_(dx, dy, weight)
    for begin, end, tile in weight.tiles(dy):
        dx = add_input_grad(dx, dy[:, begin:end], tile)
    return dy.new_zeros(dy.shape[0], weight.shape[1]) if dx is None else dx


def frozen_linear(x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias with a weight that takes no gradient; keeps nothing for backward, but for the weight itself.

    x [..., K], weight [N, K], bias [N] or None -> [..., N]; one dtype (float64, float32, bfloat16, float16) and device.
    Backward: dx = dy @ weight, d_bias = sum(dy), each only where it is asked for.
    Raises ValueError for shapes that do not fit; with a compressed weight, which is not twice differentiable,
    RuntimeError in a backward with create_graph. Under autocast x and bias are first cast, as by F.linear.
    """
    N, K = weight.shape
    if x.dim() < 1 or x.shape[-1] != K:
        raise ValueError(f"frozen_linear: x is {list(x.shape)}, expected [..., {K}] like weight {[N, K]}")
    if bias is not None and tuple(bias.shape) != (N,):
        raise ValueError(f"frozen_linear: bias is {list(bias.shape)}, expected [{N}]")
    grad = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if not isinstance(weight, FrozenWeight) and (not grad or weight.requires_grad):
        return products.linear(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        weight = weight if isinstance(weight, FrozenWeight) else weight.to(dtype)
    return _FrozenLinear.apply(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        if isinstance(ctx.weight, FrozenWeight):
            refuse_create_graph("frozen_linear", "a quantised weight's tiles share one buffer")
        rows = dy.reshape(-1, dy.shape[-1])
        dx = add_input_grad(None, rows, ctx.weight) if ctx.needs_input_grad[0] else None
        d_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return None if dx is None else dx.view(*dy.shape[:-1], dx.shape[1]), None, d_bias


def register() -> None:
    library = torch.library
    for op in ("dequantise_4bit", "dequantise_8bit", "quantise_4bit"):
        library.register_fake(f"fastft::{op}")(lambda *args: None)
