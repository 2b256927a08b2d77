"""quantise_4bit, and one tile's dequantisation, against bitsandbytes on the CPU.

python benchmarks/bench_quantise.py --rows 256 1024 4096

A weight of --rows x --columns becomes nf4 in blocks of 64. `quantise_4bit` reads it once and writes codes and scales,
as bitsandbytes.functional.quantize_4bit does with the scales left in float32; the bits are compared.
`dequantise_4bit` writes the values that the codes stand for, which every product with a quantised base does tile by
tile. On a GPU fastft quantises by bitsandbytes: there is nothing to compare.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from fastft import ops

BLOCK = 64
NF4 = bnb.get_4bit_type("nf4", device="cpu")


def draw(args, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, args.columns, generator=generator).to(common.DTYPES[args.dtype])


def quantise(args, rows: int) -> common.Case:
    weight = draw(args, rows)

    def bitsandbytes():
        packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        return packed.flatten(), state.absmax

    return common.Case(
        name="quantise_4bit",
        shape={"rows": rows, "columns": args.columns},
        implementations={
            "bitsandbytes": bitsandbytes,
            "fastft": lambda: ops.quantise_4bit(weight, NF4, BLOCK),
        },
        bytes=weight.numel() * (weight.element_size() + 0.5 + 4 / BLOCK),
        tolerance={"fastft": 0.0},
    )


def dequantise(args, rows: int) -> common.Case:
    weight = draw(args, rows)
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    packed.quant_state = state
    frozen, out = ops.Weight4bit.from_bitsandbytes(packed), torch.empty_like(weight)

    def ours():
        frozen.dequantise(0, rows, out)
        return (out,)

    return common.Case(
        name="dequantise_4bit",
        shape={"rows": rows, "columns": args.columns},
        implementations={
            "bitsandbytes": lambda: (bnb.dequantize_4bit(packed, state),),
            "fastft": ours,
        },
        bytes=weight.numel() * (weight.element_size() + 0.5 + 4 / BLOCK),
    )


def main() -> int:
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, nargs="+", default=[2048])
    p.add_argument("--columns", type=int, default=2048)
    args = p.parse_args()
    if args.device != "cpu":
        p.error("--device cuda: fastft quantises by bitsandbytes on a GPU; expected --device cpu")
    kinds = [(kind, rows) for rows in args.rows for kind in (quantise, dequantise)]
    return common.main(args, [functools.partial(kind, args, rows) for kind, rows in kinds])


if __name__ == "__main__":
    raise SystemExit(main())
