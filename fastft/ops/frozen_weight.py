"""The product with a frozen weight, plain or quantised: vendor matrix products, a quantised weight tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

# Of a quantised weight, so much is dequantised at a time: large enough for the product to run at full speed, small
# enough to be no matter beside the quantised model, and on a CPU to be multiplied while it is still in the cache.
TILE_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}


class FrozenWeight:
    """A weight [N, K] in a compressed form that takes no gradient.

    shape is (N, K); dequantise(begin, end, out) writes rows [begin, end) into out [end - begin, K].
    """

    shape: tuple[int, int]

    def dequantise(self, begin: int, end: int, out: Tensor) -> None:
        raise NotImplementedError

    def tiles(self, like: Tensor):
        """(begin, end, rows [begin, end) in the dtype of `like`), all in one buffer that is used again and again."""
        N, K = self.shape
        count = max(1, TILE_BYTES.get(like.device.type, TILE_BYTES["cpu"]) // max(1, K * like.element_size()))
        buffer = like.new_empty(min(count, N), K)
        for begin in range(0, N, count):
            end = min(begin + count, N)
            self.dequantise(begin, end, buffer[: end - begin])
            yield begin, end, buffer[: end - begin]


def linear(x: Tensor, weight: Tensor | FrozenWeight, bias: Tensor | None) -> Tensor:
    """x [M, K] @ weight.T [K, N] + bias [N]"""
    if not isinstance(weight, FrozenWeight):
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    y = x.new_empty(x.shape[0], weight.shape[0])
    for begin, end, tile in weight.tiles(x):
        y[:, begin:end] = linear(x, tile, None if bias is None else bias[begin:end])
    return y


def add_input_grad(dx: Tensor | None, dy: Tensor, weight: Tensor | FrozenWeight) -> Tensor:
    """dx + dy [M, N] @ weight [N, K], in place where there is a dx."""
    if not isinstance(weight, FrozenWeight):
        return torch.mm(dy, weight) if dx is None else dx.addmm_(dy, weight)
    for begin, end, tile in weight.tiles(dy):
        dx = add_input_grad(dx, dy[:, begin:end], tile)
    return dy.new_zeros(dy.shape[0], weight.shape[1]) if dx is None else dx
