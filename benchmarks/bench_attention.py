"""Attention of a ragged pack against the same sequences padded, and behind a shared prefix against keys per sequence.

python benchmarks/bench_attention.py --device cpu
python benchmarks/bench_attention.py --device cuda --model llama-3-8b --sequences 32 --longest 512 --context 2048

`fastft` is `packed_attention` as model.attention=auto runs it (on a CPU the project's own kernel where no gradient is
needed), `fastft_NAME` with another back end that can be used here, `fastft_sdpa` padded through torch's. Lengths are
uniform from an eighth of the longest to the longest. Peers of a pack, forward and backward:

    padded    torch's scaled_dot_product_attention over [B, H, longest, D], without what padding itself costs
    masked    the same over one row [1, H, T, D] with a block-causal mask [T, T]; key/value heads expanded, without
              which no fused kernel takes a mask

Peers behind a prefix, forward without gradient:

    expanded  the context's keys and values in front of each padded sequence's own, [B, H, C + longest, D], with a mask
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
import common

from fastft.models import flash
from fastft.models.attention import PackedSequences, Prefix, packed_attention

LAYER = SimpleNamespace(layer_idx=0)

# query heads, key/value heads, head size
MODELS = {"smollm2-135m": (9, 3, 64), "opt-1.3b": (32, 32, 64), "llama-3-8b": (32, 8, 128)}


class Pack:
    """Inputs q [1, H, T, D], k and v [1, G, T, D], and their padded form [B, H or G, longest, D]."""

    def __init__(self, args):
        generator = torch.Generator().manual_seed(0)
        ends = (max(1, args.longest // 8), args.longest + 1)
        self.lengths = [args.longest, *torch.randint(*ends, (args.sequences - 1,), generator=generator).tolist()]
        self.scale = args.head_size**-0.5
        self.args = args
        self.heads = (args.heads, args.kv_heads, args.kv_heads)
        self.inputs = [self.draw(heads, sum(self.lengths), generator) for heads in self.heads]
        self.seed = self.draw(args.heads, sum(self.lengths), generator).transpose(1, 2)
        self.context = [self.draw(heads, args.context, generator) for heads in self.heads[1:]]
        length = torch.tensor(self.lengths, device=args.device)
        self.is_token = torch.arange(args.longest, device=args.device) < length[:, None]  # [B, longest]

    def draw(self, heads: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(1, tokens, heads, self.args.head_size, generator=generator)
        return x.to(self.args.device, common.DTYPES[self.args.dtype]).transpose(1, 2)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(*self.is_token.shape, x.shape[1], x.shape[3])
        padded[self.is_token] = x[0].transpose(0, 1)
        return padded.transpose(1, 2)

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(self.args.heads // self.args.kv_heads, 1)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)[self.is_token]

    def choices(self) -> dict[str, str]:
        """Rows of ours, and the model.attention of each: auto, and what else can be used here."""
        case = (self.inputs[0].device, self.inputs[0].dtype, self.args.head_size)
        auto = flash.select("auto", *case)
        others = [b.name for b in flash.BACKENDS if b is not auto and b.obstacle(*case) is None]
        padded = ["sdpa"] if auto or self.args.device == "cpu" else []
        return {"fastft": "auto"} | {f"fastft_{name}": name for name in (*others, *padded)}

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, among the pack's own."""
        return sum(n * (n + 1) // 2 for n in self.lengths)

    def shape(self) -> dict[str, int]:
        shape = {name: getattr(self.args, name) for name in ("sequences", "longest", "heads", "kv_heads", "head_size")}
        return {**shape, "tokens": sum(self.lengths)}


def with_gradients(function: Callable[..., torch.Tensor], inputs, seed) -> Callable[[], tuple[torch.Tensor, ...]]:
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run():
        out = function(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, seed))

    return run


def packed(args) -> common.Case:
    pack = Pack(args)
    sequences = PackedSequences(pack.lengths, device=args.device)

    def ours(q, k, v, choice):
        return packed_attention(LAYER, q, k, v, None, scaling=pack.scale, packed=sequences, choice=choice)[0]

    def padded(dtype):
        run = with_gradients(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=pack.scale, enable_gqa=True),
            [pack.pad(x).to(dtype) for x in pack.inputs],
            pack.pad(pack.seed.transpose(1, 2)).to(dtype),
        )
        return lambda: tuple(pack.unpad(x) for x in run())

    sequence = torch.repeat_interleave(torch.arange(args.sequences), torch.tensor(pack.lengths)).to(args.device)
    mask = (sequence[:, None] == sequence).tril()

    def masked(q, k, v):
        k, v = pack.expand(k), pack.expand(v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=pack.scale).transpose(1, 2)

    def by_token(run):
        """Outputs as [T, heads, D]: gradients of q, k and v come as [1, heads, T, D]."""

        def rows():
            out, *gradients = run()
            return (out[0], *(x[0].transpose(0, 1) for x in gradients))

        return rows

    implementations = {
        name: by_token(with_gradients(functools.partial(ours, choice=choice), pack.inputs, pack.seed))
        for name, choice in pack.choices().items()
    }
    implementations["padded"] = padded(pack.inputs[0].dtype)
    implementations["masked"] = by_token(with_gradients(masked, pack.inputs, pack.seed))
    elements = sum(x.numel() for x in pack.inputs) + pack.inputs[0].numel()
    return common.Case(
        name="attention of a pack forward+backward",
        shape=pack.shape(),
        implementations=implementations,
        reference=padded(torch.float32),
        bytes=3.0 * elements * pack.inputs[0].element_size(),
        flops=7 * 2.0 * args.heads * args.head_size * pack.pairs(),  # 2 products forward, 5 backward
    )


def prefixed(args) -> common.Case:
    pack = Pack(args)
    prefix = Prefix()
    prefix.put(0, *pack.context)
    sequences = PackedSequences(pack.lengths, prefixes=[(prefix, args.sequences)], device=args.device)

    @torch.no_grad()
    def ours(choice):
        out, _ = packed_attention(LAYER, *pack.inputs, None, scaling=pack.scale, packed=sequences, choice=choice)
        return (out[0],)

    q, *own = (pack.pad(x) for x in pack.inputs)
    shape = (args.sequences, args.kv_heads, args.context, args.head_size)
    k, v = (pack.expand(torch.cat([c.expand(shape), x], 2)) for c, x in zip(pack.context, own, strict=True))
    causal = torch.ones(args.longest, args.longest, dtype=torch.bool, device=args.device).tril()
    mask = F.pad(causal, (args.context, 0), value=True)

    @torch.no_grad()
    def expanded(dtype):
        inputs = (x.to(dtype) for x in (q, k, v))
        return (pack.unpad(F.scaled_dot_product_attention(*inputs, attn_mask=mask, scale=pack.scale)),)

    implementations = {name: functools.partial(ours, choice) for name, choice in pack.choices().items()}
    implementations["expanded"] = functools.partial(expanded, q.dtype)
    pairs = pack.pairs() + sum(pack.lengths) * args.context
    elements = 2 * pack.inputs[0].numel() + sum(x.numel() for x in (*pack.inputs[1:], *pack.context))
    return common.Case(
        name="attention behind a prefix forward",
        shape={**pack.shape(), "context": args.context},
        implementations=implementations,
        reference=functools.partial(expanded, torch.float32),
        bytes=float(elements * q.element_size()),
        flops=2 * 2.0 * args.heads * args.head_size * pairs,
    )


def with_(args, **values):
    return SimpleNamespace(**{**vars(args), **values})


if __name__ == "__main__":
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--model", default="smollm2-135m", choices=list(MODELS), help="whose heads")
    p.add_argument("--sequences", type=int, default=8)
    p.add_argument("--longest", type=int, nargs="+", default=[64], help="tokens of the longest sequence")
    p.add_argument("--context", type=int, nargs="+", default=[896], help="tokens of the prefix")
    args = p.parse_args()
    args.heads, args.kv_heads, args.head_size = MODELS[args.model]
    cases = []
    for longest in args.longest:
        cases += [functools.partial(packed, with_(args, longest=longest, context=0))]
        cases += [
            functools.partial(prefixed, with_(args, longest=longest, context=context)) for context in args.context
        ]
    sys.exit(common.main(args, cases))
