"""relu, which keeps a bit an element, against torch.relu, which keeps its result.

python benchmarks/bench_relu.py --device cpu --tokens 64 256 1024
python benchmarks/bench_relu.py --device cuda --model opt-30b --tokens 2048 --json relu.json

The activation [tokens, 4 H] of an OPT layer. Of s bytes an element forward reads and writes 2 s, and 1 / 8 for the bit;
backward 2 s and 1 / 8, where torch.relu's reads its result, too: 3 s. In 16 bits that is 4.125 bytes for torch's 4
forward, 4.125 for 6 backward, 0.83 for both.
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from fastft.ops import relu

WIDTHS = {"opt-125m": 3072, "opt-1.3b": 8192, "opt-30b": 28672}


def case(args, tokens: int, passes: str) -> common.Case:
    generator = torch.Generator().manual_seed(0)
    shape = tokens, WIDTHS[args.model]
    x, dy = (torch.randn(shape, generator=generator).to(args.device, common.DTYPES[args.dtype]) for _ in range(2))
    x.requires_grad_()

    def implementation(function):
        if passes == "forward":
            return lambda: (function(x).detach(),)
        if passes == "backward":
            y = function(x)
            return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)
        return lambda: torch.autograd.grad(function(x), x, dy)

    of_one = x.nbytes * 2 + x.numel() / 8
    return common.Case(
        name=f"relu {passes}",
        shape={"tokens": shape[0], "width": shape[1]},
        implementations={"fastft": implementation(relu), "torch": implementation(torch.relu)},
        bytes=of_one * (2 if passes == "forward+backward" else 1),
    )


if __name__ == "__main__":
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--model", default="opt-30b", choices=list(WIDTHS))
    p.add_argument("--tokens", type=int, nargs="+", default=[256])
    args = p.parse_args()
    of = itertools.product(args.tokens, ("forward", "backward", "forward+backward"))
    sys.exit(common.main(args, [functools.partial(case, args, *one) for one in of]))
