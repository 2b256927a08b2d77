"""rotary and swiglu against what transformers computes in their place, torch.compile of that, and Liger's kernels.

python benchmarks/bench_elementwise.py --device cpu --tokens 64 256 1024 4096
python benchmarks/bench_elementwise.py --device cuda --model llama-3-8b --tokens 2048 --json elementwise.json

One layer's queries and keys, as the projections leave them, and its MLP's gate and up. Least traffic, of s bytes an
element: rotary reads and writes q and k in each direction and reads cos and sin; swiglu reads 2 and writes 1 forward,
reads 3 and writes 2 backward.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from fastft.ops import reference, rotary, swiglu

# query heads, key/value heads, head size, width of the MLP
SHAPES = {"smollm2-135m": (9, 3, 64, 1536), "llama-3-8b": (32, 8, 128, 14336)}
PASSES = ("forward", "backward", "forward+backward")


def liger(name: str) -> Callable | None:
    """Liger's kernel, where it is installed: they are Triton's, of a GPU."""
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return None
    return {"rotary": LigerRopeFunction.apply, "swiglu": LigerSiLUMulFunction.apply}[name]


def implementations(args, passes: str, functions: dict[str, Callable], inputs, constants, upstream) -> dict:
    """Each function's results, its gradients, or both in one; functions: of inputs and constants."""

    def results(function: Callable) -> tuple[torch.Tensor, ...]:
        y = function(*inputs, *constants)
        return y if isinstance(y, tuple) else (y,)

    def of(function: Callable) -> Callable[[], tuple[torch.Tensor, ...]]:
        if passes == "forward":
            return lambda: tuple(y.detach() for y in results(function))
        if passes == "backward":
            y = results(function)
            return lambda: torch.autograd.grad(y, inputs, upstream, retain_graph=True)
        return lambda: torch.autograd.grad(results(function), inputs, upstream)

    if not args.no_compile:
        functions = functions | {"compile": torch.compile(functions["transformers"])}
    return {name: of(function) for name, function in functions.items()}


def draw(args, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(args.device, common.DTYPES[args.dtype])


def case(args, tokens: int, name: str, passes: str) -> common.Case:
    heads, kv_heads, size, width = SHAPES[args.model]
    if name == "rotary":
        of_heads = [draw(args, 1, tokens, n, size).transpose(1, 2) for n in (heads, kv_heads)]
        angles = torch.outer(torch.arange(tokens), 500_000 ** -(torch.arange(0, size, 2) / size)).repeat(1, 2)
        constants = [x[None].to(of_heads[0]) for x in (angles.cos(), angles.sin())]
        inputs, upstream = of_heads, [x.clone() for x in of_heads]
        functions = {"fastft": rotary, "transformers": apply_rotary_pos_emb}
        truth = reference.rotary
        elements = sum(x.numel() for x in inputs)
        moved = {"forward": 2 * elements, "backward": 2 * elements}
        moved = {key: value + sum(x.numel() for x in constants) for key, value in moved.items()}
        shape = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "size": size}
    else:
        inputs, constants = [draw(args, tokens, width), draw(args, tokens, width).roll(1)], []
        upstream = [inputs[0].flip(0)]
        functions = {"fastft": swiglu, "transformers": lambda gate, up: torch.nn.functional.silu(gate) * up}
        truth = lambda gate, up: (reference.swiglu(gate, up),)  # noqa: E731
        moved = {"forward": 3 * inputs[0].numel(), "backward": 5 * inputs[0].numel()}
        shape = {"tokens": tokens, "width": width}
    if args.device == "cuda" and liger(name):
        functions["liger"] = liger(name)
    for x in inputs:
        x.requires_grad_()

    def exact() -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().float().requires_grad_() for x in inputs]
        y = truth(*leaves, *(x.float() for x in constants))
        if passes == "forward":
            return tuple(x.detach() for x in y)
        return torch.autograd.grad(y, leaves, [x.float() for x in upstream])

    return common.Case(
        name=f"{name} {passes}",
        shape=shape,
        implementations=implementations(args, passes, functions, inputs, constants, upstream),
        bytes=sum(moved[part] for part in passes.split("+")) * inputs[0].element_size(),
        reference=exact,
    )


if __name__ == "__main__":
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2-135m", choices=list(SHAPES))
    p.add_argument("--tokens", type=int, nargs="+", default=[300])
    args = p.parse_args()
    of = itertools.product(args.tokens, ("rotary", "swiglu"), PASSES)
    sys.exit(common.main(args, [functools.partial(case, args, *one) for one in of]))
