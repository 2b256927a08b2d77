"""16-bit matrix products on a processor without instructions for them: fastft's, torch's own, and float32.

python benchmarks/bench_products.py --rows 1 16 300
python benchmarks/bench_products.py --rows 512 --dtype float16 --model opt-125m-head --rounds 3

x [rows, K] and a weight [N, K]: forward x @ weight.T, backward dy @ weight. float32 is the same product of float32
matrices, `converted` converts both whole first. Where torch has 16-bit products, fastft's are those.
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from fastft.ops import products

WEIGHTS = {"smollm2-mlp": (1536, 576), "opt-1.3b": (2048, 2048), "opt-125m-head": (50272, 768)}


def case(args, rows: int, passes: str) -> common.Case:
    generator = torch.Generator().manual_seed(0)
    N, K = WEIGHTS[args.model]
    dtype = common.DTYPES[args.dtype]
    weight = torch.randn(N, K, generator=generator).to(args.device, dtype)
    x = torch.randn(rows, K if passes == "forward" else N, generator=generator).to(args.device, dtype)
    b = weight.t() if passes == "forward" else weight
    wide_x, wide_b = x.float(), b.float()
    return common.Case(
        name=f"products {passes}",
        shape={"rows": rows, "K": K, "N": N},
        implementations={
            "fastft": lambda: (products.mm(x, b),),
            "torch": lambda: (torch.mm(x, b),),
            "converted": lambda: (torch.mm(x.float(), b.float()).to(dtype),),
            "float32": lambda: (torch.mm(wide_x, wide_b),),
        },
        not_peers=("float32",),
        bytes=x.nbytes + b.nbytes + rows * b.shape[1] * dtype.itemsize,
        flops=2 * rows * N * K,
    )


if __name__ == "__main__":
    p = common.parser(__doc__.splitlines()[0])
    p.set_defaults(dtype="bfloat16", device="cpu")
    p.add_argument("--model", default="smollm2-mlp", choices=list(WEIGHTS))
    p.add_argument("--rows", type=int, nargs="+", default=[1, 16, 300])
    args = p.parse_args()
    of = itertools.product(args.rows, ("forward", "backward"))
    sys.exit(common.main(args, [functools.partial(case, args, *one) for one in of]))
