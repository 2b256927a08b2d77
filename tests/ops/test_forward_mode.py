"""Forward-mode derivatives: refused where an op has none, never a result without its tangent."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from fastft import ops

OTHER, HEAD = torch.randn(4, 16), torch.randn(40, 16)
ONE_TOKEN = torch.randn(1, 1, 4, 16)
CASES = {
    "rms_norm": lambda x: ops.rms_norm(x, OTHER[0], 1e-5),
    "swiglu": lambda x: ops.swiglu(OTHER, x),
    "rotary": lambda x: ops.rotary(ONE_TOKEN, x.view(1, 1, 4, 16), ONE_TOKEN[0], ONE_TOKEN[0])[1],
    "log_softmax_kl": lambda x: ops.log_softmax_kl(x, OTHER),
    "linear_log_softmax_kl": lambda x: ops.linear_log_softmax_kl(x, OTHER, HEAD),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, HEAD, torch.zeros(4, dtype=torch.long)),
    "linear_topk_kl": lambda x: ops.linear_topk_kl(x, HEAD, torch.zeros(4, 1, dtype=torch.int), -torch.ones(4, 1)),
    "lora_linear": lambda x: ops.lora_linear(x, HEAD, torch.randn(2, 16), torch.randn(40, 2), 1.0),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", CASES)
def test_a_tangent_is_not_dropped(op, requires_grad):
    x = torch.randn(4, 16)
    with forward_ad.dual_level():
        CASES[op](x)  # a level alone is no tangent
        dual = forward_ad.make_dual(x.requires_grad_(requires_grad), torch.ones(4, 16))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            CASES[op](dual)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(CASES[op], (x,), (torch.ones(4, 16),))


def test_relu_without_gradient_has_one():
    x = torch.randn(4, 16)
    torch.testing.assert_close(torch.func.jvp(ops.relu, (x,), (OTHER,)), torch.func.jvp(torch.relu, (x,), (OTHER,)))
