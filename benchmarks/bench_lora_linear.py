"""lora_linear and lora_linears against PEFT, plain PyTorch and torch.compile.

python benchmarks/bench_lora_linear.py --device cpu
python benchmarks/bench_lora_linear.py --device cuda --model opt-30b --rows 8192 --json lora.json

`frozen`: the frozen linear alone, its forward and the gradient of its input; what is beyond it is the adapter's price.
`peft` is PEFT's own layer as it comes (float32 adapters on a 16-bit base), `peft_same_dtype` with its adapters in the
base's dtype; `unsloth` and `lorafusion` are there on a GPU where they can be imported; `fastft_*` is our layer in the
forms of `fastft.ops.lora_linear.FORMS` that `fastft`, the row before, is not.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from fastft import ops
from fastft.ops import reference
from fastft.ops.lora_linear import FORMS, pick_form

SCALING = 2.0
# (in features, out features) of an attention projection and of the first feed-forward layer
MODELS = {
    "smollm2-135m": [(576, 576), (576, 1536)],
    "opt-125m": [(768, 768), (768, 3072)],
    "opt-1.3b": [(2048, 2048), (2048, 8192)],
    "opt-30b": [(7168, 7168), (7168, 28672)],
    "llama-3-8b": [(4096, 4096), (4096, 14336)],
}


class Data:
    """x, dy, and for each of `count` layers weight, lora_A and lora_B; all products are of size 1."""

    def __init__(self, args, K: int, N: int, count: int):
        torch.manual_seed(0)
        self.args, self.K, self.N, self.count = args, K, N, count
        self.dtype = common.DTYPES[args.dtype]
        self.x = self.random(args.rows, K).requires_grad_()
        self.weights = [self.random(N, K, scale=K**-0.5) for _ in range(count)]
        self.lora_As = [self.random(args.rank, K, scale=K**-0.5).requires_grad_() for _ in range(count)]
        self.lora_Bs = [self.random(N, args.rank).requires_grad_() for _ in range(count)]
        self.dys = [self.random(args.rows, N) for _ in range(count)]

    def random(self, *shape, scale=1.0):
        return (torch.randn(*shape, device=self.args.device) * scale).to(self.dtype)

    def run(self, layers, leaves, backward=True):
        """Outputs, and gradients of `leaves`, of a function from x to this many outputs."""

        def call():
            if not backward:
                with torch.no_grad():
                    return tuple(layers(self.x))
            outputs = layers(self.x)
            torch.autograd.backward(outputs, self.dys)
            gradients = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
            return (*(y.detach() for y in outputs), *gradients)

        return call

    def truth(self, backward=True):
        """The same in float32 (float64 for float64), one layer at a time."""
        up = torch.float64 if self.dtype == torch.float64 else torch.float32
        x = self.x.detach().to(up).requires_grad_()
        leaves = [[t.detach().to(up).requires_grad_() for t in ts] for ts in (self.lora_As, self.lora_Bs)]
        outputs = [
            reference.lora_linear(x, w.to(up), A, B, SCALING) for w, A, B in zip(self.weights, *leaves, strict=True)
        ]
        if not backward:
            return tuple(y.detach() for y in outputs)
        flat = [x, *leaves[0], *leaves[1]]
        gradients = torch.autograd.grad(outputs, flat, [dy.to(up) for dy in self.dys])
        return (*(y.detach() for y in outputs), *gradients)

    def cost(self, backward=True):
        """FLOPs and least bytes: every large tensor once in each product that needs it."""
        M, K, N, r, n = self.args.rows, self.K, self.N, self.args.rank, self.count
        size = self.x.element_size()
        flops = n * (2.0 * M * K * N + 2.0 * M * r * (K + N))
        moved = size * (M * K + n * (K * N + M * N))
        return (3 * flops - n * 2.0 * M * K * N, 2 * moved) if backward else (flops, moved)


def peft_layers(data: Data, adapter_dtype: torch.dtype):
    """PEFT's layers with our values; None where PEFT is not installed."""
    try:
        import peft
    except ImportError:
        return None
    layers, leaves = [], []
    for weight, A, B in zip(data.weights, data.lora_As, data.lora_Bs, strict=True):
        base = nn.Linear(data.K, data.N, bias=False, device="meta")
        base.weight = nn.Parameter(weight, requires_grad=False)
        config = peft.LoraConfig(r=data.args.rank, lora_alpha=SCALING * data.args.rank, target_modules=["0"])
        layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
        layer.lora_A["default"].weight = nn.Parameter(A.detach().to(adapter_dtype).clone())
        layer.lora_B["default"].weight = nn.Parameter(B.detach().to(adapter_dtype).clone())
        layers.append(layer)
        leaves.append((layer.lora_A["default"].weight, layer.lora_B["default"].weight))
    flat = [data.x, *(A for A, _ in leaves), *(B for _, B in leaves)]
    return (lambda x: [layer(x) for layer in layers]), flat


def _unsloth():
    from unsloth.kernels.fast_lora import LoRA_W

    return lambda x, weight, A, B: LoRA_W.apply(x[None], weight, None, A, B, SCALING)[0]


def _lorafusion():
    from lorafusion.ops.lora_v1 import fused_linear_lora

    return lambda x, weight, A, B: fused_linear_lora(x[None], weight, A, B, SCALING)[0]


# Peers of a GPU alone, which few machines have installed.
GPU_PEERS = {"unsloth": _unsloth, "lorafusion": _lorafusion}


def gpu_peers(data: Data) -> dict[str, Callable]:
    """Functions from x to the layers' outputs, as far as these libraries can be imported."""
    found, tensors = {}, list(zip(data.weights, data.lora_As, data.lora_Bs, strict=True))
    for name, load in GPU_PEERS.items():
        try:
            layer = load()
        except Exception as why:  # they look for GPUs, drivers and each other as they are imported
            print(f"left out: {name}: {type(why).__name__}: {why}", file=sys.stderr)
            continue
        found[name] = lambda x, layer=layer: [layer(x, *own) for own in tensors]
    return found


def forms_of(data: Data) -> list[str]:
    """The forms that this machine has; on a CPU main_loop is torch's products in another order, and no row."""
    forms = []
    for form in FORMS if data.x.is_cuda else [form for form in FORMS if form != "main_loop"]:
        try:
            forms.append(pick_form(form, data.x.device, data.dtype, data.weights, data.lora_As))
        except ValueError as why:
            print(f"left out: {why}", file=sys.stderr)
    return forms


def case(args, K: int, N: int, count: int, backward: bool):
    data = Data(args, K, N, count)
    own = [data.x, *data.lora_As, *data.lora_Bs]
    group = list(zip(data.weights, data.lora_As, data.lora_Bs, strict=True))

    def ours(form):
        tensors = data.weights, data.lora_As, data.lora_Bs
        return lambda x: list(ops.lora_linears(x, *tensors, SCALING, form=form))

    def frozen(x):
        return [F.linear(x, weight) for weight in data.weights]

    def eager(x):
        return [reference.lora_linear(x, *tensors, SCALING) for tensors in group]

    run = functools.partial(data.run, backward=backward)
    implementations = {"frozen": run(frozen, [data.x]), "eager": run(eager, own)}
    if not args.no_compile:
        implementations["compile"] = run(torch.compile(eager), own)
    for name, dtype in (("peft", torch.float32), ("peft_same_dtype", data.dtype)):
        if layers := peft_layers(data, dtype):
            implementations[name] = run(*layers)
    if data.x.is_cuda:
        implementations |= {name: run(layers, own) for name, layers in gpu_peers(data).items()}
    picked = pick_form(args.form, data.x.device, data.dtype, data.weights, data.lora_As)
    implementations["fastft"] = run(ours(picked), own)
    others = {f"fastft_{form}": run(ours(form), own) for form in forms_of(data) if form != picked}
    flops, moved = data.cost(backward)
    return common.Case(
        name=("lora_linear" if count == 1 else "lora_linears, q k v")
        + (" forward+backward" if backward else " forward"),
        shape={"M": args.rows, "K": K, "N": N, "r": args.rank},
        implementations=implementations | others,
        reference=functools.partial(data.truth, backward),
        bytes=moved,
        flops=flops,
        not_peers=("frozen", *others),
    )


def quantised(args, K: int, N: int):
    """lora_linear on an nf4 weight against dequantising it whole with bitsandbytes; `bfloat16` is not quantised."""
    data = Data(args, K, N, 1)
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(data.weights[0], quant_type="nf4", compress_statistics=True)
    packed.quant_state = state
    weight, plain = ops.Weight4bit.from_bitsandbytes(packed), data.weights[0]
    data.weights = [bnb.dequantize_4bit(packed, state).to(data.dtype)]
    A, B = data.lora_As[0], data.lora_Bs[0]
    own = [data.x, A, B]

    class Frozen4bit(torch.autograd.Function):
        """As bitsandbytes' MatMul4Bit: dequantised whole for each product."""

        @staticmethod
        def forward(ctx, x):
            return F.linear(x, bnb.dequantize_4bit(packed, state).to(x.dtype))

        @staticmethod
        def backward(ctx, dy):
            return dy @ bnb.dequantize_4bit(packed, state).to(dy.dtype)

    def whole(x):
        return [Frozen4bit.apply(x) + SCALING * F.linear(F.linear(x, A), B)]

    flops, moved = data.cost()
    return common.Case(
        name="lora_linear, nf4 weight forward+backward",
        shape={"M": args.rows, "K": K, "N": N, "r": args.rank},
        implementations={
            args.dtype: data.run(lambda x: [ops.lora_linear(x, plain, A, B, SCALING, form=args.form)], own),
            "bitsandbytes": data.run(whole, own),
            "fastft": data.run(lambda x: [ops.lora_linear(x, weight, A, B, SCALING, form=args.form)], own),
        },
        reference=data.truth,
        bytes=moved - 2 * K * N * (data.x.element_size() - 0.5625),
        flops=flops,
        not_peers=(args.dtype,),
    )


def trained_bias(args, K: int, N: int):
    """What training a bias adds to a linear's backward; `reads_dy` reads dy once more, and computes nothing with it."""
    data = Data(args, K, N, 1)
    weight, dy = data.weights[0], data.dys[0]

    def backward(extra):
        return lambda: (torch.mm(dy, weight), extra())

    up = torch.float64 if data.dtype == torch.float64 else torch.float32
    return common.Case(
        name="linear with a trained bias, backward",
        shape={"M": args.rows, "K": K, "N": N},
        implementations={
            "frozen": lambda: (torch.mm(dy, weight),),
            "trained": backward(lambda: dy.sum(0)),
            "reads_dy": backward(lambda: dy.view(torch.int32).amax()),
        },
        reference=lambda: (dy.to(up) @ weight.to(up), dy.double().sum(0)),
        bytes=dy.element_size() * (args.rows * (N + K) + N * K),
        flops=2.0 * args.rows * K * N,
        not_peers=("frozen", "reads_dy"),
    )


def cases_of(args, rows: int):
    args = argparse.Namespace(**{**vars(args), "rows": rows})
    (K, N), (_, ffn) = MODELS[args.model]
    return [
        functools.partial(case, args, K, N, 1, False),
        functools.partial(case, args, K, N, 1, True),
        functools.partial(case, args, K, ffn, 1, True),
        functools.partial(case, args, K, N, 3, True),
        functools.partial(quantised, args, K, N),
        functools.partial(trained_bias, args, K, N),
        functools.partial(trained_bias, args, K, ffn),
    ]


def main() -> int:
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--rows", type=int, nargs="+", default=[1024])
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--model", choices=list(MODELS), default="opt-1.3b")
    p.add_argument("--form", choices=FORMS, help="default: what fastft picks by itself")
    args = p.parse_args()
    return common.main(args, [case for rows in args.rows for case in cases_of(args, rows)])


if __name__ == "__main__":
    raise SystemExit(main())
