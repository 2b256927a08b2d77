"""Trained linear layers on a processor without 16-bit products: `fastft.ops.products.linear` in their place."""

from __future__ import annotations

from types import MethodType

from torch import Tensor, nn

from fastft.ops import products


def fuse_linears(model: nn.Module) -> None:
    """Let each plain linear layer whose dtype torch has only slow products for multiply in float32, a block at a time.

    Elsewhere, and for inputs on a GPU, layers are left as they are. A frozen layer is replaced later by one that keeps
    less for backward (`fastft.peft.freeze_linears`), which knows such processors by itself.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype in products.WIDENED and "forward" not in vars(module):
            module.forward = MethodType(forward, module)


# Named as the method whose place it takes: a pickle holds a method by its name, and finds the class's own again.
def forward(self: nn.Linear, x: Tensor) -> Tensor:
    return products.linear(x, self.weight, self.bias)
