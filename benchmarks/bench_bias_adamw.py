"""BiasAdamW against torch's foreach and fused AdamW, bitsandbytes' AdamW8bit and DeepSpeed's CPUAdam.

python benchmarks/bench_bias_adamw.py --device cpu --dtype float32
python benchmarks/bench_bias_adamw.py --device cuda --layers 48 --hidden 7168 --json bias_adamw.json

`list`: all biases of an OPT model, as without ZeRO-3 (the defaults are OPT-30B: 385 tensors, 3,791,872 parameters).
`flat`: one tensor of as many elements, as ZeRO-3 hands it over. A call is optimizer.step() with all it does in Python;
`fastft_clip` also clips by the global norm, which is a second pass over the gradients.
Every optimizer has its own parameters, gradients and state, so a round finds none of them in the cache.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from fastft.optim import BiasAdamW


def bias_sizes(layers: int, hidden: int, ffn: int) -> list[int]:
    """q, k, v, out, fc1, fc2 and two LayerNorms a layer, and the last LayerNorm."""
    return [*[hidden] * 4, ffn, hidden, hidden, hidden] * layers + [hidden]


def stepper(args, sizes: list[int], make):
    """optimizer.step() on parameters that start at 0, so that what is compared is the updates."""
    dtype = common.DTYPES[args.dtype]
    generator = torch.Generator().manual_seed(0)
    params = []
    for n in sizes:
        p = torch.zeros(n, dtype=dtype, device=args.device, requires_grad=True)
        p.grad = torch.randn(n, generator=generator).to(dtype).to(args.device)
        params.append(p)
    optimizer = make(params)

    def run():
        optimizer.step()
        return [p.detach() for p in params[:9]]

    return run


def two_steps(args, sizes: list[int]):
    """What every optimizer's parameters are after the harness's two warm-up calls."""
    run = stepper(args, sizes, lambda p: torch.optim.AdamW(p, lr=1e-3))
    run()
    return run()


def bitsandbytes_8bit(params):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, lr=1e-3)


def deepspeed_cpu(params):
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, lr=1e-3, weight_decay=1e-2, fp32_optimizer_states=True)


def case(args, layers: int, layout: str, state_bits: int) -> common.Case:
    sizes = bias_sizes(layers, args.hidden, args.ffn or 4 * args.hidden)
    total = sum(sizes)
    sizes = sizes if layout == "list" else [total]
    if state_bits == 32:
        makers = {
            "torch_foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
            "torch_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
            "fastft": lambda p: BiasAdamW(p, lr=1e-3),
            "fastft_clip": lambda p: BiasAdamW(p, lr=1e-3, max_grad_norm=1.0),
        }
        if args.deepspeed:
            makers["deepspeed_cpu"] = deepspeed_cpu
    else:
        makers = {
            "bitsandbytes_8bit": bitsandbytes_8bit,
            "fastft": lambda p: BiasAdamW(p, lr=1e-3, state_bits=8),
            "fastft_32bit": lambda p: BiasAdamW(p, lr=1e-3),
            "torch_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        }
    itemsize = common.DTYPES[args.dtype].itemsize
    # parameter read and written, gradient read; both moments read and written, with 8 bits two scales for 256
    state = 16 if state_bits == 32 else 4 + 16 / 256
    return common.Case(
        name=f"bias_adamw {layout}, {state_bits}-bit state",
        shape={"tensors": len(sizes), "parameters": total},
        implementations={name: stepper(args, sizes, make) for name, make in makers.items()},
        bytes=total * (3 * itemsize + state),
        reference=functools.partial(two_steps, args, sizes),
        # Of millions of gradients some are tiny beside their neighbours; there a step is off by up to its size.
        tolerance={"fastft": 1.0, "bitsandbytes_8bit": 1.0} if state_bits == 8 else {},
        not_peers=("fastft_clip", "fastft_32bit"),
    )


def main() -> int:
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--layers", type=int, nargs="+", default=[48])
    p.add_argument("--hidden", type=int, default=7168)
    p.add_argument("--ffn", type=int, help="default: 4 * hidden")
    p.add_argument("--deepspeed", action="store_true", help="also DeepSpeed's CPUAdam, which is compiled first")
    args = p.parse_args()
    kinds = [(layers, layout, bits) for layers in args.layers for layout in ("list", "flat") for bits in (32, 8)]
    return common.main(args, [functools.partial(case, args, *kind) for kind in kinds])


if __name__ == "__main__":
    raise SystemExit(main())
